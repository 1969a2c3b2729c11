"""Cylinders, heads, sectors: of hard disks by translation, of floppies by format, of emulated disks by their table."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from vmgraft.vmmhost.core.drives import Disk

SECTOR: Final = 512
#: What a 10-bit cylinder field of INT 13h can hold.
CYLINDERS_MAX: Final = 1024
SECTORS_PER_TRACK: Final = 63
PARTITION_TABLE: Final = 446
#: One entry: status, first CHS (head, sector, cylinder), type, last CHS, first LBA, sectors.
PARTITION: Final = struct.Struct("<B3sB3sII")
#: BIOS parameter block: bytes a sector at 11, sectors in all at 19, sectors a track and heads at 24 (FAT specification
#: 1.03, section 3.1).
_BPB: Final = struct.Struct("<11xH6xH3xHH")


@dataclass(frozen=True, slots=True)
class Geometry:
    """What CHS addresses are counted in."""

    cylinders: int
    heads: int
    sectors: int

    @property
    def total(self) -> int:
        """Sectors in all."""
        return self.cylinders * self.heads * self.sectors


@dataclass(frozen=True, slots=True)
class FloppyFormat:
    """One of the customary formats; ``drive_type`` is what INT 13h AH=08h tells in BL."""

    geometry: Geometry
    drive_type: int


_1200K: Final = FloppyFormat(Geometry(80, 2, 15), 2)
_1440K: Final = FloppyFormat(Geometry(80, 2, 18), 4)
_2880K: Final = FloppyFormat(Geometry(80, 2, 36), 6)
#: By ascending size: 160, 180, 320, 360, 720 KB, 1.2, 1.44, 1.68, 1.72 and 2.88 MB.
FLOPPY_FORMATS: Final = (
    FloppyFormat(Geometry(40, 1, 8), 1),
    FloppyFormat(Geometry(40, 1, 9), 1),
    FloppyFormat(Geometry(40, 2, 8), 1),
    FloppyFormat(Geometry(40, 2, 9), 1),
    FloppyFormat(Geometry(80, 2, 9), 3),
    _1200K,
    _1440K,
    FloppyFormat(Geometry(80, 2, 21), 4),
    FloppyFormat(Geometry(82, 2, 21), 4),
    _2880K,
)
#: The formats El Torito can emulate, by media type (El Torito 1.0, figure 3).
EL_TORITO_FLOPPIES: Final = {1: _1200K, 2: _1440K, 3: _2880K}
FLOPPY_MAX: Final = _2880K.geometry.total * SECTOR


def hard_disk_geometry(sectors: int) -> Geometry:
    """Return the usual LBA-assist translation at 63 sectors a track."""
    heads = next(
        (each for each in (16, 32, 64, 128) if sectors <= CYLINDERS_MAX * each * SECTORS_PER_TRACK),
        255,
    )
    return Geometry(
        max(1, min(CYLINDERS_MAX, sectors // (heads * SECTORS_PER_TRACK))),
        heads,
        SECTORS_PER_TRACK,
    )


def floppy_format(disk: Disk) -> FloppyFormat:
    """Return the format of a floppy image: by its BIOS parameter block, else the smallest that holds it."""
    sectors = -(-disk.size // SECTOR)
    by_size = next((each for each in FLOPPY_FORMATS if each.geometry.total >= sectors), FLOPPY_FORMATS[-1])
    if disk.size < SECTOR:
        return by_size
    sector_bytes, total, track, heads = _BPB.unpack(disk.read(0, _BPB.size))
    known = next(
        (each for each in FLOPPY_FORMATS if (each.geometry.sectors, each.geometry.heads) == (track, heads)
         and each.geometry.total == total),
        None,
    )  # fmt: skip
    return by_size if known is None or sector_bytes != SECTOR or sectors > total else known


def is_floppy(disk: Disk) -> bool:
    """Whether content looks like a floppy: one of the customary sizes, and no partition table that fits it."""
    if disk.size not in {each.geometry.total * SECTOR for each in FLOPPY_FORMATS}:
        return False
    return not partitions(disk.read(0, SECTOR), disk.size // SECTOR)


def partitions(sector: bytes, total: int) -> list[tuple[int, int, bytes]]:
    """Return (first LBA, sectors, last CHS) of the used entries of a partition table; nothing when it is none.

    Args:
        sector: A master boot record, 512 bytes.
        total: Sectors of the disk; a table with an entry that reaches beyond is none.
    """
    found = []
    for index in range(4):
        status, _first_chs, kind, last_chs, first, count = PARTITION.unpack_from(sector, PARTITION_TABLE + 16 * index)
        if status & 0x7F or (kind and (not count or first + count > total)):
            return []
        if kind:
            found.append((first, count, last_chs))
    return found


def table_geometry(last_chs: bytes, sectors: int) -> Geometry:
    """Return the geometry that the end of a partition implies, or the usual translation where it says nothing."""
    heads, track = last_chs[0] + 1, last_chs[1] & 0x3F
    if not track or heads > 255:
        return hard_disk_geometry(sectors)
    return Geometry(max(1, min(CYLINDERS_MAX, -(-sectors // (heads * track)))), heads, track)
