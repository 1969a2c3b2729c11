"""Grain directory and grain tables, decoded in bulk with numpy."""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.mapped import U8, U64, BlockKind, BlockMap
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.vmdk import _layout as lay
from vmgraft.imagefmt.vmdk.header import Header

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]
_GT_BYTES = lay.GT_SECTORS * lay.SECTOR


def read_directory(file: FlatFile, header: Header, offset: int) -> U32:
    """Return the sectors of the grain tables of the directory at sector ``offset``; 0 where there is none.

    Raises:
        MalformedImageError: when the file ends before the directory does.
    """
    length = header.tables * 4
    data = file.read(offset * lay.SECTOR, length)
    if len(data) < length:
        message = "the file ends inside the grain directory"
        raise MalformedImageError(message, file=file.path, offset=offset * lay.SECTOR, field="grain directory")
    return np.frombuffer(data, dtype="<u4").astype(np.uint32)


class VmdkGrains(BlockMap):
    """The tables of one image.

    Args:
        file: The image.
        header: Its header.

    Raises:
        MalformedImageError: when a grain table lies outside the file or on other metadata.
    """

    least_compressed = lay.SECTOR

    def __init__(self, file: FlatFile, header: Header) -> None:
        self._file = file
        self._header = header
        self.block_size = header.grain_bytes
        self.virtual_size = header.capacity * lay.SECTOR
        self.stored_limit = max(0, file.size - header.overhead * lay.SECTOR)
        self._gd = read_directory(file, header, header.gd_offset)
        self._late_starts, self._late_ends = self._check_metadata()

    # --- metadata --------------------------------------------------------------------------------------------------

    def _check_metadata(self) -> tuple[I64, I64]:
        """Check that no two tables share a sector; return starts and ends of metadata that lies among the grains."""
        header = self._header
        tables = [self._gd[self._gd != 0]]
        fixed = [(0, 1), (header.descriptor_offset, header.descriptor_size), (header.gd_offset, header.gd_sectors)]
        if header.rgd_offset:
            second = read_directory(self._file, header, header.rgd_offset)
            tables.append(second[second != 0])
            fixed.append((header.rgd_offset, header.gd_sectors))
        starts = np.sort(np.concatenate(tables))
        last = int(starts[-1]) + lay.GT_SECTORS if len(starts) else 0
        if last * lay.SECTOR > -(-self._file.size // lay.SECTOR) * lay.SECTOR:
            self._bad_table(f"a grain table ends at sector {last}, behind the end of the file")
        shared = np.flatnonzero(np.diff(starts) < lay.GT_SECTORS)
        if len(shared):
            self._bad_table(f"the grain table at sector {int(starts[shared[0] + 1])} lies on other metadata")
        for start, length in fixed:
            low, high = np.searchsorted(starts, [max(0, start - lay.GT_SECTORS + 1), start + length])
            if high > low:
                self._bad_table(f"the grain table at sector {int(starts[low])} lies on other metadata")
        first = int(np.searchsorted(starts, max(0, header.overhead - lay.GT_SECTORS), side="right"))
        late = [(start, start + length) for start, length in fixed if start + length > header.overhead]
        begin = np.concatenate([starts[first:].astype(np.int64), np.array([one for one, _ in late], dtype=np.int64)])
        end = np.concatenate([begin[: len(starts) - first] + lay.GT_SECTORS, np.array([e for _, e in late], np.int64)])
        order = np.argsort(begin)
        return begin[order], end[order]

    def _bad_table(self, message: str) -> NoReturn:
        where = self._header.gd_offset * lay.SECTOR
        hint = "`qemu-img check` shows the damage"
        raise MalformedImageError(message, file=self._file.path, offset=where, field="grain directory", hint=hint)

    # --- entries ---------------------------------------------------------------------------------------------------

    def skip_unmapped(self, block: int, end: int) -> int:
        """Return the first grain from ``block`` on that has a table, ``end`` at most."""
        index = block // lay.GTES_PER_GT
        if self._gd[index]:
            return block
        there = np.flatnonzero(self._gd[index : -(-end // lay.GTES_PER_GT)])
        return min(end, (index + int(there[0])) * lay.GTES_PER_GT) if len(there) else end

    def entries(self, first: int, count: int) -> tuple[U8, U64]:
        """Return kind and file offset of ``count`` grains from grain ``first`` on.

        Raises:
            MalformedImageError: when an entry points astray, or two to the same place.
        """
        sectors = self._sectors(first, count)
        kind = np.full(count, BlockKind.HOLE, dtype=np.uint8)
        host = np.zeros(count, dtype=np.uint64)
        used = np.flatnonzero(sectors)
        if self._header.zeroed:
            zero = sectors[used] == 1
            kind[used[zero]] = BlockKind.ZERO
            used = used[~zero]
        if len(used):
            at = sectors[used].astype(np.int64)
            self._check(at, used + first)
            kind[used] = BlockKind.COMPRESSED if self._header.compressed else BlockKind.DATA
            host[used] = at * lay.SECTOR
        return kind, host

    def _sectors(self, first: int, count: int) -> U32:
        """Return table entries; tables that follow each other in the file are read at once."""
        out = np.zeros(count, dtype=np.uint32)
        begin, end = first // lay.GTES_PER_GT, -(-(first + count) // lay.GTES_PER_GT)
        tables = self._gd[begin:end].astype(np.int64)
        breaks = np.flatnonzero((np.diff(tables) != lay.GT_SECTORS) | (tables[1:] == 0)) + 1
        edges = [0, *breaks.tolist(), len(tables)]
        for low, high in pairwise(edges):
            if tables[low]:
                entries = self._read_tables(int(tables[low]), high - low)
                start = (begin + low) * lay.GTES_PER_GT
                skip = max(0, first - start)
                piece = entries[skip : first + count - start]
                out[start + skip - first : start + skip - first + len(piece)] = piece
        return out

    def _read_tables(self, sector: int, count: int) -> U32:
        data = self._file.read(sector * lay.SECTOR, count * _GT_BYTES)
        # The last sector of a file may be cut short; what would stand there is zero, as in QEMU.
        if -(-len(data) // lay.SECTOR) * lay.SECTOR < count * _GT_BYTES:
            message = "the file ends inside a grain table"
            raise MalformedImageError(message, file=self._file.path, offset=sector * lay.SECTOR, field="grain table")
        return np.frombuffer(data.ljust(count * _GT_BYTES, b"\0"), dtype="<u4").astype(np.uint32)

    def _check(self, at: I64, grains: I64) -> None:
        """Check the sectors ``at`` of the grains with the given numbers."""
        header = self._header
        self._refuse(at < header.overhead, at, grains, "lies in the metadata")
        if header.compressed:
            ends = at * lay.SECTOR + lay.GRAIN_MARKER_SIZE
        else:
            ends = at * lay.SECTOR + np.minimum(self.block_size, self.virtual_size - grains * self.block_size)
        self._refuse(ends > self._file.size, at, grains, "lies behind the end of the file")
        apart = 1 if header.compressed else header.grain_size
        order = np.argsort(at, kind="stable")
        again = np.zeros(len(at), dtype=np.bool_)
        again[order[1:][np.diff(at[order]) < apart]] = True
        self._refuse(again, at, grains, "is used twice")
        if len(self._late_starts):
            index = np.searchsorted(self._late_ends, at, side="right")
            behind = np.append(self._late_starts, np.iinfo(np.int64).max)[index]
            self._refuse(at + apart > behind, at, grains, "lies on a table")

    def _refuse(self, wrong: npt.NDArray[np.bool_], at: I64, grains: I64, message: str) -> None:
        if not wrong.any():
            return
        index = int(np.flatnonzero(wrong)[0])
        table, inside = divmod(int(grains[index]), lay.GTES_PER_GT)
        raise MalformedImageError(
            f"grain {int(grains[index])}: sector {int(at[index])} {message}",
            file=self._file.path,
            offset=int(self._gd[table]) * lay.SECTOR + 4 * inside,
            field="grain table",
            hint="`qemu-img check` shows the damage",
        )

    # --- compressed grains -----------------------------------------------------------------------------------------

    def expand(self, host: int, block: int) -> bytes:
        """Return the bytes of a compressed grain; zeros behind the end of the disk.

        Raises:
            MalformedImageError: when its marker names another grain, or the data is cut, garbage or of another length.
        """
        head = self._file.read(host, lay.GRAIN_MARKER_SIZE)
        marker = parse_struct(lay.GRAIN_MARKER, head, file=self._file.path, offset=host, what="grain marker")
        lba = block * self._header.grain_size
        if marker.lba != lba:
            self._bad_grain(host, "lba", f"the marker says sector {marker.lba}, the table {lba}")
        # Deflate adds a few bytes to what it cannot make smaller; QEMU's limit.
        if not 0 < marker.size <= 2 * self.block_size:
            self._bad_grain(host, "size", f"{marker.size} compressed bytes for a grain of {self.block_size}")
        data = self._file.read(host + lay.GRAIN_MARKER_SIZE, marker.size)
        if len(data) < marker.size:
            self._bad_grain(host, "size", f"{marker.size} compressed bytes, but the file ends after {len(data)}")
        needed = min(self.block_size, self.virtual_size - block * self.block_size)
        return self._inflate(data, needed, host).ljust(self.block_size, b"\0")

    def _inflate(self, data: bytes, needed: int, host: int) -> bytes:
        stream = zlib.decompressobj()
        try:
            out = stream.decompress(data, self.block_size)
            more = b"" if stream.eof else stream.decompress(stream.unconsumed_tail, 1)
        except zlib.error as problem:
            self._bad_grain(host, "data", f"cannot be inflated ({problem})")
        if more or not stream.eof:
            self._bad_grain(host, "data", f"does not end after the {self.block_size} bytes of a grain")
        if len(out) < needed:
            self._bad_grain(host, "data", f"inflates to {len(out)} bytes instead of {needed}")
        return out

    def _bad_grain(self, host: int, field: str, message: str) -> NoReturn:
        raise MalformedImageError(message, file=self._file.path, offset=host, field=f"grain.{field}")
