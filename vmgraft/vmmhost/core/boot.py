"""Finding what to boot: a master boot record, a floppy's boot sector or an El Torito entry; and what drive it is."""

from __future__ import annotations

from enum import StrEnum

from vmgraft.errors import NotBootableError
from vmgraft.vmmhost.core import eltorito
from vmgraft.vmmhost.core.bootplan import (
    CD_SECTOR,
    CDROM,
    FLOPPY,
    HARD_DISK,
    MBR_ADDRESS,
    MBR_SIGNATURE,
    BootPlan,
    Emulation,
)
from vmgraft.vmmhost.core.drives import Disk
from vmgraft.vmmhost.core.geometry import FLOPPY_MAX, SECTOR, is_floppy

__all__ = ["CDROM", "FLOPPY", "HARD_DISK", "BootPlan", "BootSource", "Emulation", "drive_only", "find_boot"]


class BootSource(StrEnum):
    """Where the guest starts from."""

    AUTO = "auto"
    DISK = "disk"
    CDROM = "cdrom"
    FLOPPY = "floppy"


def find_boot(disk: Disk, source: BootSource) -> BootPlan:
    """Return what to boot from ``disk``.

    ``AUTO`` takes the CD entry of an ISO 9660 image that has a bootable one; else the boot sector, of a floppy where
    the content has the size of one and no partition table, of a hard disk otherwise.

    Raises:
        NotBootableError: when there is nothing this host can boot.
        ContentMismatchError: when the content is not what was verified.
    """
    if source is BootSource.FLOPPY:
        return _floppy(disk)
    if source is BootSource.DISK or (source is BootSource.AUTO and not eltorito.has_boot_record(disk)):
        return _floppy(disk) if source is BootSource.AUTO and is_floppy(disk) else _mbr(disk)
    try:
        return eltorito.find_entry(disk)
    except NotBootableError as error:
        if source is BootSource.CDROM:
            raise
        return _mbr_instead(disk, error)


def drive_only(disk: Disk, source: BootSource) -> BootPlan:
    """Return a plan that says which drive ``disk`` is, and boots nothing of it: the kernel comes from elsewhere."""
    if source is BootSource.AUTO:
        if eltorito.is_iso(disk):
            source = BootSource.CDROM
        else:
            source = BootSource.FLOPPY if is_floppy(disk) else BootSource.DISK
    drive = {BootSource.CDROM: CDROM, BootSource.FLOPPY: FLOPPY}.get(source, HARD_DISK)
    return BootPlan(drive, CD_SECTOR if drive == CDROM else SECTOR, 0, 0, MBR_ADDRESS, 0, MBR_ADDRESS)


def _mbr_instead(disk: Disk, cause: NotBootableError) -> BootPlan:
    """Take the disk side of a hybrid image whose CD side does not boot; without one, the CD's error stands."""
    try:
        return _mbr(disk)
    except NotBootableError:
        raise cause from None


def _boot_sector(disk: Disk, field: str) -> bytes:
    sector = disk.read(0, min(SECTOR, disk.size))
    if len(sector) < SECTOR or sector[-2:] != MBR_SIGNATURE:
        hint = "the first sector must end in 55 AA; is this a data disk, or one for UEFI only?"
        raise NotBootableError("no boot signature in the first sector", offset=SECTOR - 2, field=field, hint=hint)
    return sector


def _mbr(disk: Disk) -> BootPlan:
    if not any(_boot_sector(disk, "MBR")[:440]):
        hint = "a partition table alone does not boot; the disk may be one for UEFI only"
        raise NotBootableError("the boot code area of the first sector is empty", offset=0, field="MBR", hint=hint)
    return BootPlan(HARD_DISK, SECTOR, 0, SECTOR, MBR_ADDRESS, 0, MBR_ADDRESS)


def _floppy(disk: Disk) -> BootPlan:
    if disk.size > FLOPPY_MAX:
        message = f"an image of {disk.size} bytes is no floppy"
        raise NotBootableError(message, field="size", hint=f"a floppy holds at most {FLOPPY_MAX} bytes")
    if not any(_boot_sector(disk, "boot sector")[:-2]):
        hint = "this floppy was not made to be booted"
        raise NotBootableError("the boot sector is empty", offset=0, field="boot sector", hint=hint)
    return BootPlan(FLOPPY, SECTOR, 0, SECTOR, MBR_ADDRESS, 0, MBR_ADDRESS)
