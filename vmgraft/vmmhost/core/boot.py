"""Finding what to boot: a master boot record, or an El Torito no-emulation entry."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from vmgraft.errors import NotBootableError
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.memory import CONVENTIONAL_END

HARD_DISK: Final = 0x80
CDROM: Final = 0xE0
SECTOR: Final = 512
CD_SECTOR: Final = 2048
MBR_ADDRESS: Final = 0x7C00
MBR_SIGNATURE: Final = b"\x55\xaa"
#: Lowest address a boot program may be loaded to: above vector table, BIOS data area and the ROM's stack.
LOAD_MIN: Final = 0x600

# El Torito 1.0: boot record volume descriptor (figure 7), validation and initial entry (figures 2 and 3).
_VOLUME_DESCRIPTORS: Final = 16
_BOOT_RECORD_SECTOR: Final = 17
_BOOT_RECORD: Final = struct.Struct("<B5sB32s32sI")
_BOOT_SYSTEM: Final = b"EL TORITO SPECIFICATION"
_VALIDATION: Final = struct.Struct("<BBH24sHBB")
_INITIAL: Final = struct.Struct("<BBHBBHI20x")
_CATALOGUE_ENTRY: Final = 32
_BOOTABLE: Final = 0x88
_PLATFORM_X86: Final = 0
_DEFAULT_SEGMENT: Final = 0x7C0


class BootSource(StrEnum):
    """Where the guest starts from."""

    AUTO = "auto"
    DISK = "disk"
    CDROM = "cdrom"


@dataclass(frozen=True, slots=True)
class BootPlan:
    """What INT 19h does.

    Attributes:
        drive: BIOS number of the drive booted from, the only one the guest has.
        sector_size: Bytes a sector of that drive has for INT 13h.
        source_offset: Byte offset of the boot program in the guest content.
        size: Its length in bytes.
        address: Guest-physical address to load it to.
        segment: Code segment to enter with.
        ip: Instruction pointer to enter with.
        media: El Torito media byte; 0 for disks.
    """

    drive: int
    sector_size: int
    source_offset: int
    size: int
    address: int
    segment: int
    ip: int
    media: int = 0


def find_boot(disk: VerifiedDisk, source: BootSource) -> BootPlan:
    """Return what to boot from ``disk``.

    ``AUTO`` takes the CD entry of an ISO 9660 image that has a bootable one, else the master boot record.

    Raises:
        NotBootableError: when there is nothing this host can boot.
        ContentMismatchError: when the content is not what was verified.
    """
    if source is BootSource.DISK or (source is BootSource.AUTO and not _has_boot_record(disk)):
        return _mbr(disk)
    try:
        return _el_torito(disk)
    except NotBootableError as error:
        if source is BootSource.CDROM:
            raise
        return _mbr_instead(disk, error)


def _mbr_instead(disk: VerifiedDisk, cause: NotBootableError) -> BootPlan:
    """Take the disk side of a hybrid image whose CD side does not boot; without one, the CD's error stands."""
    try:
        return _mbr(disk)
    except NotBootableError:
        raise cause from None


def _mbr(disk: VerifiedDisk) -> BootPlan:
    sector = disk.read(0, min(SECTOR, disk.size))
    if len(sector) < SECTOR or sector[-2:] != MBR_SIGNATURE:
        hint = "the first sector must end in 55 AA; is this a data disk, or one for UEFI only?"
        raise NotBootableError("no boot signature in the first sector", offset=SECTOR - 2, field="MBR", hint=hint)
    if not any(sector[:440]):
        hint = "a partition table alone does not boot; the disk may be one for UEFI only"
        raise NotBootableError("the boot code area of the first sector is empty", offset=0, field="MBR", hint=hint)
    return BootPlan(HARD_DISK, SECTOR, 0, SECTOR, MBR_ADDRESS, 0, MBR_ADDRESS)


def _has_boot_record(disk: VerifiedDisk) -> bool:
    start = _VOLUME_DESCRIPTORS * CD_SECTOR
    if disk.size < (_BOOT_RECORD_SECTOR + 1) * CD_SECTOR or disk.read(start + 1, 5) != b"CD001":
        return False
    return _boot_record(disk) is not None


def _boot_record(disk: VerifiedDisk) -> int | None:
    """Return the sector of the boot catalogue, or None without an El Torito boot record."""
    raw = disk.read(_BOOT_RECORD_SECTOR * CD_SECTOR, _BOOT_RECORD.size)
    kind, ident, _version, system, _boot_id, catalogue = _BOOT_RECORD.unpack(raw)
    if kind != 0 or ident != b"CD001" or system.rstrip(b"\0 ") != _BOOT_SYSTEM:
        return None
    return int(catalogue)


def _el_torito(disk: VerifiedDisk) -> BootPlan:
    if not _has_boot_record(disk):
        hint = "boot from the disk side (--boot disk), or take an image made with an El Torito boot entry"
        offset = _BOOT_RECORD_SECTOR * CD_SECTOR
        raise NotBootableError("no El Torito boot record", offset=offset, field="boot record", hint=hint)
    offset = (_boot_record(disk) or 0) * CD_SECTOR
    if offset + 2 * _CATALOGUE_ENTRY > disk.size:
        hint = "the image is truncated or its boot record damaged"
        raise NotBootableError("the boot catalogue lies outside the image", offset=offset, field="catalogue", hint=hint)
    catalogue = disk.read(offset, 2 * _CATALOGUE_ENTRY)
    _check_validation(catalogue[:_CATALOGUE_ENTRY], offset)
    return _initial_entry(disk, catalogue[_CATALOGUE_ENTRY:], offset + _CATALOGUE_ENTRY)


def _check_validation(raw: bytes, offset: int) -> None:
    header, platform, _reserved, _ident, _checksum, key_55, key_aa = _VALIDATION.unpack(raw)
    if header != 1 or (key_55, key_aa) != (0x55, 0xAA) or sum(struct.unpack("<16H", raw)) & 0xFFFF:
        hint = "the image is damaged"
        raise NotBootableError(
            "the boot catalogue's validation entry is wrong", offset=offset, field="catalogue", hint=hint
        )
    if platform != _PLATFORM_X86:
        hint = "this host boots BIOS entries; the first one here is for another platform"
        raise NotBootableError(f"boot platform {platform:#x} is not x86", offset=offset, field="platform", hint=hint)


def _initial_entry(disk: VerifiedDisk, raw: bytes, offset: int) -> BootPlan:
    indicator, media, segment, _system, _unused, count, sector = _INITIAL.unpack(raw)
    if indicator != _BOOTABLE:
        raise NotBootableError("the default boot entry is not bootable", offset=offset, field="boot indicator")
    if media & 0x0F:
        hint = "floppy and hard-disk emulation are not offered; try --boot disk"
        message = f"boot media type {media & 15} is not no-emulation"
        raise NotBootableError(message, offset=offset, field="media", hint=hint)
    segment = segment or _DEFAULT_SEGMENT
    address, size = segment << 4, count * SECTOR
    if not size or address < LOAD_MIN or address + size > CONVENTIONAL_END:
        hint = f"a boot program must fit between {LOAD_MIN:#x} and {CONVENTIONAL_END:#x}"
        message = f"{count} sectors at segment {segment:#x} do not fit into conventional memory"
        raise NotBootableError(message, offset=offset, field="sector count", hint=hint)
    start = sector * CD_SECTOR
    if start + size > disk.size:
        message = f"the boot program at sector {sector} lies outside the image"
        raise NotBootableError(message, offset=offset, field="load RBA", hint="the image is truncated or damaged")
    # Entered as segment:0 by the letter; as 0000:7C00 by custom when that is the same address.
    entry = (0, address) if address == MBR_ADDRESS else (segment, 0)
    return BootPlan(CDROM, CD_SECTOR, start, size, address, entry[0], entry[1], media)
