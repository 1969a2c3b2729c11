"""Compressed clusters, raw deflate or zstd: at most one cluster of output from no more input than the entry says."""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from typing import NoReturn

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.qcow2.header import Header
from vmgraft.imagefmt.qcow2.source import Source

#: QEMU deflates with a 4 KiB window and without zlib header (block/qcow2-threads.c).
_WINDOW_BITS = -12
#: QEMU compresses one cluster (2 MiB at most) a frame, so a bigger window only serves to eat memory.
_MAX_ZSTD_WINDOW = 8 << 20
_CACHE_BYTES = 4 << 20


class CompressedReader:
    """Reads compressed clusters of one image and keeps the last few, because guests read sector by sector."""

    def __init__(self, source: Source, header: Header) -> None:
        self._source = source
        self._header = header
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._keep = max(2, _CACHE_BYTES // header.cluster_size)

    def cluster(self, entry: int) -> bytes:
        """Return the content of the cluster that the L2 entry ``entry`` describes (exactly one cluster).

        Raises:
            MalformedImageError: the data lies outside the file, is cut or is garbage.
        """
        with self._lock:
            if entry in self._cache:
                self._cache.move_to_end(entry)
                return self._cache[entry]
        content = self._decompress(entry)
        with self._lock:
            self._cache[entry] = content
            while len(self._cache) > self._keep:
                self._cache.popitem(last=False)
        return content

    def _decompress(self, entry: int) -> bytes:
        # spec, "Compressed Clusters Descriptor"
        shift = 62 - (self._header.cluster_bits - 8)
        offset = entry & (1 << shift) - 1
        sectors = entry >> shift & (1 << 62 - shift) - 1
        length = (sectors + 1) * lay.COMPRESSED_SECTOR - offset % lay.COMPRESSED_SECTOR
        if offset < self._header.cluster_size or offset >= self._source.size:
            self._bad(offset, "the descriptor points outside the data area")
        packed = self._source.read(offset, length)
        if self._header.compression_type == lay.COMPRESSION_ZSTD:
            return self._unzstd(packed, offset)
        return self._inflate(packed, offset)

    def _bad(self, offset: int, message: str) -> NoReturn:
        raise MalformedImageError(message, file=self._source.file, offset=offset, field="compressed_cluster")

    def _inflate(self, packed: bytes, offset: int) -> bytes:
        size = self._header.cluster_size
        try:
            out = zlib.decompressobj(_WINDOW_BITS).decompress(packed, size)
        except zlib.error as exc:
            self._bad(offset, f"cannot be inflated ({exc})")
        if len(out) != size:
            self._bad(offset, f"inflates to {len(out)} bytes instead of {size}")
        return out

    def _unzstd(self, packed: bytes, offset: int) -> bytes:
        import zstandard

        size = self._header.cluster_size
        reader = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).stream_reader(packed)
        try:
            out = reader.read(size)
        except zstandard.ZstdError as exc:
            self._bad(offset, f"cannot be decompressed ({exc})")
        if len(out) != size:
            self._bad(offset, f"decompresses to {len(out)} bytes instead of {size}")
        return out
