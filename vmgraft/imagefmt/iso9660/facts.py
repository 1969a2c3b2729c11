"""Facts about a volume for people and reports; bounded reads at fixed places, nothing of it is trusted."""

from __future__ import annotations

from typing import Any

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.iso9660 import _layout as layout
from vmgraft.imagefmt.iso9660.descriptors import VolumeDescriptors
from vmgraft.imagefmt.parse import parse_struct

#: El Torito 1.0, figure 2: platform of a validation entry or section header; 0xEF is UEFI 2.10, 13.3.2.1.
_PLATFORMS = {0: "x86", 1: "powerpc", 2: "mac", 0xEF: "efi"}
#: El Torito 1.0, figure 3: boot media type, low nibble.
_MEDIA = {0: "no-emulation", 1: "floppy-1.2M", 2: "floppy-1.44M", 3: "floppy-2.88M", 4: "hard-disk"}
_BOOTABLE = 0x88
_MORE_HEADERS = 0x90
_LAST_HEADER = 0x91
_EXTENSION = 0x44
#: ECMA-167, 2/9.1: volume structure descriptors that announce UDF, in the sectors behind the ISO 9660 ones.
_UDF_IDENTIFIERS = (b"NSR02", b"NSR03")
_UDF_SCAN = 16
#: IEEE P1281 (SUSP), 5.3: the SP entry that opens the system use area of the root's first record.
_SUSP_MARK = b"SP\x07\x01\xbe\xef"


def volume_facts(file: FlatFile, volume: VolumeDescriptors) -> dict[str, Any]:
    """Return JSON-able facts: identifiers, sizes, boot entries, and which hybrids the image is."""
    head = file.read(0, 1024)
    return {
        "volumeId": volume.texts["volume_id"],
        "identifiers": {name: text for name, text in volume.texts.items() if text},
        "created": volume.created,
        "volumeSize": volume.volume_space_size * layout.SECTOR_SIZE,
        "joliet": volume.joliet,
        "rockRidge": _SUSP_MARK in file.read(volume.root_sector * layout.SECTOR_SIZE, 256),
        "udf": _has_udf(file, volume),
        "isohybridMbr": head[510:512] == b"\x55\xaa",
        "isohybridGpt": head[512:520] == b"EFI PART",
        "elTorito": _boot_entries(file, volume),
    }


def _has_udf(file: FlatFile, volume: VolumeDescriptors) -> bool:
    start = layout.FIRST_DESCRIPTOR + volume.count
    return any(file.read((start + index) * layout.SECTOR_SIZE + 1, 5) in _UDF_IDENTIFIERS for index in range(_UDF_SCAN))


def _boot_entries(file: FlatFile, volume: VolumeDescriptors) -> list[dict[str, Any]]:
    """Return the boot catalogue's entries, or one entry that says why it cannot be read."""
    if volume.boot_catalog is None:
        return []
    offset = volume.boot_catalog * layout.SECTOR_SIZE
    catalog = file.read(offset, layout.SECTOR_SIZE)
    try:
        return _parse_catalog(file, catalog, offset)
    except MalformedImageError as problem:
        return [{"problem": str(problem)}]


def _parse_catalog(file: FlatFile, catalog: bytes, offset: int) -> list[dict[str, Any]]:
    validation = parse_struct(
        layout.VALIDATION_ENTRY, catalog, file=file.path, offset=offset, what="boot catalogue validation entry"
    )
    if validation.header != 1 or sum(catalog[i] | catalog[i + 1] << 8 for i in range(0, 32, 2)) & 0xFFFF:
        raise MalformedImageError(
            "the validation entry's checksum is wrong", file=file.path, offset=offset, field="boot catalogue"
        )
    platform = validation.platform
    entries: list[dict[str, Any]] = []
    for index in range(1, len(catalog) // layout.CATALOG_ENTRY_SIZE):
        start = index * layout.CATALOG_ENTRY_SIZE
        raw = catalog[start : start + layout.CATALOG_ENTRY_SIZE]
        if raw[0] in (_MORE_HEADERS, _LAST_HEADER):
            platform = raw[1]
        elif index == 1 or raw[0] == _BOOTABLE:
            entries.append(_entry(file, raw, offset + start, platform))
        elif raw[0] != _EXTENSION and not any(raw):
            break
    return entries


def _entry(file: FlatFile, raw: bytes, offset: int, platform: int) -> dict[str, Any]:
    entry = parse_struct(layout.BOOT_ENTRY, raw, file=file.path, offset=offset, what="boot entry")
    return {
        "platform": _PLATFORMS.get(platform, f"0x{platform:02x}"),
        "bootable": entry.indicator == _BOOTABLE,
        "media": _MEDIA.get(entry.media & 0x0F, f"0x{entry.media:02x}"),
        "sector": entry.lba,
        "count": entry.count,
    }
