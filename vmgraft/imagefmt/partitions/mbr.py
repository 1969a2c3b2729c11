"""Master boot records and the chains of extended ones: UEFI 2.10, 5.2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vmgraft.imagefmt.partitions import _layout as layout
from vmgraft.imagefmt.partitions.model import Disk, Partition, Table, range_problems
from vmgraft.imagefmt.partitions.names import MBR_TYPES


class Mbr(Table):
    """A master boot record.

    Attributes:
        protective: Length in sectors of the entry that protects a GPT, or None where there is none.
    """

    def __init__(self, disk_id: str) -> None:
        super().__init__(disk_id=disk_id)
        self.protective: int | None = None


def read_mbr(disk: Disk) -> Mbr | None:
    """Return the disk's MBR, or None where there is none.

    A file system's boot sector ends with the same signature. It is told apart by its name, and by what stands where
    entries of a partition table begin.
    """
    raw = disk.read(0, layout.SECTOR_SIZE)
    if len(raw) < layout.SECTOR_SIZE or not raw.endswith(layout.MBR_SIGNATURE):
        return None
    record = layout.MBR.parse(raw)
    if any(entry.status not in layout.MBR_STATUS for entry in record.entries):
        return None
    used = [(number, entry) for number, entry in enumerate(record.entries, 1) if entry.count]
    if any(raw.startswith(name, offset) for offset, name in layout.BOOT_SECTORS) and not _plausible(disk, used):
        return None
    mbr = Mbr(f"0x{record.disk_id:08x}")
    for number, entry in used:
        mbr.partitions.append(_partition(number, entry, entry.start))
        if entry.type == layout.TYPE_PROTECTIVE and mbr.protective is None:
            mbr.protective = entry.count
    extended = [partition for partition in mbr.partitions if int(partition.type, 16) in layout.TYPES_EXTENDED]
    if mbr.protective is None:  # beside a protective entry nothing is followed, and it may cover everything
        mbr.problems += range_problems(mbr.partitions, disk)
        _read_logical(disk, mbr, extended)
    return mbr


def _plausible(disk: Disk, used: Sequence[tuple[int, Any]]) -> bool:
    sectors = disk.sectors(layout.SECTOR_SIZE)
    return bool(used) and all(entry.start and entry.start + entry.count <= sectors for _, entry in used)


def _partition(number: int, entry: Any, start: int) -> Partition:
    return Partition(
        number=number,
        start=start * layout.SECTOR_SIZE,
        size=entry.count * layout.SECTOR_SIZE,
        type=f"0x{entry.type:02x}",
        type_name=MBR_TYPES.get(entry.type, "unknown"),
        flags=("active",) if entry.status == layout.MBR_ACTIVE else (),
    )


def _read_logical(disk: Disk, mbr: Mbr, extended: list[Partition]) -> None:
    """Follow the chain of boot records of every extended partition, each record once."""
    logical: list[Partition] = []
    visited: set[int] = set()
    for outer in extended:
        base = outer.start // layout.SECTOR_SIZE
        place: int | None = base
        while place is not None:
            if len(visited) >= layout.MAX_CHAIN:
                mbr.problems.append(f"more than {layout.MAX_CHAIN} extended boot records: the rest is not followed")
                break
            if place in visited:
                mbr.problems.append(f"the chain of extended boot records comes back to sector {place}")
                break
            visited.add(place)
            place = _follow(disk, mbr, logical, base, place)
        _check_inside(mbr, outer, logical)
    mbr.problems += range_problems(logical, disk)
    mbr.partitions += logical


def _follow(disk: Disk, mbr: Mbr, logical: list[Partition], base: int, place: int) -> int | None:
    """Read the extended boot record at sector ``place``; return where the next one lies."""
    raw = disk.read(place * layout.SECTOR_SIZE, layout.SECTOR_SIZE)
    if len(raw) < layout.SECTOR_SIZE or not raw.endswith(layout.MBR_SIGNATURE):
        mbr.problems.append(f"sector {place} should hold an extended boot record and does not")
        return None
    following = None
    for entry in layout.MBR.parse(raw).entries[:2]:
        if entry.type in layout.TYPES_EXTENDED:
            following = base + entry.start if entry.start and following is None else following
        elif entry.type and entry.count:
            logical.append(_partition(layout.FIRST_LOGICAL + len(logical), entry, place + entry.start))
    return following


def _check_inside(mbr: Mbr, outer: Partition, logical: list[Partition]) -> None:
    mine = [item for item in logical if item.start >= outer.start]
    for partition in mine:
        if partition.start + partition.size > outer.start + outer.size:
            mbr.problems.append(
                f"logical partition {partition.number} reaches out of extended partition {outer.number}"
            )
