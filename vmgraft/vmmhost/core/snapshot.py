"""A machine at rest as bytes, and back: CPU, memory, devices and what the guest changed on its disks.

::

    "VGFSNAP1"                      8 bytes
    length of the header            4 bytes, little-endian
    header                          JSON: the machine it is of, what it is bound to, and each section's name, length and
                                    SHA-256
    sections                        one after the other

A snapshot goes back only into a machine that is built the same way, on the same engine, and bound to the same things:
the caller says which, such as the digest of the image and of each extension. Hashes find damage; they are no signature.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Protocol

from vmgraft.errors import HostError
from vmgraft.vmmhost.core.disk import BLOCK, VerifiedDisk
from vmgraft.vmmhost.core.diskhook import HookedDisk
from vmgraft.vmmhost.core.drives import Disk
from vmgraft.vmmhost.core.memory import GuestRam
from vmgraft.vmmhost.core.state import State

MAGIC: Final = b"VGFSNAP1"
#: Longest header and longest device state, bytes; most sections.
HEADER_MAX: Final = 1 << 20
STATE_MAX: Final = 16 << 20
SECTIONS_MAX: Final = 256
#: Memory is kept in pieces of this size; those that are all zero are left out.
PIECE: Final = 1 << 16
_LENGTH: Final = struct.Struct("<I")
#: Number of a piece and length of its compressed bytes.
_PIECE: Final = struct.Struct("<QI")
_HINT: Final = "take a new one of this guest"


class Kept(Protocol):
    """What of a machine is kept."""

    ram: GuestRam

    def describe(self) -> State: ...  # noqa: D102
    def state(self) -> State: ...  # noqa: D102
    def set_state(self, state: State) -> None: ...  # noqa: D102
    def disks(self) -> tuple[Disk, ...]: ...  # noqa: D102


def _bad(what: str, **where: Any) -> HostError:
    return HostError(f"the snapshot {what}", hint=_HINT, **where)


# --- keeping ---------------------------------------------------------------------------------------------------------


def save(machine: Kept, bindings: Mapping[str, str], extra: Mapping[str, bytes]) -> bytes:
    """Return a snapshot of a machine at rest.

    Args:
        machine: The machine.
        bindings: What must be the same on the way back, name → digest.
        extra: Further sections, which :func:`load` gives back as they are.

    Raises:
        HostError: when the machine cannot be kept.
    """
    sections = {"state": json.dumps(machine.state()).encode(), "ram": b"".join(_memory(machine.ram))}
    for number, disk in enumerate(machine.disks()):
        sections[f"disk{number}"] = b"".join(_overlay(disk, number))
    sections |= {f"extra:{name}": data for name, data in extra.items()}
    header = {
        "machine": machine.describe(),
        "bindings": dict(bindings),
        "sections": [[name, len(data), hashlib.sha256(data).hexdigest()] for name, data in sections.items()],
    }
    encoded = json.dumps(header, sort_keys=True).encode()
    if len(encoded) > HEADER_MAX or len(sections) > SECTIONS_MAX or len(sections["state"]) > STATE_MAX:
        raise HostError("the machine has too many parts to keep")
    return b"".join((MAGIC, _LENGTH.pack(len(encoded)), encoded, *sections.values()))


def _packed(number: int, data: bytes) -> bytes:
    small = zlib.compress(data, 1)
    return _PIECE.pack(number, len(small)) + small


def _memory(ram: GuestRam) -> Iterator[bytes]:
    zero = bytes(PIECE)
    for start in range(0, ram.size, PIECE):
        data = ram.map[start : start + PIECE]
        if data != zero[: len(data)]:
            yield _packed(start // PIECE, data)


def _inner(disk: Disk, number: int) -> VerifiedDisk:
    while isinstance(disk, HookedDisk):
        disk = disk.inner
    if not isinstance(disk, VerifiedDisk):
        raise HostError(f"drive {number} cannot be kept: it is no plain verified disk", field=f"disk{number}")
    return disk


def _overlay(disk: Disk, number: int) -> Iterator[bytes]:
    for index, block in sorted(_inner(disk, number).overlay().items()):
        yield _packed(index, bytes(block))


# --- bringing back ---------------------------------------------------------------------------------------------------


def load(machine: Kept, data: bytes | bytearray | memoryview, bindings: Mapping[str, str]) -> dict[str, bytes]:
    """Bring a snapshot back into a machine that has not run; return the further sections.

    Steps: 1 layout and lengths; 2 the machine and what it is bound to; 3 the hash of each section; 4 disks, memory,
    devices and CPU. After an error in step 4 the machine must not be run.

    Raises:
        HostError: when the snapshot is damaged, or of another machine, image or extension.
    """
    header, body = _header(memoryview(data))  # 1
    if header.get("machine") != machine.describe():  # 2
        raise _bad("is of a machine that is built differently", field="machine")
    if header.get("bindings") != dict(bindings):
        raise _bad("is bound to another image or to other extensions", field="bindings")
    sections = _sections(header, body)  # 1, 3
    disks = machine.disks()
    wanted = {"state", "ram", *(f"disk{number}" for number in range(len(disks)))}
    extra = {name.removeprefix("extra:"): bytes(part) for name, part in sections.items() if name not in wanted}
    if not wanted <= sections.keys() or not all(name in wanted or name.startswith("extra:") for name in sections):
        raise _bad("lacks a section or has one too many", field="sections")
    for number, disk in enumerate(disks):  # 4
        size = (disk.size + BLOCK - 1) // BLOCK
        lengths = lambda index, disk=disk: min(BLOCK, disk.size - index * BLOCK)  # noqa: E731
        _inner(disk, number).set_overlay(dict(_pieces(sections[f"disk{number}"], f"disk{number}", size, lengths)))
    _set_memory(machine.ram, sections["ram"])
    machine.set_state(_json(sections["state"], STATE_MAX, "state"))
    return extra


def _json(raw: memoryview, limit: int, field: str) -> State:
    if len(raw) > limit:
        raise _bad("has a part that is too long", field=field)
    try:
        document = json.loads(bytes(raw))
    except (ValueError, RecursionError) as error:
        raise _bad("is damaged: no JSON", field=field) from error
    if type(document) is not dict:
        raise _bad("is damaged: no JSON object", field=field)
    return document


def _header(data: memoryview) -> tuple[State, memoryview]:
    start = len(MAGIC) + _LENGTH.size
    if len(data) < start or bytes(data[: len(MAGIC)]) != MAGIC:
        raise _bad("is none: it does not begin as one does", offset=0, field="magic")
    length = _LENGTH.unpack_from(data, len(MAGIC))[0]
    if length > HEADER_MAX or start + length > len(data):
        raise _bad("is cut short", offset=len(MAGIC), field="header")
    return _json(data[start : start + length], HEADER_MAX, "header"), data[start + length :]


def _sections(header: State, body: memoryview) -> dict[str, memoryview]:
    listed = header.get("sections")
    if type(listed) is not list or len(listed) > SECTIONS_MAX:
        raise _bad("is damaged: no list of sections", field="sections")
    found: dict[str, memoryview] = {}
    for item in listed:
        if type(item) is not list or [type(each) for each in item] != [str, int, str] or item[0] in found:
            raise _bad("is damaged: a section that makes no sense", field="sections")
        name, length, digest = item
        if not 0 <= length <= len(body):
            raise _bad("is cut short", field=name)
        found[name], body = body[:length], body[length:]
        if hashlib.sha256(found[name]).hexdigest() != digest:
            raise _bad("is damaged: a section's hash is another", field=name)
    if body:
        raise _bad("has bytes behind its end", field="sections")
    return found


def _pieces(
    raw: memoryview, field: str, count: int, length_of: Callable[[int], int]
) -> Iterator[tuple[int, bytearray]]:
    """Yield numbered pieces, in rising order, each of exactly the length it must have."""
    position, last = 0, -1
    while position < len(raw):
        if position + _PIECE.size > len(raw):
            raise _bad("is cut short", field=field, offset=position)
        number, small = _PIECE.unpack_from(raw, position)
        position += _PIECE.size
        if not last < number < count or position + small > len(raw):
            raise _bad("has a piece outside", field=field, offset=position)
        unpacker, length, last = zlib.decompressobj(), length_of(number), number
        try:
            data = unpacker.decompress(raw[position : position + small], length)
        except zlib.error as error:
            raise _bad("is damaged", field=field, offset=position) from error
        if len(data) != length or unpacker.unconsumed_tail or unpacker.unused_data:
            raise _bad("has a piece of another length", field=field, offset=position)
        yield number, bytearray(data)
        position += small


def _set_memory(ram: GuestRam, raw: memoryview) -> None:
    zero, expected = bytes(PIECE), 0
    count = (ram.size + PIECE - 1) // PIECE

    def clear(first: int, last: int) -> None:
        for number in range(first, last):
            start = number * PIECE
            length = min(PIECE, ram.size - start)
            if ram.map[start : start + length] != zero[:length]:
                ram.map[start : start + length] = zero[:length]

    for number, data in _pieces(raw, "ram", count, lambda index: min(PIECE, ram.size - index * PIECE)):
        clear(expected, number)
        ram.map[number * PIECE : number * PIECE + len(data)] = data
        expected = number + 1
    clear(expected, count)
    if ram.written is not None:
        ram.written(0, ram.size)
