"""The commands of a CD drive with a disc in it, as far as boot code and drivers ask (SPC-3, MMC-5)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmgraft.vmmhost.core.drives import Disk

CD_SECTOR: Final = 2048
GOOD, CHECK_CONDITION = 0, 2
#: Sense key and additional sense code.
_INVALID_COMMAND: Final = (5, 0x20)
_OUT_OF_RANGE: Final = (5, 0x21)
_INVALID_FIELD: Final = (5, 0x24)
#: Type 5 (CD), removable, SPC-3, response format 2, then vendor, product and revision.
_INQUIRY: Final = struct.pack(">BBBBB3s8s16s4s", 5, 0x80, 5, 2, 31, bytes(3), b"VMGRAFT ", b"CD-ROM".ljust(16), b"1   ")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command came to."""

    data: bytes = b""
    status: int = GOOD
    sense: bytes = b""


def _failed(reason: tuple[int, int]) -> Answer:
    key, code = reason
    sense = struct.pack(">BBBIBIBB4x", 0x70, 0, key, 0, 10, 0, code, 0)
    return Answer(b"", CHECK_CONDITION, sense)


class ScsiCd:
    """A drive that reads; every other change of the medium is refused.

    Args:
        disk: The disc's content; what is behind the last whole sector is not seen.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk, self._sectors = disk, disk.size // CD_SECTOR
        self._commands: dict[int, Callable[[bytes, int], Answer]] = {
            **dict.fromkeys((0x00, 0x1B, 0x1E, 0x2F, 0x35), lambda _command, _room: Answer()),
            0x03: lambda command, _room: Answer(bytes((0x70, 0, 0, 0, 0, 0, 0, 10, *bytes(10)))[: command[4]]),
            0x12: self._inquiry,
            0x25: lambda _command, _room: Answer(
                struct.pack(">II", min(max(0, self._sectors - 1), 0xFFFFFFFF), CD_SECTOR)
            ),
            0x28: lambda command, room: self._read(struct.unpack_from(">IxH", command, 2), room),
            0xA8: lambda command, room: self._read(struct.unpack_from(">II", command, 2), room),
            0x43: self._contents,
            0x4A: self._events,
            0xA0: lambda _command, _room: Answer(struct.pack(">I12x", 8)),
        }

    def execute(self, command: bytes, room: int) -> Answer:
        """Execute a command block of at least 16 bytes whose answer may have ``room`` bytes."""
        execute = self._commands.get(command[0])
        return _failed(_INVALID_COMMAND) if execute is None else execute(command, room)

    def _last(self) -> int:
        """Return the last sector's number, as far as 32 bits can tell."""
        return min(max(0, self._sectors - 1), 0xFFFFFFFF)

    def _inquiry(self, command: bytes, _room: int) -> Answer:
        if command[1] & 1:  # vital product data: none
            return _failed(_INVALID_FIELD)
        return Answer(_INQUIRY[: struct.unpack_from(">H", command, 3)[0]])

    def _read(self, sectors: tuple[int, ...], room: int) -> Answer:
        first, count = sectors
        if first + count > self._sectors:
            return _failed(_OUT_OF_RANGE)
        length = count * CD_SECTOR
        if length > room:
            return _failed(_INVALID_FIELD)
        return Answer(self._disk.read(first * CD_SECTOR, length))

    def _contents(self, command: bytes, _room: int) -> Answer:
        """READ TOC: one data track, and the lead-out behind it (format 0000b)."""
        if command[2] & 15 or command[9] >> 6:
            return _failed(_INVALID_FIELD)
        minutes = bool(command[1] & 2)
        entries = ((1, 0), (0xAA, self._sectors))
        table = b"".join(
            struct.pack(">BBBB4s", 0, 0x14, track, 0, _address(sector, minutes))
            for track, sector in entries
            if track >= command[6]
        )
        data = struct.pack(">HBB", len(table) + 2, 1, 1) + table
        return Answer(data[: struct.unpack_from(">H", command, 7)[0]])

    def _events(self, command: bytes, _room: int) -> Answer:
        """GET EVENT STATUS NOTIFICATION: nothing new, a medium is present."""
        if not command[1] & 1:
            return _failed(_INVALID_FIELD)
        return Answer(struct.pack(">HBBBBBB", 6, 0x04, 0x10, 0, 0x02, 0, 0))


def _address(sector: int, minutes: bool) -> bytes:
    """Return a disc address: a block number, or minute, second and frame at 75 frames a second from 00:02:00."""
    if not minutes:
        return struct.pack(">I", sector & 0xFFFFFFFF)
    seconds, frame = divmod(sector + 150, 75)
    return bytes((0, min(255, seconds // 60), seconds % 60, frame))
