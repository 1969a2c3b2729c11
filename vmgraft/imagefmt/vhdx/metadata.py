"""The metadata region: sizes, identifiers and the parent of the disk (2.6)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from construct import Array

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.vhdx import _layout as lay
from vmgraft.imagefmt.vhdx.regions import Region


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """What the metadata say about the disk; sizes in bytes.

    Attributes:
        parent: Entries of the parent locator, by name; empty without a parent.
    """

    block_size: int
    leave_allocated: bool
    has_parent: bool
    virtual_size: int
    disk_id: bytes
    logical_sector: int
    physical_sector: int
    parent: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Item:
    guid: bytes
    offset: int
    length: int
    flags: int
    entry: int


def read_metadata(flat: FlatFile, region: Region) -> DiskFacts:
    """Read and check the metadata items.

    Raises:
        MalformedImageError: the table or an item is malformed, or one is missing.
        UnsupportedError: an item is required and not known.
    """
    items = _read_table(flat, region)

    def number(guid: bytes) -> int:
        return int.from_bytes(_value(flat, region, items, guid), "little")

    parameters = _value(flat, region, items, lay.FILE_PARAMETERS)
    flags = int.from_bytes(parameters[4:], "little")
    has_parent = bool(flags & lay.HAS_PARENT)
    facts = DiskFacts(
        block_size=int.from_bytes(parameters[:4], "little"),
        leave_allocated=bool(flags & lay.LEAVE_BLOCKS_ALLOCATED),
        has_parent=has_parent,
        virtual_size=number(lay.VIRTUAL_DISK_SIZE),
        disk_id=_value(flat, region, items, lay.VIRTUAL_DISK_ID),
        logical_sector=number(lay.LOGICAL_SECTOR_SIZE),
        physical_sector=number(lay.PHYSICAL_SECTOR_SIZE),
        parent=_parent(flat, region, items) if has_parent else {},
    )
    _check(flat, items, facts)
    return facts


def _read_table(flat: FlatFile, region: Region) -> dict[bytes, _Item]:
    """Return the items by GUID; user items, which are free to repeat system GUIDs, are left out."""
    raw = flat.read(region.offset, lay.METADATA_TABLE_SIZE)
    header: Any = parse_struct(
        lay.METADATA_HEADER, raw, file=flat.path, offset=region.offset, what="metadata table header"
    )
    if header.entry_count > lay.MAX_ENTRIES:
        message = f"{header.entry_count} entries, at most {lay.MAX_ENTRIES} allowed"
        raise MalformedImageError(message, file=flat.path, offset=region.offset, field="metadata.entry_count")
    rows: Any = parse_struct(
        Array(header.entry_count, lay.METADATA_ENTRY),
        raw[lay.METADATA_HEADER_SIZE :],
        file=flat.path,
        offset=region.offset + lay.METADATA_HEADER_SIZE,
        what="metadata table",
    )
    items = []
    for index, row in enumerate(rows):
        entry = region.offset + lay.METADATA_HEADER_SIZE + index * lay.ENTRY_SIZE
        items.append(_Item(bytes(row.item_id), row.offset, row.length, row.flags, entry))
    for item in items:
        _check_item(flat, region, item)
    _check_overlap(flat, items)
    system = [item for item in items if not item.flags & lay.ITEM_USER]
    found = {item.guid: item for item in system}
    if len(found) != len(system):
        message = "a metadata item is listed twice"
        raise MalformedImageError(message, file=flat.path, offset=region.offset, field="metadata")
    return found


def _check_item(flat: FlatFile, region: Region, item: _Item) -> None:
    known = item.guid in lay.ITEM_NAMES and not item.flags & lay.ITEM_USER
    name = lay.ITEM_NAMES[item.guid] if known else lay.guid_text(item.guid)
    if item.flags & lay.ITEM_REQUIRED and not known:
        message = f"metadata item {name} must be understood, and is not known here"
        raise UnsupportedError(message, file=flat.path, offset=item.entry, field="metadata")
    if item.offset == 0 and item.length == 0:
        return  # an item without a value
    inside = lay.METADATA_TABLE_SIZE <= item.offset <= region.length - item.length
    if not inside or not 0 < item.length <= lay.MAX_ITEM_SIZE:
        message = f"metadata item {name} ({item.length} bytes at {item.offset}) is out of place"
        raise MalformedImageError(message, file=flat.path, offset=item.entry, field="metadata.offset")


def _check_overlap(flat: FlatFile, items: list[_Item]) -> None:
    ordered = sorted((item for item in items if item.length), key=lambda item: item.offset)
    for lower, upper in pairwise(ordered):
        if lower.offset + lower.length > upper.offset:
            message = "two metadata items overlap"
            raise MalformedImageError(message, file=flat.path, offset=upper.entry, field="metadata.offset")


def _value(flat: FlatFile, region: Region, items: dict[bytes, _Item], guid: bytes) -> bytes:
    """Return the value of an item of a fixed size."""
    name, item = lay.ITEM_NAMES[guid], items.get(guid)
    if item is None:
        message = f"the metadata lack the {name}"
        raise MalformedImageError(message, file=flat.path, offset=region.offset, field=name)
    if item.length != lay.ITEM_SIZES[guid]:
        message = f"the {name} is {item.length} bytes long, and must be {lay.ITEM_SIZES[guid]}"
        raise MalformedImageError(message, file=flat.path, offset=item.entry, field=name)
    return flat.read(region.offset + item.offset, item.length)


def _check(flat: FlatFile, items: dict[bytes, _Item], facts: DiskFacts) -> None:
    def refuse(guid: bytes, message: str) -> MalformedImageError:
        return MalformedImageError(message, file=flat.path, offset=items[guid].entry, field=lay.ITEM_NAMES[guid])

    size, sector = facts.block_size, facts.logical_sector
    if not lay.MIN_BLOCK_SIZE <= size <= lay.MAX_BLOCK_SIZE or size & (size - 1):
        raise refuse(lay.FILE_PARAMETERS, f"blocks of {size} bytes: only powers of 2 from 1 to 256 MiB are allowed")
    if sector not in lay.SECTOR_SIZES:
        raise refuse(lay.LOGICAL_SECTOR_SIZE, f"sectors of {sector} bytes: only 512 and 4096 are allowed")
    if facts.physical_sector not in lay.SECTOR_SIZES:
        message = f"sectors of {facts.physical_sector} bytes: only 512 and 4096 are allowed"
        raise refuse(lay.PHYSICAL_SECTOR_SIZE, message)
    if not 0 < facts.virtual_size <= lay.MAX_VIRTUAL_SIZE or facts.virtual_size % sector:
        message = f"a disk of {facts.virtual_size} bytes: it must be whole sectors of {sector} and at most 64 TiB"
        raise refuse(lay.VIRTUAL_DISK_SIZE, message)


def _parent(flat: FlatFile, region: Region, items: dict[bytes, _Item]) -> dict[str, str]:
    """Return the entries of the parent locator (2.6.2.6), as far as they can be read: they are only shown."""
    item = items.get(lay.PARENT_LOCATOR)
    if item is None or item.length < lay.PARENT_HEADER_SIZE:
        return {}
    at = region.offset + item.offset
    data = flat.read(at, item.length)
    header: Any = parse_struct(lay.PARENT_HEADER, data, file=flat.path, offset=at, what="parent locator")
    if header.key_value_count > lay.MAX_PARENT_KEYS:
        message = f"{header.key_value_count} entries, at most {lay.MAX_PARENT_KEYS} are read"
        raise MalformedImageError(message, file=flat.path, offset=at, field="parent locator")
    rows: Any = parse_struct(
        Array(header.key_value_count, lay.PARENT_ENTRY),
        data[lay.PARENT_HEADER_SIZE :],
        file=flat.path,
        offset=at + lay.PARENT_HEADER_SIZE,
        what="parent locator",
    )
    return {
        _text(data, row.key_offset, row.key_length): _text(data, row.value_offset, row.value_length) for row in rows
    }


def _text(data: bytes, offset: int, length: int) -> str:
    return data[offset : offset + length].decode("utf-16-le", "backslashreplace")
