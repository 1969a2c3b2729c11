"""The block map: one 32-bit number a block, decoded in bulk with numpy."""

from __future__ import annotations

import threading
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.mapped import U8, U64, BlockKind, BlockMap
from vmgraft.imagefmt.vdi import _layout as lay
from vmgraft.imagefmt.vdi.header import Header

#: Entries looked at in one go while the whole map is checked: 4 MiB of it.
_STEP: Final = 1 << 20

U32 = npt.NDArray[np.uint32]


class VdiBlocks(BlockMap):
    """The map of one image.

    Args:
        file: The image.
        header: Its header.
    """

    def __init__(self, file: FlatFile, header: Header) -> None:
        self._file = file
        self._header = header
        self.block_size = header.block_size
        self.virtual_size = header.disk_size
        self.stored_limit = max(0, file.size - header.offset_data)
        self._checked = False
        self._lock = threading.Lock()

    def entries(self, first: int, count: int) -> tuple[U8, U64]:
        """Return kind and file offset of ``count`` blocks from ``first`` on.

        Raises:
            MalformedImageError: when an entry points astray, or two to the same block.
        """
        with self._lock:
            if not self._checked:
                self._check_all()
                self._checked = True
        numbers = self._numbers(first, count)
        stored = self._check(numbers, first)
        kind = np.where(stored, BlockKind.DATA, BlockKind.HOLE).astype(np.uint8)
        kind[numbers == lay.BLOCK_ZERO] = BlockKind.ZERO
        host = numbers.astype(np.uint64) * np.uint64(self.block_size) + np.uint64(self._header.offset_data)
        return kind, np.where(stored, host, np.uint64(0))

    def _numbers(self, first: int, count: int) -> U32:
        offset = self._header.offset_blocks + 4 * first
        data = self._file.read(offset, 4 * count)
        if len(data) < 4 * count:
            message = "the file ends inside the block map"
            raise MalformedImageError(message, file=self._file.path, offset=offset + len(data), field="block map")
        return np.frombuffer(data, dtype="<u4").astype(np.uint32)

    def _check(self, numbers: U32, first: int) -> Any:
        """Return which entries name a block; each of those must be allocated and lie in the file."""
        stored = numbers < np.uint32(lay.BLOCK_ZERO)
        wrong = stored & (numbers >= np.uint32(self._header.blocks_allocated))
        if wrong.any():
            message = f"is not one of the {self._header.blocks_allocated} blocks allocated"
            self._bad(numbers, first, int(np.flatnonzero(wrong)[0]), message)
        behind = stored & (numbers.astype(np.int64) >= (self._file.size - self._header.offset_data) // self.block_size)
        if behind.any():
            wrong = behind & (self._ends(numbers, first) > self._file.size)
            if wrong.any():
                self._bad(numbers, first, int(np.flatnonzero(wrong)[0]), "lies behind the end of the file")
        return stored

    def _ends(self, numbers: U32, first: int) -> npt.NDArray[np.int64]:
        """Return the file offset behind what the disk uses of each block; 0 for blocks behind the disk's end."""
        starts = (np.arange(len(numbers), dtype=np.int64) + first) * self.block_size
        lengths = np.minimum(self.block_size, self.virtual_size - starts)
        ends = numbers.astype(np.int64) * self.block_size + self._header.offset_data + lengths
        return np.where(lengths > 0, ends, 0)

    def _check_all(self) -> None:
        """Go through the whole map once, looking for blocks that are used twice."""
        seen = np.zeros(self._header.blocks_allocated, dtype=np.bool_)
        for first in range(0, self._header.blocks, _STEP):
            numbers = self._numbers(first, min(_STEP, self._header.blocks - first))
            at = np.flatnonzero(self._check(numbers, first))
            used = numbers[at]
            order = np.sort(used)
            again = seen[used]
            if (order[1:] == order[:-1]).any():
                first_use = np.zeros(len(used), dtype=np.bool_)
                first_use[np.unique(used, return_index=True)[1]] = True
                again = again | ~first_use
            if again.any():
                self._bad(numbers, first, int(at[np.flatnonzero(again)[0]]), "is used twice")
            seen[used] = True

    def _bad(self, numbers: U32, first: int, at: int, message: str) -> NoReturn:
        raise MalformedImageError(
            f"block {first + at} of the disk: number {int(numbers[at])} {message}",
            file=self._file.path,
            offset=self._header.offset_blocks + 4 * (first + at),
            field="block map",
            hint="`qemu-img check` shows the damage",
        )
