"""The guest content of a qcow2 image: clusters, and what shines through from the backing file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain as join

from vmgraft.imagefmt.contract import Extent, Kind
from vmgraft.imagefmt.qcow2.backing import Backing
from vmgraft.imagefmt.qcow2.compressed import CompressedReader
from vmgraft.imagefmt.qcow2.header import Header
from vmgraft.imagefmt.qcow2.runs import Run, RunKind
from vmgraft.imagefmt.qcow2.source import Source, clear
from vmgraft.imagefmt.qcow2.tables import ClusterMap

_KINDS = {RunKind.DATA: Kind.DATA, RunKind.COMPRESSED: Kind.DATA, RunKind.ZERO: Kind.ZERO, RunKind.HOLE: Kind.HOLE}


class Content:
    """Reads guest bytes; safe to use from several threads.

    Args:
        source: The image file.
        header: Its header.
        data: The file with the clusters, ``source`` unless there is an external data file.
        tables: (offset, length) of further metadata that no content may stand in.
    """

    def __init__(self, source: Source, header: Header, data: Source, tables: Sequence[tuple[int, int]] = ()) -> None:
        self._data = data
        self._size = header.size
        self._cluster = header.cluster_size
        self._map = ClusterMap(source, header, data, tables)
        self._compressed = CompressedReader(source, header)
        #: What holes show; set once, before the first read.
        self.backing: Backing | None = None

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with guest bytes from ``offset``; return how many, fewer only at the end of the disk."""
        end = min(offset + len(buffer), self._size)
        if end <= offset:
            return 0
        for run in self._map.runs(offset, end):
            self._fill(run, buffer[run.start - offset : run.start - offset + run.length])
        return end - offset

    def _fill(self, run: Run, view: memoryview) -> None:
        if run.kind is RunKind.DATA:
            self._data.readinto(run.host, view)
        elif run.kind is RunKind.COMPRESSED:
            inside = run.start % self._cluster
            view[:] = self._compressed.cluster(run.host)[inside : inside + run.length]
        elif run.kind is RunKind.HOLE and self.backing is not None:
            there = max(0, min(run.length, self.backing.virtual_size - run.start))
            if there:
                there = self.backing.readinto(run.start, view[:there])
            clear(view[there:])
        else:
            clear(view)

    def extents(self) -> Iterator[Extent]:
        """Yield the runs of the whole disk, backing file included, neighbours of one kind joined."""
        own = (Extent(start, length, _KINDS[kind]) for start, length, kind in self._map.walk())
        return _joined(own if self.backing is None else _through(own, self.backing))


def _through(own: Iterator[Extent], backing: Backing) -> Iterator[Extent]:
    """Replace holes by what the backing file holds there; one pass over both."""
    below = join(backing.extents(), (Extent(backing.virtual_size, 1 << 63, Kind.HOLE),))
    current = next(below)
    for extent in own:
        if extent.kind is not Kind.HOLE:
            yield extent
            continue
        at, end = extent.start, extent.start + extent.length
        while at < end:
            while current.start + current.length <= at:
                current = next(below)
            stop = min(end, current.start + current.length)
            yield Extent(at, stop - at, current.kind)
            at = stop


def _joined(extents: Iterator[Extent]) -> Iterator[Extent]:
    last: Extent | None = None
    for extent in extents:
        if last is not None and last.kind is extent.kind:
            last = Extent(last.start, last.length + extent.length, last.kind)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last
