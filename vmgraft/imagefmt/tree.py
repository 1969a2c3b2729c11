"""The content tree: fs-verity SHA-256 over 64 KiB blocks, no salt, with holes free of charge.

The tree is the Merkle tree of the kernel's fs-verity (Documentation/filesystems/fsverity.rst, "Merkle tree" and
"fs-verity descriptor"), so ``fsverity digest --block-size=65536`` prints the same digest and ``veritysetup format`` the
same root. A block or a whole subtree of zeros hashes to a constant that depends on its level only.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from itertools import chain, cycle
from typing import Literal, Self

from vmgraft.errors import FileError, MalformedImageError
from vmgraft.imagefmt.contract import ContentDigest, Image, Kind, Progress
from vmgraft.imagefmt.treenodes import (
    BLOCK_SIZE,
    FAN_OUT,
    ContentTree,
    Leaves,
    Segment,
    TreeBuilder,
    descriptor_digest,
    leaf_hashes,
)

__all__ = [
    "BLOCK_SIZE",
    "FLAT_AUTO_LIMIT",
    "ContentTree",
    "FlatMode",
    "build_tree",
    "data_runs",
    "descriptor_digest",
    "digest_content",
    "digest_with_tree",
    "read_blocks",
    "reader_count",
]

#: Bytes of guest content under one lowest node, a segment: 128 MiB.
_SEGMENT = FAN_OUT * BLOCK_SIZE
#: Bytes read at a time: what a processor's own cache holds while it is hashed.
_BUFFER = 1 << 20
_ZERO_BUFFER = bytes(_BUFFER)
#: Flat SHA-256 is computed by default up to this many bytes of guest content.
FLAT_AUTO_LIMIT = 16 << 30

#: Segments are hashed together up to this many bytes of data, or this many of them.
_BATCH_BYTES = 8 << 20
_BATCH_SEGMENTS = 256

FlatMode = Literal["auto", "always", "never"]
#: A segment's number, and the (start, end) runs of it that hold data.
_Work = tuple[int, list[tuple[int, int]]]
#: The number of the last segment looked at, and those that are not all zeros.
_Hashed = tuple[int, dict[int, Segment]]


def build_tree(
    image: Image, *, progress: Progress | None = None, threads: int | None = None, keep_leaves: bool = True
) -> ContentTree:
    """Read the content of ``image`` and build its tree; only data extents are read.

    Args:
        image: Its ``readinto`` must be safe to call from several threads.
        progress: Called from this thread with (bytes done, bytes in all), both of guest content.
        threads: Readers; as many as the machine has processors (at most 8) when ``None``.
        keep_leaves: Whether single blocks are to be checked against the result.

    Raises:
        MalformedImageError: when the extents have gaps or reads end early.
        FileError: when the image cannot be read.
    """
    segments: dict[int, Segment] = {}
    workers = threads or reader_count()
    waiting: deque[Future[_Hashed]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vmgraft-tree")
    try:
        for batch in _batches(image):
            waiting.append(pool.submit(_hash_batch, image, batch, keep_leaves))
            if len(waiting) > 2 * workers:
                _collect(waiting, segments, image, progress)
        while waiting:
            _collect(waiting, segments, image, progress)
    finally:
        pool.shutdown(cancel_futures=True)
    if progress is not None:
        progress(image.virtual_size, image.virtual_size)
    return ContentTree(image.virtual_size, segments)


def digest_content(image: Image, *, flat: FlatMode = "auto", progress: Progress | None = None) -> ContentDigest:
    """Return the digests of the content of ``image``, reading every data byte once.

    Args:
        image: An open image.
        flat: Whether to compute the flat SHA-256 too: ``auto`` up to 16 GiB. Holes cost time for that one.
        progress: Called with (bytes done, bytes in all).

    Raises:
        MalformedImageError: when the extents have gaps or reads end early.
        FileError: when the image cannot be read.
    """
    return _digest(image, flat, progress, keep_leaves=False)[0]


def digest_with_tree(
    image: Image, *, flat: FlatMode = "auto", progress: Progress | None = None
) -> tuple[ContentDigest, ContentTree]:
    """Do what :func:`digest_content` does and return the tree too."""
    return _digest(image, flat, progress, keep_leaves=True)


def reader_count() -> int:
    """Return how many threads read and hash: one a processor that this process may use, at most 8."""
    return min(8, len(os.sched_getaffinity(0)))


def _digest(
    image: Image, flat: FlatMode, progress: Progress | None, *, keep_leaves: bool
) -> tuple[ContentDigest, ContentTree]:
    flat_digest = None
    if flat == "always" or (flat == "auto" and image.virtual_size <= FLAT_AUTO_LIMIT):
        tree, flat_digest = _build_with_flat(image, progress, keep_leaves)
    else:
        tree = build_tree(image, progress=progress, keep_leaves=keep_leaves)
    digest = ContentDigest(image.virtual_size, tree.root_hash, tree.tree_digest, flat_digest, BLOCK_SIZE)
    return digest, tree


def data_runs(image: Image) -> Iterator[tuple[int, int]]:
    """Yield block-aligned, merged (start, end) runs that hold data; the last may end behind the content.

    Raises:
        MalformedImageError: when the extents have gaps, overlap, or do not cover the content.
    """
    expected = start = end = 0
    for extent in image.extents():
        if extent.start != expected or extent.length <= 0:
            raise MalformedImageError("the extents of the image have a gap or overlap", file=image.path)
        expected += extent.length
        if extent.kind is not Kind.DATA:
            continue
        first = extent.start // BLOCK_SIZE * BLOCK_SIZE
        if first > end:
            if end > start:
                yield start, end
            start = first
        end = -(-expected // BLOCK_SIZE) * BLOCK_SIZE
    if expected != image.virtual_size:
        raise MalformedImageError("the extents of the image do not cover it", file=image.path)
    if end > start:
        yield start, end


def _batches(image: Image) -> Iterator[list[_Work]]:
    """Put segments together to units of work: one that holds much data, or many that hold little."""
    batch, size = list[_Work](), 0
    for number, runs in _by_segment(image):
        batch.append((number, runs))
        size += sum(end - start for start, end in runs)
        if size >= _BATCH_BYTES or len(batch) == _BATCH_SEGMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _by_segment(image: Image) -> Iterator[_Work]:
    """Group the runs by the segment they lie in."""
    number, runs = -1, list[tuple[int, int]]()
    for run_start, end in data_runs(image):
        start = run_start
        while start < end:
            if start // _SEGMENT != number:
                if runs:
                    yield number, runs
                number, runs = start // _SEGMENT, []
            stop = min(end, (number + 1) * _SEGMENT)
            runs.append((start, stop))
            start = stop
    if runs:
        yield number, runs


def _collect(
    waiting: deque[Future[_Hashed]], segments: dict[int, Segment], image: Image, progress: Progress | None
) -> None:
    last, hashed = waiting.popleft().result()
    segments.update(hashed)
    if progress is not None:
        progress(min((last + 1) * _SEGMENT, image.virtual_size), image.virtual_size)


def _hash_batch(image: Image, batch: list[_Work], keep: bool) -> _Hashed:
    """Return the number of the last segment, and those segments that are not all zero."""
    longest = max(end - start for _, runs in batch for start, end in runs)
    buffer = memoryview(bytearray(min(_BUFFER, longest)))
    hashed = {}
    for number, runs in batch:
        segment = _hash_segment(image, number, runs, buffer).seal(keep)
        if segment is not None:
            hashed[number] = segment
    return batch[-1][0], hashed


def _hash_segment(image: Image, number: int, runs: list[tuple[int, int]], buffer: memoryview) -> Leaves:
    base = number * _SEGMENT
    leaves = Leaves(number, image.virtual_size)
    for start, end in runs:
        for position in range(start, end, len(buffer)):
            view = buffer[: min(len(buffer), end - position)]
            read_blocks(image, position, view)
            hashes = leaf_hashes(view)
            if hashes is not None:
                leaves.add((position - base) // BLOCK_SIZE, hashes)
    return leaves


def read_blocks(image: Image, offset: int, view: memoryview) -> int:
    """Read a whole number of blocks, zero-padded behind the end of the content; return the content bytes.

    Raises:
        FileError: when the image yields less than its size promises.
    """
    want = min(len(view), image.virtual_size - offset)
    got = image.readinto(offset, view[:want])
    if got != want:
        raise FileError(
            f"the content ends early: {got} of {want} bytes could be read", file=image.path, field=f"content@{offset}"
        )
    if want < len(view):
        view[want:] = bytes(len(view) - want)
    return want


def _build_with_flat(image: Image, progress: Progress | None, keep: bool) -> tuple[ContentTree, bytes]:
    """Read the content once, in order; the flat digest is computed beside the leaves."""
    size = image.virtual_size
    builder = TreeBuilder(size, keep_leaves=keep)
    buffers = cycle([memoryview(bytearray(_BUFFER)) for _ in range(2)])
    position = 0
    with _FlatDigest() as flat:
        for start, end in chain(data_runs(image), [(size, size)]):
            flat.skip(max(0, min(start, size) - position))
            position = max(position, min(start, size))
            while position < min(end, size):
                view = next(buffers)[: min(_BUFFER, end - position)]
                count = read_blocks(image, position, view)
                flat.update(view[:count])
                builder.add(position, leaf_hashes(view))
                position += count
                if progress is not None:
                    progress(position, size)
        digest = flat.digest()
    return builder.finish(), digest


class _FlatDigest:
    """SHA-256 on a thread of its own: at most one buffer is being hashed while the next is read."""

    def __init__(self) -> None:
        self._hash = sha256()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vmgraft-flat")
        self._pending: Future[None] | None = None

    def update(self, view: memoryview) -> None:
        """Hash ``view``, which must stay as it is until the call after the next."""
        self._wait()
        self._pending = self._pool.submit(self._hash.update, view)

    def skip(self, count: int) -> None:
        """Hash ``count`` zeros."""
        self._wait()
        while count > 0:
            step = min(count, _BUFFER)
            self._hash.update(memoryview(_ZERO_BUFFER)[:step])
            count -= step

    def digest(self) -> bytes:
        """Return the digest of everything so far."""
        self._wait()
        return self._hash.digest()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
