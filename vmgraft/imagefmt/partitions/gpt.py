"""GUID partition tables, both copies: UEFI 2.10, 5.3."""

from __future__ import annotations

from typing import Any
from uuid import UUID
from zlib import crc32

from construct import ConstructError

from vmgraft.imagefmt.partitions import _layout as layout
from vmgraft.imagefmt.partitions.model import Disk, Partition, Table, printable, range_problems
from vmgraft.imagefmt.partitions.names import GPT_TYPES, gpt_flags

_UNUSED = bytes(16)


class Gpt(Table):
    """A GUID partition table.

    Attributes:
        primary: Whether there is something of its primary copy.
    """

    primary: bool = True


class Copy:
    """One of the two copies of a GPT.

    Attributes:
        header: Its header, or None where it cannot be used.
        entries: Its entry array, or None where it cannot be used.
        problem: Why not.
    """

    def __init__(self, disk: Disk, lba: int, sector_size: int) -> None:
        self.lba = lba
        self.header: Any = None
        self.entries: bytes | None = None
        raw = disk.read(lba * sector_size, sector_size) if 0 < lba < disk.sectors(sector_size) else b""
        self.found = raw.startswith(layout.GPT_SIGNATURE)
        self.problem = self._parse(disk, raw, sector_size) if self.found else "is missing"

    def _parse(self, disk: Disk, raw: bytes, sector_size: int) -> str:
        try:
            header = layout.GPT_HEADER.parse(raw)
        except ConstructError:
            return "ends too early"
        if not layout.GPT_HEADER_SIZE <= header.header_size <= len(raw):
            return f"states a length of {header.header_size} bytes"
        counted = bytearray(raw[: header.header_size])
        counted[layout.GPT_CRC_FIELD] = bytes(4)
        if crc32(counted) != header.header_crc:
            return "has a wrong CRC"
        if header.revision != layout.GPT_REVISION:
            return f"has the unknown revision 0x{header.revision:08x}"
        if header.my_lba != self.lba:
            return f"says that it is at LBA {header.my_lba}"
        self.header = header
        return self._read_entries(disk, sector_size)

    def _read_entries(self, disk: Disk, sector_size: int) -> str:
        size, count = self.header.entry_size, self.header.entry_count
        if not layout.GPT_ENTRY_SIZE <= size <= layout.MAX_ENTRY_SIZE or size % 8:
            return f"states entries of {size} bytes"
        if size * count > layout.MAX_ENTRY_ARRAY:
            return f"states {count} entries of {size} bytes, too many to read"
        if not 0 < self.header.entries_lba < disk.sectors(sector_size):
            return f"puts its entries at LBA {self.header.entries_lba}, outside the disk"
        data = disk.read(self.header.entries_lba * sector_size, size * count)
        if len(data) != size * count or crc32(data) != self.header.entries_crc:
            return "has entries with a wrong CRC"
        self.entries = data
        return ""

    @property
    def usable(self) -> bool:
        """Whether header and entries are sound."""
        return self.entries is not None


def read_gpt(disk: Disk, *, protected: bool) -> Gpt | None:
    """Return the disk's GPT from the better of its two copies, or None where there is no sign of one.

    Args:
        disk: The disk.
        protected: Whether an MBR announces a GPT.
    """
    sector_size, primary = _primary(disk)
    place = primary.header.alternate_lba if primary.header is not None else None
    backup = Copy(disk, disk.sectors(sector_size) - 1, sector_size)
    if not backup.usable and place is not None and place != backup.lba:
        backup = Copy(disk, place, sector_size)
    if not primary.found and not backup.usable:
        other = _other(sector_size)
        backup = Copy(disk, disk.sectors(other) - 1, other)
        sector_size = other if backup.usable else sector_size
    if not primary.found and not (backup.usable or protected):
        return None
    table = Gpt(sector_size=sector_size)
    table.primary = primary.found
    table.problems = _problems(disk, primary, backup, sector_size)
    best = primary if primary.usable else backup
    if best.usable:
        _fill(table, disk, best)
    return table


def _primary(disk: Disk) -> tuple[int, Copy]:
    """Return the sector size and the copy at LBA 1 of that size: the sound one, if only one is."""
    copies = [(size, Copy(disk, 1, size)) for size in (layout.SECTOR_SIZE, layout.LARGE_SECTOR_SIZE)]
    for wanted in ("usable", "header", "found"):
        for size, copy in copies:
            if getattr(copy, wanted):
                return size, copy
    return copies[0]


def _other(sector_size: int) -> int:
    return layout.LARGE_SECTOR_SIZE if sector_size == layout.SECTOR_SIZE else layout.SECTOR_SIZE


def _problems(disk: Disk, primary: Copy, backup: Copy, sector_size: int) -> list[str]:
    copies = (("primary", primary), ("backup", backup))
    problems = [f"the {name} GPT {copy.problem}" for name, copy in copies if copy.problem]
    if primary.header is None:
        return problems
    last, place = disk.sectors(sector_size) - 1, primary.header.alternate_lba
    if place > last:
        problems.append(f"the disk is {(place - last) * sector_size} bytes shorter than its GPT says")
    elif place < last:
        problems.append(f"the backup GPT lies {(last - place) * sector_size} bytes before the end of the disk")
    if backup.lba == last and place != last and backup.usable:
        problems.append("another backup GPT stands at the end of the disk")
    if primary.usable and backup.usable and _differ(primary, backup):
        problems.append("the two copies of the GPT differ")
    return problems


def _differ(primary: Copy, backup: Copy) -> bool:
    names = ("disk_guid", "first_usable", "last_usable", "entry_count", "entry_size", "entries_crc")
    return any(primary.header[name] != backup.header[name] for name in names)


def _fill(table: Gpt, disk: Disk, copy: Copy) -> None:
    header, entries, unit = copy.header, copy.entries or b"", table.sector_size
    table.disk_id = _guid(header.disk_guid)
    if not header.first_usable <= header.last_usable:
        table.problems.append(f"the usable range ends at LBA {header.last_usable}, before it begins")
    seen: set[bytes] = set()
    for number in range(1, header.entry_count + 1):
        start = (number - 1) * header.entry_size
        kind, unique, first, last, attributes, name = layout.GPT_ENTRY.unpack_from(entries, start)
        if kind == _UNUSED:
            continue
        if last < first:
            table.problems.append(f"partition {number} ends before it begins")
        elif first < header.first_usable or last > header.last_usable:
            table.problems.append(f"partition {number} reaches out of the usable range")
        if unique in seen:
            table.problems.append(f"partition {number} has the GUID of another one")
        seen.add(unique)
        table.partitions.append(
            Partition(
                number=number,
                start=first * unit,
                size=max(0, last - first + 1) * unit,
                type=_guid(kind),
                type_name=GPT_TYPES.get(_guid(kind), "unknown"),
                name=printable(name.decode("utf-16-le", "replace")),
                id=_guid(unique),
                flags=tuple(gpt_flags(attributes)),
            )
        )
    table.problems += range_problems([item for item in table.partitions if item.size], disk)


def _guid(raw: bytes) -> str:
    return str(UUID(bytes_le=raw)).upper()
