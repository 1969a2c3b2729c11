"""Guest content in blocks of one size that lie anywhere in a file: what VHDX, VMDK, VHD and VDI have in common."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from vmgraft.errors import FileError, MalformedImageError
from vmgraft.imagefmt.contract import Extent, Kind
from vmgraft.imagefmt.flatfile import FlatFile

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]

#: Blocks decoded at a time while walking, and kept at a time for reads.
_BATCH = 1 << 16
_WINDOW = 1 << 12
_WINDOWS = 64


class BlockKind(IntEnum):
    """What a table says about a block."""

    HOLE = 0
    ZERO = 1
    DATA = 2  #: stored as it is
    COMPRESSED = 3  #: ``BlockMap.expand`` turns it into bytes


_KINDS = {
    BlockKind.HOLE: Kind.HOLE,
    BlockKind.ZERO: Kind.ZERO,
    BlockKind.DATA: Kind.DATA,
    BlockKind.COMPRESSED: Kind.DATA,
}


#: Compressed blocks are data like others for those who ask for extents.
_JOINED = np.array([BlockKind.HOLE, BlockKind.ZERO, BlockKind.DATA, BlockKind.DATA], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Run:
    """Guest bytes ``start`` .. ``start + length`` that stand together in the file from ``host`` on."""

    start: int
    length: int
    kind: BlockKind
    host: int


class BlockMap(ABC):
    """The table of a container.

    Attributes:
        block_size: Bytes of guest content in a block.
        virtual_size: Bytes of guest content; the last block may be cut short by it.
        stored_limit: Bytes of the file at most that blocks can fill; more mapped data than that means blocks that are
            used twice, and is refused. Compressed blocks count as ``least_compressed`` bytes each.
    """

    block_size: int
    virtual_size: int
    stored_limit: int
    #: The fewest file bytes that a compressed block takes.
    least_compressed: int = 64

    @abstractmethod
    def entries(self, first: int, count: int) -> tuple[U8, U64]:
        """Return kind (:class:`BlockKind`) and file offset of ``count`` blocks from block ``first`` on.

        Offsets of ``DATA`` blocks must be checked by the map: the whole block (or its part below ``virtual_size``) lies
        in the file and not on metadata. Thread-safe.

        Raises:
            MalformedImageError: when an entry points astray.
        """

    def skip_unmapped(self, block: int, end: int) -> int:
        """Return the first block from ``block`` on, ``end`` at most, that may be mapped; skipping makes walks fast."""
        return block

    def expand(self, host: int, block: int) -> bytes:
        """Return the ``block_size`` bytes of a compressed block; only called for such.

        Raises:
            MalformedImageError: when it does not decompress to exactly that.
        """
        raise NotImplementedError


class MappedContent:
    """Reads guest content through a :class:`BlockMap`. Safe to use from several threads.

    Args:
        file: The file the blocks lie in.
        blocks: Its table.
    """

    def __init__(self, file: FlatFile, blocks: BlockMap) -> None:
        self._file = file
        self._map = blocks
        self._size = blocks.block_size
        self._count = -(-blocks.virtual_size // self._size)
        self._windows: OrderedDict[int, tuple[list[int], list[Run]]] = OrderedDict()
        self._expanded: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The file, for messages."""
        return self._file.path

    # --- reading ---------------------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with guest content from ``offset``; return how many bytes, fewer only at the content's end.

        Raises:
            MalformedImageError: the table points astray.
            FileError: the file cannot be read.
        """
        end = min(offset + len(buffer), self._map.virtual_size)
        if offset < 0 or end <= offset:
            return 0
        for run in self._runs(offset, end):
            self._fill(run, buffer[run.start - offset : run.start - offset + run.length])
        return end - offset

    def _fill(self, run: Run, view: memoryview) -> None:
        if run.kind is BlockKind.DATA:
            got = self._file.readinto(run.host, view)
            if got != len(view):
                raise FileError("the file became shorter while it was read", file=self.path, offset=run.host + got)
        elif run.kind is BlockKind.COMPRESSED:
            block = run.start // self._size
            inside = run.start - block * self._size
            view[:] = self._block(run.host, block)[inside : inside + run.length]
        else:
            view[:] = bytes(len(view))

    def _block(self, host: int, block: int) -> bytes:
        with self._lock:
            if block in self._expanded:
                self._expanded.move_to_end(block)
                return self._expanded[block]
        data = self._map.expand(host, block)
        with self._lock:
            self._expanded[block] = data
            while len(self._expanded) > 1 and len(self._expanded) * self._size > 4 << 20:
                self._expanded.popitem(last=False)
        return data

    def _runs(self, start: int, end: int) -> Iterator[Run]:
        """Yield the runs that cover guest bytes ``start`` .. ``end``, clipped to them."""
        size = _WINDOW * self._size
        for index in range(start // size, -(-end // size)):
            starts, runs = self._window(index)
            at = max(0, bisect_right(starts, start) - 1)
            while at < len(runs) and runs[at].start < end:
                yield _clip(runs[at], start, end)
                at += 1

    def _window(self, index: int) -> tuple[list[int], list[Run]]:
        with self._lock:
            if index in self._windows:
                self._windows.move_to_end(index)
                return self._windows[index]
        first = index * _WINDOW
        runs = list(self._batch(first, min(_WINDOW, self._count - first)))
        window = ([run.start for run in runs], runs)
        with self._lock:
            self._windows[index] = window
            while len(self._windows) > _WINDOWS:
                self._windows.popitem(last=False)
        return window

    # --- walking ---------------------------------------------------------------------------------------------------

    def extents(self) -> Iterator[Extent]:
        """Yield the runs of the whole content, neighbours of one kind joined.

        Raises:
            MalformedImageError: the table points astray, or maps more than the file can hold.
        """
        start = end = 0
        kind = Kind.HOLE
        for stop, found in self._spans():
            if found is not kind and end > start:
                yield Extent(start, end - start, kind)
                start = end
            kind, end = found, stop
        if end > start:
            yield Extent(start, end - start, kind)

    def _spans(self) -> Iterator[tuple[int, Kind]]:
        """Yield where spans of one kind end, in guest bytes; a whole batch of blocks is joined at once."""
        at, budget = 0, self._map.stored_limit
        while at < self._count:
            mapped = max(at, min(self._map.skip_unmapped(at, self._count), self._count))
            if mapped > at:
                at = mapped
                yield self._place(at), Kind.HOLE
                continue
            count = min(_BATCH, self._count - at)
            kinds, _ = self._map.entries(at, count)
            budget -= self._least_stored(kinds, at)
            if budget < 0:
                self._bad()
            joined = _JOINED[kinds]
            ends = np.append(np.flatnonzero(joined[1:] != joined[:-1]) + 1, count)
            for stop, found in zip((ends + at).tolist(), joined[ends - 1].tolist(), strict=True):
                yield self._place(stop), _KINDS[BlockKind(found)]
            at += count

    def _place(self, block: int) -> int:
        """Return where a block begins, or the content ends."""
        return min(block * self._size, self._map.virtual_size)

    def _least_stored(self, kinds: U8, first: int) -> int:
        """Return how many bytes of the file these blocks take at least; the last of the content may be cut short."""
        stored = int(np.count_nonzero(kinds == BlockKind.DATA)) * self._size
        if first + len(kinds) == self._count and kinds[-1] == BlockKind.DATA:
            stored -= self._count * self._size - self._map.virtual_size
        return stored + int(np.count_nonzero(kinds == BlockKind.COMPRESSED)) * self._map.least_compressed

    def _bad(self) -> NoReturn:
        raise MalformedImageError(
            "more guest data is mapped than the file can hold: blocks are used twice",
            file=self.path,
            field="block table",
        )

    def _batch(self, first: int, count: int) -> Iterator[Run]:
        """Yield the runs of ``count`` blocks; a compressed block is a run of its own."""
        kind, host = self._map.entries(first, count)
        change = kind[1:] != kind[:-1]
        change |= (kind[1:] == BlockKind.DATA) & (host[1:] != host[:-1] + np.uint64(self._size))
        change |= kind[1:] == BlockKind.COMPRESSED
        breaks = np.concatenate([np.zeros(1, dtype=np.intp), np.flatnonzero(change) + 1])
        places = np.append(breaks, len(kind)).astype(np.int64) * self._size + first * self._size
        rows = zip(places[:-1].tolist(), places[1:].tolist(), kind[breaks].tolist(), host[breaks].tolist(), strict=True)
        for begin, end, what, where in rows:
            yield Run(begin, end - begin, BlockKind(what), where)


def _clip(run: Run, start: int, end: int) -> Run:
    begin, stop = max(run.start, start), min(run.start + run.length, end)
    host = run.host + begin - run.start if run.kind is BlockKind.DATA else run.host
    return Run(begin, stop - begin, run.kind, host)
