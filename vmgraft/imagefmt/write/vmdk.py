"""VMDK, monolithicSparse: one file with an embedded descriptor, grains of 64 KiB; see ``imagefmt.vmdk._layout``.

VMware Virtual Disk Format 5.0, "Hosted Sparse Extents" and "The Descriptor File".
"""

from __future__ import annotations

import secrets
from typing import ClassVar

from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.vmdk import _layout as lay
from vmgraft.imagefmt.write.base import SECTOR, BlockWriter, Table, WriteOptions, round_up

_DESCRIPTOR_SECTOR, _DESCRIPTOR_SECTORS = 1, 20
_GRAIN_SECTORS = 128
_GRAIN = _GRAIN_SECTORS * SECTOR
#: Grain table entries are sector numbers of 32 bits.
_MAX_FILE = SECTOR << 32
_DESCRIPTOR = """\
# Disk DescriptorFile
version=1
CID={cid:08x}
parentCID=ffffffff
createType="monolithicSparse"

# Extent description
RW {sectors} SPARSE "{name}"

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "{cylinders}"
ddb.geometry.heads = "16"
ddb.geometry.sectors = "63"
ddb.adapterType = "ide"
"""


class VmdkWriter(BlockWriter):
    """A monolithicSparse VMDK with redundant grain tables."""

    format_name: ClassVar[str] = "vmdk"
    block_size = _GRAIN

    def __init__(self, writer: Writer, size: int, options: WriteOptions, name: str) -> None:
        super().__init__(writer, size, options, name)
        self._tables = -(-size // (_GRAIN * lay.GTES_PER_GT))
        directory = -(-self._tables * 4 // SECTOR)
        self._copies = [_DESCRIPTOR_SECTOR + _DESCRIPTOR_SECTORS]
        self._copies.append(self._copies[0] + directory + self._tables * lay.GT_SECTORS)
        self._overhead = round_up(self._copies[1] + directory + self._tables * lay.GT_SECTORS, _GRAIN_SECTORS)
        if self._overhead * SECTOR + round_up(size, _GRAIN) > _MAX_FILE:
            raise self.refuse(f"{size} bytes do not fit into one sparse extent of 2 TiB", "convert to qcow2 or vhdx")
        self._first_tables = [start + directory for start in self._copies]
        entries = self._tables * lay.GTES_PER_GT
        self._entries = [Table(writer, start * SECTOR, entries, "<u4") for start in self._first_tables]
        self._next = self._overhead

    def allocate(self, block: int) -> int:
        """Put the grain behind the last one."""
        place = self._next
        self._next += _GRAIN_SECTORS
        for table in self._entries:
            table[block] = place
        return place * SECTOR

    def finish(self) -> None:
        """Write grain tables and directories, descriptor and header."""
        self.writer.truncate(self._next * SECTOR)
        for start, first, entries in zip(self._copies, self._first_tables, self._entries, strict=True):
            entries.finish()
            directory = Table(self.writer, start * SECTOR, self._tables, "<u4")
            for number in range(self._tables):
                directory[number] = first + number * lay.GT_SECTORS
            directory.finish()
        self.writer.write(_DESCRIPTOR_SECTOR * SECTOR, self._descriptor())
        self.writer.write(0, self._header().ljust(SECTOR, b"\0"))

    def _header(self) -> bytes:
        redundant, primary = self._copies
        fields = {
            "version": 1,
            "flags": lay.FLAG_NEWLINES | lay.FLAG_REDUNDANT,
            "capacity": self.size // SECTOR,
            "grain_size": _GRAIN_SECTORS,
            "descriptor_offset": _DESCRIPTOR_SECTOR,
            "descriptor_size": _DESCRIPTOR_SECTORS,
            "gtes_per_gt": lay.GTES_PER_GT,
            "rgd_offset": redundant,
            "gd_offset": primary,
            "overhead": self._overhead,
            "unclean_shutdown": 0,
            "newlines": lay.NEWLINES,
            "compression": lay.COMPRESSION_NONE,
        }
        return bytes(lay.HEADER.build(fields))

    def _descriptor(self) -> bytes:
        sectors = self.size // SECTOR
        text = _DESCRIPTOR.format(
            cid=secrets.randbelow(0xFFFF_FFFE) + 1,  # neither 0 nor "no parent"
            sectors=sectors,
            name=_quotable(self.name),
            cylinders=min(sectors // (63 * 16), 16383),
        )
        return text.encode("ascii")


def _quotable(name: str) -> str:
    """Return a file name that can stand between quotes in a descriptor; VMware finds the extent by it."""
    plain = name.isascii() and name.isprintable() and '"' not in name and len(name) < SECTOR
    return name if plain else "disk.vmdk"
