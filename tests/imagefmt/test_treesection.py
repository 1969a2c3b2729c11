"""The TREE section: one encoding of a content tree, and what is refused."""

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import GraftFormatError, UsageError
from vmgraft.imagefmt import treesection
from vmgraft.imagefmt.tree import BLOCK_SIZE, ContentTree
from vmgraft.imagefmt.treenodes import ZERO_LEAF, TreeBuilder
from vmgraft.imagefmt.treesection import parse_tree, tree_section

HEAD = struct.Struct("<HBBIQ")
RUN = struct.Struct("<QQ")


def made(size: int, leaves: dict[int, bytes]) -> ContentTree:
    builder = TreeBuilder(size)
    for block in sorted(leaves):
        builder.add(block * BLOCK_SIZE, leaves[block])
    return builder.finish()


def parse(data: bytes, size: int) -> ContentTree:
    return parse_tree(data, size, file="disk.img", offset=100)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 5000 * BLOCK_SIZE), st.sets(st.integers(0, 4999), max_size=40), st.integers())
def test_a_tree_comes_back_with_its_root_and_leaves(size: int, blocks: set[int], seed: int) -> None:
    rng = random.Random(seed)
    count = -(-size // BLOCK_SIZE)
    leaves = {block: rng.choice([ZERO_LEAF, rng.randbytes(32)]) for block in blocks if block < count}
    tree = made(size, leaves)
    raw = tree_section(tree).raw
    again = parse(raw, size)
    assert (again.root_hash, again.tree_digest, again.virtual_size) == (tree.root_hash, tree.tree_digest, size)
    assert all(again.leaf(block) == leaf for block, leaf in leaves.items())
    assert tree_section(again).raw == raw


def test_zeros_that_were_read_leave_no_trace() -> None:
    """The same content in two containers, holes here and zeros there, is one section."""
    leaf = b"\1" * 32
    holes = made(BLOCK_SIZE * 9, {1: leaf, 5: leaf})
    zeros = made(BLOCK_SIZE * 9, {number: leaf if number in (1, 5) else ZERO_LEAF for number in range(9)})
    assert tree_section(holes).raw == tree_section(zeros).raw


def test_a_tree_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = made(BLOCK_SIZE * 4, {block: bytes([block + 1]) * 32 for block in range(4)})
    size = len(tree_section(tree).raw)
    monkeypatch.setattr(treesection, "MAX_RAW_SIZE", size)
    assert len(tree_section(tree).raw) == size
    monkeypatch.setattr(treesection, "MAX_RAW_SIZE", size - 1)
    with pytest.raises(UsageError, match="at most"):
        tree_section(tree)


LEAF = b"\7" * 32
GOOD = HEAD.pack(1, 16, 1, 2, 9 * BLOCK_SIZE) + RUN.pack(1, 1) + RUN.pack(3, 2) + LEAF * 3


def test_the_layout_is_what_it_is() -> None:
    assert tree_section(parse(GOOD, 9 * BLOCK_SIZE)).raw == GOOD


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "version"),
        (GOOD[:15], "version"),
        (b"\2" + GOOD[1:], "version"),
        (GOOD[:2] + b"\x0c" + GOOD[3:], "version"),
        (GOOD[:3] + b"\2" + GOOD[4:], "version"),
        (HEAD.pack(1, 16, 1, 0, 9 * BLOCK_SIZE + 1), "virtualSize"),
        (HEAD.pack(1, 16, 1, 0xFFFFFFFF, 9 * BLOCK_SIZE), "runs"),
        (HEAD.pack(1, 16, 1, 1, 9 * BLOCK_SIZE) + RUN.pack(0, 0), "runs"),
        (HEAD.pack(1, 16, 1, 1, 9 * BLOCK_SIZE) + RUN.pack(9, 1) + LEAF, "runs"),
        (HEAD.pack(1, 16, 1, 1, 9 * BLOCK_SIZE) + RUN.pack(8, 2) + LEAF * 2, "runs"),
        (HEAD.pack(1, 16, 1, 1, 9 * BLOCK_SIZE) + RUN.pack(0, 2**64 - 1) + LEAF, "runs"),
        (HEAD.pack(1, 16, 1, 2, 9 * BLOCK_SIZE) + RUN.pack(3, 1) + RUN.pack(1, 1) + LEAF * 2, "runs"),
        (HEAD.pack(1, 16, 1, 2, 9 * BLOCK_SIZE) + RUN.pack(1, 1) + RUN.pack(2, 1) + LEAF * 2, "runs"),
        (HEAD.pack(1, 16, 1, 2, 9 * BLOCK_SIZE) + RUN.pack(1, 2) + RUN.pack(2, 1) + LEAF * 3, "runs"),
        (GOOD[:-1], "hashes"),
        (GOOD + b"\0", "hashes"),
        (GOOD[:-32] + ZERO_LEAF, "hashes"),
    ],
)
def test_any_other_encoding_is_refused(data: bytes, field: str) -> None:
    with pytest.raises(GraftFormatError) as caught:
        parse(data, 9 * BLOCK_SIZE)
    assert (caught.value.file, caught.value.offset, caught.value.field) == ("disk.img", 100, f"tree.{field}")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, len(GOOD)), st.integers(0, 2**63))
def test_no_bytes_end_in_anything_else(noise: bytes, at: int, size: int) -> None:
    for data in (noise, GOOD[:at] + noise, GOOD[:at] + noise + GOOD[at + len(noise) :]):
        for expected in (size, 9 * BLOCK_SIZE):
            try:
                tree = parse(data, expected)
            except GraftFormatError:
                continue
            assert tree_section(tree).raw == data
