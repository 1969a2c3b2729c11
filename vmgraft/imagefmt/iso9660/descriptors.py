"""A strict reader of the volume descriptor set. It never walks directories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from construct import Container

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.iso9660 import _layout as layout
from vmgraft.imagefmt.parse import parse_struct


@dataclass(frozen=True, slots=True)
class VolumeDescriptors:
    """What the descriptors say.

    Attributes:
        volume_space_size: Length of the volume in logical blocks of 2048 bytes.
        boot_catalog: Sector of the El Torito boot catalogue, or None.
        joliet_level: Level of the first supplementary descriptor with a Joliet escape sequence, 1 to 3, or None.
        kinds: What the descriptors are, in order, terminator included.
        texts: System, volume, set, publisher, preparer and application identifiers, padding removed.
        root_sector: First sector of the root directory.
        created: Creation date and time as ``YYYYMMDDhhmmss`` digits, or an empty string.
    """

    volume_space_size: int
    boot_catalog: int | None
    joliet_level: int | None
    kinds: tuple[str, ...]
    texts: dict[str, str]
    root_sector: int
    created: str

    @property
    def size(self) -> int:
        """Length of the volume in bytes."""
        return self.volume_space_size * layout.SECTOR_SIZE


#: Joliet Specification, "SVD Escape Sequences field": UCS-2 levels 1 to 3, at byte 88 of the descriptor.
_JOLIET_LEVELS = {b"%/@": 1, b"%/C": 2, b"%/E": 3}
_JOLIET_OFFSET = 88
#: ECMA-119 (4th edition), 8.5.1: version 2 makes a supplementary descriptor an enhanced one, "ISO 9660:1999", level 4.
_ENHANCED = 2
_KINDS = {
    layout.TYPE_BOOT: "boot",
    layout.TYPE_PRIMARY: "primary",
    layout.TYPE_SUPPLEMENTARY: "supplementary",
    layout.TYPE_PARTITION: "partition",
    layout.TYPE_TERMINATOR: "terminator",
}
_TEXT_FIELDS = ("system_id", "volume_id", "volume_set_id", "publisher_id", "preparer_id", "application_id")


def read_descriptors(file: FlatFile) -> VolumeDescriptors:
    """Read the volume descriptor set.

    Raises:
        MalformedImageError: when it has no end, several primaries, or numbers that contradict each other or the file.
    """
    primary: Container[Any] | None = None
    boot_catalog: int | None = None
    joliet: int | None = None
    kinds: list[str] = []
    for index in range(layout.MAX_DESCRIPTORS):
        offset = (layout.FIRST_DESCRIPTOR + index) * layout.SECTOR_SIZE
        data = file.read(offset, layout.SECTOR_SIZE)
        header = _header(file, data, offset, index)
        kinds.append(_kind(header, data))
        if header.type == layout.TYPE_TERMINATOR:
            break
        if header.type == layout.TYPE_PRIMARY:
            if primary is not None:
                raise _malformed(file, "more than one primary volume descriptor", offset, "type")
            primary = _primary(file, data, offset)
        elif header.type == layout.TYPE_BOOT and data.startswith(layout.EL_TORITO_ID, layout.EL_TORITO_ID_OFFSET):
            start = layout.EL_TORITO_CATALOG_OFFSET
            boot_catalog = int.from_bytes(data[start : start + 4], "little") if boot_catalog is None else boot_catalog
        elif header.type == layout.TYPE_SUPPLEMENTARY:
            level = _JOLIET_LEVELS.get(data[_JOLIET_OFFSET : _JOLIET_OFFSET + 3])
            joliet = level if joliet is None else joliet
    else:
        raise _malformed(file, f"no terminator within {layout.MAX_DESCRIPTORS} volume descriptors", offset, "type")
    if primary is None:
        raise _malformed(file, "no primary volume descriptor", layout.FIRST_DESCRIPTOR * layout.SECTOR_SIZE, "type")
    return VolumeDescriptors(
        volume_space_size=primary.volume_space_size,
        boot_catalog=boot_catalog,
        joliet_level=joliet,
        kinds=tuple(kinds),
        texts={name: _text(primary[name]) for name in _TEXT_FIELDS},
        root_sector=int.from_bytes(primary.root_record[2:6], "little"),
        created=_digits(primary.creation_date),
    )


def _header(file: FlatFile, data: bytes, offset: int, index: int) -> Container[Any]:
    header = parse_struct(layout.DESCRIPTOR_HEADER, data, file=file.path, offset=offset, what="volume descriptor")
    if len(data) < layout.SECTOR_SIZE:
        raise _malformed(file, "the file ends inside a volume descriptor", offset, "volume descriptor")
    # The locator's place is fixed, so the primary descriptor must be the first one (ECMA-119, 6.7.1).
    if index == 0 and header.type != layout.TYPE_PRIMARY:
        raise _malformed(file, f"the first volume descriptor has type {header.type}, not 1", offset, "type")
    return header


def _kind(header: Container[Any], data: bytes) -> str:
    """Return what a descriptor is, in words."""
    if header.type == layout.TYPE_BOOT and data.startswith(layout.EL_TORITO_ID, layout.EL_TORITO_ID_OFFSET):
        return "el-torito"
    if header.type == layout.TYPE_SUPPLEMENTARY and header.version == _ENHANCED:
        return "enhanced"
    if header.type == layout.TYPE_SUPPLEMENTARY and data[_JOLIET_OFFSET : _JOLIET_OFFSET + 3] in _JOLIET_LEVELS:
        return "joliet"
    return _KINDS.get(header.type, f"type-{header.type}")


def _primary(file: FlatFile, data: bytes, offset: int) -> Container[Any]:
    what = "primary volume descriptor"
    primary = parse_struct(layout.PRIMARY_DESCRIPTOR, data, file=file.path, offset=offset, what=what)
    if primary.version != 1:
        raise _malformed(file, f"{what} of version {primary.version}", offset, "version")
    for name in layout.BOTH_ENDIAN:
        if primary[name] != primary[f"{name}_be"]:
            message = f"little-endian {primary[name]} and big-endian {primary[f'{name}_be']} differ"
            raise _malformed(file, message, offset, name)
    if primary.logical_block_size != layout.SECTOR_SIZE:
        message = f"logical blocks of {primary.logical_block_size} bytes; only {layout.SECTOR_SIZE} is supported"
        raise _malformed(file, message, offset, "logical_block_size")
    if primary.volume_space_size <= layout.FIRST_DESCRIPTOR + 1:
        message = f"a volume of {primary.volume_space_size} blocks cannot hold its own descriptors"
        raise _malformed(file, message, offset, "volume_space_size")
    if primary.volume_space_size * layout.SECTOR_SIZE > file.size:
        message = (
            f"the volume of {primary.volume_space_size * layout.SECTOR_SIZE} bytes is larger than the file"
            f" of {file.size} bytes"
        )
        root = int.from_bytes(primary.root_record[2:6], "little") * layout.SECTOR_SIZE
        hint = "the image was cut off: get a complete copy"
        if root >= file.size:
            hint = "this is a later session of a disc without the ones before it: get a copy of the whole disc"
        raise _malformed(file, message, offset, "volume_space_size", hint)
    return primary


def _malformed(file: FlatFile, message: str, offset: int, field: str, hint: str | None = None) -> MalformedImageError:
    return MalformedImageError(message, file=file.path, offset=offset, field=field, hint=hint)


def _text(raw: bytes) -> str:
    text = raw.decode("ascii", "replace").strip(" \0")
    return "".join(char if char.isprintable() else "?" for char in text)


def _digits(raw: bytes) -> str:
    text = raw[:14]
    return text.decode("ascii") if text.isdigit() and text.strip(b"0") else ""
