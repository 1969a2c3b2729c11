"""The content tree: fs-verity SHA-256 over 64 KiB blocks, no salt, with holes free of charge.

The tree is the Merkle tree of the kernel's fs-verity (Documentation/filesystems/fsverity.rst, "Merkle tree" and
"fs-verity descriptor"), so ``fsverity digest --block-size=65536`` prints the same digest and ``veritysetup format`` the
same root. A block or a whole subtree of zeros hashes to a constant that depends on its level only.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from itertools import chain, cycle
from typing import Literal, Self

from vmgraft.errors import FileError, MalformedImageError
from vmgraft.imagefmt.contract import ContentDigest, Image, Kind, Progress

#: Bytes of guest content in a leaf, and of hashes in a node.
BLOCK_SIZE = 65536
_HASH_SIZE = 32
#: Hashes in a node.
FAN_OUT = BLOCK_SIZE // _HASH_SIZE
#: Bytes of guest content under one lowest node, the unit of work: 128 MiB.
_SEGMENT = FAN_OUT * BLOCK_SIZE
_BUFFER = 4 << 20
_ZERO = bytes(BLOCK_SIZE)
_ZERO_BUFFER = bytes(_BUFFER)
#: Flat SHA-256 is computed by default up to this many bytes of guest content.
FLAT_AUTO_LIMIT = 16 << 30

#: struct fsverity_descriptor (fsverity.rst): version, hash algorithm, log2 of block size, salt size, signature size,
#: data size, root hash, salt, reserved.
_DESCRIPTOR = struct.Struct("<BBBBIQ64s32s144s")
_VERSION = 1
_SHA256 = 1

FlatMode = Literal["auto", "always", "never"]


def _zero_levels() -> tuple[bytes, ...]:
    """Hash of an all-zero block, of a node over such blocks, and so on; enough levels for 2^64 bytes."""
    levels = [sha256(_ZERO).digest()]
    for _ in range(6):
        levels.append(sha256(levels[-1] * FAN_OUT).digest())
    return tuple(levels)


_ZERO_HASH = _zero_levels()


class ContentTree:
    """The tree of one guest content. Leaves of segments without data are not stored.

    Args:
        virtual_size: Bytes of guest content.
        segments: Leaf hashes of every segment that holds data, by segment number.
    """

    def __init__(self, virtual_size: int, segments: dict[int, bytes]) -> None:
        self.virtual_size = virtual_size
        self.block_count = -(-virtual_size // BLOCK_SIZE)
        self._segments = segments
        self.root_hash = self._root()
        self.tree_digest = descriptor_digest(virtual_size, self.root_hash)

    def leaf(self, index: int) -> bytes:
        """Return the hash of block ``index``.

        Raises:
            IndexError: when there is no such block.
        """
        if not 0 <= index < self.block_count:
            raise IndexError(f"block {index} of {self.block_count}")
        hashes = self._segments.get(index // FAN_OUT)
        if hashes is None:
            return _ZERO_HASH[0]
        start = index % FAN_OUT * _HASH_SIZE
        return hashes[start : start + _HASH_SIZE]

    def check(self, block_index: int, data: bytes) -> bool:
        """Return whether ``data`` is block ``block_index``: 64 KiB, or what is left of the content at its end."""
        if not 0 <= block_index < self.block_count:
            return False
        if len(data) != min(BLOCK_SIZE, self.virtual_size - block_index * BLOCK_SIZE):
            return False
        return sha256(data.ljust(BLOCK_SIZE, b"\0")).digest() == self.leaf(block_index)

    def _root(self) -> bytes:
        if self.block_count == 0:
            return bytes(_HASH_SIZE)
        if self.block_count == 1:
            return self.leaf(0)
        count = -(-self.block_count // FAN_OUT)
        nodes = {index: sha256(hashes.ljust(BLOCK_SIZE, b"\0")).digest() for index, hashes in self._segments.items()}
        _fill_last(nodes, self.block_count, 0)
        level = 1
        while count > 1:
            parents: dict[int, bytes] = {}
            for index in {child // FAN_OUT for child in nodes}:
                first = index * FAN_OUT
                children = range(first, min(first + FAN_OUT, count))
                block = b"".join(nodes.get(child, _ZERO_HASH[level]) for child in children)
                parents[index] = sha256(block.ljust(BLOCK_SIZE, b"\0")).digest()
            _fill_last(parents, count, level)
            nodes, count, level = parents, -(-count // FAN_OUT), level + 1
        return nodes.get(0, _ZERO_HASH[level])


def _fill_last(nodes: dict[int, bytes], count: int, level: int) -> None:
    """Add the node over the last, incomplete group of ``count`` zero subtrees, which is no constant."""
    rest = count % FAN_OUT
    if rest:
        nodes.setdefault(count // FAN_OUT, sha256((_ZERO_HASH[level] * rest).ljust(BLOCK_SIZE, b"\0")).digest())


def descriptor_digest(virtual_size: int, root_hash: bytes) -> bytes:
    """Return what ``fsverity digest`` prints: SHA-256 over the fs-verity descriptor."""
    log2_block = BLOCK_SIZE.bit_length() - 1
    return sha256(_DESCRIPTOR.pack(_VERSION, _SHA256, log2_block, 0, 0, virtual_size, root_hash, b"", b"")).digest()


def build_tree(image: Image, *, progress: Progress | None = None, threads: int | None = None) -> ContentTree:
    """Read the content of ``image`` and build its tree; only data extents are read.

    Args:
        image: Its ``readinto`` must be safe to call from several threads.
        progress: Called from this thread with (bytes done, bytes in all), both of guest content.
        threads: Readers; as many as the machine has processors (at most 8) when ``None``.

    Raises:
        MalformedImageError: when the extents have gaps or reads end early.
        FileError: when the image cannot be read.
    """
    segments: dict[int, bytes] = {}
    workers = threads or min(8, os.cpu_count() or 1)
    waiting: deque[tuple[int, Future[bytes]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vmgraft-tree")
    try:
        for number, runs in _by_segment(image):
            waiting.append((number, pool.submit(_hash_segment, image, number, runs)))
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
    return digest_with_tree(image, flat=flat, progress=progress)[0]


def digest_with_tree(
    image: Image, *, flat: FlatMode = "auto", progress: Progress | None = None
) -> tuple[ContentDigest, ContentTree]:
    """Do what :func:`digest_content` does and return the tree too."""
    flat_digest = None
    if flat == "always" or (flat == "auto" and image.virtual_size <= FLAT_AUTO_LIMIT):
        tree, flat_digest = _build_with_flat(image, progress)
    else:
        tree = build_tree(image, progress=progress)
    digest = ContentDigest(image.virtual_size, tree.root_hash, tree.tree_digest, flat_digest, BLOCK_SIZE)
    return digest, tree


def _runs(image: Image) -> Iterator[tuple[int, int]]:
    """Yield block-aligned, merged (start, end) runs that hold data."""
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


def _by_segment(image: Image) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Group the runs by the segment they lie in."""
    number, runs = -1, list[tuple[int, int]]()
    for run_start, end in _runs(image):
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
    waiting: deque[tuple[int, Future[bytes]]], segments: dict[int, bytes], image: Image, progress: Progress | None
) -> None:
    number, future = waiting.popleft()
    hashes = future.result()
    if hashes:
        segments[number] = hashes
    if progress is not None:
        progress(min((number + 1) * _SEGMENT, image.virtual_size), image.virtual_size)


def _hash_segment(image: Image, number: int, runs: list[tuple[int, int]]) -> bytes:
    """Return the leaf hashes of a segment, or nothing when all its blocks are zero."""
    base = number * _SEGMENT
    blocks = min(FAN_OUT, -(-(image.virtual_size - base) // BLOCK_SIZE))
    buffer = memoryview(bytearray(min(_BUFFER, max(end - start for start, end in runs))))
    leaves: bytearray | None = None
    for start, end in runs:
        for position in range(start, end, len(buffer)):
            view = buffer[: min(len(buffer), end - position)]
            _fill(image, position, view)
            hashes = _leaf_hashes(view)
            if hashes is None:
                continue
            if leaves is None:
                leaves = bytearray(_ZERO_HASH[0] * blocks)
            first = (position - base) // BLOCK_SIZE * _HASH_SIZE
            leaves[first : first + len(hashes)] = hashes
    return bytes(leaves or b"")


def _fill(image: Image, offset: int, view: memoryview) -> int:
    """Read a whole number of blocks, zero-padded behind the end of the content; return the content bytes."""
    want = min(len(view), image.virtual_size - offset)
    got = image.readinto(offset, view[:want])
    if got != want:
        raise FileError(
            f"the content ends early: {got} of {want} bytes could be read", file=image.path, field=f"content@{offset}"
        )
    if want < len(view):
        view[want:] = bytes(len(view) - want)
    return want


def _leaf_hashes(view: memoryview) -> bytes | None:
    """Return the hashes of all blocks in ``view``, or None when they are all zero."""
    hashes = []
    zeros = 0
    for start in range(0, len(view), BLOCK_SIZE):
        block = view[start : start + BLOCK_SIZE]
        # Comparing bytes with bytes is one memcmp; the first byte spares most blocks the copy.
        if block[0] == 0 and bytes(block) == _ZERO:
            zeros += 1
            hashes.append(_ZERO_HASH[0])
        else:
            hashes.append(sha256(block).digest())
    return None if zeros == len(hashes) else b"".join(hashes)


def _build_with_flat(image: Image, progress: Progress | None) -> tuple[ContentTree, bytes]:
    """Read the content once, in order; the flat digest is computed beside the leaves."""
    size = image.virtual_size
    segments: dict[int, bytearray] = {}
    buffers = cycle([memoryview(bytearray(_BUFFER)) for _ in range(2)])
    position = 0
    with _FlatDigest() as flat:
        for start, end in chain(_runs(image), [(size, size)]):
            flat.skip(max(0, min(start, size) - position))
            position = max(position, min(start, size))
            while position < min(end, size):
                view = next(buffers)[: min(_BUFFER, end - position)]
                count = _fill(image, position, view)
                flat.update(view[:count])
                _store_leaves(segments, size, position, _leaf_hashes(view))
                position += count
                if progress is not None:
                    progress(position, size)
        digest = flat.digest()
    tree = ContentTree(size, {number: bytes(leaves) for number, leaves in segments.items()})
    return tree, digest


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


def _store_leaves(segments: dict[int, bytearray], virtual_size: int, position: int, hashes: bytes | None) -> None:
    """Put the hashes of consecutive blocks from ``position`` on where they belong."""
    if hashes is None:
        return
    block = position // BLOCK_SIZE
    while hashes:
        number, index = divmod(block, FAN_OUT)
        count = min(len(hashes) // _HASH_SIZE, FAN_OUT - index)
        blocks = min(FAN_OUT, -(-virtual_size // BLOCK_SIZE) - number * FAN_OUT)
        leaves = segments.setdefault(number, bytearray(_ZERO_HASH[0] * blocks))
        leaves[index * _HASH_SIZE : (index + count) * _HASH_SIZE] = hashes[: count * _HASH_SIZE]
        hashes, block = hashes[count * _HASH_SIZE :], block + count
