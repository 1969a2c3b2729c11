"""VHDX, dynamic; see ``imagefmt.vhdx._layout``. Sections are those of [MS-VHDX]."""

from __future__ import annotations

import os
import struct
from typing import ClassVar
from uuid import UUID

from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.vhdx import _layout as lay
from vmgraft.imagefmt.vhdx.crc32c import checksum
from vmgraft.imagefmt.write.base import SECTOR, BlockWriter, Table, WriteOptions, round_up

_MIB = lay.MIB
#: Place and size of log, metadata region and BAT (2.2): all on a MiB, one behind the other.
_LOG = (1 * _MIB, _MIB)
_METADATA = (2 * _MIB, _MIB)
_BAT_OFFSET = 3 * _MIB
#: Flag of a metadata item that describes the disk, not the file (2.6.1.2).
_IS_VIRTUAL_DISK = 2
#: What the entries between two sector bitmaps describe (2.5).
_CHUNK = SECTOR * lay.BITMAP_SECTORS
_SMALL_BLOCK, _LARGE_BLOCK = 8 * _MIB, 32 * _MIB
#: Up to this size small blocks are used; the table stays small either way.
_SMALL_UP_TO = 1 << 40


class VhdxWriter(BlockWriter):
    """A dynamic VHDX with sectors of 512 bytes."""

    format_name: ClassVar[str] = "vhdx"

    def __init__(self, writer: Writer, size: int, options: WriteOptions, name: str) -> None:
        super().__init__(writer, size, options, name)
        if size > lay.MAX_VIRTUAL_SIZE:
            raise self.refuse(f"{size} bytes are more than 64 TiB", "convert to qcow2")
        self.block_size = _SMALL_BLOCK if size <= _SMALL_UP_TO else _LARGE_BLOCK
        self._ratio = _CHUNK // self.block_size
        blocks = -(-size // self.block_size)
        entries = blocks + (blocks - 1) // self._ratio
        self._bat_size = round_up(entries * 8, _MIB)
        self._bat = Table(writer, _BAT_OFFSET, entries, "<u8")
        self._next = _BAT_OFFSET + self._bat_size

    def allocate(self, block: int) -> int:
        """Put the block behind the last one; all begin on a MiB."""
        place = self._next
        self._next += self.block_size
        self._bat[block + block // self._ratio] = place | lay.FULLY_PRESENT
        return place

    def finish(self) -> None:
        """Write BAT, metadata, region tables, headers and the identifier."""
        self._bat.finish()
        self.writer.truncate(self._next)
        table, items = self._metadata()
        self.writer.write(_METADATA[0], table)
        self.writer.write(_METADATA[0] + lay.METADATA_TABLE_SIZE, items)
        regions, ids = self._regions(), (_guid(), _guid())
        for offset in lay.TABLE_OFFSETS:
            self.writer.write(offset, regions)
        for sequence, offset in enumerate(lay.HEADER_OFFSETS):
            self.writer.write(offset, _header(sequence, *ids))
        self.writer.write(0, lay.SIGNATURE + "vmgraft".encode("utf-16-le"))

    def _regions(self) -> bytes:
        """Return the region table (2.2.3)."""
        head = {"signature": b"regi", "checksum": 0, "entry_count": 2, "reserved": 0}
        table = lay.TABLE_HEADER.build(head)
        for guid, offset, length in ((lay.BAT_REGION, _BAT_OFFSET, self._bat_size), (lay.METADATA_REGION, *_METADATA)):
            entry = {"guid": guid, "file_offset": offset, "length": length, "flags": lay.REQUIRED}
            table += lay.REGION_ENTRY.build(entry)
        return _with_checksum(table.ljust(lay.TABLE_SIZE, b"\0"))

    def _metadata(self) -> tuple[bytes, bytes]:
        """Return the metadata table and the items (2.6)."""
        disk = _IS_VIRTUAL_DISK | lay.ITEM_REQUIRED
        rows = (
            (lay.FILE_PARAMETERS, lay.ITEM_REQUIRED, struct.pack("<II", self.block_size, 0)),
            (lay.VIRTUAL_DISK_SIZE, disk, struct.pack("<Q", self.size)),
            (lay.VIRTUAL_DISK_ID, disk, _guid()),
            (lay.LOGICAL_SECTOR_SIZE, disk, struct.pack("<I", SECTOR)),
            (lay.PHYSICAL_SECTOR_SIZE, disk, struct.pack("<I", SECTOR)),
        )
        table = lay.METADATA_HEADER.build({"reserved": 0, "entry_count": len(rows), "reserved2": bytes(20)})
        items = b""
        for item, flags, data in rows:
            offset = lay.METADATA_TABLE_SIZE + len(items)
            entry = {"item_id": item, "offset": offset, "length": len(data), "flags": flags, "reserved": 0}
            table += lay.METADATA_ENTRY.build(entry)
            items += data
        return table, items


def _header(sequence: int, file_write: bytes, data_write: bytes) -> bytes:
    """Return one of the two headers (2.2.2); the log is empty."""
    fields = {
        "checksum": 0,
        "sequence_number": sequence,
        "file_write_guid": file_write,
        "data_write_guid": data_write,
        "log_guid": bytes(16),
        "log_version": 0,
        "version": lay.VERSION,
        "log_length": _LOG[1],
        "log_offset": _LOG[0],
    }
    return _with_checksum(lay.HEADER.build(fields).ljust(lay.HEADER_SIZE, b"\0"))


def _guid() -> bytes:
    return UUID(bytes=os.urandom(16), version=4).bytes_le


def _with_checksum(data: bytes) -> bytes:
    """Fill in the CRC-32C."""
    at = lay.CHECKSUM_OFFSET
    return data[:at] + struct.pack("<I", checksum(data, at)) + data[at + 4 :]
