"""The TREE section: the content tree's leaf hashes, so that a host can check single blocks without reading them all.

Little-endian: a head (version 1, log2 of the block size, hash algorithm as fs-verity numbers it, zero, number of runs,
virtual size), then for each run the index of its first block and how many blocks it has, then the hashes of all runs.
Leaves outside the runs are those of zero blocks. There is one encoding of a tree: runs ascend, have a gap between them
and hold no leaf of a zero block. Nobody signs the section: its tree is worth what its digest is compared with.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from vmgraft.errors import GraftFormatError, UsageError
from vmgraft.imagefmt._layout import MAX_RAW_SIZE
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.treenodes import BLOCK_SIZE, FAN_OUT, ZERO_LEAF, ContentTree, TreeBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmgraft.imagefmt.graft import Graft

_HEAD: Final = struct.Struct("<HBBIQ")  # version, log2 of the block size, hash algorithm, runs, virtual size
_RUN: Final = struct.Struct("<QQ")  # first block, blocks
_VERSION: Final = 1
_LOG2_BLOCK: Final = BLOCK_SIZE.bit_length() - 1
_SHA256: Final = 1  # FS_VERITY_HASH_ALG_SHA256 (include/uapi/linux/fsverity.h)
_HASH: Final = 32
#: Runs of a section: each costs time that its few bytes do not pay for.
MAX_RUNS: Final = 65536
#: Nodes of 64 KiB that the runs of a section may touch, in all levels together: what is hashed for the root, 640 MiB.
#: Data all over 1 TiB touches 8,200; the densest section there can be, 1,027.
MAX_NODES: Final = 10240


def tree_section(tree: ContentTree) -> Section:
    """Return the section that holds a tree.

    Raises:
        UsageError: the content has so much data that the section would be over the format's limit of 64 MiB, or is so
            scattered that no reader takes it.
    """
    runs = list(_runs(tree))
    touched = _nodes([(first, first + len(part) // _HASH - 1) for first, part in runs], tree.block_count)
    if len(runs) > MAX_RUNS or touched > MAX_NODES:
        raise UsageError(
            f"the content is too scattered for a stored tree: {len(runs)} runs of data that touch {touched} nodes, "
            f"at most {MAX_RUNS} and {MAX_NODES} are read",
            field="tree",
            hint="leave --with-tree out: hosts then read all of the content before they start it",
        )
    hashes = b"".join(part for _first, part in runs)
    raw = b"".join((
        _HEAD.pack(_VERSION, _LOG2_BLOCK, _SHA256, len(runs), tree.virtual_size),
        *(_RUN.pack(first, len(part) // _HASH) for first, part in runs),
        hashes,
    ))  # fmt: skip
    if len(raw) > MAX_RAW_SIZE:
        raise UsageError(
            f"the content tree takes {len(raw)} bytes, at most {MAX_RAW_SIZE} fit into a section",
            field="tree",
            hint="leave --with-tree out: hosts then read all of the content before they start it",
        )
    return Section(SectionKind.TREE, raw, critical=False)


def _runs(tree: ContentTree) -> list[tuple[int, bytes]]:
    """Return (first block, hashes) of every run of blocks that are not zeros, however they were read."""
    found: list[tuple[int, bytearray]] = []
    end = -1
    for first, hashes in tree.runs():
        for at in range(0, len(hashes), _HASH):
            leaf, block = hashes[at : at + _HASH], first + at // _HASH
            if leaf == ZERO_LEAF:
                continue
            if block == end:
                found[-1][1].extend(leaf)
            else:
                found.append((block, bytearray(leaf)))
            end = block + 1
    return [(first, bytes(hashes)) for first, hashes in found]


def _nodes(spans: list[tuple[int, int]], blocks: int) -> int:
    """Return how many nodes have to be hashed for a root over runs (first and last block, ascending)."""
    total = 0
    while blocks > 1:
        above: list[tuple[int, int]] = []
        for first, last in ((one // FAN_OUT, other // FAN_OUT) for one, other in spans):
            if above and first <= above[-1][1]:
                above[-1] = (above[-1][0], last)
            else:
                above.append((first, last))
        total += sum(last - first + 1 for first, last in above) + 1  # and the incomplete one at the end
        spans, blocks = above, -(-blocks // FAN_OUT)
    return total


def _read_runs(
    data: bytes, end: int, blocks: int, refuse: Callable[[str, str], GraftFormatError]
) -> list[tuple[int, int]]:
    """Return (first, last) block of each run; nothing has been hashed until they are all found to be affordable."""
    spans: list[tuple[int, int]] = []
    position, before = end, -1
    for first, length in _RUN.iter_unpack(data[_HEAD.size : end]):
        if not (before < first < blocks and 0 < length <= blocks - first):
            raise refuse(f"a run of {length} blocks at {first} is empty, out of order or outside the content", "runs")
        position += length * _HASH
        if position > len(data):
            raise refuse("there are fewer hashes than blocks", "hashes")
        spans.append((first, first + length - 1))
        before = first + length
    if position != len(data):
        raise refuse("there are more hashes than blocks", "hashes")
    touched = _nodes(spans, blocks)
    if touched > MAX_NODES:
        raise refuse(f"its runs touch {touched} nodes, at most {MAX_NODES} are computed", "runs")
    return spans


def parse_tree(data: bytes, virtual_size: int, *, file: str | None, offset: int) -> ContentTree:
    """Return the tree of a section; root and digest are computed from the leaves, never read.

    Nothing is hashed before the whole layout is known to be sound and within ``MAX_RUNS`` and ``MAX_NODES``.

    Args:
        data: The section's raw bytes.
        virtual_size: Bytes of guest content that the image has.
        file: Where it comes from, for messages.
        offset: Where in that file it begins, in bytes.

    Raises:
        GraftFormatError: not the one encoding of a tree over so many bytes.
    """

    def refuse(message: str, field: str) -> GraftFormatError:
        return GraftFormatError(f"TREE section: {message}", file=file, offset=offset, field=f"tree.{field}")

    if len(data) < _HEAD.size:
        raise refuse(f"{len(data)} bytes are no tree", "version")
    version, log2_block, algorithm, count, size = _HEAD.unpack_from(data)
    if (version, log2_block, algorithm) != (_VERSION, _LOG2_BLOCK, _SHA256):
        raise refuse("not of a version, block size and hash that this release knows", "version")
    if size != virtual_size:
        raise refuse(f"the tree of {size} bytes, where the content has {virtual_size}", "virtualSize")
    position = _HEAD.size + count * _RUN.size
    if count > MAX_RUNS or position > len(data):
        raise refuse(f"{count} runs do not fit into {len(data)} bytes, or are more than {MAX_RUNS}", "runs")
    builder = TreeBuilder(size)
    for first, last in _read_runs(data, position, -(-size // BLOCK_SIZE), refuse):
        hashes = data[position : position + (last - first + 1) * _HASH]
        if ZERO_LEAF in hashes:
            raise refuse("a run holds a block of zeros", "hashes")
        builder.add(first * BLOCK_SIZE, hashes)
        position += len(hashes)
    return builder.finish()


def stored_tree(graft: Graft) -> ContentTree | None:
    """Return the tree that a graft's record holds, or None; nothing in it is trusted.

    Raises:
        GraftFormatError: the section is damaged, or holds no tree over the image's size.
    """
    record = graft.record
    sections = () if record is None else record.of_kind(SectionKind.TREE)
    if record is None or not sections:
        return None
    raw = record.raw(sections[0])
    return parse_tree(raw, graft.image.virtual_size, file=record.file, offset=record.offset + sections[0].offset)


def kept_tree(graft: Graft) -> tuple[Section, ...]:
    """Return the section anew for a graft that had one and whose content was read; nothing where it had none."""
    if graft.record is None or graft.tree is None or not graft.record.of_kind(SectionKind.TREE):
        return ()
    return (tree_section(graft.tree),)
