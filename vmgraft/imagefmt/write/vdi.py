"""VDI, dynamic: one MiB a block, stored in ascending order; see ``imagefmt.vdi._layout``."""

from __future__ import annotations

import os
from typing import ClassVar
from uuid import UUID

from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.vdi import _layout as lay
from vmgraft.imagefmt.write.base import SECTOR, BlockWriter, Table, WriteOptions, round_up

_DYNAMIC = 1
_BLOCK = 1 << 20


class VdiWriter(BlockWriter):
    """A dynamic VDI."""

    format_name: ClassVar[str] = "vdi"
    block_size = _BLOCK

    def __init__(self, writer: Writer, size: int, options: WriteOptions, name: str) -> None:
        super().__init__(writer, size, options, name)
        self._count = -(-size // _BLOCK)
        if self._count > lay.MAX_BLOCKS:
            raise self.refuse(f"{size} bytes are more than {lay.MAX_BLOCKS} MiB", "convert to qcow2")
        #: On a MiB, as VirtualBox does, so that blocks are aligned in the file.
        self._data = round_up(SECTOR + 4 * self._count, _BLOCK)
        self._map = Table(writer, SECTOR, self._count, "<u4", lay.BLOCK_FREE)
        self._used = 0

    def allocate(self, block: int) -> int:
        """Put the block behind the last one."""
        self._map[block] = self._used
        self._used += 1
        return self._data + (self._used - 1) * _BLOCK

    def finish(self) -> None:
        """Write block map and header."""
        self._map.finish()
        self.writer.truncate(self._data + self._used * _BLOCK)
        self.writer.write(0, self._header().ljust(SECTOR, b"\0"))

    def _header(self) -> bytes:
        fields = {
            "text": b"<<< vmgraft VM Disk Image >>>\n".ljust(64, b"\0"),
            "version": lay.VERSION_1_1,
            "header_size": lay.HEADER_SIZES[0],
            "image_type": _DYNAMIC,
            "image_flags": 0,
            "comment": bytes(lay.COMMENT_SIZE),
            "offset_blocks": SECTOR,
            "offset_data": self._data,
            "cylinders": 0,
            "heads": 0,
            "sectors": 0,
            "sector_size": SECTOR,
            "unused": 0,
            "disk_size": self.size,
            "block_size": _BLOCK,
            "block_extra": 0,
            "blocks": self._count,
            "blocks_allocated": self._used,
            "uuid_create": _uuid(),
            "uuid_modify": _uuid(),
            "uuid_linkage": bytes(16),
            "uuid_parent_modify": bytes(16),
        }
        return bytes(lay.HEADER.build(fields))


def _uuid() -> bytes:
    """Return a random UUID (RFC 4122, version 4) with its first three fields little-endian."""
    return UUID(bytes=os.urandom(16), version=4).bytes_le
