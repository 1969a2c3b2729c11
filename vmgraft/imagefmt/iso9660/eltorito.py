"""The El Torito boot catalogue, for people and reports: "El Torito" Bootable CD-ROM Format Specification 1.0."""

from __future__ import annotations

from typing import Any

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.iso9660 import _layout as layout
from vmgraft.imagefmt.parse import parse_struct

#: Figure 2: platform of a validation entry or section header; 0xEF is UEFI 2.10, 13.3.2.1.
_PLATFORMS = {0: "x86", 1: "powerpc", 2: "mac", 0xEF: "efi"}
#: Figure 3: boot media type, low nibble.
_MEDIA = {0: "no-emulation", 1: "floppy-1.2M", 2: "floppy-1.44M", 3: "floppy-2.88M", 4: "hard-disk"}
_BOOTABLE = 0x88
_MORE_HEADERS = 0x90
_LAST_HEADER = 0x91
_EXTENSION = 0x44


def boot_entries(file: FlatFile, catalog_sector: int | None) -> list[dict[str, Any]]:
    """Return the boot catalogue's entries, or one entry that says why it cannot be read.

    Only the first sector of a catalogue is read: it holds 63 entries.

    Args:
        file: The image.
        catalog_sector: Where the boot record says that the catalogue is.
    """
    if catalog_sector is None:
        return []
    offset = catalog_sector * layout.SECTOR_SIZE
    try:
        return _parse(file, file.read(offset, layout.SECTOR_SIZE), offset)
    except MalformedImageError as problem:
        return [{"problem": str(problem)}]


def _parse(file: FlatFile, catalog: bytes, offset: int) -> list[dict[str, Any]]:
    validation = parse_struct(
        layout.VALIDATION_ENTRY, catalog, file=file.path, offset=offset, what="boot catalogue validation entry"
    )
    if validation.header != 1 or sum(catalog[i] | catalog[i + 1] << 8 for i in range(0, 32, 2)) & 0xFFFF:
        raise MalformedImageError(
            "the validation entry's checksum is wrong", file=file.path, offset=offset, field="boot catalogue"
        )
    platform, name = validation.platform, _text(validation.id)
    entries: list[dict[str, Any]] = []
    for index in range(1, len(catalog) // layout.CATALOG_ENTRY_SIZE):
        start = index * layout.CATALOG_ENTRY_SIZE
        raw = catalog[start : start + layout.CATALOG_ENTRY_SIZE]
        if raw[0] in (_MORE_HEADERS, _LAST_HEADER):
            header = layout.SECTION_HEADER.parse(raw)
            platform, name = header.platform, _text(header.id)
        elif index == 1 or raw[0] == _BOOTABLE:
            entries.append(_entry(file, raw, offset + start, platform, name))
        elif raw[0] != _EXTENSION and not any(raw):
            break
    return entries


def _entry(file: FlatFile, raw: bytes, offset: int, platform: int, name: str) -> dict[str, Any]:
    entry = parse_struct(layout.BOOT_ENTRY, raw, file=file.path, offset=offset, what="boot entry")
    start = entry.lba * layout.SECTOR_SIZE
    return {
        "platform": _PLATFORMS.get(platform, f"0x{platform:02x}"),
        "id": name,
        "bootable": entry.indicator == _BOOTABLE,
        "media": _MEDIA.get(entry.media & 0x0F, f"0x{entry.media:02x}"),
        "loadSegment": entry.segment,
        "systemType": entry.system,
        "sector": entry.lba,
        "count": entry.count,
        "inFile": 0 < start < file.size,
        "bootInfoTable": _has_boot_info(file, start, entry.lba),
        "grub2BootInfo": _has_grub_info(file, start, entry.lba),
    }


def _has_boot_info(file: FlatFile, start: int, lba: int) -> bool:
    raw = file.read(start + layout.BOOT_INFO_OFFSET, layout.BOOT_INFO.sizeof())
    if len(raw) < layout.BOOT_INFO.sizeof():
        return False
    info = layout.BOOT_INFO.parse(raw)
    return bool(info.descriptor == layout.FIRST_DESCRIPTOR and info.image == lba)


def _has_grub_info(file: FlatFile, start: int, lba: int) -> bool:
    raw = file.read(start + layout.GRUB_INFO_OFFSET, layout.GRUB_INFO.sizeof())
    # GRUB goes on behind the first sector of 2048 bytes, at its second piece of 512.
    return len(raw) == layout.GRUB_INFO.sizeof() and bool(layout.GRUB_INFO.parse(raw).sector == lba * 4 + 5)


def _text(raw: bytes) -> str:
    text = raw.split(b"\0", 1)[0].decode("ascii", "replace").strip()
    return "".join(char if char.isprintable() else "?" for char in text)
