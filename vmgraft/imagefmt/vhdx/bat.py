"""The block allocation table (2.5): where the blocks of the disk lie in the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.contract import Kind
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.mapped import U8, U64, BlockKind, BlockMap
from vmgraft.imagefmt.vhdx import _layout as lay
from vmgraft.imagefmt.vhdx.metadata import DiskFacts
from vmgraft.imagefmt.vhdx.regions import Region

#: Kind by state; other states are refused.
_KINDS = {
    lay.NOT_PRESENT: BlockKind.HOLE,
    lay.UNDEFINED: BlockKind.HOLE,
    lay.ZERO: BlockKind.ZERO,
    lay.UNMAPPED: BlockKind.HOLE,
    lay.UNMAPPED_V095: BlockKind.HOLE,
    lay.FULLY_PRESENT: BlockKind.DATA,
}
_KIND_OF_STATE = np.array([_KINDS.get(state, 255) for state in range(8)], dtype=np.uint8)
#: MiB of the file that are marked at a time when looking for blocks that overlap.
_MARKS = 1 << 18
_ENTRIES = 1 << 16


@dataclass(frozen=True, slots=True)
class Survey:
    """What the whole table says about the file; offsets in bytes.

    Attributes:
        end: Behind every object in the file, blocks counted in full and those with a place but no data included. Only
            from here on is there room for a region: QEMU refuses one that overlaps a block of which the file holds
            only the part that is within the disk.
        stored_end: Behind every byte of the file that is needed without a graft.
        present: How many blocks hold data.
    """

    end: int
    stored_end: int
    present: int


class BlockTable(BlockMap):
    """The table of an image without parent; entries are read when they are asked for, and checked then.

    Args:
        flat: The file.
        region: Where the table lies.
        facts: Sizes of disk and blocks.
        objects: Regions and log: what no block may overlap.

    Raises:
        MalformedImageError: when the table is too short for the disk.
    """

    def __init__(self, flat: FlatFile, region: Region, facts: DiskFacts, objects: Sequence[Region]) -> None:
        self._flat = flat
        self._region = region
        self._objects = objects
        self.block_size = facts.block_size
        self.virtual_size = facts.virtual_size
        self.stored_limit = flat.size
        self._blocks = -(-facts.virtual_size // facts.block_size)
        #: Payload blocks before each entry of a sector bitmap block (2.5, "chunk ratio").
        self._ratio = lay.BITMAP_SECTORS * facts.logical_sector // facts.block_size
        if flat.size > lay.MAX_FILE_SIZE:
            message = f"the file has {flat.size} bytes, more than any VHDX file needs"
            raise MalformedImageError(message, file=flat.path, field="file size")
        self._count = self._blocks + (self._blocks - 1) // self._ratio
        if self._count * 8 > region.length:
            self._bad(0, f"the table has room for {region.length // 8} entries, and the disk needs {self._count}")
        taken = sorted([(0, lay.HEADER_SECTION_SIZE), *((item.offset, item.end) for item in objects)])
        self._taken = np.array([edge for span in taken for edge in span], dtype=np.uint64)

    def entries(self, first: int, count: int) -> tuple[U8, U64]:
        """Return kind and place of blocks; see :class:`BlockMap`."""
        blocks = np.arange(first, first + count, dtype=np.int64)
        index = blocks + blocks // self._ratio
        start = int(index[0])
        words = self._words(start, int(index[-1]) + 1 - start)[index - start]
        return self._decode(words, index)

    def skip_unmapped(self, block: int, end: int) -> int:
        """Skip blocks whose entries lie in a hole of the file: they are zero, hence not present."""
        first = self._region.offset + 8 * (block + block // self._ratio)
        last = self._region.offset + 8 * self._count
        run = next(self._flat.extents_from(first, last), None)
        if run is None or run.kind is not Kind.HOLE:
            return block
        # Between any two payload entries there is at most one of a bitmap, so this block is not behind the run's end.
        index = (run.start + run.length - self._region.offset) // 8
        return max(block, min(end, index - index // (self._ratio + 1)))

    def survey(self) -> Survey:
        """Check the whole table, that no two blocks overlap included.

        Raises:
            MalformedImageError: when an entry points astray.
        """
        end = max([lay.HEADER_SECTION_SIZE, *(item.end for item in self._objects)])
        others = [item.end for item in self._objects if item.guid != lay.GRAFT_REGION and item.end <= self._flat.size]
        stored = max([lay.HEADER_SECTION_SIZE, *others])
        used = np.zeros(self._flat.size // lay.MIB + 1 + self.block_size // lay.MIB, dtype=np.bool_)
        present = 0
        for index, words in self._runs():
            place = words & np.uint64(lay.OFFSET_MASK)
            # What a block keeps of its old place counts as taken, as long as it lies in the file.
            kept = place[(place > 0) & (place <= np.uint64(max(0, self._flat.size - self.block_size)))]
            end = max(end, int(kept.max()) + self.block_size if len(kept) else 0)
            payload = (index + 1) % (self._ratio + 1) != 0
            kinds, hosts = self._decode(words[payload], index[payload])
            data = kinds == BlockKind.DATA
            if not data.any():
                continue
            hosts, where = hosts[data], index[payload][data]
            present += len(hosts)
            needed = self._needed(where)
            end = max(end, int(hosts.max()) + self.block_size)
            stored = max(stored, int((hosts + needed).max()))
            self._mark(used, hosts, where)
        return Survey(end, stored, present)

    def _mark(self, used: npt.NDArray[np.bool_], hosts: U64, index: Any) -> None:
        """Mark the MiB that blocks take, and refuse those that are taken twice."""
        width = self.block_size // lay.MIB
        step = max(1, _MARKS // width)
        for at in range(0, len(hosts), step):
            first = (hosts[at : at + step] // np.uint64(lay.MIB)).astype(np.int64)
            where = index[at : at + step]
            order = np.argsort(first)
            close = np.append(np.diff(first[order]) < width, False)
            self._refuse(close, where[order], "the block overlaps another one")
            slots = first[:, None] + np.arange(width)
            self._refuse(used[slots].any(axis=1), where, "the block overlaps another one")
            used[slots] = True

    def _runs(self) -> Iterator[tuple[Any, U64]]:
        """Yield the entries that do not lie in holes of the file, with their indexes."""
        first, last = self._region.offset, self._region.offset + 8 * self._count
        for extent in self._flat.extents_from(first, last):
            if extent.kind is Kind.HOLE:
                continue
            begin = (extent.start - first) // 8
            stop = -(-(extent.start + extent.length - first) // 8)
            for at in range(begin, stop, _ENTRIES):
                count = min(_ENTRIES, stop - at)
                yield np.arange(at, at + count, dtype=np.int64), self._words(at, count)

    def _words(self, index: int, count: int) -> U64:
        data = self._flat.read(self._region.offset + 8 * index, 8 * count)
        if len(data) != 8 * count:
            self._bad(index, "the file became shorter while it was read")
        return np.frombuffer(data, dtype="<u8").astype(np.uint64, copy=False)

    def _decode(self, words: U64, index: Any) -> tuple[U8, U64]:
        state = (words & np.uint64(lay.STATE_MASK)).astype(np.intp)
        kinds = _KIND_OF_STATE[state]
        self._refuse(kinds == 255, index, "the state of the block is not one that a disk without parent may have")
        self._refuse((words & np.uint64(lay.RESERVED_MASK)) != 0, index, "reserved bits are set")
        hosts = words & np.uint64(lay.OFFSET_MASK)
        data = kinds == BlockKind.DATA
        if data.any():
            begin, where = hosts[data], index[data]
            behind = begin > np.uint64(self._flat.size)
            self._refuse(behind, where, "the block lies behind the end of the file")
            end = begin + self._needed(where)
            self._refuse(end > np.uint64(self._flat.size), where, "the block ends behind the end of the file")
            full = begin + np.uint64(self.block_size)
            low, high = np.searchsorted(self._taken, begin, "right"), np.searchsorted(self._taken, full, "left")
            self._refuse((low != high) | (low % 2 == 1), where, "the block lies on the container's own metadata")
        return kinds, hosts

    def _needed(self, index: Any) -> U64:
        """Return how many bytes of each block belong to the disk: all of it, but for the last one."""
        block = index - index // (self._ratio + 1)
        rest = self.virtual_size - block * self.block_size
        needed: U64 = np.minimum(rest, self.block_size).astype(np.uint64)
        return needed

    def _refuse(self, wrong: Any, index: Any, message: str) -> None:
        if wrong.any():
            self._bad(int(index[np.flatnonzero(wrong)[0]]), message)

    def _bad(self, index: int, message: str) -> NoReturn:
        offset = self._region.offset + 8 * index
        raise MalformedImageError(message, file=self._flat.path, offset=offset, field=f"BAT entry {index}")
