"""Content behind a table of blocks, against the same bytes in memory."""

import random
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import FileError, MalformedImageError
from vmgraft.imagefmt.contract import Kind
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.mapped import BlockKind, BlockMap, MappedContent

BLOCK = 4096


class Table(BlockMap):
    block_size = BLOCK

    def __init__(self, rows, virtual_size, stored_limit, packed):
        self.rows = rows
        self.virtual_size = virtual_size
        self.stored_limit = stored_limit
        self.packed = packed
        self.asked = 0

    def entries(self, first, count):
        self.asked += count
        part = self.rows[first : first + count]
        return np.array([k for k, _ in part], dtype=np.uint8), np.array([h for _, h in part], dtype=np.uint64)

    def expand(self, host, block):
        return zlib.decompress(self.packed[host])


def build(path, kinds, cut=0, seed=1):
    """Write blocks of the given kinds in random order; return the table and the bytes it stands for."""
    rng = random.Random(seed)
    rows, content, packed = [None] * len(kinds), [b""] * len(kinds), {}
    data = bytearray(b"head".ljust(BLOCK, b"-"))
    order = list(range(len(kinds)))
    if seed % 2:
        rng.shuffle(order)
    for index in order:
        content[index] = bytes(BLOCK)
        rows[index] = (kinds[index], 0)
        if kinds[index] is BlockKind.DATA:
            content[index] = rng.randbytes(BLOCK)
            rows[index] = (BlockKind.DATA, len(data))
            data += content[index]
        elif kinds[index] is BlockKind.COMPRESSED:
            content[index] = bytes([index % 256]) * BLOCK
            rows[index] = (BlockKind.COMPRESSED, len(packed) + 7)
            packed[len(packed) + 7] = zlib.compress(content[index])
    path.write_bytes(data)
    size = max(1, len(kinds) * BLOCK - cut)
    return Table(rows, size, len(data) + BLOCK * len(packed), packed), b"".join(content)[:size]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mapped")


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(list(BlockKind)), min_size=1, max_size=40),
    cut=st.integers(0, BLOCK - 1),
    seed=st.integers(0, 9),
    reads=st.lists(st.tuples(st.integers(0, 41 * BLOCK), st.integers(0, 9 * BLOCK)), max_size=6),
)
def test_reads_and_extents(folder, kinds, cut, seed, reads):
    table, expected = build(folder / "x", kinds, cut, seed)
    file = FlatFile(folder / "x")
    content = MappedContent(file, table)
    for offset, length in [(0, len(expected) + 5), *reads]:
        buffer = bytearray(length)
        count = content.readinto(offset, memoryview(buffer))
        assert bytes(buffer[:count]) == expected[offset : offset + length]
    position, last = 0, None
    for extent in content.extents():
        assert extent.start == position and extent.length > 0 and extent.kind is not last
        if extent.kind is not Kind.DATA:
            assert not any(expected[position : position + extent.length])
        position, last = position + extent.length, extent.kind
    assert position == len(expected)
    data = sum(extent.length for extent in content.extents() if extent.kind is Kind.DATA)
    stored = [i for i, kind in enumerate(kinds) if kind in (BlockKind.DATA, BlockKind.COMPRESSED)]
    assert data == sum(min(BLOCK, len(expected) - i * BLOCK) for i in stored)
    file.close()


def test_blocks_used_twice_are_refused(tmp_path):
    table, _ = build(tmp_path / "x", [BlockKind.DATA] * 3)
    table.rows = [table.rows[0]] * 3
    table.virtual_size = 3 * BLOCK
    table.stored_limit = BLOCK
    with pytest.raises(MalformedImageError, match="used twice"):
        list(MappedContent(FlatFile(tmp_path / "x"), table).extents())


def test_a_file_that_was_cut_is_told(tmp_path):
    table, _ = build(tmp_path / "x", [BlockKind.DATA], seed=2)
    (tmp_path / "x").write_bytes(b"short")
    with pytest.raises(FileError, match="shorter"):
        MappedContent(FlatFile(tmp_path / "x"), table).readinto(0, memoryview(bytearray(BLOCK)))


def test_unmapped_parts_are_skipped(tmp_path):
    table, _ = build(tmp_path / "x", [BlockKind.DATA], seed=2)
    blocks = 1 << 40
    table.virtual_size = blocks * BLOCK
    table.skip_unmapped = lambda block, end: block if block == 0 else end
    real = table.entries
    table.entries = lambda first, count: real(first, 1) if first == 0 and count == 1 else _padded(real, first, count)
    runs = list(MappedContent(FlatFile(tmp_path / "x"), table).extents())
    assert [run.kind for run in runs] == [Kind.DATA, Kind.HOLE]
    assert table.asked < 1 << 17


def _padded(real, first, count):
    kind, host = real(first, 1)
    return np.pad(kind, (0, count - len(kind))), np.pad(host, (0, count - len(host)))
