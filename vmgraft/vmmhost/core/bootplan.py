"""What INT 19h does: the boot program, where it goes, and what the boot medium is to the guest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmgraft.vmmhost.core.drives import DriveKind
from vmgraft.vmmhost.core.geometry import Geometry

FLOPPY: Final = 0x00
HARD_DISK: Final = 0x80
CDROM: Final = 0xE0
CD_SECTOR: Final = 2048
MBR_ADDRESS: Final = 0x7C00
MBR_SIGNATURE: Final = b"\x55\xaa"
#: Lowest address a boot program may be loaded to: above vector table, BIOS data area and the ROM's stack.
LOAD_MIN: Final = 0x600


@dataclass(frozen=True, slots=True)
class Emulation:
    """A drive that a CD shows instead of itself while its boot program runs (El Torito 1.0, section 1.5).

    Attributes:
        offset: Byte offset of its image in the guest content.
        size: Length of the image in bytes.
        geometry: What CHS addresses are counted in.
        floppy_type: BIOS type of the emulated floppy drive; 0 for a hard disk.
    """

    offset: int
    size: int
    geometry: Geometry
    floppy_type: int = 0


@dataclass(frozen=True, slots=True)
class BootPlan:
    """What INT 19h does.

    Attributes:
        drive: BIOS number of the drive booted from, which the boot program finds in DL.
        sector_size: Bytes a sector of the boot medium has for INT 13h.
        source_offset: Byte offset of the boot program in the guest content.
        size: Its length in bytes.
        address: Guest-physical address to load it to.
        segment: Code segment to enter with.
        ip: Instruction pointer to enter with.
        media: El Torito media byte; 0 for disks.
        emulated: The drive that the CD emulates, if it does.
    """

    drive: int
    sector_size: int
    source_offset: int
    size: int
    address: int
    segment: int
    ip: int
    media: int = 0
    emulated: Emulation | None = None

    @property
    def medium(self) -> DriveKind:
        """What the guest content is: a hard disk, a CD or a floppy."""
        if self.drive == CDROM or self.emulated is not None:
            return DriveKind.CDROM
        return DriveKind.HARD_DISK if self.drive & HARD_DISK else DriveKind.FLOPPY
