"""What the readers of the three kinds of tables hand to the one report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vmgraft.imagefmt.partitions._layout import ISO_MARK, ISO_MARK_OFFSET, MAX_LISTED

#: (offset, length) -> bytes of the disk, fewer at its end.
Reader = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk to be read. Sizes in bytes."""

    read: Reader
    size: int

    @property
    def is_iso(self) -> bool:
        """Whether it is an ISO 9660 image too: partitions of those lie over one another on purpose."""
        return self.read(ISO_MARK_OFFSET, len(ISO_MARK)) == ISO_MARK

    def sectors(self, sector_size: int) -> int:
        """Return how many whole sectors it has."""
        return self.size // sector_size


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition; ``start`` and ``size`` in bytes."""

    number: int
    start: int
    size: int
    type: str
    type_name: str
    name: str = ""
    id: str = ""
    flags: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "number": self.number,
            "start": self.start,
            "size": self.size,
            "type": self.type,
            "typeName": self.type_name,
            "name": self.name,
            "id": self.id,
            "flags": list(self.flags),
        }


@dataclass(slots=True)
class Table:
    """A partition table as read.

    Attributes:
        disk_id: GUID of a GPT, signature of an MBR, or an empty string.
        sector_size: Unit of its numbers, in bytes.
        partitions: In the order of the table.
        problems: What is wrong with it, a sentence each.
    """

    disk_id: str = ""
    sector_size: int = 512
    partitions: list[Partition] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without the problems."""
        return {
            "diskId": self.disk_id,
            "partitions": [partition.to_dict() for partition in self.partitions[:MAX_LISTED]],
        }


def range_problems(partitions: Iterable[Partition], disk: Disk) -> list[str]:
    """Return what is wrong with where partitions lie: behind the end of the disk, or over one another.

    Args:
        partitions: Those that may not overlap; no extended ones.
        disk: The disk they are on.
    """
    may_overlap = disk.is_iso
    problems = []
    last: Partition | None = None
    for partition in sorted(partitions, key=lambda item: (item.start, item.size)):
        if partition.start + partition.size > disk.size:
            problems.append(f"partition {partition.number} reaches behind the end of the disk")
        if last is not None and not may_overlap and partition.start < last.start + last.size:
            problems.append(f"partitions {last.number} and {partition.number} overlap")
        if last is None or partition.start + partition.size > last.start + last.size:
            last = partition
    return problems


def printable(text: str) -> str:
    """Return text up to its first NUL, with what cannot be shown replaced."""
    return "".join(char if char.isprintable() else "?" for char in text.split("\0", 1)[0])
