"""Writing a fresh qcow2 image, for machines without qemu-img."""

from __future__ import annotations

import io
import struct
from os import PathLike
from typing import BinaryIO

from vmgraft.errors import UsageError
from vmgraft.imagefmt.commit import Writer, atomic_output
from vmgraft.imagefmt.qcow2 import _layout as lay

_REFCOUNT_ORDER = 4
_REFCOUNT_BYTES = 2
_V3_LENGTH = 112


class _Builder:
    """Lays out header, refcount table, refcount blocks, L1, and then L2 tables and data as they come."""

    def __init__(self, writer: Writer, size: int, cluster_bits: int, version: int) -> None:
        self.writer = writer
        self.size = size
        self.bits = cluster_bits
        self.cluster = 1 << cluster_bits
        self.version = version
        self.per_l2 = self.cluster // 8
        clusters = -(-size // self.cluster)
        self.l1_size = -(-clusters // self.per_l2)
        l1_clusters = -(-self.l1_size * 8 // self.cluster)
        # The most that can be needed, if every cluster holds data; refcount blocks count themselves.
        most = 1 + l1_clusters + self.l1_size + clusters
        per_block = self.cluster // _REFCOUNT_BYTES
        self.blocks = 1
        while True:
            self.table_clusters = -(-self.blocks * 8 // self.cluster)
            if (most + self.blocks + self.table_clusters) <= self.blocks * per_block:
                break
            self.blocks += 1
        self.block_offset = (1 + self.table_clusters) * self.cluster
        self.l1_offset = self.block_offset + self.blocks * self.cluster
        self.next = self.l1_offset + l1_clusters * self.cluster
        self.l1 = [0] * self.l1_size

    def allocate(self) -> int:
        offset = self.next
        self.next += self.cluster
        return offset

    def add_clusters(self, content: BinaryIO) -> None:
        """Write the content's clusters, and each L2 table once it is full; all-zero clusters stay unallocated."""
        for index in range(self.l1_size):
            entries = [0] * self.per_l2
            for at in range(self.per_l2):
                chunk = content.read(self.cluster)
                if not chunk:
                    break
                if chunk.count(0) < len(chunk):
                    offset = self.allocate()
                    self.writer.write(offset, chunk.ljust(self.cluster, b"\0"))
                    entries[at] = offset | lay.FLAG_COPIED
            if any(entries):
                offset = self.allocate()
                self.writer.write(offset, struct.pack(f">{self.per_l2}Q", *entries))
                self.l1[index] = offset | lay.FLAG_COPIED

    def finish(self) -> None:
        """Write L1, refcounts and header, and give the file its final length."""
        self.writer.truncate(self.next)
        self.writer.write(self.l1_offset, struct.pack(f">{self.l1_size}Q", *self.l1))
        used = self.next // self.cluster
        self.writer.write(self.block_offset, b"\0\1" * used)
        offsets = [self.block_offset + i * self.cluster for i in range(self.blocks)]
        self.writer.write(self.cluster, struct.pack(f">{self.blocks}Q", *offsets))
        self.writer.write(0, self.header())

    def header(self) -> bytes:
        fields = {
            "version": self.version,
            "backing_file_offset": 0,
            "backing_file_size": 0,
            "cluster_bits": self.bits,
            "size": self.size,
            "crypt_method": 0,
            "l1_size": self.l1_size,
            "l1_table_offset": self.l1_offset,
            "refcount_table_offset": self.cluster,
            "refcount_table_clusters": self.table_clusters,
            "nb_snapshots": 0,
            "snapshots_offset": 0,
        }
        head = bytes(lay.HEADER_V2.build(fields))
        if self.version == 2:
            return head
        more = {"incompatible_features": 0, "compatible_features": 0, "autoclear_features": 0}
        more |= {"refcount_order": _REFCOUNT_ORDER, "header_length": _V3_LENGTH}
        return (head + bytes(lay.HEADER_V3.build(more))).ljust(_V3_LENGTH, b"\0") + _feature_table()


def _feature_table() -> bytes:
    """Return the extension that names all known features, so that older programs can say what they miss."""
    rows = [
        lay.FEATURE_NAME.build({"type": kind, "bit": bit, "name": name.encode().ljust(46, b"\0")})
        for (kind, bit), name in lay.FEATURE_NAMES.items()
    ]
    data = b"".join(rows)
    return bytes(lay.EXTENSION_HEADER.build({"magic": lay.EXT_FEATURE_NAMES, "length": len(data)})) + data


def create_qcow2(
    path: str | PathLike[str], content: BinaryIO | bytes, *, cluster_size: int = 65536, version: int = 3
) -> None:
    """Write a qcow2 image holding ``content``, rounded up to whole sectors; all-zero clusters take no space.

    The file gets its name when it is complete.

    Args:
        path: The image to be made; must not exist.
        content: The guest's disk, as bytes or a seekable binary file.
        cluster_size: In bytes, a power of two from 512 to 2 MiB.
        version: 2 or 3.

    Raises:
        UsageError: a parameter is out of range, or ``path`` exists.
        FileError: the file cannot be written.
    """
    if cluster_size not in [1 << bits for bits in range(lay.MIN_CLUSTER_BITS, lay.MAX_CLUSTER_BITS + 1)]:
        raise UsageError(f"cluster size {cluster_size} is not a power of two from 512 to 2097152")
    if version not in (2, 3):
        raise UsageError(f"version {version} is neither 2 nor 3")
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    size = source.seek(0, io.SEEK_END)
    source.seek(0)
    if size == 0:
        raise UsageError("an image needs at least one byte of content", file=path)
    with atomic_output(path) as fd:
        rounded = -(-size // lay.SECTOR) * lay.SECTOR
        builder = _Builder(Writer(fd, file=path), rounded, cluster_size.bit_length() - 1, version)
        if builder.l1_size * 8 > lay.MAX_L1_BYTES:
            raise UsageError(f"{size} bytes of content need bigger clusters than {cluster_size}", file=path)
        builder.add_clusters(source)
        builder.finish()
