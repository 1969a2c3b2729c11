"""VHD, dynamic: blocks of 2 MiB, each behind a bitmap of its sectors; see ``imagefmt.vhd._layout``."""

from __future__ import annotations

import os
import time
from typing import ClassVar

from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.vhd import _layout as lay
from vmgraft.imagefmt.vhd.header import checksum
from vmgraft.imagefmt.write.base import SECTOR, BlockWriter, Table, WriteOptions, round_up

#: "Features": this bit "must always be set to 1".
_RESERVED_FEATURE = 2
_FILE_VERSION = lay.VERSION_MAJOR << 16
#: "Data Offset" of a dynamic header: no further structure.
_NOWHERE = (1 << 64) - 1
#: Virtual Server. Readers take the disk's size from the size field for this creator, and from the geometry, which is
#: rounded, for some others (QEMU ``block/vpc.c``).
_CREATOR, _CREATOR_VERSION, _CREATOR_HOST = b"win ", 0x0006_0001, b"Wi2k"
_BLOCK = 2 << 20
#: 4096 sectors of a block at one bit each.
_BITMAP = b"\xff" * SECTOR


class VhdWriter(BlockWriter):
    """A dynamic VHD."""

    format_name: ClassVar[str] = "vhd"
    block_size = _BLOCK

    def __init__(self, writer: Writer, size: int, options: WriteOptions, name: str) -> None:
        super().__init__(writer, size, options, name)
        if size > lay.MAX_SECTORS * SECTOR:
            raise self.refuse(f"{size} bytes are more than 2040 GiB", "convert to vhdx or qcow2")
        self._count = -(-size // _BLOCK)
        self._table_offset = SECTOR + lay.HEADER_SIZE
        self._table = Table(writer, self._table_offset, self._count, ">u4", lay.UNUSED)
        self._pad_from = self._table_offset + 4 * self._count
        self._next = self._first = round_up(self._pad_from, SECTOR)

    def allocate(self, block: int) -> int:
        """Put the block behind the last one, its bitmap first."""
        bitmap = self._next
        self._next += SECTOR + _BLOCK
        self._table[block] = bitmap // SECTOR
        self.writer.write(bitmap, _BITMAP)
        return bitmap + SECTOR

    def finish(self) -> None:
        """Write the table, the dynamic header and both footers."""
        self._table.finish()
        self.writer.write(self._pad_from, b"\xff" * (self._first - self._pad_from))
        footer = self._footer()
        self.writer.write(SECTOR, self._header())
        self.writer.write(self._next, footer)
        self.writer.write(0, footer)

    def _header(self) -> bytes:
        locator = {"platform_code": bytes(4), "data_space": 0, "data_length": 0, "reserved": 0, "data_offset": 0}
        fields = {
            "data_offset": _NOWHERE,
            "table_offset": self._table_offset,
            "version": _FILE_VERSION,
            "max_table_entries": self._count,
            "block_size": _BLOCK,
            "checksum": 0,
            "parent_unique_id": bytes(16),
            "parent_time_stamp": 0,
            "parent_name": bytes(512),
            "parent_locators": [locator] * lay.LOCATOR_COUNT,
        }
        fields["checksum"] = checksum(lay.DYNAMIC_HEADER.build(fields), lay.HEADER_CHECKSUM_OFFSET)
        return bytes(lay.DYNAMIC_HEADER.build(fields))

    def _footer(self) -> bytes:
        cylinders, heads, per_track = geometry(self.size // SECTOR)
        fields = {
            "features": _RESERVED_FEATURE,
            "version": _FILE_VERSION,
            "data_offset": SECTOR,
            "time_stamp": max(0, int(time.time()) - lay.EPOCH),
            "creator_application": _CREATOR,
            "creator_version": _CREATOR_VERSION,
            "creator_host": _CREATOR_HOST,
            "original_size": self.size,
            "current_size": self.size,
            "cylinders": cylinders,
            "heads": heads,
            "sectors_per_track": per_track,
            "disk_type": lay.TYPE_DYNAMIC,
            "checksum": 0,
            "unique_id": os.urandom(16),
            "saved_state": 0,
        }
        fields["checksum"] = checksum(lay.FOOTER.build(fields), lay.FOOTER_CHECKSUM_OFFSET)
        return bytes(lay.FOOTER.build(fields)).ljust(lay.FOOTER_SIZE, b"\0")


def geometry(sectors: int) -> tuple[int, int, int]:
    """Return cylinders, heads and sectors a track, as the specification's appendix computes them."""
    total = min(sectors, lay.MAX_GEOMETRY)
    if total >= 65535 * 16 * 63:
        return total // 255 // 16, 16, 255
    per_track = 17
    tracks = total // per_track
    heads = max((tracks + 1023) // 1024, 4)
    if tracks >= heads * 1024 or heads > 16:
        per_track, heads = 31, 16
        tracks = total // per_track
    if tracks >= heads * 1024:
        per_track, heads = 63, 16
        tracks = total // per_track
    return tracks // heads, heads, per_track
