"""qcow2: clusters in the order of the guest, reference counts at the end. Big-endian.

Layout of the file: header, L1 table, then L2 tables and data as they come, then refcount blocks and the refcount table.
The numbers are those of QEMU's ``docs/interop/qcow2.txt``, called "spec" below.
"""

from __future__ import annotations

import zlib
from array import array
from typing import ClassVar

from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.treenodes import BLOCK_SIZE
from vmgraft.imagefmt.write.base import (
    SECTOR,
    BlockWriter,
    Piece,
    Table,
    WriteOptions,
    nonzero_runs,
    round_up,
)

_REFCOUNT_ORDER = 4
_REFCOUNT_BYTES = 2
_DEFAULT_CLUSTER = 65536
#: With the compression type's byte and padding.
_HEADER_LENGTH = 112
#: A window of 4 KiB without zlib's header, all that QEMU inflates (``block/qcow2-threads.c``).
_DEFLATE_WINDOW = -12
_PIECE = 1 << 20


class Qcow2Writer(BlockWriter):
    """A qcow2 of version 3 without backing file."""

    format_name: ClassVar[str] = "qcow2"
    version: ClassVar[int] = 3

    def __init__(self, writer: Writer, size: int, options: WriteOptions, name: str) -> None:
        super().__init__(writer, size, options, name)
        self.block_size = options.cluster_size or _DEFAULT_CLUSTER
        self.alignment = max(BLOCK_SIZE, self.block_size)
        self._per_l2 = self.block_size // 8
        self._l1_size = -(-size // (self.block_size * self._per_l2))
        if self._l1_size * 8 > lay.MAX_L1_BYTES:
            raise self.refuse(
                f"{size} bytes need bigger clusters than {self.block_size}", "choose a larger --cluster-size"
            )
        self._next = self.block_size + round_up(self._l1_size * 8, self.block_size)
        self._l1 = Table(writer, self.block_size, self._l1_size, ">u8")
        self._l2: Table | None = None
        self._l2_number = -1
        self._packed = _Packed(self)

    def _check_options(self) -> None:
        size = self.options.cluster_size
        sizes = [1 << bits for bits in range(lay.MIN_CLUSTER_BITS, lay.MAX_CLUSTER_BITS + 1)]
        if size is not None and size not in sizes:
            raise self.refuse(f"a cluster of {size} bytes", f"a power of two from {sizes[0]} to {sizes[-1]}")

    def pieces(self, offset: int, view: memoryview) -> list[Piece]:
        """Choose the pages, or deflate the clusters, that are not all zeros."""
        if not self.options.compress:
            return super().pieces(offset, view)
        size, found = self.block_size, []
        for first, end in nonzero_runs(view, size):
            for start in range(first, end, size):
                data = view[start : start + size]
                packer = zlib.compressobj(wbits=_DEFLATE_WINDOW, memLevel=9)
                packed = packer.compress(data) + packer.flush()
                smaller = len(packed) < size
                found.append(Piece(offset + start, packed if smaller else data, smaller))
        return found

    def store(self, piece: Piece) -> None:
        """Write a piece, plain or deflated."""
        if piece.packed:
            self._set_entry(piece.offset // self.block_size, self._packed.store(bytes(piece.data)))
        else:
            super().store(piece)

    def allocate(self, block: int) -> int:
        """Put the cluster behind what is there."""
        self._reach(block)
        place = self.take(1)
        self._set_entry(block, place | lay.FLAG_COPIED)
        return place

    def take(self, count: int) -> int:
        """Return the file offset of ``count`` clusters in a row."""
        place = self._next
        self._next += count * self.block_size
        return place

    @property
    def end(self) -> int:
        """Where the next cluster goes, in bytes."""
        return self._next

    def _reach(self, cluster: int) -> Table:
        """Return the L2 table of a cluster; the one before it is finished."""
        number = cluster // self._per_l2
        if self._l2 is None or number != self._l2_number:
            self._end_l2()
            place = self.take(1)
            self._l1[number] = place | lay.FLAG_COPIED
            self._l2, self._l2_number = Table(self.writer, place, self._per_l2, ">u8"), number
        return self._l2

    def _set_entry(self, cluster: int, entry: int) -> None:
        self._reach(cluster)[cluster % self._per_l2] = entry

    def _end_l2(self) -> None:
        if self._l2 is not None:
            self._l2.finish()
            self._l2 = None

    def finish(self) -> None:
        """Write the tables, the reference counts and the header."""
        self._end_l2()
        self._l1.finish()
        size, used = self.block_size, self._next // self.block_size
        per_block = size // _REFCOUNT_BYTES
        blocks = tables = 0
        while used + blocks + tables > blocks * per_block:  # they count themselves
            blocks = -(-(used + blocks + tables) // per_block)
            tables = -(-blocks * 8 // size)
        self._write_refcounts(used + blocks + tables)
        self._next += blocks * size
        table = Table(self.writer, self._next, blocks, ">u8")
        for number in range(blocks):
            table[number] = (used + number) * size
        table.finish()
        self.writer.truncate(self._next + tables * size)
        self.writer.write(0, self._header(self._next, tables))

    def _write_refcounts(self, count: int) -> None:
        """Write a 1 for each of the ``count`` clusters, and more where deflated clusters share one."""
        step = _PIECE // _REFCOUNT_BYTES
        for first in range(0, count, step):
            counts = array("H", b"\1\0" * min(step, count - first))
            for cluster in self._packed.shared_between(first, first + len(counts)):
                counts[cluster - first] = self._packed.shared[cluster]
            counts.byteswap()
            self.writer.write(self._next + first * _REFCOUNT_BYTES, counts.tobytes())

    def _header(self, refcount_table: int, refcount_clusters: int) -> bytes:
        fields = {
            "version": self.version,
            "backing_file_offset": 0,
            "backing_file_size": 0,
            "cluster_bits": self.block_size.bit_length() - 1,
            "size": self.size,
            "crypt_method": 0,
            "l1_size": self._l1_size,
            "l1_table_offset": self.block_size,
            "refcount_table_offset": refcount_table,
            "refcount_table_clusters": refcount_clusters,
            "nb_snapshots": 0,
            "snapshots_offset": 0,
        }
        head = bytes(lay.HEADER_V2.build(fields))
        if self.version == 2:
            return head
        more = {"incompatible_features": 0, "compatible_features": 0, "autoclear_features": 0}
        more |= {"refcount_order": _REFCOUNT_ORDER, "header_length": _HEADER_LENGTH}
        return (head + bytes(lay.HEADER_V3.build(more))).ljust(_HEADER_LENGTH, b"\0") + _feature_table()


class Qcow2V2Writer(Qcow2Writer):
    """A qcow2 of version 2, for programs from before 2011."""

    version: ClassVar[int] = 2


class _Packed:
    """Puts deflated clusters one behind the other, also across the border of two clusters that follow each other."""

    def __init__(self, image: Qcow2Writer) -> None:
        self._image = image
        self._at = self._end = 0
        #: Clusters that more than one deflated cluster touches, and how many do.
        self.shared: dict[int, int] = {}
        self._touched = -1

    def store(self, data: bytes) -> int:
        """Write a deflated cluster and return its L2 entry (spec, "Compressed Clusters Descriptor")."""
        image, size = self._image, self._image.block_size
        if len(data) > self._end - self._at:
            if self._end != image.end:
                self._at = image.end
            missing = -(-(len(data) - (image.end - self._at)) // size)
            image.take(missing)
            self._end = image.end
        place = self._at
        self._at += len(data)
        image.writer.write(place, data)
        self._count(place // size, (self._at - 1) // size)
        sectors = (self._at - 1) // SECTOR - place // SECTOR
        shift = 62 - (size.bit_length() - 1 - 8)
        return lay.FLAG_COMPRESSED | sectors << shift | place

    def _count(self, first: int, last: int) -> None:
        if first == self._touched:
            self.shared[first] = self.shared.get(first, 1) + 1
        self._touched = last

    def shared_between(self, first: int, end: int) -> list[int]:
        """Return the shared clusters in a range."""
        if len(self.shared) < end - first:
            return [cluster for cluster in self.shared if first <= cluster < end]
        return [cluster for cluster in range(first, end) if cluster in self.shared]


def _feature_table() -> bytes:
    """Return the extension that names all known features, so that older programs can say what they miss."""
    rows = [
        lay.FEATURE_NAME.build({"type": kind, "bit": bit, "name": name.encode().ljust(46, b"\0")})
        for (kind, bit), name in lay.FEATURE_NAMES.items()
    ]
    data = b"".join(rows)
    return bytes(lay.EXTENSION_HEADER.build({"magic": lay.EXT_FEATURE_NAMES, "length": len(data)})) + data
