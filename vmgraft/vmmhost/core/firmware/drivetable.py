"""Which drive answers to which number of INT 13h, and what an El Torito emulation does to the numbers."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vmgraft.errors import UsageError
from vmgraft.vmmhost.core.bootplan import CD_SECTOR, CDROM, FLOPPY, HARD_DISK, BootPlan, Emulation
from vmgraft.vmmhost.core.devices.cmos import Cmos
from vmgraft.vmmhost.core.drives import Disk, Drive, DriveKind, PartOfDisk
from vmgraft.vmmhost.core.firmware.call import BiosData
from vmgraft.vmmhost.core.geometry import SECTOR, Geometry, floppy_format, hard_disk_geometry
from vmgraft.vmmhost.core.memory import GuestRam

#: First number of each kind, and how many there can be: the equipment word counts four floppies; the rest by custom.
_FIRST: Final = {DriveKind.FLOPPY: FLOPPY, DriveKind.HARD_DISK: HARD_DISK, DriveKind.CDROM: CDROM}
_MOST: Final = {DriveKind.FLOPPY: 4, DriveKind.HARD_DISK: 24, DriveKind.CDROM: 8}
#: Diskette parameters (vector 1Eh): the ROM's table is for 18 sectors a track; others get one in the extended BIOS data
#: area. Steps, DMA, motor ticks, bytes a sector (2 = 512), sectors a track, gap, data length, format gap, fill, times.
_PARAMETERS: Final = struct.Struct("<11B")
_PARAMETERS_AT: Final = 0x9FC20
_ROM_TRACK: Final = 18
_VECTOR_1E: Final = 0x1E * 4
#: Equipment word: bit 0 says there are floppies, bits 6 and 7 how many, less one.
_EQUIPMENT_FLOPPIES: Final = 0x00C1


@dataclass(frozen=True, slots=True)
class BiosDrive:
    """One drive as INT 13h knows it."""

    disk: Disk
    kind: DriveKind
    read_only: bool
    geometry: Geometry
    floppy_type: int = 0

    @property
    def sector_size(self) -> int:
        """Bytes a sector."""
        return CD_SECTOR if self.kind is DriveKind.CDROM else SECTOR

    @property
    def sectors(self) -> int:
        """How many of them are there."""
        return self.disk.size // self.sector_size


def _as_drive(drive: Drive) -> BiosDrive:
    if drive.kind is DriveKind.FLOPPY:
        form = floppy_format(drive.disk)
        return BiosDrive(drive.disk, drive.kind, drive.read_only, form.geometry, form.drive_type)
    read_only = drive.read_only or drive.kind is DriveKind.CDROM
    return BiosDrive(drive.disk, drive.kind, read_only, hard_disk_geometry(drive.disk.size // SECTOR))


def _as_emulated(disk: Disk, plan: Emulation) -> BiosDrive:
    kind = DriveKind.FLOPPY if plan.floppy_type else DriveKind.HARD_DISK
    part = PartOfDisk(disk, plan.offset, plan.size)
    return BiosDrive(part, kind, read_only=True, geometry=plan.geometry, floppy_type=plan.floppy_type)


class DriveTable:
    """The drives of a machine: the boot medium is the first of its kind, an emulated drive goes before it.

    Args:
        disk: The boot medium.
        plan: What it is, and what it emulates.
        drives: The others, in the order of their numbers.
        read_only: Whether the boot medium refuses writes, beyond what its kind says.

    Raises:
        UsageError: when there are more drives of a kind than it has numbers.
    """

    def __init__(self, disk: Disk, plan: BootPlan, drives: Sequence[Drive] = (), *, read_only: bool = False) -> None:
        boot = Drive(disk, plan.medium, read_only, "boot medium")
        self._real = [_as_drive(drive) for drive in (boot, *drives)]
        self.emulated = None if plan.emulated is None else _as_emulated(disk, plan.emulated)
        for kind, most in _MOST.items():
            count = len(list(self._of_kind(kind)))
            if count > most:
                raise UsageError(f"{count} drives of kind {kind.value}, but numbers for {most}")
        self._numbers = self._numbered()

    def find(self, number: int) -> BiosDrive | None:
        """Return the drive with a number, or None."""
        return self._numbers.get(number)

    def count(self, kind: DriveKind) -> int:
        """Return how many drives of a kind the guest sees."""
        return sum(drive.kind is kind for drive in self._numbers.values())

    def end_emulation(self) -> None:
        """Take the emulated drive away; those that it had pushed up get their numbers back."""
        self.emulated = None
        self._numbers = self._numbered()

    def _of_kind(self, kind: DriveKind) -> Iterable[BiosDrive]:
        first = () if self.emulated is None else (self.emulated,)
        return (drive for drive in (*first, *self._real) if drive.kind is kind)

    def _numbered(self) -> dict[int, BiosDrive]:
        kinds = _FIRST.items()
        return {first + index: drive for kind, first in kinds for index, drive in enumerate(self._of_kind(kind))}

    def describe(self, ram: GuestRam, cmos: Cmos) -> None:
        """Tell BIOS data area and CMOS which drives there are, and the diskette parameters how long a track is."""
        floppies = self.count(DriveKind.FLOPPY)
        equipment = ram.get(BiosData.EQUIPMENT, 2) & ~_EQUIPMENT_FLOPPIES
        equipment |= 1 | (floppies - 1) << 6 if floppies else 0
        ram.put(BiosData.EQUIPMENT, 2, equipment)
        types = [drive.floppy_type for drive in map(self.find, (FLOPPY, FLOPPY + 1)) if drive is not None]
        cmos.set_floppies(types, equipment & 0xFF)
        ram.put(BiosData.DISKS, 1, self.count(DriveKind.HARD_DISK))
        first = self.find(FLOPPY)
        if first is not None and first.geometry.sectors != _ROM_TRACK:
            track = first.geometry.sectors
            ram.write(_PARAMETERS_AT, _PARAMETERS.pack(0xAF, 2, 0x25, 2, track, 0x1B, 0xFF, 0x6C, 0xF6, 0x0F, 8))
            ram.put(_VECTOR_1E, 4, (_PARAMETERS_AT - 0x20) >> 4 << 16 | 0x20)
