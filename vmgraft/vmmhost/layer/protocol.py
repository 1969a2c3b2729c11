"""The messages between host and worker: one SOCK_SEQPACKET packet each, little-endian, both sides check everything.

A *call* goes from host to worker in a fixed-size packet. All else is a *frame*: a 16-byte header and at most 4096
bytes. While a call runs the worker may send requests under the call's sequence number; the first RESULT, TRAP or FUEL
ends it.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from vmgraft.errors import ExtensionFaultError
from vmgraft.vmmhost.layer.abi import MAX_ACCESS_BYTES, MAX_LOG_BYTES

MAX_PAYLOAD: Final = MAX_ACCESS_BYTES
MAX_TEXT: Final = 512
#: Requests a worker may send during one call; more is a ``quota`` fault.
MAX_REQUESTS: Final = 65536

_FRAME: Final = struct.Struct("<BBHIQ")  # kind, flag, length, sequence, value
_CALL: Final = struct.Struct("<BBHIQQQ4I")  # kind, size, zero, sequence, now, address, value, arguments
#: kind, grant, config, module, memory, log, fuel, cpu, isolation, seed
_SETUP: Final = struct.Struct("<BBHIIIQII32s")

HEADER_BYTES: Final = _FRAME.size
CALL_BYTES: Final = _CALL.size
MAX_PACKET: Final = HEADER_BYTES + MAX_PAYLOAD
#: Receive buffers hold one byte more, so that a packet that is too long shows.
RECV_BYTES: Final = MAX_PACKET + 1


class Kind(IntEnum):
    """First byte of every packet."""

    SETUP = 1
    MODULE = 2
    CALL_START = 0x10
    CALL_PIO_READ = 0x11
    CALL_PIO_WRITE = 0x12
    CALL_MMIO_READ = 0x13
    CALL_MMIO_WRITE = 0x14
    CALL_HYPERCALL = 0x15
    CALL_TICK = 0x16
    CALL_EVENT = 0x17
    GUEST_DATA = 0x20  # host → worker: answers GUEST_READ
    GUEST_DONE = 0x21  # host → worker: answers GUEST_WRITE
    READY = 0x30  # worker → host: flag level, value hooks | mechanisms << 16 | fast << 63
    REFUSED = 0x31  # worker → host: flag `Refusal`, value offset + 1 or 0, payload message NUL field NUL hint
    RESULT = 0x40  # value: what the export returned
    TRAP = 0x41  # payload: why
    FUEL = 0x42
    GUEST_READ = 0x50  # value gpa, length wanted, no payload
    GUEST_WRITE = 0x51  # value gpa, payload data
    LOG = 0x52
    STOP = 0x53
    SET_TICK = 0x54  # value nanoseconds


class Refusal(IntEnum):
    """Why a worker refuses a module."""

    MALFORMED = 1
    CAPABILITY = 2
    ENGINE = 3
    ISOLATION = 4


#: Largest payload of each frame kind that a worker may send.
_WORKER_PAYLOAD: Final = {
    Kind.READY: 0, Kind.REFUSED: MAX_PAYLOAD, Kind.RESULT: 0, Kind.TRAP: MAX_TEXT, Kind.FUEL: 0, Kind.GUEST_READ: 0,
    Kind.GUEST_WRITE: MAX_ACCESS_BYTES, Kind.LOG: MAX_LOG_BYTES, Kind.STOP: 0, Kind.SET_TICK: 0,
}  # fmt: skip
_NEEDS_PAYLOAD: Final = frozenset({Kind.GUEST_WRITE})
_CALLS: Final = frozenset(kind for kind in Kind if kind.name.startswith("CALL_"))


class ProtocolError(ExtensionFaultError):
    """A packet breaks the protocol."""


class Frame(NamedTuple):
    """A checked frame."""

    kind: int
    flag: int
    length: int
    seq: int
    value: int
    payload: bytes


class Call(NamedTuple):
    """A checked call: ``address`` is a port, a GPA or a hypercall number."""

    kind: int
    size: int
    seq: int
    now: int
    address: int
    value: int
    args: tuple[int, int, int, int]


class Setup(NamedTuple):
    """What a worker is told first.

    ``cpu_seconds`` limits compilation, ``min_isolation`` is the level below which it does not even begin, ``seed`` keys
    the random generator.
    """

    grant: int
    config: bytes
    module_bytes: int
    memory_mib: int
    log_bytes: int
    fuel: int
    cpu_seconds: int
    min_isolation: int
    seed: bytes


def frame(
    kind: Kind, seq: int, value: int = 0, payload: bytes = b"", *, flag: int = 0, length: int | None = None
) -> bytes:
    """Build a frame; ``length`` differs from the payload's only in GUEST_READ."""
    return _FRAME.pack(kind, flag, len(payload) if length is None else length, seq, value) + payload


def call(message: Call) -> bytes:
    """Build a call."""
    kind, size, seq, now, address, value, args = message
    return _CALL.pack(kind, size, 0, seq, now, address, value, *args)


def setup(message: Setup) -> bytes:
    """Build the first packet of a worker's life."""
    head = _SETUP.pack(
        Kind.SETUP, message.grant, len(message.config), message.module_bytes, message.memory_mib, message.log_bytes,
        message.fuel, message.cpu_seconds, message.min_isolation, message.seed,
    )  # fmt: skip
    return head + message.config


def parse_worker_frame(packet: bytes, seq: int) -> Frame:
    """Check a packet from a worker, which is not trusted.

    Raises:
        ProtocolError: wrong length, unknown kind, wrong sequence number or a field out of range.
    """
    if len(packet) < HEADER_BYTES:
        raise ProtocolError(f"a packet of {len(packet)} bytes")
    kind, flag, length, got, value = _FRAME.unpack_from(packet)
    limit = _WORKER_PAYLOAD.get(kind)
    if limit is None:
        raise ProtocolError(f"a packet of kind 0x{kind:02x}")
    if got != seq:
        raise ProtocolError(f"sequence number {got} in call {seq}")
    size = len(packet) - HEADER_BYTES
    if kind == Kind.GUEST_READ:
        if size or not 1 <= length <= MAX_ACCESS_BYTES:
            raise ProtocolError(f"a guest read of {length} bytes")
    elif size != length or size > limit or (not size and kind in _NEEDS_PAYLOAD):
        raise ProtocolError(f"a {Kind(kind).name} packet of {size} bytes that says {length}")
    return Frame(kind, flag, length, got, value, packet[HEADER_BYTES:])


def parse_answer(packet: bytes, kind: Kind, seq: int, length: int) -> bytes:
    """Check the host's answer to a request, in the worker.

    Raises:
        ProtocolError: not the answer that was asked for.
    """
    if len(packet) != HEADER_BYTES + length or _FRAME.unpack_from(packet)[::3] != (kind, seq):
        raise ProtocolError("an answer to no question")
    return packet[HEADER_BYTES:]


def parse_call(packet: bytes) -> Call:
    """Check a call, in the worker.

    Raises:
        ProtocolError: wrong length, kind or size.
    """
    if len(packet) != CALL_BYTES:
        raise ProtocolError(f"a call of {len(packet)} bytes")
    kind, size, _zero, seq, now, address, value, a0, a1, a2, a3 = _CALL.unpack(packet)
    if kind not in _CALLS:
        raise ProtocolError(f"a call of kind 0x{kind:02x}")
    return Call(kind, size, seq, now, address, value, (a0, a1, a2, a3))


def parse_setup(packet: bytes) -> Setup:
    """Check the first packet, in the worker.

    Raises:
        ProtocolError: not a SETUP packet, or its lengths disagree.
    """
    if len(packet) < _SETUP.size:
        raise ProtocolError(f"a setup of {len(packet)} bytes")
    kind, grant, config, module, memory, log, fuel, cpu, isolation, seed = _SETUP.unpack_from(packet)
    if kind != Kind.SETUP or len(packet) != _SETUP.size + config:
        raise ProtocolError("a setup that is none")
    return Setup(grant, packet[_SETUP.size :], module, memory, log, fuel, cpu, isolation, seed)


def module_packets(module: bytes) -> list[bytes]:
    """Cut a module into packets."""
    return [frame(Kind.MODULE, 0, at, module[at : at + MAX_PAYLOAD]) for at in range(0, len(module), MAX_PAYLOAD)]


def parse_module_packet(packet: bytes, offset: int) -> bytes:
    """Check one packet of a module, in the worker, and return its bytes.

    Raises:
        ProtocolError: not the packet that continues at ``offset``.
    """
    if len(packet) <= HEADER_BYTES:
        raise ProtocolError("an empty module packet")
    kind, _flag, length, seq, value = _FRAME.unpack_from(packet)
    if (kind, seq, value, length) != (Kind.MODULE, 0, offset, len(packet) - HEADER_BYTES):
        raise ProtocolError("a module packet out of order")
    return packet[HEADER_BYTES:]
