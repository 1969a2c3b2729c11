"""The block allocation table and the sector bitmaps of a dynamic VHD."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.mapped import U8, U64, BlockKind, BlockMap
from vmgraft.imagefmt.vhd import _layout as layout
from vmgraft.imagefmt.vhd.header import Container, DynamicHeader

_U32 = npt.NDArray[np.uint32]
_FULL, _PARTLY = 1, 2


class VhdBlocks(BlockMap):
    """The blocks of a dynamic disk.

    The whole table is read and checked at once: at most 16 MiB.

    Args:
        file: The image.
        container: Its footer.
        header: Its dynamic header.

    Raises:
        MalformedImageError: when an entry points out of the file, onto metadata, or onto another block.
    """

    def __init__(self, file: FlatFile, container: Container, header: DynamicHeader) -> None:
        self._file = file
        self._header = header
        self.block_size = header.block_size
        self.virtual_size = container.footer.virtual_size
        self.stored_limit = file.size
        data = file.read(header.table_offset, header.entries * layout.ENTRY_SIZE)
        self._table: _U32 = np.frombuffer(data, dtype=">u4").astype(np.uint32)
        if len(self._table) != header.entries:
            raise self._bad(0, "the block allocation table is cut short")
        self._check(container)
        count = -(-self.virtual_size // self.block_size)
        self._mapped = np.flatnonzero(self._table[:count] != layout.UNUSED)
        #: What is known of each block's bitmap: nothing yet, every bit is set, or not.
        self._full = bytearray(count)

    @property
    def allocated(self) -> int:
        """Number of blocks that are stored."""
        return len(self._mapped)

    def entries(self, first: int, count: int) -> tuple[U8, U64]:
        """Return kinds and file offsets; see :class:`BlockMap`."""
        part = self._table[first : first + count]
        stored = part != layout.UNUSED
        host = part.astype(np.uint64) * np.uint64(layout.SECTOR_SIZE) + np.uint64(self._header.bitmap_size)
        kind = np.where(stored, np.uint8(BlockKind.DATA), np.uint8(BlockKind.HOLE)).astype(np.uint8)
        return kind, np.where(stored, host, np.uint64(0))

    def skip_unmapped(self, block: int, end: int) -> int:
        """Return the next stored block."""
        at = int(np.searchsorted(self._mapped, block))
        return int(self._mapped[at]) if at < len(self._mapped) else end

    def check_bitmaps(self, offset: int, view: memoryview) -> None:
        """Refuse sectors that the bitmap calls never written although bytes stand there.

        The specification has such sectors read as zeros, QEMU shows the bytes and 7-Zip reports a data error: what a
        guest sees would depend on who asks.

        Args:
            offset: Guest offset of the bytes, in bytes.
            view: The bytes that were read there.

        Raises:
            MalformedImageError: for such a sector.
        """
        end = offset + len(view)
        for block in range(offset // self.block_size, -(-end // self.block_size)):
            entry, start = int(self._table[block]), block * self.block_size
            if entry == layout.UNUSED or self._is_full(block, entry):
                continue
            low, high = max(start, offset), min(start + self.block_size, end)
            self._check_bitmap(block, entry, low - start, view[low - offset : high - offset])

    def _is_full(self, block: int, entry: int) -> bool:
        """Return whether every bit of a block's bitmap is set; the answer is kept."""
        if not self._full[block]:
            data = self._file.read(entry * layout.SECTOR_SIZE, -(-self.block_size // layout.SECTOR_SIZE // 8))
            self._full[block] = _FULL if data.count(0xFF) == len(data) else _PARTLY
        return self._full[block] == _FULL

    def _check_bitmap(self, block: int, entry: int, at: int, view: memoryview) -> None:
        """Compare the bytes at ``at`` of a block with the part of its bitmap that speaks of them."""
        size = layout.SECTOR_SIZE
        first, last = at // size, -(-(at + len(view)) // size)
        where = entry * size + first // 8
        data = self._file.read(where, -(-last // 8) - first // 8)
        # Bit 7 is the first sector.
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))[first % 8 : first % 8 + last - first]
        sectors = np.zeros((last - first) * size, dtype=np.uint8)
        sectors[at % size : at % size + len(view)] = np.frombuffer(view, dtype=np.uint8)
        wrong = sectors.reshape(-1, size).any(axis=1) & (bits == 0)
        if wrong.any():
            sector = first + int(np.argmax(wrong))
            raise MalformedImageError(
                f"the bitmap of block {block} says that sector {sector} was never written, but bytes stand there: "
                "programs see different content",
                file=self._file.path,
                offset=entry * size + sector // 8,
                field="sector bitmap",
                hint="let the program that made the image write a new one",
            )

    def _check(self, container: Container) -> None:
        """Check where all blocks lie; in sectors and without their numbers, as there may be four million."""
        header, size = self._header, layout.SECTOR_SIZE
        stored = self._table != layout.UNUSED
        first = self._table[stored]
        length = (header.bitmap_size + header.block_size) // size
        fits = container.end // size - length
        behind = first > np.uint32(min(fits, layout.UNUSED)) if fits >= 0 else np.ones(len(first), dtype=np.bool_)
        self._refuse(stored, behind, "reaches behind the end of the data: the file was cut")
        table_end = header.table_offset + header.entries * layout.ENTRY_SIZE
        metadata = [
            (0, layout.FOOTER_SIZE),
            (header.offset, header.offset + layout.HEADER_SIZE),
            (header.table_offset, table_end),
            *((low, min(low + count, container.end)) for low, count in header.locators if low < container.end),
        ]
        for low, high in metadata:
            begin, end = max(0, low // size - length + 1), -(-high // size)
            if begin < end:
                on_it = (first >= np.uint32(begin)) & (first < np.uint32(min(end, layout.UNUSED)))
                self._refuse(stored, on_it, "lies on metadata of the container")
        ordered = np.sort(first)
        close = np.diff(ordered) < length
        if close.any():
            later = ordered[1:][np.argmax(close)]
            same = np.flatnonzero(first == later)
            self._refuse(stored, np.arange(len(first)) == same[-1], "overlaps another block")

    def _refuse(self, stored: npt.NDArray[np.bool_], wrong: npt.NDArray[np.bool_], what: str) -> None:
        """Complain of the first wrong one of the stored blocks."""
        if wrong.any():
            block = int(np.flatnonzero(stored)[int(np.argmax(wrong))])
            raise self._bad(block, f"block {block}, stored at sector {int(self._table[block])}, {what}")

    def _bad(self, block: int, message: str) -> MalformedImageError:
        offset = self._header.table_offset + block * layout.ENTRY_SIZE
        return MalformedImageError(message, file=self._file.path, offset=offset, field="block allocation table")
