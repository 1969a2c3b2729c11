"""The content tree against its two oracles, fsverity and veritysetup, and against itself."""

import os
from hashlib import sha256
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imagefmt_helpers import tool

from vmgraft.errors import FileError, MalformedImageError
from vmgraft.imagefmt.contract import Extent, Image, Kind
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.tree import BLOCK_SIZE, build_tree, digest_content, digest_with_tree

MIB = 1 << 20


class FileImage(Image):
    """A file as it is: the tree must not depend on any format."""

    format_name = "test"

    def __init__(self, path):
        self.path = path
        self.file = FlatFile(path)
        self.virtual_size = self.file.size

    def read(self, offset, length):
        return self.file.read(offset, length)

    def readinto(self, offset, buffer):
        return self.file.readinto(offset, buffer)

    def extents(self):
        return self.file.extents(self.virtual_size)

    metadata = locate = room = attach = detach = None

    def close(self):
        self.file.close()


FileImage.__abstractmethods__ = frozenset()


class MemoryImage(FileImage):
    """Content and extents as the test wants them."""

    def __init__(self, content, extents=None):
        self.path = "memory"
        self.content = content
        self.virtual_size = len(content)
        self.runs = [Extent(0, len(content), Kind.DATA)] if extents is None and content else extents or []

    def readinto(self, offset, buffer):
        part = self.content[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def extents(self):
        return iter(self.runs)


def write(path, size, *pieces):
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return path


def fsverity_digest(path):
    return tool("fsverity", "digest", "--block-size=65536", "--compact", path).stdout.strip()


def verity_root(path, size):
    padded = path.with_suffix(".padded")
    tool("cp", "--sparse=always", path, padded)
    os.truncate(padded, -(-size // BLOCK_SIZE) * BLOCK_SIZE)
    output = tool(
        "veritysetup", "format", "--no-superblock", "--salt=-", "--data-block-size=65536", "--hash-block-size=65536",
        padded, path.with_suffix(".hashes"),
    ).stdout  # fmt: skip
    padded.unlink()
    return next(line.split()[-1] for line in output.splitlines() if line.startswith("Root hash:"))


SIZES = [1, 512, 65535, 65536, 65537, 200 << 10, 128 * MIB, 128 * MIB + 1, 129 * MIB + 4097]


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_fsverity_and_veritysetup(tmp_path, size):
    noise = os.urandom(min(size, 70000))
    path = write(
        tmp_path / "data", size, (0, noise), (size - len(noise), noise), (size // 2, noise[: size - size // 2])
    )
    with FileImage(path) as image:
        both = digest_content(image, flat="always")
        tree_only = digest_content(image, flat="never")
    assert both.tree_digest.hex() == fsverity_digest(path).removeprefix("sha256:")
    assert both.root_hash.hex() == verity_root(path, size)
    assert both.flat == sha256(path.read_bytes()).digest()
    assert (tree_only.root_hash, tree_only.tree_digest, tree_only.flat) == (both.root_hash, both.tree_digest, None)
    assert both.virtual_size == size


def test_empty_content_agrees_with_fsverity(tmp_path):
    path = write(tmp_path / "empty", 0)
    with FileImage(path) as image:
        found = digest_content(image)
    assert found.root_hash == bytes(32)
    assert found.tree_digest.hex() == fsverity_digest(path).removeprefix("sha256:")
    assert found.flat == sha256().digest()


@pytest.mark.slow
def test_above_4_gib_agrees_with_fsverity_and_sees_every_late_byte(tmp_path):
    """A signature over the first 2 or 4 GiB only is how others were fooled (CVE-2026-34155)."""
    size = 4096 * MIB + 3 * BLOCK_SIZE + 700
    path = write(tmp_path / "big", size, (5, b"early"), (size - 9, b"very last"))
    with FileImage(path) as image:
        before = digest_content(image, flat="never").tree_digest
    assert before.hex() == fsverity_digest(path).removeprefix("sha256:")
    seen = {before}
    for offset in (2048 * MIB + 1, 4096 * MIB - 1, 4096 * MIB, 4096 * MIB + 1, size - 1):
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(b"!")
        with FileImage(path) as image:
            seen.add(digest_content(image, flat="never").tree_digest)
    assert len(seen) == 6


def test_holes_zeros_and_zero_extents_are_the_same(tmp_path):
    noise = os.urandom(100_000)
    sparse = write(tmp_path / "sparse", 3 * MIB, (MIB, noise))
    dense = tmp_path / "dense"
    dense.write_bytes(sparse.read_bytes())
    content = dense.read_bytes()
    runs = [
        Extent(0, MIB, Kind.ZERO),
        Extent(MIB, 100_000, Kind.DATA),
        Extent(MIB + 100_000, 2 * MIB - 100_000, Kind.HOLE),
    ]
    with FileImage(sparse) as one, FileImage(dense) as two:
        expected = digest_content(one, flat="always")
        assert expected == digest_content(two, flat="always")
        assert expected == digest_content(MemoryImage(content, runs), flat="always")
        assert expected.flat == sha256(content).digest()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6 * BLOCK_SIZE),
    st.lists(st.tuples(st.integers(0, 6 * BLOCK_SIZE), st.binary(min_size=1, max_size=50)), max_size=4),
    st.lists(st.integers(1, 6 * BLOCK_SIZE), max_size=4),
)
def test_the_digest_does_not_depend_on_how_extents_are_cut(size, pieces, cuts):
    content = bytearray(size)
    for offset, data in pieces:
        content[offset : offset + len(data)] = data[: max(0, size - offset)]
    content = bytes(content[:size])
    edges = sorted({0, size, *(cut for cut in cuts if cut < size)})
    runs = []
    for start, end in pairwise(edges):
        runs.append(Extent(start, end - start, Kind.DATA if any(content[start:end]) else Kind.HOLE))
    whole, cut = (digest_with_tree(MemoryImage(content, item), flat="always") for item in (None, runs))
    assert whole[0] == cut[0]
    assert whole[0].flat == sha256(content).digest()
    assert whole[0].tree_digest == build_tree(MemoryImage(content, runs), threads=1).tree_digest
    for index in range(-(-size // BLOCK_SIZE)):
        block = content[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
        assert cut[1].check(index, block)
        assert not cut[1].check(index, bytes([block[0] ^ 1]) + block[1:])


def test_check_and_leaf():
    content = os.urandom(BLOCK_SIZE) + bytes(BLOCK_SIZE) + b"end"
    tree = build_tree(MemoryImage(content))
    assert tree.leaf(0) == sha256(content[:BLOCK_SIZE]).digest()
    assert tree.leaf(1) == sha256(bytes(BLOCK_SIZE)).digest()
    assert tree.check(2, b"end")
    assert not tree.check(2, b"end\0")
    assert not tree.check(1, content[:BLOCK_SIZE])
    assert not tree.check(3, b"")
    assert not tree.check(-1, b"end")
    with pytest.raises(IndexError):
        tree.leaf(3)


def test_leaves_of_a_segment_without_data_are_zero(tmp_path):
    path = write(tmp_path / "data", 300 * MIB, (290 * MIB, b"x"))
    with FileImage(path) as image:
        tree = build_tree(image)
    assert tree.check(0, bytes(BLOCK_SIZE))
    assert not tree.check(290 * 16, bytes(BLOCK_SIZE))
    assert tree.check(290 * 16, b"x".ljust(BLOCK_SIZE, b"\0"))


def test_scattered_blocks_have_their_leaves(tmp_path):
    places = [0, 3, 4, 2047, 2048, 2050, 3 * 2048 + 31, 3 * 2048 + 32, 3 * 2048 + 65]
    path = write(tmp_path / "data", 4 * 2048 * BLOCK_SIZE + 512, *((at * BLOCK_SIZE, b"%d" % at) for at in places))
    with FileImage(path) as image:
        tree = build_tree(image)
        assert build_tree(image, keep_leaves=False).root_hash == tree.root_hash
    assert tree.tree_digest.hex() in fsverity_digest(path)
    for at in {*places, *(at + 1 for at in places), *(max(0, at - 1) for at in places)}:
        block = (b"%d" % at if at in places else b"").ljust(BLOCK_SIZE, b"\0")
        assert tree.check(at, block), at
        assert tree.leaf(at) == sha256(block).digest()


def test_a_terabyte_of_holes_costs_nothing(tmp_path):
    path = write(tmp_path / "huge", 1 << 40, ((1 << 40) - 5, b"end"))

    reads = []

    class Counting(FileImage):
        def readinto(self, offset, buffer):
            reads.append(len(buffer))
            return super().readinto(offset, buffer)

    with Counting(path) as image:
        found = digest_content(image)
    assert found.flat is None
    assert sum(reads) <= 4 * BLOCK_SIZE


def test_progress_reaches_the_end():
    for flat in ("always", "never"):
        calls = []
        content = os.urandom(5 * MIB)
        digest_content(
            MemoryImage(content), flat=flat, progress=lambda done, total, calls=calls: calls.append((done, total))
        )
        assert calls[-1] == (5 * MIB, 5 * MIB)
        assert calls == sorted(calls)


@pytest.mark.parametrize(
    "runs",
    [
        [Extent(0, 10, Kind.DATA)],
        [Extent(0, 10, Kind.DATA), Extent(11, 89, Kind.DATA)],
        [Extent(0, 60, Kind.DATA), Extent(50, 50, Kind.HOLE)],
        [Extent(0, 0, Kind.DATA), Extent(0, 100, Kind.DATA)],
        [Extent(0, 101, Kind.DATA)],
        [],
    ],
)
@pytest.mark.parametrize("flat", ["always", "never"])
def test_extents_that_do_not_cover_the_content_are_refused(runs, flat):
    with pytest.raises(MalformedImageError):
        digest_content(MemoryImage(bytes(100), runs), flat=flat)


@pytest.mark.parametrize("flat", ["always", "never"])
def test_content_that_ends_early_is_refused(flat):
    image = MemoryImage(b"x" * 100)
    image.content = b"x" * 99
    with pytest.raises(FileError, match="ends early"):
        digest_content(image, flat=flat)
