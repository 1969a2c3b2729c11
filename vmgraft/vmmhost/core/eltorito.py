"""The boot entry of a CD: "El Torito" Bootable CD-ROM Format Specification, version 1.0."""

from __future__ import annotations

import struct
from typing import Final

from vmgraft.errors import NotBootableError
from vmgraft.vmmhost.core.bootplan import (
    CD_SECTOR,
    CDROM,
    FLOPPY,
    HARD_DISK,
    LOAD_MIN,
    MBR_ADDRESS,
    MBR_SIGNATURE,
    BootPlan,
    Emulation,
)
from vmgraft.vmmhost.core.drives import Disk
from vmgraft.vmmhost.core.geometry import EL_TORITO_FLOPPIES, SECTOR, partitions, table_geometry
from vmgraft.vmmhost.core.memory import CONVENTIONAL_END

# Boot record volume descriptor (figure 7), validation and initial entry (figures 2 and 3).
_VOLUME_DESCRIPTORS: Final = 16
_BOOT_RECORD_SECTOR: Final = 17
_BOOT_RECORD: Final = struct.Struct("<B5sB32s32sI")
_BOOT_SYSTEM: Final = b"EL TORITO SPECIFICATION"
_VALIDATION: Final = struct.Struct("<BBH24sHBB")
_INITIAL: Final = struct.Struct("<BBHBBHI20x")
_ENTRY: Final = 32
_BOOTABLE: Final = 0x88
_PLATFORM_X86: Final = 0
_DEFAULT_SEGMENT: Final = 0x7C0
_NO_EMULATION: Final = 0
_HARD_DISK: Final = 4


def is_iso(disk: Disk) -> bool:
    """Whether content is an ISO 9660 volume with room for a boot record."""
    start = _VOLUME_DESCRIPTORS * CD_SECTOR
    return disk.size >= (_BOOT_RECORD_SECTOR + 1) * CD_SECTOR and disk.read(start + 1, 5) == b"CD001"


def has_boot_record(disk: Disk) -> bool:
    """Whether content is an ISO 9660 volume with an El Torito boot record."""
    return is_iso(disk) and _catalogue_sector(disk) is not None


def _catalogue_sector(disk: Disk) -> int | None:
    """Return the sector of the boot catalogue, or None without an El Torito boot record."""
    raw = disk.read(_BOOT_RECORD_SECTOR * CD_SECTOR, _BOOT_RECORD.size)
    kind, ident, _version, system, _boot_id, catalogue = _BOOT_RECORD.unpack(raw)
    if kind != 0 or ident != b"CD001" or system.rstrip(b"\0 ") != _BOOT_SYSTEM:
        return None
    return int(catalogue)


def find_entry(disk: Disk) -> BootPlan:
    """Return what the default entry of the boot catalogue says.

    Raises:
        NotBootableError: when there is none, or it is damaged or not for this machine.
    """
    if not has_boot_record(disk):
        hint = "boot from the disk side (--boot disk), or take an image made with an El Torito boot entry"
        offset = _BOOT_RECORD_SECTOR * CD_SECTOR
        raise NotBootableError("no El Torito boot record", offset=offset, field="boot record", hint=hint)
    offset = (_catalogue_sector(disk) or 0) * CD_SECTOR
    if offset + 2 * _ENTRY > disk.size:
        hint = "the image is truncated or its boot record damaged"
        raise NotBootableError("the boot catalogue lies outside the image", offset=offset, field="catalogue", hint=hint)
    catalogue = disk.read(offset, 2 * _ENTRY)
    _check_validation(catalogue[:_ENTRY], offset)
    return _initial_entry(disk, catalogue[_ENTRY:], offset + _ENTRY)


def _check_validation(raw: bytes, offset: int) -> None:
    header, platform, _reserved, _ident, _checksum, key_55, key_aa = _VALIDATION.unpack(raw)
    if header != 1 or (key_55, key_aa) != (0x55, 0xAA) or sum(struct.unpack("<16H", raw)) & 0xFFFF:
        message = "the boot catalogue's validation entry is wrong"
        raise NotBootableError(message, offset=offset, field="catalogue", hint="the image is damaged")
    if platform != _PLATFORM_X86:
        hint = "this host boots BIOS entries; the first one here is for another platform"
        raise NotBootableError(f"boot platform {platform:#x} is not x86", offset=offset, field="platform", hint=hint)


def _initial_entry(disk: Disk, raw: bytes, offset: int) -> BootPlan:
    indicator, media, segment, _system, _unused, count, sector = _INITIAL.unpack(raw)
    if indicator != _BOOTABLE:
        hint = "try --boot disk"
        raise NotBootableError(
            "the default boot entry is not bootable", offset=offset, field="boot indicator", hint=hint
        )
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
    emulated = _emulation(disk, media & 0x0F, start, offset)
    drive = CDROM if emulated is None else FLOPPY if emulated.floppy_type else HARD_DISK
    return BootPlan(drive, CD_SECTOR, start, size, address, entry[0], entry[1], media, emulated)


def _emulation(disk: Disk, media: int, start: int, offset: int) -> Emulation | None:
    """Return the drive to emulate for a media type; None for no emulation."""
    if media == _NO_EMULATION:
        return None
    if media == _HARD_DISK:
        return _hard_disk(disk, start, offset)
    form = EL_TORITO_FLOPPIES.get(media)
    if form is None:
        hint = "known are 0 to 4; try --boot disk"
        raise NotBootableError(f"boot media type {media} is unknown", offset=offset, field="media", hint=hint)
    size = form.geometry.total * SECTOR
    if start + size > disk.size:
        message = f"the floppy of {size} bytes reaches beyond the end of the image"
        raise NotBootableError(message, offset=start, field="media", hint="the image is truncated or damaged")
    return Emulation(start, size, form.geometry, form.drive_type)


def _hard_disk(disk: Disk, start: int, offset: int) -> Emulation:
    """Return the hard disk whose image begins at ``start``; its partition table tells how long it is."""
    record = disk.read(start, SECTOR)
    found = partitions(record, (disk.size - start) // SECTOR) if record[-2:] == MBR_SIGNATURE else []
    if len(found) != 1:
        hint = "its master boot record must hold one partition, inside the image"
        message = "the hard disk to emulate has no usable partition table"
        raise NotBootableError(message, offset=start, field="partition table", hint=hint)
    first, count, last_chs = found[0]
    sectors = first + count
    return Emulation(start, sectors * SECTOR, table_geometry(last_chs, sectors))
