"""The messages between host and worker: one SOCK_SEQPACKET packet each, little-endian, both sides check everything.

A *call* goes from host to worker in a fixed-size packet. All else is a *frame*: a 16-byte header and at most 4096
bytes. While a call runs the worker may send requests under the call's sequence number; the first RESULT, ANSWER, TRAP
or FUEL ends it. Some calls carry data, up to 64 KiB in either direction: what is over 4096 bytes goes before, in full
DATA frames, the rest behind the call, or in the ANSWER.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

from vmgraft.errors import ExtensionFaultError
from vmgraft.vmmhost.layer.abi import (
    MAX_ACCESS_BYTES,
    MAX_BUFFER_BYTES,
    MAX_KEY_BYTES,
    MAX_LOG_BYTES,
    MAX_NAME_BYTES,
    MAX_VALUE_BYTES,
)
from vmgraft.vmmhost.layer.virtioshape import VirtioShape
from vmgraft.vmmhost.layer.windows import MAX_WINDOWS, Window, pack_windows, unpack_windows

MAX_PAYLOAD: Final = MAX_ACCESS_BYTES
MAX_TEXT: Final = 512
#: What a call may use fits into so many bytes (schema ``manifest``: at most 1e9).
FUEL_BYTES: Final = 4
#: Requests a worker may send during one call; more is a ``quota`` fault.
MAX_REQUESTS: Final = 65536

_FRAME: Final = struct.Struct("<BBHIQ")  # kind, flag, length, sequence, value
_RESULT: Final = struct.Struct("<BBHIQI")  # a frame, and the fuel used
_ACCESS: Final = struct.Struct("<BBHIQQQ16x")  # a call, without its arguments
_CALL: Final = struct.Struct("<BBHIQQQ4I")  # kind, size, zero, sequence, now, address, value, arguments
#: kind, length of the virtio device, grant, irqs, config, windows, module, memory, log, fuel, cpu, isolation, seed
_SETUP: Final = struct.Struct("<BBHHHHIIIQII32s")
#: Longest description of windows and of a virtio device.
_SHAPES_BYTES: Final = len(pack_windows([Window(0, 0)] * MAX_WINDOWS)) + 255

HEADER_BYTES: Final = _FRAME.size
CALL_BYTES: Final = _CALL.size
_RESULT_BYTES: Final = _RESULT.size
MAX_PACKET: Final = HEADER_BYTES + MAX_PAYLOAD
#: Receive buffers hold one byte more, so that a packet that is too long shows.
RECV_BYTES: Final = MAX_PACKET + 1
#: The same for a worker, to whom calls and its setup come with data.
WORKER_RECV_BYTES: Final = max(CALL_BYTES, _SETUP.size + _SHAPES_BYTES) + MAX_PAYLOAD + 1


class Kind(IntEnum):
    """First byte of every packet."""

    SETUP = 1
    MODULE = 2
    WINDOW = 3  # host → worker, with a descriptor: value the number of the window that it is the file of
    CALL_START = 0x10
    CALL_PIO_READ = 0x11
    CALL_PIO_WRITE = 0x12
    CALL_MMIO_READ = 0x13
    CALL_MMIO_WRITE = 0x14
    CALL_HYPERCALL = 0x15
    CALL_TICK = 0x16
    CALL_EVENT = 0x17
    CALL_SERVICE = 0x18  # size service, address and value its arguments, first of the others: room for the answer
    CALL_SNAPSHOT = 0x19  # first of the other arguments: room for the state
    CALL_RESTORE = 0x1A  # value: bytes of the state
    GUEST_DATA = 0x20  # host → worker: answers GUEST_READ
    GUEST_DONE = 0x21  # host → worker: answers GUEST_WRITE
    KV_DATA = 0x22  # host → worker: answers KV_GET; flag 1 and the value, or flag 0
    KV_DONE = 0x23  # host → worker: answers KV_PUT; flag 1 where it was kept
    DATA = 0x24  # both ways: value is the offset of the payload in the data of the call
    READY = 0x30  # worker → host: flag level, value hooks | mechanisms << 16 | fast << 63
    LOCKED = 0x32  # worker → host, its first packet: value mechanisms so far
    REFUSED = 0x31  # worker → host: flag `Refusal`, value offset + 1 or 0, payload message NUL field NUL hint
    RESULT = 0x40  # value: what the export returned; flag 1: it wrote into a mapped window; payload: 4 bytes, fuel used
    TRAP = 0x41  # payload: why
    FUEL = 0x42
    ANSWER = 0x43  # as RESULT; payload: the end of its data
    GUEST_READ = 0x50  # value gpa, length wanted, no payload
    GUEST_WRITE = 0x51  # value gpa, payload data
    LOG = 0x52
    STOP = 0x53
    SET_TICK = 0x54  # value nanoseconds
    IRQ = 0x55  # value line << 1 | level
    KV_GET = 0x56  # payload key
    KV_PUT = 0x57  # flag length of the key, payload key and value
    METRIC = 0x58  # value, payload name
    USED = 0x59  # value: fuel used, before an ANSWER


#: Members of an enumeration take longer to look up than to compare with.
_RESULT_KIND: Final = int(Kind.RESULT)
_DATA: Final = bytes((Kind.DATA,))


class Refusal(IntEnum):
    """Why a worker refuses a module."""

    MALFORMED = 1
    CAPABILITY = 2
    ENGINE = 3
    ISOLATION = 4


#: Largest payload of each frame kind that a worker may send.
_WORKER_PAYLOAD: Final = {
    Kind.READY: 0, Kind.LOCKED: 0, Kind.REFUSED: MAX_PAYLOAD, Kind.RESULT: FUEL_BYTES,
    Kind.TRAP: MAX_TEXT, Kind.FUEL: 0, Kind.GUEST_READ: 0,
    Kind.GUEST_WRITE: MAX_ACCESS_BYTES, Kind.LOG: MAX_LOG_BYTES, Kind.STOP: 0, Kind.SET_TICK: 0,
    Kind.DATA: MAX_PAYLOAD, Kind.ANSWER: MAX_PAYLOAD, Kind.IRQ: 0, Kind.KV_GET: MAX_KEY_BYTES,
    Kind.KV_PUT: MAX_KEY_BYTES + MAX_VALUE_BYTES, Kind.METRIC: MAX_NAME_BYTES, Kind.USED: 0,
}  # fmt: skip
_NEEDS_PAYLOAD: Final = frozenset({Kind.GUEST_WRITE, Kind.DATA, Kind.KV_GET, Kind.KV_PUT, Kind.METRIC})
_CALLS: Final = frozenset(kind for kind in Kind if kind.name.startswith("CALL_"))
_CALLS_WITH_DATA: Final = frozenset({Kind.CALL_SERVICE, Kind.CALL_RESTORE})
#: Where a call's first further argument is the room that its answer has.
_CALLS_WITH_ROOM: Final = frozenset({Kind.CALL_SERVICE, Kind.CALL_SNAPSHOT})


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
    data: bytes = b""

    @property
    def room(self) -> int:
        """Bytes of data that the answer may carry."""
        return min(self.args[0], MAX_BUFFER_BYTES) if self.kind in _CALLS_WITH_ROOM else 0


class Setup(NamedTuple):
    """What a worker is told first.

    ``cpu_seconds`` limits compilation, ``min_isolation`` is the level below which it does not even begin, ``seed`` keys
    the random generator, ``irqs`` has a bit for each interrupt line. A WINDOW packet follows for every mapped window.
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
    irqs: int = 0
    windows: tuple[Window, ...] = ()
    virtio: VirtioShape | None = None


def frame(
    kind: Kind, seq: int, value: int = 0, payload: bytes = b"", *, flag: int = 0, length: int | None = None
) -> bytes:
    """Build a frame; ``length`` differs from the payload's only in GUEST_READ."""
    return _FRAME.pack(kind, flag, len(payload) if length is None else length, seq, value) + payload


def call(message: Call) -> bytes:
    """Build a call; its data is what `data_frames` left over."""
    kind, size, seq, now, address, value, args, data = message
    return _CALL.pack(kind, size, 0, seq, now, address, value, *args) + data


def plain_call(  # noqa: PLR0917 - named arguments would cost what it is there to save
    kind: int, seq: int, now: int, address: int, size: int, value: int, args: tuple[int, int, int, int]
) -> bytes:
    """Build a call without data, as :func:`call` does, in one step: this is what an access of the guest waits for."""
    return _CALL.pack(kind, size, 0, seq, now, address, value, *args)


def result(seq: int, value: int, used: int, *, touched: bool) -> bytes:
    """Build a RESULT in one step."""
    return _RESULT.pack(_RESULT_KIND, touched, FUEL_BYTES, seq, value, used)


def plain_result(packet: bytes, seq: int) -> tuple[int, int, int] | None:
    """Return flag, value and fuel of a RESULT to call ``seq``; None for any other packet (`parse_worker_frame`)."""
    if len(packet) != _RESULT_BYTES:
        return None
    kind, flag, length, got, value, used = _RESULT.unpack(packet)
    return (flag, value, used) if kind == _RESULT_KIND and got == seq and length == FUEL_BYTES else None


def data_frames(seq: int, data: bytes) -> tuple[list[bytes], bytes]:
    """Cut the data of a call or an answer into the frames that go before, and the rest of at most 4096 bytes."""
    last = max(len(data) - 1, 0) // MAX_PAYLOAD * MAX_PAYLOAD
    frames = [frame(Kind.DATA, seq, at, data[at : at + MAX_PAYLOAD]) for at in range(0, last, MAX_PAYLOAD)]
    return frames, data[last:]


def setup(message: Setup) -> bytes:
    """Build the first packet of a worker's life."""
    windows, virtio = pack_windows(message.windows), b"" if message.virtio is None else message.virtio.pack()
    head = _SETUP.pack(
        Kind.SETUP, len(virtio), message.grant, message.irqs, len(message.config), len(windows), message.module_bytes,
        message.memory_mib, message.log_bytes, message.fuel, message.cpu_seconds, message.min_isolation, message.seed,
    )  # fmt: skip
    return head + virtio + windows + message.config


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
    elif (
        size != length
        or size > limit
        or (not size and kind in _NEEDS_PAYLOAD)
        or (kind == Kind.RESULT and 0 < size < limit)
        or (flag > 1 and kind == Kind.ANSWER)
    ):
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


def parse_value(packet: bytes, kind: Kind, seq: int) -> bytes | None:
    """Check the host's answer to KV_GET or KV_PUT, in the worker; None where it says no.

    Raises:
        ProtocolError: not the answer that was asked for.
    """
    if not HEADER_BYTES <= len(packet) <= MAX_PACKET:
        raise ProtocolError("an answer to no question")
    got, flag, length, answered, _value = _FRAME.unpack_from(packet)
    if (got, answered, length) != (kind, seq, len(packet) - HEADER_BYTES):
        raise ProtocolError("an answer to no question")
    return packet[HEADER_BYTES:] if flag else None


def is_data(packet: bytes) -> bool:
    """Say whether a packet from the host is data that goes before a call."""
    return packet[:1] == _DATA


def parse_data(packet: bytes, offset: int) -> bytes:
    """Check data that goes before a call, in the worker.

    Raises:
        ProtocolError: not the full frame that continues at ``offset``, or beyond the bound.
    """
    if len(packet) != MAX_PACKET or offset + MAX_PAYLOAD > MAX_BUFFER_BYTES:
        raise ProtocolError("data out of bounds")
    kind, _flag, length, _seq, value = _FRAME.unpack_from(packet)
    if (kind, length, value) != (Kind.DATA, MAX_PAYLOAD, offset):
        raise ProtocolError("data out of order")
    return packet[HEADER_BYTES:]


def parse_call(packet: bytes, before: bytes = b"") -> Call:
    """Check a call, in the worker.

    Args:
        packet: The call.
        before: Data that went before it.

    Raises:
        ProtocolError: wrong length, kind or size.
    """
    if len(packet) < CALL_BYTES:
        raise ProtocolError(f"a call of {len(packet)} bytes")
    kind, size, _zero, seq, now, address, value, a0, a1, a2, a3 = _CALL.unpack_from(packet)
    if kind not in _CALLS:
        raise ProtocolError(f"a call of kind 0x{kind:02x}")
    data = before + packet[CALL_BYTES:] if len(packet) > CALL_BYTES or before else b""
    if data and (kind not in _CALLS_WITH_DATA or len(data) > MAX_BUFFER_BYTES):
        raise ProtocolError(f"a call of kind 0x{kind:02x} with {len(data)} bytes of data")
    return Call(kind, size, seq, now, address, value, (a0, a1, a2, a3), data)


def parse_access(packet: bytes) -> tuple[int, int, int, int, int]:
    """Return size, sequence number, now, address and value of a call of CALL_BYTES bytes, whose kind is known."""
    _kind, size, _zero, seq, now, address, value = _ACCESS.unpack(packet)
    return size, seq, now, address, value


def parse_setup(packet: bytes) -> Setup:
    """Check the first packet, in the worker.

    Raises:
        ProtocolError: not a SETUP packet, or its lengths disagree.
    """
    if len(packet) < _SETUP.size:
        raise ProtocolError(f"a setup of {len(packet)} bytes")
    kind, shape, grant, irqs, config, places, module, *numbers, seed = _SETUP.unpack_from(packet)
    if kind != Kind.SETUP or len(packet) != _SETUP.size + shape + places + config:
        raise ProtocolError("a setup that is none")
    rest = packet[_SETUP.size :]
    try:
        virtio = VirtioShape.unpack(rest[:shape]) if shape else None
        windows = unpack_windows(rest[shape : shape + places])
    except ValueError as error:
        raise ProtocolError(f"a setup that is none: {error}") from error
    memory, log, fuel, cpu, isolation = numbers
    return Setup(
        grant, rest[shape + places :], module, memory, log, fuel, cpu, isolation, seed, irqs, windows, virtio
    )  # fmt: skip


def parse_window_packet(packet: bytes, number: int) -> None:
    """Check the packet that comes with a window's descriptor, in the worker.

    Raises:
        ProtocolError: it is not that of window ``number``.
    """
    if packet != frame(Kind.WINDOW, 0, number):
        raise ProtocolError("a window out of order")


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
