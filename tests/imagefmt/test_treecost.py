"""What a stored tree may cost: its section is unsigned, so its own bytes bound what is hashed for it."""

import struct
from typing import Any

import pytest

from vmgraft.errors import GraftFormatError, UsageError
from vmgraft.imagefmt import treenodes
from vmgraft.imagefmt.tree import BLOCK_SIZE
from vmgraft.imagefmt.treenodes import FAN_OUT, ContentTree, TreeBuilder
from vmgraft.imagefmt.treesection import MAX_NODES, MAX_RUNS, parse_tree, tree_section

LEAF = b"\x11" * 32
EXBIBYTE = 1 << 60


class Counted:
    """Stands in for SHA-256 and counts the bytes it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        for number in range(0, FAN_OUT, 32):  # states that are kept for good are not part of what a section costs
            treenodes._zero_state(number)
        outer, real = self, treenodes.sha256

        class Hash:
            def __init__(self, inner: Any) -> None:
                self._inner = inner

            def update(self, data: bytes) -> None:
                outer.bytes += len(data)
                self._inner.update(data)

            def copy(self) -> "Hash":
                return Hash(self._inner.copy())

            def digest(self) -> bytes:
                return bytes(self._inner.digest())

        def sha256(data: bytes = b"") -> Hash:
            outer.bytes += len(data)
            return Hash(real(data))

        monkeypatch.setattr(treenodes, "sha256", sha256)
        monkeypatch.setattr(treenodes, "_zero_state", lambda count: Hash(real(treenodes.ZERO_LEAF * count)))


def section(size: int, runs: list[tuple[int, int]]) -> bytes:
    head = struct.pack("<HBBIQ", 1, 16, 1, len(runs), size)
    blocks = sum(length for _first, length in runs)
    return head + b"".join(struct.pack("<QQ", *run) for run in runs) + LEAF * blocks


def parse(raw: bytes, size: int) -> ContentTree:
    return parse_tree(raw, size, file="disk.img", offset=0)


def test_scattered_runs_are_refused_before_anything_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 8000
    raw = section(EXBIBYTE, [(EXBIBYTE // BLOCK_SIZE // count * number, 1) for number in range(count)])
    counted = Counted(monkeypatch)
    with pytest.raises(GraftFormatError, match="touch") as caught:
        parse(raw, EXBIBYTE)
    assert (caught.value.field, counted.bytes) == ("tree.runs", 0)


@pytest.mark.parametrize("spread", [1, 700, FAN_OUT, 40 * FAN_OUT])
def test_what_is_hashed_stays_within_the_nodes_that_are_counted(monkeypatch: pytest.MonkeyPatch, spread: int) -> None:
    """The count that decides is no guess: no section is hashed more than it says."""
    size, runs = (1 << 47) + 5 * BLOCK_SIZE, [(spread * 2 * number, 1) for number in range(40)]
    counted = Counted(monkeypatch)
    parse(section(size, runs), size)
    monkeypatch.setattr("vmgraft.imagefmt.treesection.MAX_NODES", counted.bytes // BLOCK_SIZE - 1)
    with pytest.raises(GraftFormatError, match="touch"):
        parse(section(size, runs), size)


def test_the_most_that_is_read_and_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmgraft.imagefmt.treesection.MAX_NODES", 12)
    size = 16 * FAN_OUT * BLOCK_SIZE  # 16 nodes over the blocks, one over those; one in each level may be incomplete
    runs = [(FAN_OUT * number, 1) for number in range(10)]
    counted = Counted(monkeypatch)
    with pytest.raises(GraftFormatError, match="touch 13 nodes, at most 12"):
        parse(section(size, runs), size)
    assert counted.bytes == 0
    tree = parse(section(size, runs[:9]), size)
    assert 0 < counted.bytes <= 12 * BLOCK_SIZE
    assert tree.leaf(FAN_OUT) == LEAF


def test_the_bound_is_of_use_and_not_for_dense_data() -> None:
    assert MAX_NODES > (1 << 40) // BLOCK_SIZE // FAN_OUT + 8  # data all over 1 TiB
    blocks = (64 << 20) // 32 - 100
    tree = parse(section(blocks * BLOCK_SIZE, [(0, blocks)]), blocks * BLOCK_SIZE)  # as much as a section holds
    assert tree.leaf(blocks - 1) == LEAF


def test_runs_are_bounded() -> None:
    size = 1 << 40
    parse(section(size, [(2 * number, 1) for number in range(MAX_RUNS)]), size)
    with pytest.raises(GraftFormatError) as caught:
        parse(section(size, [(2 * number, 1) for number in range(MAX_RUNS + 1)]), size)
    assert caught.value.field == "tree.runs"


@pytest.mark.parametrize(("bound", "least"), [("MAX_NODES", 3), ("MAX_RUNS", 1)])
def test_what_nobody_would_read_is_not_written(monkeypatch: pytest.MonkeyPatch, bound: str, least: int) -> None:
    builder = TreeBuilder(4 * FAN_OUT * BLOCK_SIZE)
    builder.add(0, LEAF)
    builder.add(FAN_OUT * BLOCK_SIZE, LEAF)
    tree = builder.finish()
    assert parse(bytes(tree_section(tree).raw), tree.virtual_size).root_hash == tree.root_hash
    monkeypatch.setattr(f"vmgraft.imagefmt.treesection.{bound}", least)
    with pytest.raises(UsageError, match="too scattered") as caught:
        tree_section(tree)
    assert caught.value.field == "tree"
