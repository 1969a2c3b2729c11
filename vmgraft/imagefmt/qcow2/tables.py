"""Guest offset → host offset: the L1 and L2 tables, decoded in bulk with numpy (a struct layout would take hours).

The map works in *units*: a cluster, or a subcluster where L2 entries are extended. Tables are loaded when needed;
memory stays within a few copies of the L1 table (32 MiB at most), a cache of 16 MiB, some decoded runs and one batch.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.qcow2.header import Header
from vmgraft.imagefmt.qcow2.runs import Budget, Run, RunKind
from vmgraft.imagefmt.qcow2.source import Source

U64 = npt.NDArray[np.uint64]
U8 = npt.NDArray[np.uint8]

_CACHE_BYTES = 16 << 20
_BATCH_UNITS = 1 << 16
_L1_SLICE = 1 << 18
#: Reads decode this many units at once and keep the runs of the last windows: guests read sector by sector.
_WINDOW_UNITS = 1 << 10
_WINDOWS = 64


def _load(data: bytes | bytearray) -> U64:
    return np.frombuffer(data, dtype=">u8").astype(np.uint64)


class ClusterMap:
    """The mapping of one image.

    Args:
        source: The image file.
        header: Its header.
        data: The file that holds the guest's clusters: ``source`` itself, or the external data file.
        tables: (offset, length) of metadata that the header does not speak of.

    Raises:
        MalformedImageError: the L1 table points astray.
    """

    def __init__(self, source: Source, header: Header, data: Source, tables: Sequence[tuple[int, int]] = ()) -> None:
        self._source = source
        self._header = header
        self._data_size = data.size
        self._external = data is not source
        self._cluster = header.cluster_size
        self._per_cluster = lay.SUBCLUSTERS if header.extended_l2 else 1
        self._unit = self._cluster // self._per_cluster
        self._words = 2 if header.extended_l2 else 1
        self._l1, tables_used = self._load_l1()
        #: Indexes of the L1 entries that are used, and which of them are the last before a gap.
        self._mapped = np.flatnonzero(self._l1).astype(np.uint32)
        self._mapped_gaps = np.append(np.flatnonzero(np.diff(self._mapped) != 1), max(0, len(self._mapped) - 1))
        self._metadata = self._metadata_starts(tables_used, tables)
        self._cache: OrderedDict[int, U64] = OrderedDict()
        self._cache_limit = max(2, _CACHE_BYTES // self._cluster)
        self._windows: OrderedDict[int, tuple[list[int], list[Run]]] = OrderedDict()
        self._lock = threading.Lock()

    def _bad(self, field: str, message: str, offset: int | None = None) -> NoReturn:
        hint = "`qemu-img check` shows the damage"
        raise MalformedImageError(message, file=self._source.file, offset=offset, field=field, hint=hint)

    def _load_l1(self) -> tuple[U64, U64]:
        """Return the offsets of the L2 tables, by L1 index (0: none), and those that exist in ascending order."""
        header = self._header
        raw = self._source.exactly(header.l1_table_offset, header.l1_size * 8, "l1_table_offset")
        entries = _load(raw)
        last = np.uint64(max(0, self._source.size - self._cluster))
        for first in range(0, len(entries), _L1_SLICE):  # in slices, for the sake of memory
            part = entries[first : first + _L1_SLICE]
            used = part & np.uint64(lay.OFFSET_MASK)
            wrong = (part & np.uint64(lay.L1_RESERVED)) | (used & np.uint64(self._cluster - 1))
            wrong |= used > last
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                where = header.l1_table_offset + 8 * (first + at)
                entry = f"entry {first + at} (0x{int(part[at]):016x})"
                self._bad("l1_entry", f"{entry} points astray or sets reserved bits", where)
            entries[first : first + _L1_SLICE] = used
        tables = entries[entries != 0]
        tables.sort(kind="stable")  # quick for tables that were allocated in order
        if (tables[1:] == tables[:-1]).any():
            self._bad("l1_entry", "two L1 entries share one L2 table", header.l1_table_offset)
        return entries, tables

    def _metadata_starts(self, inner: U64, more: Sequence[tuple[int, int]]) -> U64:
        """Return the sorted offsets of all clusters that hold metadata, which no guest data may stand in.

        Args:
            inner: The offsets of the L2 tables, sorted.
            more: (offset, length) of metadata that the header does not speak of.
        """
        header, size = self._header, self._cluster
        tables = ((header.l1_table_offset, header.l1_size * 8), (header.refcount_table_offset, self._reftable_bytes))
        spans = [(0, size), *tables, *more]
        if header.nb_snapshots:
            spans.append((header.snapshots_offset, header.nb_snapshots * 40))
        fixed = [np.arange(at, at + length, size, dtype=np.uint64) for at, length in spans]
        outer = np.concatenate([*fixed, self._refcount_blocks()])
        place = np.searchsorted(inner, outer)
        inside = place < len(inner)
        if (inner[place[inside]] == outer[inside]).any():
            self._bad("l1_entry", "an L2 table lies on other metadata", header.l1_table_offset)
        starts = np.concatenate([outer, inner])
        starts.sort(kind="stable")
        return starts

    @property
    def _reftable_bytes(self) -> int:
        return self._header.refcount_table_clusters * self._cluster

    def _refcount_blocks(self) -> U64:
        raw = self._source.exactly(self._header.refcount_table_offset, self._reftable_bytes, "refcount_table_offset")
        blocks: U64 = _load(raw) & np.uint64(0xFFFF_FFFF_FFFF_FE00)  # spec, "Refcount table entry"
        used: U64 = blocks[blocks != 0]
        return used

    # --- entries ---------------------------------------------------------------------------------------------------

    def _table(self, index: int) -> U64:
        """Return an L2 table; the last ones are kept."""
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
        table = _load(self._source.exactly(int(self._l1[index]), self._cluster, "l2_table"))
        with self._lock:
            self._cache[index] = table
            while len(self._cache) > self._cache_limit:
                self._cache.popitem(last=False)
        return table

    def _entries(self, first: int, count: int) -> U64:
        """Return the L2 entries of ``count`` clusters from cluster ``first``; zeros where there is no L2 table."""
        per_table = self._header.l2_entries
        words = self._words
        out = np.zeros(count * words, dtype=np.uint64)
        at = first
        while at < first + count:
            index, inside = divmod(at, per_table)
            take = min(per_table - inside, first + count - at)
            if self._l1[index]:
                piece = self._table(index)[inside * words : (inside + take) * words]
                out[(at - first) * words : (at - first + take) * words] = piece
            at += take
        return out

    def _read_entries(self, first: int, count: int) -> U64:
        """Do the same where all L2 tables exist: neighbours in the file are read at once, and nothing is kept."""
        per_table, words = self._header.l2_entries, self._words
        low, end = first // per_table, first + count
        offsets = self._l1[low : -(-end // per_table)]
        breaks = np.flatnonzero(np.diff(offsets) != np.uint64(self._cluster)) + 1
        out = np.empty(count * words, dtype=np.uint64)
        for begin, behind in pairwise([0, *breaks.tolist(), len(offsets)]):
            start = max(first, (low + begin) * per_table)
            stop = min(end, (low + behind) * per_table)
            where = int(offsets[begin]) + (start - (low + begin) * per_table) * words * 8
            raw = self._source.exactly(where, (stop - start) * words * 8, "l2_table")
            out[(start - first) * words : (stop - first) * words] = np.frombuffer(raw, dtype=">u8")
        return out

    def _entry_offset(self, cluster: int) -> int:
        index, inside = divmod(cluster, self._header.l2_entries)
        return int(self._l1[index]) + inside * 8 * self._words

    def _bad_entry(self, wrong: Any, first: int, entries: U64, message: str) -> NoReturn:
        at = int(np.flatnonzero(wrong)[0])
        self._bad("l2_entry", f"0x{int(entries[at]):016x} {message}", self._entry_offset(first + at))

    def _check_plain(self, entries: U64, plain: Any, first: int) -> U64:
        """Check standard entries and return their host offsets (0 where there is none)."""
        reserved = lay.L2_RESERVED
        if self._header.version < 3 or self._header.extended_l2:
            reserved |= lay.FLAG_ZERO
        host = np.where(plain, entries & np.uint64(lay.OFFSET_MASK), np.uint64(0))
        wrong = plain & ((entries & np.uint64(reserved)) != 0)
        if wrong.any():
            self._bad_entry(wrong, first, entries, "sets reserved bits")
        wrong = (host & np.uint64(self._cluster - 1)) != 0
        if wrong.any():
            self._bad_entry(wrong, first, entries, "is not aligned to a cluster")
        wrong = (host != 0) & (host >= np.uint64(self._data_size))
        if wrong.any():
            self._bad_entry(wrong, first, entries, "points behind the end of the file")
        return host

    def _decode(self, entries: U64, first: int) -> tuple[U8, U64]:
        """Return kind and host offset of every unit of the given L2 entries."""
        words = entries[:: self._words]
        compressed = (words & np.uint64(lay.FLAG_COMPRESSED)) != 0
        host = self._check_plain(words, ~compressed, first)
        present = host != 0
        if self._external:  # cluster 0 of a data file is a real one; the copied flag tells (spec, "L2 table entry")
            if compressed.any():
                self._bad_entry(compressed, first, words, "is compressed, which an external data file cannot be")
            present |= (words & np.uint64(lay.FLAG_COPIED)) != 0
        if self._per_cluster == 1:
            zero = ~compressed & ((words & np.uint64(lay.FLAG_ZERO)) != 0)
            kind = np.where(present, RunKind.DATA, RunKind.HOLE).astype(np.uint8)
            kind[zero] = RunKind.ZERO
        else:
            kind, host = self._decode_subclusters(words, entries[1::2], present, host, first)
            words, compressed = (np.repeat(a, self._per_cluster) for a in (words, compressed))
        kind[compressed] = RunKind.COMPRESSED
        return kind, np.where(compressed, words, host)

    def _decode_subclusters(self, words: U64, bitmaps: U64, present: Any, host: U64, first: int) -> tuple[U8, U64]:
        compressed = (words & np.uint64(lay.FLAG_COMPRESSED)) != 0
        both = bitmaps & (bitmaps >> np.uint64(32)) & np.uint64(0xFFFF_FFFF)
        wrong = (both != 0) & ~compressed
        if wrong.any():
            self._bad_entry(wrong, first, bitmaps, "marks a subcluster as both data and zero")
        wrong = ((bitmaps & np.uint64(0xFFFF_FFFF)) != 0) & ~present & ~compressed
        if wrong.any():
            self._bad_entry(wrong, first, bitmaps, "allocates subclusters of no cluster")
        shifts = np.arange(lay.SUBCLUSTERS, dtype=np.uint64)
        data = ((bitmaps[:, None] >> shifts) & np.uint64(1)) != 0
        zero = ((bitmaps[:, None] >> (shifts + np.uint64(32))) & np.uint64(1)) != 0
        kind = np.where(data, RunKind.DATA, np.where(zero, RunKind.ZERO, RunKind.HOLE)).astype(np.uint8)
        hosts = host[:, None] + shifts * np.uint64(self._unit)
        return kind.reshape(-1), hosts.reshape(-1)

    # --- runs ------------------------------------------------------------------------------------------------------

    def _breaks(self, kind: U8, host: U64) -> npt.NDArray[np.intp]:
        """Return the indexes of the units that begin a run."""
        change = kind[1:] != kind[:-1]
        data = kind[1:] == RunKind.DATA
        change |= data & (host[1:] != host[:-1] + np.uint64(self._unit))
        change |= (kind[1:] == RunKind.COMPRESSED) & (np.arange(1, len(kind)) % self._per_cluster == 0)
        return np.concatenate([np.zeros(1, dtype=np.intp), np.flatnonzero(change) + 1])

    def _check_overlap(self, start: Any, kind: Any, host: Any, first: int) -> None:
        if self._external:
            return
        units = np.diff(start)
        data = kind == RunKind.DATA
        begin = host[data] & ~np.uint64(self._cluster - 1)
        end = host[data] + units[data].astype(np.uint64) * np.uint64(self._unit)
        hit = np.searchsorted(self._metadata, begin) != np.searchsorted(self._metadata, end)
        if hit.any():
            unit = int(start[:-1][data][np.flatnonzero(hit)[0]])
            where = self._entry_offset(first + unit // self._per_cluster)
            self._bad("l2_entry", "guest data lies on the container's own metadata", where)

    def _decoded(self, entries: U64, first: int) -> tuple[U8, U64, npt.NDArray[np.intp]]:
        """Return kind and host offset of every unit of clusters from ``first``, and where runs begin."""
        kind, host = self._decode(entries, first)
        breaks = self._breaks(kind, host)
        self._check_overlap(np.append(breaks, len(kind)), kind[breaks], host[breaks], first)
        return kind, host, breaks

    def _batch(self, first: int, count: int) -> Iterator[Run]:
        """Yield the runs of ``count`` clusters from cluster ``first``, whole clusters."""
        kind, host, breaks = self._decoded(self._entries(first, count), first)
        places = (first * self._cluster + np.append(breaks, len(kind)).astype(np.int64) * self._unit).tolist()
        rows = zip(places[:-1], places[1:], kind[breaks].tolist(), host[breaks].tolist(), strict=True)
        for begin, end, what, where in rows:
            yield Run(begin, end - begin, RunKind(what), where)

    def _next_mapped(self, cluster: int, end: int) -> tuple[int, int]:
        """Return the next clusters from ``cluster`` on whose L2 tables exist: first, and just behind the last."""
        per_table = self._header.l2_entries
        at = int(np.searchsorted(self._mapped, np.uint32(cluster // per_table)))  # of its type, or numpy copies all
        last = np.searchsorted(self._mapped_gaps, at)
        if at == len(self._mapped):
            return end, end
        first = max(cluster, int(self._mapped[at]) * per_table)
        stop = int(self._mapped[self._mapped_gaps[last]]) + 1
        return min(end, first), min(end, stop * per_table)

    def _window(self, index: int, clusters: int) -> tuple[list[int], list[Run]]:
        """Return the runs of a window of ``clusters`` clusters, and where they start."""
        with self._lock:
            if index in self._windows:
                self._windows.move_to_end(index)
                return self._windows[index]
        first = index * clusters
        count = min(clusters, -(-self._header.size // self._cluster) - first)
        runs = list(self._batch(first, count))
        window = ([run.start for run in runs], runs)
        with self._lock:
            self._windows[index] = window
            while len(self._windows) > _WINDOWS:
                self._windows.popitem(last=False)
        return window

    def runs(self, start: int, end: int) -> Iterator[Run]:
        """Yield the runs that cover guest bytes ``start`` .. ``end``, clipped to them; for reads.

        Args:
            start: First byte.
            end: Just behind the last byte; at most the virtual size.

        Raises:
            MalformedImageError: an entry there or close by points astray.
        """
        clusters = max(1, _WINDOW_UNITS // self._per_cluster)
        size = clusters * self._cluster
        for index in range(start // size, -(-end // size)):
            starts, runs = self._window(index, clusters)
            at = max(0, bisect_right(starts, start) - 1)
            while at < len(runs) and runs[at].start < end:
                yield self._clip(runs[at], start, end)
                at += 1

    def walk(self) -> Iterator[tuple[int, int, RunKind]]:
        """Yield (start, length, kind) over the whole disk, clipped to its size; nothing is cached.

        Neighbours of one kind may come in several pieces.

        Raises:
            MalformedImageError: an entry points astray, or more data is mapped than the file can honestly hold.
        """
        at, size, stop = 0, self._header.size, -(-self._header.size // self._cluster)
        step = max(1, _BATCH_UNITS // self._per_cluster)
        budget = Budget(self._data_size, self._source.size, self._least_stored())
        while at < stop:
            mapped, end = self._next_mapped(at, stop)
            if mapped > at:
                yield at * self._cluster, min(size, mapped * self._cluster) - at * self._cluster, RunKind.HOLE
                at = mapped
                continue
            count = min(step, end - at)
            kind, _, _ = self._decoded(self._read_entries(at, count), at)
            counts = np.bincount(kind, minlength=len(RunKind))
            compressed = int(counts[RunKind.COMPRESSED]) // self._per_cluster
            if not budget.take(int(counts[RunKind.DATA]) * self._unit, compressed):
                self._bad("l2_entry", "more guest data is mapped than the file can hold: clusters are used many times")
            breaks = np.concatenate([[0], np.flatnonzero(kind[1:] != kind[:-1]) + 1])
            places = at * self._cluster + np.append(breaks, len(kind)) * self._unit
            rows = zip(places[:-1].tolist(), places[1:].tolist(), kind[breaks].tolist(), strict=True)
            for begin, behind, what in rows:
                if begin < size:
                    yield begin, min(size, behind) - begin, RunKind(what)
            at += count

    def _least_stored(self) -> int:
        """Return how many bytes of the file a compressed cluster takes at least."""
        if self._header.compression_type == lay.COMPRESSION_ZSTD:
            return lay.MIN_ZSTD_FRAME + lay.MIN_ZSTD_BLOCK * -(-self._cluster // lay.MAX_ZSTD_BLOCK)
        return -(-self._cluster // lay.MAX_DEFLATE_RATIO)

    @staticmethod
    def _clip(run: Run, start: int, end: int) -> Run:
        begin, stop = max(run.start, start), min(run.start + run.length, end)
        host = run.host + begin - run.start if run.kind is RunKind.DATA else run.host
        return Run(begin, stop - begin, run.kind, host)
