"""The container as read from the file: headers, regions and metadata; the block table is left for later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.vhdx import _layout as lay
from vmgraft.imagefmt.vhdx.bat import BlockTable
from vmgraft.imagefmt.vhdx.header import Headers, read_headers
from vmgraft.imagefmt.vhdx.log import is_dirty
from vmgraft.imagefmt.vhdx.metadata import DiskFacts, read_metadata
from vmgraft.imagefmt.vhdx.regions import Region, RegionTable, check_regions, read_tables


@dataclass(frozen=True, slots=True)
class Container:
    """What stands in a file.

    Attributes:
        tables: Both copies of the region table; None for one that is not sound.
        table: The first sound one, which counts.
        dirty: Whether the log holds changes that are not yet made.
    """

    headers: Headers
    tables: tuple[RegionTable | None, RegionTable | None]
    table: RegionTable
    facts: DiskFacts
    dirty: bool

    def region(self, guid: bytes) -> Region | None:
        """Return a region of the table that counts."""
        return self.table.find(guid)

    def block_table(self, flat: FlatFile) -> BlockTable:
        """Return the block allocation table.

        Raises:
            MalformedImageError: when it is too short for the disk.
        """
        bat = next(region for region in self.table.regions if region.guid == lay.BAT_REGION)
        return BlockTable(flat, bat, self.facts, [*self.table.regions, _log(self.headers)])


def read_container(flat: FlatFile) -> Container:
    """Read and check everything but the block allocation table.

    Raises:
        MalformedImageError: it violates the specification.
        UnsupportedError: it uses what is not known here.
    """
    headers = read_headers(flat)
    table, tables = read_tables(flat)
    check_regions(flat, table, _log(headers))
    metadata = next(region for region in table.regions if region.guid == lay.METADATA_REGION)
    facts = read_metadata(flat, metadata)
    return Container(headers, tables, table, facts, is_dirty(flat, headers.current))


def _log(headers: Headers) -> Region:
    return Region(lay.LOG_MARK, headers.current.log_offset, headers.current.log_length, True)


def describe(container: Container, flat: FlatFile) -> dict[str, Any]:
    """Return container facts for people and reports, JSON-able and unverified."""
    headers, facts = container.headers, container.facts
    creator = flat.read(lay.CREATOR_OFFSET, lay.CREATOR_SIZE).decode("utf-16-le", "backslashreplace")
    kind = "fixed" if facts.leave_allocated else "dynamic"
    return {
        "format": "vhdx",
        "type": "differencing" if facts.has_parent else kind,
        "creator": creator.split("\0", 1)[0],
        "virtualSize": facts.virtual_size,
        "fileSize": flat.size,
        "blockSize": facts.block_size,
        "logicalSectorSize": facts.logical_sector,
        "physicalSectorSize": facts.physical_sector,
        "diskId": lay.guid_text(facts.disk_id),
        "fileWriteId": lay.guid_text(headers.current.file_write_guid),
        "dataWriteId": lay.guid_text(headers.current.data_write_guid),
        "sequenceNumber": headers.current.sequence_number,
        "soundHeaders": sum(header is not None for header in headers.parsed),
        "soundRegionTables": sum(table is not None for table in container.tables),
        "regions": [
            {"name": r.name, "offset": r.offset, "length": r.length, "required": r.required}
            for r in container.table.regions
        ],
        "logToReplay": container.dirty,
        "parent": facts.parent if facts.has_parent else None,
    }
