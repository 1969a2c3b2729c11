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
from vmgraft.imagefmt.treenodes import BLOCK_SIZE, ZERO_LEAF, ContentTree, TreeBuilder

if TYPE_CHECKING:
    from vmgraft.imagefmt.graft import Graft

_HEAD: Final = struct.Struct("<HBBIQ")  # version, log2 of the block size, hash algorithm, runs, virtual size
_RUN: Final = struct.Struct("<QQ")  # first block, blocks
_VERSION: Final = 1
_LOG2_BLOCK: Final = BLOCK_SIZE.bit_length() - 1
_SHA256: Final = 1  # FS_VERITY_HASH_ALG_SHA256 (include/uapi/linux/fsverity.h)
_HASH: Final = 32


def tree_section(tree: ContentTree) -> Section:
    """Return the section that holds a tree.

    Raises:
        UsageError: the content has so much data that the section would be over the format's limit of 64 MiB.
    """
    runs = list(_runs(tree))
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


def parse_tree(data: bytes, virtual_size: int, *, file: str | None, offset: int) -> ContentTree:
    """Return the tree of a section; root and digest are computed from the leaves, never read.

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
    if position > len(data):
        raise refuse(f"{count} runs do not fit into {len(data)} bytes", "runs")
    builder, blocks, end = TreeBuilder(size), -(-size // BLOCK_SIZE), -1
    for first, length in _RUN.iter_unpack(data[_HEAD.size : position]):
        if not (end < first < blocks and 0 < length <= blocks - first):
            raise refuse(f"a run of {length} blocks at {first} is empty, out of order or outside the content", "runs")
        if position + length * _HASH > len(data):
            raise refuse("there are fewer hashes than blocks", "hashes")
        hashes = data[position : position + length * _HASH]
        if ZERO_LEAF in hashes:
            raise refuse("a run holds a block of zeros", "hashes")
        builder.add(first * BLOCK_SIZE, hashes)
        position, end = position + len(hashes), first + length
    if position != len(data):
        raise refuse("there are more hashes than blocks", "hashes")
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
