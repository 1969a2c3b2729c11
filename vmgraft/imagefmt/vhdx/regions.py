"""The region table: what lies where in the file, kept twice (2.2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from construct import Array

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.vhdx import _layout as lay
from vmgraft.imagefmt.vhdx.crc32c import checksum


@dataclass(frozen=True, slots=True)
class Region:
    """An entry of the region table; offset and length in bytes."""

    guid: bytes
    offset: int
    length: int
    required: bool

    @property
    def end(self) -> int:
        """Offset behind the region."""
        return self.offset + self.length

    @property
    def name(self) -> str:
        """Its name, or its GUID where it is not known."""
        names = lay.KNOWN_REGIONS | {lay.LOG_MARK: "log"}
        return names.get(self.guid) or lay.guid_text(self.guid)


@dataclass(frozen=True, slots=True)
class RegionTable:
    """One copy of the region table, with a sound checksum.

    Attributes:
        slot: 0 or 1, which copy.
        raw: Its 64 KiB.
        regions: The entries in their order.
    """

    slot: int
    raw: bytes
    regions: tuple[Region, ...]

    def find(self, guid: bytes) -> Region | None:
        """Return the region with this GUID, or None."""
        return next((region for region in self.regions if region.guid == guid), None)


def parse_table(raw: bytes, slot: int) -> RegionTable | None:
    """Return a copy of the table, or None when signature, checksum or number of entries are wrong."""
    if len(raw) != lay.TABLE_SIZE or not raw.startswith(b"regi"):
        return None
    header: Any = parse_struct(lay.TABLE_HEADER, raw, file=None, offset=0, what="region table")
    if header.entry_count > lay.MAX_ENTRIES or header.checksum != checksum(raw, lay.CHECKSUM_OFFSET):
        return None
    count = header.entry_count
    rows: Any = parse_struct(
        Array(count, lay.REGION_ENTRY), raw[lay.TABLE_HEADER_SIZE :], file=None, offset=0, what="region table"
    )
    regions = (Region(bytes(row.guid), row.file_offset, row.length, bool(row.flags & lay.REQUIRED)) for row in rows)
    return RegionTable(slot, raw, tuple(regions))


def read_tables(flat: FlatFile) -> tuple[RegionTable, tuple[RegionTable | None, RegionTable | None]]:
    """Return the copy of the region table that counts, the first sound one, and both; None for one that is not sound.

    Raises:
        MalformedImageError: when neither is.
    """
    raw = [flat.read(offset, lay.TABLE_SIZE) for offset in lay.TABLE_OFFSETS]
    first = parse_table(raw[0], 0)
    # Usually the two are equal, and then the second need not be parsed.
    second = replace(first, slot=1) if first is not None and raw[0] == raw[1] else parse_table(raw[1], 1)
    table = first or second
    if table is None:
        raise MalformedImageError(
            "both copies of the region table are damaged",
            file=flat.path,
            offset=lay.TABLE_OFFSETS[0],
            field="region table",
            hint="restore the image from a copy",
        )
    return table, (first, second)


def check_regions(flat: FlatFile, table: RegionTable, log: Region) -> None:
    """Check where the regions lie.

    Args:
        flat: The file.
        table: The copy of the table that counts.
        log: The place of the log, which must not be overlapped either.

    Raises:
        MalformedImageError: a region is missing, twice there, out of place or overlaps another object.
        UnsupportedError: a region is required and not known.
    """
    for index, region in enumerate(table.regions):
        offset = lay.TABLE_OFFSETS[table.slot] + lay.TABLE_HEADER_SIZE + index * lay.ENTRY_SIZE
        problem = _problem(flat, region)
        if region.required and region.guid not in lay.KNOWN_REGIONS:
            message = f"region {region.name} must be understood, and is not known here"
            raise UnsupportedError(message, file=flat.path, offset=offset, field="region table")
        if problem is not None:
            raise MalformedImageError(
                f"region {region.name} {problem}", file=flat.path, offset=offset, field="region table"
            )
    for guid in (lay.BAT_REGION, lay.METADATA_REGION):
        found = sum(region.guid == guid for region in table.regions)
        if found != 1:
            message = f"the file has {found} regions {lay.KNOWN_REGIONS[guid]}, and must have one"
            offset = lay.TABLE_OFFSETS[table.slot]
            raise MalformedImageError(message, file=flat.path, offset=offset, field="region table")
    _check_overlap(flat, [*table.regions, log], lay.TABLE_OFFSETS[table.slot])


def _problem(flat: FlatFile, region: Region) -> str | None:
    if region.offset % lay.MIB or region.length % lay.MIB or not region.length:
        return f"({region.length} bytes at {region.offset}) is not made of whole MiB"
    if region.offset < lay.HEADER_SECTION_SIZE:
        return f"begins at {region.offset}, within the header section"
    if region.end > 1 << 63:
        return f"ends at {region.end}, where no file does"
    if region.end > flat.size and region.guid in (lay.BAT_REGION, lay.METADATA_REGION):
        return f"ends at {region.end}, behind the end of the file ({flat.size})"
    return None


def _check_overlap(flat: FlatFile, regions: Sequence[Region], offset: int) -> None:
    ordered = sorted(regions, key=lambda region: region.offset)
    for lower, upper in pairwise(ordered):
        if lower.end > upper.offset:
            message = f"regions {lower.name} and {upper.name} overlap at {upper.offset}"
            raise MalformedImageError(message, file=flat.path, offset=offset, field="region table")
    guids = [region.guid for region in regions if region.guid != lay.LOG_MARK]
    if len(set(guids)) != len(guids):
        message = "a region is listed twice"
        raise MalformedImageError(message, file=flat.path, offset=offset, field="region table")
