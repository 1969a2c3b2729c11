"""The nodes of the content tree: leaf hashes in, root and digest out; no reading. See ``tree``."""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Iterator

#: Bytes of guest content in a leaf, and of hashes in a node.
BLOCK_SIZE = 65536
_HASH_SIZE = 32
#: Hashes in a node.
FAN_OUT = BLOCK_SIZE // _HASH_SIZE
#: Leaves between two states that are kept of the hash over zero leaves: 64 states of some hundred bytes.
_ZERO_STEP = 32
_ZERO = bytes(BLOCK_SIZE)
#: struct fsverity_descriptor (fsverity.rst): version, hash algorithm, log2 of block size, salt size, signature size,
#: data size, root hash, salt, reserved.
_DESCRIPTOR = struct.Struct("<BBBBIQ64s32s144s")
_VERSION = 1
_SHA256 = 1


def _zero_levels() -> tuple[bytes, ...]:
    """Hash of an all-zero block, of a node over such blocks, and so on; enough levels for 2^64 bytes."""
    levels = [sha256(_ZERO).digest()]
    for _ in range(6):
        levels.append(sha256(levels[-1] * FAN_OUT).digest())
    return tuple(levels)


_ZERO_HASH = _zero_levels()
#: The leaf of a block of zeros.
ZERO_LEAF = _ZERO_HASH[0]


@cache
def _zero_state(count: int) -> hashlib._Hash:
    return sha256(_ZERO_HASH[0] * count)


def _zero_leaves(count: int) -> tuple[hashlib._Hash, int]:
    """Return a hash that has seen nearly ``count`` leaves of zero blocks, and how many: scattered data is common."""
    seen = count // _ZERO_STEP * _ZERO_STEP
    return _zero_state(seen).copy(), seen


@dataclass(frozen=True, slots=True)
class Segment:
    """What is known of a segment that holds data.

    Attributes:
        node: Hash of the node over its leaves.
        runs: Leaf hashes by the segment's block they begin at, ascending; the leaves between them are those of zeros.
    """

    node: bytes
    runs: tuple[tuple[int, bytes], ...]


class ContentTree:
    """The tree of one guest content. Leaves of zeros outside the runs that were read are not stored.

    Args:
        virtual_size: Bytes of guest content.
        segments: Every segment that holds data, by segment number.
    """

    def __init__(self, virtual_size: int, segments: dict[int, Segment]) -> None:
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
        number, inside = divmod(index, FAN_OUT)
        segment = self._segments.get(number)
        if segment is not None:
            at = bisect_right(segment.runs, inside, key=_first_block) - 1
            if at >= 0:
                first, hashes = segment.runs[at]
                start = (inside - first) * _HASH_SIZE
                return hashes[start : start + _HASH_SIZE] or _ZERO_HASH[0]
        return _ZERO_HASH[0]

    def runs(self) -> Iterator[tuple[int, bytes]]:
        """Yield (index of the first block, hashes) of all leaves that are stored, ascending."""
        for number in sorted(self._segments):
            for first, hashes in self._segments[number].runs:
                yield number * FAN_OUT + first, hashes

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
        if self.block_count == 1:  # the one leaf is the root; there is no node over it
            return self._segments[0].node if self._segments else _ZERO_HASH[0]
        count = -(-self.block_count // FAN_OUT)
        nodes = {number: segment.node for number, segment in self._segments.items()}
        _fill_last(nodes, self.block_count, 0)
        level = 1
        while count > 1:
            blocks: dict[int, bytearray] = {}
            for child, node in nodes.items():
                index, inside = divmod(child, FAN_OUT)
                block = blocks.get(index)
                if block is None:
                    full = min(FAN_OUT, count - index * FAN_OUT)
                    block = blocks[index] = bytearray((_ZERO_HASH[level] * full).ljust(BLOCK_SIZE, b"\0"))
                block[inside * _HASH_SIZE : (inside + 1) * _HASH_SIZE] = node
            parents = {index: sha256(block).digest() for index, block in blocks.items()}
            _fill_last(parents, count, level)
            nodes, count, level = parents, -(-count // FAN_OUT), level + 1
        return nodes.get(0, _ZERO_HASH[level])


def _fill_last(nodes: dict[int, bytes], count: int, level: int) -> None:
    """Add the node over the last, incomplete group of ``count`` zero subtrees, which is no constant."""
    rest = count % FAN_OUT
    if rest and count // FAN_OUT not in nodes:
        nodes[count // FAN_OUT] = sha256((_ZERO_HASH[level] * rest).ljust(BLOCK_SIZE, b"\0")).digest()


def _first_block(run: tuple[int, bytes]) -> int:
    return run[0]


class Leaves:
    """Collects the leaf hashes of one segment, in ascending order."""

    def __init__(self, number: int, virtual_size: int) -> None:
        self.number = number
        self._blocks = min(FAN_OUT, -(-virtual_size // BLOCK_SIZE) - number * FAN_OUT)
        self._single = virtual_size <= BLOCK_SIZE
        self._runs: list[tuple[int, bytearray]] = []

    def add(self, block: int, hashes: bytes) -> None:
        """Add the hashes of consecutive blocks of the segment."""
        if self._runs:
            first, before = self._runs[-1]
            if first + len(before) // _HASH_SIZE == block:
                before += hashes
                return
        self._runs.append((block, bytearray(hashes)))

    def seal(self, keep: bool) -> Segment | None:
        """Return the finished segment, with its leaves if they are to be kept; None when all of it is zeros."""
        if not self._runs:
            return None
        runs = tuple((first, bytes(hashes)) for first, hashes in self._runs) if keep else ()
        if self._single:
            return Segment(bytes(self._runs[0][1]), runs)
        node, done = _zero_leaves(self._runs[0][0])
        for first, hashes in self._runs:
            node.update(_ZERO_HASH[0] * (first - done))
            node.update(hashes)
            done = first + len(hashes) // _HASH_SIZE
        node.update((_ZERO_HASH[0] * (self._blocks - done)).ljust((FAN_OUT - done) * _HASH_SIZE, b"\0"))
        return Segment(node.digest(), runs)


class TreeBuilder:
    """Puts a tree together from leaf hashes that come in ascending order of their blocks.

    Args:
        virtual_size: Bytes of guest content.
        keep_leaves: Whether :meth:`ContentTree.leaf` and :meth:`ContentTree.check` are to work on the result.
    """

    def __init__(self, virtual_size: int, *, keep_leaves: bool = True) -> None:
        self._size = virtual_size
        self._keep = keep_leaves
        self._segments: dict[int, Segment] = {}
        self._open: Leaves | None = None

    def add(self, position: int, hashes: bytes | None) -> None:
        """Add the hashes of consecutive blocks.

        Args:
            position: Offset of the first block in the content, a multiple of the block size.
            hashes: 32 bytes a block; None for any number of zero blocks, which need not be added at all.
        """
        view = memoryview(hashes or b"")
        block = position // BLOCK_SIZE
        while view:
            number, inside = divmod(block, FAN_OUT)
            if self._open is None or self._open.number != number:
                self._seal()
                self._open = Leaves(number, self._size)
            count = min(len(view) // _HASH_SIZE, FAN_OUT - inside)
            self._open.add(inside, bytes(view[: count * _HASH_SIZE]))
            view, block = view[count * _HASH_SIZE :], block + count

    def finish(self) -> ContentTree:
        """Return the tree."""
        self._seal()
        return ContentTree(self._size, self._segments)

    def _seal(self) -> None:
        if self._open is not None:
            segment = self._open.seal(self._keep)
            if segment is not None:
                self._segments[self._open.number] = segment
            self._open = None


def descriptor_digest(virtual_size: int, root_hash: bytes) -> bytes:
    """Return what ``fsverity digest`` prints: SHA-256 over the fs-verity descriptor."""
    log2_block = BLOCK_SIZE.bit_length() - 1
    return sha256(_DESCRIPTOR.pack(_VERSION, _SHA256, log2_block, 0, 0, virtual_size, root_hash, b"", b"")).digest()


def leaf_hashes(view: memoryview) -> bytes | None:
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
