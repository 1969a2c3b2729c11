"""Malformed headers and tables: one clear error with the field at fault, in bounded time and memory."""

from __future__ import annotations

import resource
import struct
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qcow2_testkit import MIB, attach, detach, make, open_qcow2, pattern, qemu_io, raw_base, raw_bytes, read_all, run

from vmgraft.errors import MalformedImageError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.qcow2._layout import FIELD_OFFSET
from vmgraft.imagefmt.qcow2.create import create_qcow2
from vmgraft.imagefmt.tree import build_tree

Edit = Callable[[bytearray], None]
CLUSTER = 65536


def _u32(field: str, value: int) -> Edit:
    return lambda data: struct.pack_into(">I", data, FIELD_OFFSET[field], value)


def _u64(field: str, value: int) -> Edit:
    return lambda data: struct.pack_into(">Q", data, FIELD_OFFSET[field], value)


def _at(offset: int, value: bytes) -> Edit:
    def edit(data: bytearray) -> None:
        data[offset : offset + len(value)] = value

    return edit


def _both(*edits: Edit) -> Edit:
    def edit(data: bytearray) -> None:
        for one in edits:
            one(data)

    return edit


def _chain(*exts: tuple[int, int, bytes]) -> Edit:
    """Replace the chain of extensions; (magic, stated length, data)."""
    out = b"".join(struct.pack(">II", magic, length) + data + bytes(-len(data) % 8) for magic, length, data in exts)
    return _at(112, out + bytes(600))


def _name(offset: int, size: int, name: bytes = b"") -> Edit:
    edits = [_u64("backing_file_offset", offset), _u32("backing_file_size", size)]
    return _both(*edits, _at(offset, name)) if name else _both(*edits)


def _l1(data: bytearray) -> int:
    return int(struct.unpack_from(">Q", data, FIELD_OFFSET["l1_table_offset"])[0])


def _l1_entry(value: int, index: int = 0) -> Edit:
    return lambda data: struct.pack_into(">Q", data, _l1(data) + 8 * index, value)


def _l2_entry(value: int | Callable[[bytearray], int], index: int = 0) -> Edit:
    def edit(data: bytearray) -> None:
        table = struct.unpack_from(">Q", data, _l1(data))[0] & 0x00FFFFFFFFFFFE00
        struct.pack_into(">Q", data, table + 8 * index, value if isinstance(value, int) else value(data))

    return edit


def _l2_table(data: bytearray) -> int:
    return int(struct.unpack_from(">Q", data, _l1(data))[0]) & 0x00FFFFFFFFFFFE00


def _compressed(offset: int, sectors: int = 0) -> int:
    return 1 << 62 | sectors << 54 | offset


MALFORMED: dict[str, tuple[Edit, str]] = {
    "magic": (_at(0, b"QFI\xfa"), "magic"),
    "version 1": (_u32("version", 1), "version"),
    "version 4": (_u32("version", 4), "version"),
    "clusters of 256 bytes": (_u32("cluster_bits", 8), "cluster_bits"),
    "clusters of 4 MiB": (_u32("cluster_bits", 22), "cluster_bits"),
    "cluster_bits 2^31": (_u32("cluster_bits", 1 << 31), "cluster_bits"),
    "cluster longer than the file": (_u32("cluster_bits", 21), "cluster_bits"),
    "header_length 96": (_u32("header_length", 96), "header_length"),
    "header_length not a multiple of 8": (_u32("header_length", 107), "header_length"),
    "header_length above the cluster": (_u32("header_length", CLUSTER + 8), "header_length"),
    "size 0": (_u64("size", 0), "size"),
    "size below a sector": (_u64("size", 511), "size"),
    "size 2^63": (_u64("size", 1 << 63), "size"),
    "size 2^62": (_u64("size", 1 << 62), "l1_size"),
    "encryption method 3": (_u32("crypt_method", 3), "crypt_method"),
    "refcount_order 7": (_u32("refcount_order", 7), "refcount_order"),
    "refcount_order 2^31": (_u32("refcount_order", 1 << 31), "refcount_order"),
    "l1_size over 32 MiB": (_u32("l1_size", (32 << 20) // 8 + 1), "l1_size"),
    "l1_size 0": (_u32("l1_size", 0), "l1_size"),
    "L1 behind the file": (_u64("l1_table_offset", 1 << 40), "l1_table_offset"),
    "L1 not aligned": (_u64("l1_table_offset", 3 * CLUSTER + 512), "l1_table_offset"),
    "L1 in the header": (_u64("l1_table_offset", 0), "l1_table_offset"),
    "L1 offset wraps": (_u64("l1_table_offset", (1 << 64) - CLUSTER), "l1_table_offset"),
    "L1 longer than the file": (_u32("l1_size", 1 << 20), "l1_table_offset"),
    "no refcount table": (_u32("refcount_table_clusters", 0), "refcount_table_clusters"),
    "refcount table of 2^31 clusters": (_u32("refcount_table_clusters", 1 << 31), "refcount_table_clusters"),
    "refcount table not aligned": (_u64("refcount_table_offset", CLUSTER + 8), "refcount_table_offset"),
    "refcount table behind the file": (_u64("refcount_table_offset", 1 << 45), "refcount_table_offset"),
    "65537 snapshots": (_u32("nb_snapshots", 65537), "nb_snapshots"),
    "snapshots in the header": (_u32("nb_snapshots", 1), "snapshots_offset"),
    "snapshots behind the file": (
        _both(_u32("nb_snapshots", 9), _u64("snapshots_offset", 1 << 33)),
        "snapshots_offset",
    ),
    "backing name behind the cluster": (_name(CLUSTER + 8, 5), "backing_file_offset"),
    "backing name in the header": (_name(24, 5), "backing_file_offset"),
    "backing name of 1024 bytes": (_name(4096, 1024), "backing_file_size"),
    "backing name over the cluster's end": (_name(CLUSTER - 4, 5), "backing_file_size"),
    "NUL in the backing name": (_name(4096, 5, b"ab\0cd"), "backing_file_name"),
    "extension longer than the cluster": (_chain((0x12345678, CLUSTER, b"")), "header_extension"),
    "extension of 4 GiB": (_chain((0x12345678, 0xFFFFFFFF, b"")), "header_extension"),
    "extension runs into the backing name": (
        _both(_chain((0x12345678, 64, b"")), _name(160, 4, b"name")),
        "header_extension",
    ),
    "half an extension header": (_both(_chain((0x12345678, 4, b"")), _name(132, 4, b"name")), "header_extension"),
    "65 extensions": (_chain(*[(0x1000 + i, 0, b"") for i in range(65)]), "header_extension"),
    "two grafts": (_chain((0x564D4772, 8, bytes(8)), (0x564D4772, 8, bytes(8))), "header_extension"),
    "zstd without its bit": (_at(104, b"\1"), "compression_type"),
    "compression bit without type": (_u64("incompatible_features", 8), "compression_type"),
}

UNSUPPORTED: dict[str, tuple[Edit, str]] = {
    "unknown incompatible bit": (_u64("incompatible_features", 1 << 40), "incompatible_features"),
    "compression type 2": (_both(_u64("incompatible_features", 8), _at(104, b"\2")), "compression_type"),
}

BAD_TABLES: dict[str, tuple[Edit, str]] = {
    "L1 entry behind the file": (_l1_entry(1 << 40), "l1_entry"),
    "L1 entry with reserved bits": (_l1_entry(1 << 60), "l1_entry"),
    "L1 entry not aligned": (_l1_entry(4 * CLUSTER + 512), "l1_entry"),
    "L1 entry at the last byte": (_l1_entry((1 << 55) + CLUSTER), "l1_entry"),
    "L2 table on the refcount table": (_l1_entry(CLUSTER), "l1_entry"),
    "L2 table on the L1 table": (lambda data: _l1_entry(_l1(data))(data), "l1_entry"),
    "L2 entry behind the file": (_l2_entry(1 << 50), "l2_entry"),
    "L2 entry with reserved bits": (_l2_entry(1 << 57), "l2_entry"),
    "L2 entry with bit 1": (_l2_entry(6 * CLUSTER | 2), "l2_entry"),
    "L2 entry not aligned": (_l2_entry(5 * CLUSTER + 512), "l2_entry"),
    "data on the refcount table": (_l2_entry(CLUSTER), "l2_entry"),
    "data on the refcount block": (_l2_entry(2 * CLUSTER), "l2_entry"),
    "data on the L1 table": (_l2_entry(_l1), "l2_entry"),
    "data on its own L2 table": (_l2_entry(_l2_table), "l2_entry"),
    "compressed behind the file": (_l2_entry(_compressed(1 << 50)), "compressed_cluster"),
    "compressed in the header": (_l2_entry(_compressed(0, 127)), "compressed_cluster"),
    "compressed garbage": (_l2_entry(_compressed(3 * CLUSTER, 100)), "compressed_cluster"),
    "compressed and short": (_l2_entry(lambda data: _compressed(len(data) - 1)), "compressed_cluster"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = pattern(make(tmp_path_factory.mktemp("sound") / "x.qcow2", cluster=CLUSTER))
    return path.read_bytes()


def _write(path: Path, sound: bytes, edit: Edit) -> Path:
    data = bytearray(sound)
    edit(data)
    assert data != sound
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_header(tmp_path: Path, sound: bytes, case: str) -> None:
    edit, field = MALFORMED[case]
    path = _write(tmp_path / "x.qcow2", sound, edit)
    with pytest.raises(MalformedImageError) as caught:
        open_qcow2(path)
    assert caught.value.field == field
    assert caught.value.file == str(path)
    assert caught.value.offset is not None


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_header(tmp_path: Path, sound: bytes, case: str) -> None:
    edit, field = UNSUPPORTED[case]
    with pytest.raises(UnsupportedError) as caught:
        open_qcow2(_write(tmp_path / "x.qcow2", sound, edit))
    assert caught.value.field == field


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables(tmp_path: Path, sound: bytes, case: str) -> None:
    edit, field = BAD_TABLES[case]
    path = _write(tmp_path / "x.qcow2", sound, edit)
    with open_qcow2(path) as image:
        assert image.metadata()["clusterSize"] == CLUSTER  # facts do not depend on the tables
        with pytest.raises(MalformedImageError) as caught:
            image.read(0, image.virtual_size)
        assert caught.value.field == field
        assert caught.value.offset is not None
        if field != "compressed_cluster":
            with pytest.raises(MalformedImageError):
                list(image.extents())


def test_one_l2_table_used_twice(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2", cluster=4096, size=8 * MIB)
    qemu_io(path, "write -P 1 0 4k")
    data = bytearray(path.read_bytes())
    _l1_entry(struct.unpack_from(">Q", data, _l1(data))[0], 1)(data)
    path.write_bytes(data)
    with open_qcow2(path) as image, pytest.raises(MalformedImageError, match="share"):
        image.read(0, 1)


def test_zero_flag_in_version_2(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2", version=2)
    qemu_io(path, "write -P 1 0 64k")
    data = bytearray(path.read_bytes())
    _l2_entry(1)(data)
    path.write_bytes(data)
    with open_qcow2(path) as image, pytest.raises(MalformedImageError) as caught:
        image.read(0, 1)
    assert caught.value.field == "l2_entry"


@pytest.mark.parametrize(("bitmap", "entry"), [(1 | 1 << 32, None), (1, 0)])
def test_subclusters_that_contradict_themselves(tmp_path: Path, bitmap: int, entry: int | None) -> None:
    path = make(tmp_path / "x.qcow2", options="extended_l2=on")
    qemu_io(path, "write -P 1 0 64k")
    data = bytearray(path.read_bytes())
    struct.pack_into(">Q", data, _l2_table(data) + 8, bitmap)
    if entry is not None:
        struct.pack_into(">Q", data, _l2_table(data), entry)
    path.write_bytes(data)
    with open_qcow2(path) as image, pytest.raises(MalformedImageError) as caught:
        image.read(0, 1)
    assert caught.value.field == "l2_entry"


def test_unknown_feature_bits_are_called_by_their_name(tmp_path: Path, sound: bytes) -> None:
    row = bytes([0, 40]) + b"teleportation".ljust(46, b"\0")
    edit = _both(_u64("incompatible_features", 1 << 40), _chain((0x6803F857, 48, row)))
    with pytest.raises(UnsupportedError, match=r"teleportation \(bit 40\)"):
        open_qcow2(_write(tmp_path / "x.qcow2", sound, edit))


@pytest.mark.parametrize("size", [0, 3, 4, 71, 72, 103, 104, 511, 65535])
def test_cut_files(tmp_path: Path, sound: bytes, size: int) -> None:
    path = tmp_path / "x.qcow2"
    path.write_bytes(sound[:size])
    with pytest.raises(MalformedImageError):
        open_qcow2(path)


def test_files_cut_behind_the_header(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "x.qcow2"
    for size in range(CLUSTER, len(sound), CLUSTER):
        path.write_bytes(sound[:size])
        with pytest.raises(MalformedImageError), open_qcow2(path) as image:
            image.read(0, image.virtual_size)


def test_a_last_cluster_cut_short_reads_as_in_qemu(tmp_path: Path) -> None:
    """QEMU itself leaves files that end inside the last data cluster; the missing bytes are zeros."""
    path = pattern(make(tmp_path / "x.qcow2"))
    path.write_bytes(path.read_bytes()[: -CLUSTER // 2])
    assert read_all(path) == raw_bytes(path)


def test_a_compression_bomb_costs_one_cluster(tmp_path: Path) -> None:
    """zstd can shrink a gigabyte to a few KiB; a cluster yields its own size and not a byte more."""
    import zstandard

    path = tmp_path / "x.qcow2"
    bomb = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(512 * MIB))
    create_qcow2(path, bomb.ljust(2 * CLUSTER, b"\1"))
    data = bytearray(path.read_bytes())
    struct.pack_into(">Q", data, 72, 8)
    data[104] = 1
    at = struct.unpack_from(">Q", data, _l2_table(data))[0] & 0x00FFFFFFFFFFFE00
    _l2_entry(_compressed(at, len(bomb) // 512 + 1))(data)
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_qcow2(path) as image:
        assert image.read(0, CLUSTER) == bytes(CLUSTER)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_the_largest_l1_table_is_walked_in_time(tmp_path: Path) -> None:
    """Four million L1 entries, nothing mapped: 2 PiB of hole."""
    path = make(tmp_path / "x.qcow2", size=1 << 20)
    entries = (32 << 20) // 8
    with path.open("r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", entries * (CLUSTER // 8) * CLUSTER))
        file.seek(36)
        file.write(struct.pack(">IQ", entries, 8 * CLUSTER))
        file.truncate(8 * CLUSTER + entries * 8)
    start = time.monotonic()
    with open_qcow2(path) as image:
        runs = list(image.extents())
    assert len(runs) == 1
    assert time.monotonic() - start < 10


_OPEN = """
import sys
from vmgraft.imagefmt.contract import OpenOptions
from vmgraft.imagefmt.qcow2 import FORMAT
from pathlib import Path
with FORMAT.open(Path(sys.argv[1]), OpenOptions()) as image:
    assert image.read(1 << 30, 512) == bytes(512)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_the_fullest_l1_table_takes_no_more_memory_than_allowed(tmp_path: Path) -> None:
    """Four million L2 tables of 512 bytes, every one of them there."""
    path = make(tmp_path / "x.qcow2", cluster=512, size=1 << 20)
    entries, first = (32 << 20) // 8, 64 * MIB
    with path.open("r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", entries * 64 * 512))
        file.seek(36)
        file.write(struct.pack(">IQ", entries, 16 * MIB))
        file.truncate(first + entries * 512)
        file.seek(16 * MIB)
        file.write(struct.pack(f">{entries}Q", *range(first, first + entries * 512, 512)))
    kib = int(run(sys.executable, "-c", _OPEN, path).stdout)
    assert kib < 256 * 1024


_FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _use_everything(path: Path) -> None:
    """Open, inspect and read; anything but a VmgraftError fails the test."""
    try:
        with open_qcow2(path) as image:
            image.metadata()
            image.locate()
            image.room()
            image.read(0, 65536)
            image.read(min(image.virtual_size, 1 << 62) // 2, 65536)
            for count, _ in enumerate(image.extents()):
                if count > 1000:
                    break
    except VmgraftError as error:
        assert error.message


@pytest.fixture(scope="module")
def grafted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("grafted")
    raw_base(folder)
    path = make(folder / "x.qcow2", cluster=4096, size=MIB, backing="base.raw")
    qemu_io(path, "write -P 1 0 20k")
    run("qemu-img", "rebase", "-q", "-u", "-b", "", path)
    attach(path)
    return path.read_bytes()


@_FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, 1023), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_mutated_headers(tmp_path: Path, grafted: bytes, edits: list[tuple[int, bytes]]) -> None:
    data = bytearray(grafted)
    for offset, piece in edits:
        data[offset : offset + len(piece)] = piece
    path = tmp_path / "x.qcow2"
    path.write_bytes(data)
    _use_everything(path)


@_FUZZ
@given(edits=st.lists(st.tuples(st.integers(8, 1023), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3))
def test_mutated_headers_open_for_writing(tmp_path: Path, grafted: bytes, edits: list[tuple[int, bytes]]) -> None:
    """Whatever a header says, recovery, detach and attach write nothing behind the first cluster."""
    data = bytearray(grafted)
    for offset, piece in edits:
        data[offset : offset + len(piece)] = piece
    path = tmp_path / "x.qcow2"
    path.write_bytes(data)
    for action in (detach, lambda p: attach(p, placement=Placement.INLINE), attach):
        try:
            action(path)
        except (VmgraftError, AssertionError) as error:
            assert isinstance(error, VmgraftError) or "Located" in str(error)
    after = path.read_bytes()
    cluster = 1 << min(20, int.from_bytes(data[20:24], "big"))
    assert len(after) == len(data)
    assert after[max(4096, cluster) :] == data[max(4096, cluster) :]
    assert after[16:72] == data[16:72]


_NUMBERS = st.one_of(st.integers(0, 64), st.integers(0, 1 << 16), st.integers(0, (1 << 64) - 1)).map(
    lambda n: struct.pack(">Q", n)
)


@_FUZZ
@given(place=st.sampled_from(sorted(FIELD_OFFSET.values())), value=_NUMBERS, more=st.booleans())
def test_mutated_fields(tmp_path: Path, grafted: bytes, place: int, value: bytes, more: bool) -> None:
    data = bytearray(grafted)
    piece = value if more else value[-4:]
    data[place : place + len(piece)] = piece
    path = tmp_path / "x.qcow2"
    path.write_bytes(data)
    _use_everything(path)


@_FUZZ
@given(place=st.integers(0, (1 << 16) - 1), value=_NUMBERS)
def test_mutated_tables(tmp_path: Path, grafted: bytes, place: int, value: bytes) -> None:
    data = bytearray(grafted)
    at = 4096 + place * 8 % (len(data) - 4096 - 8)
    data[at : at + 8] = value
    path = tmp_path / "x.qcow2"
    path.write_bytes(data)
    _use_everything(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_one_cluster_mapped_a_million_times(tmp_path: Path, compressed: bool) -> None:
    """A file of a few MiB that claims 512 GiB of data would keep every digest busy for an hour."""
    path = make(tmp_path / "bomb.qcow2", cluster=2 * MIB, size=512 << 30)
    qemu_io(path, f"write {'-c ' if compressed else ''}-P 7 0 2M")
    data = bytearray(path.read_bytes())
    table = _l2_table(data)
    data[table : table + 2 * MIB] = data[table : table + 8] * (2 * MIB // 8)
    path.write_bytes(data)
    started = time.monotonic()
    with open_qcow2(path) as image, pytest.raises(MalformedImageError, match="used many times"):
        build_tree(image)
    assert time.monotonic() - started < 10


def test_a_cluster_full_of_notes_is_searched_in_time(tmp_path: Path) -> None:
    """Every one of them sound, and each claiming the whole cluster as its spill."""
    path = make(tmp_path / "x.qcow2", cluster=2 * MIB)
    with open_qcow2(path) as image:
        end = image._header.end_offset
    places = (end, 2 * MIB, 0, 0, 0, MIB, end + 8)
    body = struct.pack("<8sHHIQQQQIIQ32s", b"VMGQNOTE", 1, 2, 0, *places, bytes(32))
    note = body + sha256(body).digest()[:8]
    data = bytearray(path.read_bytes())
    for at in range(4096, 2 * MIB - 512, 104):
        data[at : at + 104] = note
    path.write_bytes(data)
    started = time.monotonic()
    with open_qcow2(path) as image:
        assert image.locate().state is GraftState.NONE
    assert time.monotonic() - started < 5
