"""Malformed headers, descriptors and tables: one clear error with the field at fault, in bounded time and memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagefmt_helpers import attach
from vmdk_testkit import (
    AT,
    AT_END,
    build,
    build_stream,
    descriptor,
    head,
    noise,
    open_vmdk,
    qemu_check,
    small_image,
    stream_image,
)

from vmgraft.errors import MalformedImageError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.tree import build_tree

Edit = Callable[[bytearray], None]
#: Places in the sample: 20 sectors of descriptor, then each directory and its only table.
RGD, RGT, GD, GT, OVERHEAD = 21, 22, 26, 27, 64
CAPACITY = 11 * 8 + 3


def u32(at: int, value: int) -> Edit:
    return lambda data: struct.pack_into("<I", data, at, value)


def u64(field: str, value: int) -> Edit:
    return lambda data: struct.pack_into("<Q", data, AT[field], value)


def put(at: int, value: bytes) -> Edit:
    def edit(data: bytearray) -> None:
        data[at : at + len(value)] = value

    return edit


def both(*edits: Edit) -> Edit:
    def edit(data: bytearray) -> None:
        for one in edits:
            one(data)

    return edit


def cut(size: int) -> Edit:
    def edit(data: bytearray) -> None:
        del data[size:]

    return edit


def entry(number: int, value: int) -> Edit:
    return u32(GT * 512 + 4 * number, value)


def text(old: bytes, new: bytes) -> Edit:
    def edit(data: bytearray) -> None:
        before = bytes(data[512:10752])
        assert old in before
        data[512:10752] = before.replace(old, new, 1).rstrip(b"\0").ljust(10240, b"\0")

    return edit


MALFORMED: dict[str, tuple[Edit, str]] = {
    "magic": (put(0, b"KDMW"), "VMDK header.magic"),
    "newlines": (put(AT["newlines"], b"\n \n\n"), "newlines"),
    "flag without compression": (u32(AT["flags"], 0x30003), "compression"),
    "compression without flag": (put(AT["compression"], b"\1\0"), "compression"),
    "grains of 4 sectors": (u64("grain", 4), "grain_size"),
    "grains of 24 sectors": (u64("grain", 24), "grain_size"),
    "grains of 32 MiB": (u64("grain", 1 << 16), "grain_size"),
    "grains of 2^64": (u64("grain", (1 << 64) - 1), "grain_size"),
    "capacity of 2^64": (u64("capacity", (1 << 64) - 1), "capacity"),
    "directory of 8 MiB and an entry": (u64("capacity", (1 << 21) * 4096 + 1), "capacity"),
    "descriptor of 2^63": (u64("descriptor_size", 1 << 63), "descriptor_size"),
    "descriptor behind the overhead": (u64("descriptor", OVERHEAD), "overhead"),
    "descriptor on the header": (both(u64("descriptor_size", 63), u64("descriptor", 1)), "rgd_offset"),
    "overhead behind the file": (u64("overhead", 1 << 40), "overhead"),
    "overhead of nothing": (u64("overhead", 0), "overhead"),
    "directory behind the file": (u64("gd", 1 << 40), "gd_offset"),
    "directory on the header": (u64("gd", 0), "gd_offset"),
    "directory on the descriptor": (u64("gd", 5), "gd_offset"),
    "both directories in one place": (u64("rgd", GD), "rgd_offset"),
    "redundant directory behind the file": (u64("rgd", 1 << 40), "rgd_offset"),
    "directory longer than the file": (u64("capacity", (1 << 20) * 4096), "gd_offset"),
    "no footer": (u64("gd", AT_END), "footer"),
    "file ends in the header": (cut(78), "VMDK header.compression"),
    "file ends in its sector": (cut(511), "VMDK header"),
    "file ends in the descriptor": (cut(5000), "overhead"),
    "file ends in the tables": (cut(GT * 512 + 100), "overhead"),
    "no title": (text(b"# Disk Descr", b"# disc descr"), "descriptor"),
    "empty descriptor": (put(512, b"\0"), "descriptor"),
    "no CID": (text(b"\nCID=", b"\nDIC="), "CID"),
    "CID of nine digits": (text(b"CID=7e5b80a7", b"CID=7e5b80a71"), "CID"),
    "two CIDs": (text(b"createType", b"CID=1\ncreateType"), "CID"),
    "no parentCID": (text(b"parentCID=ffffffff\n", b""), "parentCID"),
    "two types": (text(b"createType", b'createType="vmfs"\ncreateType'), "createType"),
    "no extent": (text(b'RW 91 SPARSE "disk.vmdk"', b""), "extent"),
    "two extents": (text(b'RW 91 SPARSE "disk.vmdk"', b'RW 9 SPARSE "a.vmdk"\nRW 9 SPARSE "b.vmdk"'), "extent"),
    "a line of nonsense": (text(b"# Extent description", b"nonsense"), "extent"),
    "an extent of another size": (text(b"RW 91", b"RW 92"), "extent"),
    "an extent elsewhere": (text(b'"disk.vmdk"', b'"/etc/passwd"'), "extent"),
    "an extent above": (text(b'"disk.vmdk"', b'"..\\\\disk.vmdk"'), "extent"),
    "an extent without name": (text(b' "disk.vmdk"', b""), "extent"),
    "5000 lines": (text(b"#DDB", b"#" + b"\n" * 5000), "descriptor"),
    "table behind the file": (u32(GD * 512, 1 << 20), "grain directory"),
    "table cut by the end of the file": (lambda data: u32(GD * 512, len(data) // 512 - 3)(data), "grain directory"),
    "table on the header": (u32(GD * 512, 0xFFFFFFFF), "grain directory"),
    "table on the descriptor": (u32(GD * 512, 3), "grain directory"),
    "table on its directory": (u32(GD * 512, GD), "grain directory"),
    "table on the redundant one": (u32(GD * 512, RGT + 1), "grain directory"),
    "grain in the descriptor": (entry(0, 2), "grain table"),
    "grain in the gap": (entry(0, OVERHEAD - 1), "grain table"),
    "grain behind the file": (entry(0, 1 << 20), "grain table"),
    "grain far behind the file": (entry(0, 0xFFFFFFFF), "grain table"),
    "grain used twice": (entry(0, OVERHEAD), "grain table"),
    "grains that overlap": (entry(0, OVERHEAD + 1), "grain table"),
    "zero grains without their flag": (both(u32(AT["flags"], 3), entry(0, 1)), "grain table"),
    "grain cut": (cut(OVERHEAD * 512 + 3 * 4096 + 1000), "grain table"),
    "grain on a table": (both(put(OVERHEAD * 512 + 8192, b"\0" * 2048), u32(RGD * 512, OVERHEAD + 16)), "grain table"),
}
UNSUPPORTED: dict[str, tuple[Edit, str]] = {
    "version 0": (u32(AT["version"], 0), "version"),
    "version 4": (u32(AT["version"], 4), "version"),
    "unknown flag": (u32(AT["flags"], 0x40003), "flags"),
    "markers alone": (u32(AT["flags"], 0x20003), "flags"),
    "compressed without markers": (both(u32(AT["flags"], 0x10003), put(AT["compression"], b"\1\0")), "flags"),
    "compression method 2": (put(AT["compression"], b"\2\0"), "compression"),
    "descriptor only": (u64("capacity", 0), "capacity"),
    "part of a split image": (both(u64("descriptor", 0), u64("descriptor_size", 0)), "descriptor_offset"),
    "tables of 128 entries": (u32(AT["gtes"], 128), "gtes_per_gt"),
    "descriptor version 4": (text(b"version=1", b"version=4"), "version"),
    "split": (text(b"monolithicSparse", b"twoGbMaxExtentSparse"), "createType"),
    "flat": (text(b"monolithicSparse", b"monolithicFlat"), "createType"),
    "on a VMFS": (text(b"monolithicSparse", b"vmfsSparse"), "createType"),
    "no type": (text(b'createType="monolithicSparse"', b""), "createType"),
    "a flat extent": (text(b"SPARSE", b"FLAT"), "extent"),
}


def use_everything(path: Path) -> None:
    with open_image(path) as image:
        image.metadata()
        image.room()
        image.locate()
        list(image.extents())
        image.read(0, 1 << 20)
        image.read(image.virtual_size - 1, 1)


@pytest.fixture
def sample(tmp_path: Path) -> bytearray:
    return bytearray(small_image(tmp_path / "sample.vmdk").read_bytes())


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path: Path, sample: bytearray, case: str) -> None:
    edit, field = MALFORMED[case]
    edit(sample)
    path = tmp_path / "x.vmdk"
    path.write_bytes(sample)
    for act in (lambda image: list(image.extents()), lambda image: image.read(0, 1 << 20)):
        with pytest.raises(MalformedImageError) as caught, open_vmdk(path) as image:
            act(image)
        assert caught.value.field == field
        assert caught.value.file == str(path)
        assert caught.value.offset is not None


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(tmp_path: Path, sample: bytearray, case: str) -> None:
    edit, field = UNSUPPORTED[case]
    edit(sample)
    path = tmp_path / "x.vmdk"
    path.write_bytes(sample)
    with pytest.raises(UnsupportedError) as caught:
        open_image(path)
    assert (caught.value.field, caught.value.file) == (field, str(path))
    assert "convert" in caught.value.hint


def test_the_samples_themselves_are_sound(tmp_path: Path) -> None:
    for path in (small_image(tmp_path / "x.vmdk"), stream_image(tmp_path / "y.vmdk")):
        use_everything(path)
        qemu_check(path)


# --- streams -------------------------------------------------------------------------------------------------------


def stream(grain: bytes, lba: int = 0, size: int | None = None) -> bytearray:
    """A stream of one grain, its marker and bytes as given."""
    data = bytearray(build_stream({0: b"x"}, capacity=128))
    packed = struct.pack("<QI", lba, len(grain) if size is None else size) + grain
    at = 128 * 512
    padded = packed.ljust(-(-len(packed) // 512) * 512, b"\0")
    rest = data[at + 512 :]
    moved = len(padded) // 512 - 1
    footer = len(rest) - 1024
    table = int.from_bytes(data[-1024 + AT["gd"] : -1024 + AT["gd"] + 8], "little")
    struct.pack_into("<Q", rest, footer + AT["gd"], table + moved)
    gd = rest.index(struct.pack("<I", table - 5)[:4], 512 * 5) if moved else None
    if gd is not None:
        struct.pack_into("<I", rest, gd, table - 5 + moved)
    return data[:at] + padded + rest


GRAIN = noise(65536, 3)
STREAMS: dict[str, tuple[bytearray, str]] = {
    "another grain's marker": (stream(zlib.compress(GRAIN), lba=128), "grain.lba"),
    "nothing": (stream(b"", size=0), "grain.size"),
    "more than two grains": (stream(zlib.compress(GRAIN), size=2 * 65536 + 1), "grain.size"),
    "4 GiB": (stream(zlib.compress(GRAIN), size=0xFFFFFFFF), "grain.size"),
    "garbage": (stream(b"\xff" * 600), "grain.data"),
    "raw deflate": (stream(zlib.compress(GRAIN)[2:-4]), "grain.data"),
    "cut": (stream(zlib.compress(GRAIN)[:-100]), "grain.data"),
    "a wrong checksum": (stream(zlib.compress(GRAIN)[:-1] + b"?"), "grain.data"),
    "too little": (stream(zlib.compress(GRAIN[:-1])), "grain.data"),
    "a byte too much": (stream(zlib.compress(GRAIN + b"x")), "grain.data"),
    "a bomb": (stream(zlib.compress(bytes(64 << 20), 9)), "grain.data"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_compressed_grains(tmp_path: Path, case: str) -> None:
    data, field = STREAMS[case]
    path = tmp_path / "x.vmdk"
    path.write_bytes(data)
    started = time.process_time()
    with open_vmdk(path) as image:
        assert [extent.length for extent in image.extents()] == [65536]
        with pytest.raises(MalformedImageError) as caught:
            image.read(0, 65536)
    assert (caught.value.field, caught.value.offset) == (field, 128 * 512)
    assert time.process_time() - started < 2


def test_the_helper_makes_sound_streams(tmp_path: Path) -> None:
    path = tmp_path / "x.vmdk"
    path.write_bytes(stream(zlib.compress(GRAIN)))
    with open_vmdk(path) as image:
        assert image.read(0, 65536) == GRAIN
    qemu_check(path)


FOOTERS: dict[str, tuple[Edit, str]] = {
    "no marker": (lambda data: put(len(data) - 1536 + 12, b"\2")(data), "footer"),
    "no end of stream": (lambda data: put(len(data) - 512 + 12, b"\1")(data), "footer"),
    "an end of stream with a value": (lambda data: put(len(data) - 512, b"\1")(data), "footer"),
    "cut": (lambda data: cut(len(data) - 512)(data), "footer"),
    "grown": (lambda data: data.extend(bytes(512)), "footer"),
    "grown by a byte": (lambda data: data.extend(b"\0"), "footer"),
    "magic": (lambda data: put(len(data) - 1024, b"X")(data), "VMDK header.magic"),
    "another capacity": (lambda data: put(len(data) - 1024 + AT["capacity"], b"\1")(data), "capacity"),
    "no directory either": (lambda data: put(len(data) - 1024 + AT["gd"], b"\xff" * 8)(data), "gd_offset"),
    "only a header": (cut(128 * 512), "footer"),
}


@pytest.mark.parametrize("case", FOOTERS)
def test_footers(tmp_path: Path, case: str) -> None:
    edit, field = FOOTERS[case]
    data = bytearray(stream_image(tmp_path / "y.vmdk").read_bytes())
    edit(data)
    path = tmp_path / "x.vmdk"
    path.write_bytes(data)
    with pytest.raises(MalformedImageError) as caught:
        open_image(path)
    assert caught.value.field == field


# --- bombs ---------------------------------------------------------------------------------------------------------


def test_one_table_used_for_a_terabyte(tmp_path: Path) -> None:
    tables = 1 << 12
    capacity = tables * 512 * 1024
    data = build({}, capacity=capacity, grain=1024, overhead=1 << 15, redundant=False, text=descriptor(capacity))
    (gd,) = struct.unpack_from("<Q", data, AT["gd"])
    path = tmp_path / "x.vmdk"
    path.write_bytes(data[: gd * 512] + data[gd * 512 : gd * 512 + 4] * tables + data[(gd + tables * 4 // 512) * 512 :])
    with open_vmdk(path) as image, pytest.raises(MalformedImageError, match="on other metadata"):
        build_tree(image)


def test_one_grain_used_in_every_table(tmp_path: Path) -> None:
    """Within a table the second use shows at once; spread over tables, it shows when the file cannot hold as much."""
    tables = 256
    capacity = tables * 512 * 8
    data = bytearray(build({0: noise(4096)}, capacity=capacity, overhead=2048, redundant=False))
    (gd,) = struct.unpack_from("<Q", data, AT["gd"])
    for table in range(tables):
        struct.pack_into("<I", data, (gd + 2 + 4 * table) * 512, 2048)
    path = tmp_path / "x.vmdk"
    text = descriptor(capacity)
    path.write_bytes(data[:512] + text.ljust(10240, b"\0") + data[10752:])
    started = time.process_time()
    with open_vmdk(path) as image, pytest.raises(MalformedImageError, match="used twice"):
        build_tree(image)
    assert time.process_time() - started < 2


def test_the_largest_directory_takes_little_time_and_memory(tmp_path: Path) -> None:
    tables = 1 << 21
    capacity = tables * 512 * 8
    path = tmp_path / "x.vmdk"
    size = tables * 4 // 512
    with path.open("wb") as file:
        file.write(head(capacity, 8, 21, 21 + size) + descriptor(capacity).ljust(10240, b"\0"))
        file.write(struct.pack("<I", 1 << 24) * tables)
        file.truncate(1 << 34)
    tracemalloc.start()
    started = time.process_time()
    with open_vmdk(path) as image, pytest.raises(MalformedImageError, match="on other metadata"):
        list(image.extents())
    assert time.process_time() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 128 << 20
    tracemalloc.stop()


def test_a_mebibyte_of_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "x.vmdk"
    lines = (b"#", b'ddb.vmgraft="' + b" " * 900_000 + b'x"y', b"a=" + b"\t" * 900_000, b'a = "' + b'" ' * 400_000)
    for line in lines:
        text = descriptor(96) + b'a.b = "c"\n' * 3000 + line
        path.write_bytes(build({}, capacity=96, room=2048, overhead=4096, text=text))
        started = time.process_time()
        use_everything(path)
        assert time.process_time() - started < 2


@pytest.mark.parametrize("line", [b"RW 96 SPARSE" + b" " * 900_000 + b"x", b" \t\r" * 300_000 + b"x", b"RW " * 300_000])
def test_a_line_that_could_keep_a_pattern_busy(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.vmdk"
    path.write_bytes(build({}, capacity=96, room=2048, overhead=4096, text=descriptor(96) + line))
    started = time.process_time()
    with pytest.raises(MalformedImageError, match="descriptor"):
        open_image(path)
    assert time.process_time() - started < 2


# --- anything ------------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=30, deadline=2000, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
NUMBERS = st.one_of(st.integers(0, 130), st.sampled_from([512, 4096, AT_END, 1 << 31]), st.integers(0, AT_END))


@pytest.fixture
def grafted(tmp_path: Path) -> bytes:
    path = small_image(tmp_path / "g.vmdk")
    attach(path, Placement.INLINE)
    return path.read_bytes()


@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, 75), NUMBERS), min_size=1, max_size=3), wide=st.booleans())
def test_mutated_headers(tmp_path: Path, grafted: bytes, edits: list[tuple[int, int]], wide: bool) -> None:
    data = bytearray(grafted)
    for place, number in edits:
        put(4 + place, struct.pack("<Q", number)[: 8 if wide else 2])(data)
    try_everything(tmp_path / "x.vmdk", data)


@FUZZ
@given(place=st.sampled_from([RGD * 128, GD * 128, *range(GT * 128, GT * 128 + 14)]), number=NUMBERS)
def test_mutated_tables(tmp_path: Path, grafted: bytes, place: int, number: int) -> None:
    data = bytearray(grafted)
    u32(4 * place, number & 0xFFFFFFFF)(data)
    try_everything(tmp_path / "x.vmdk", data)


@FUZZ
@given(
    place=st.one_of(st.integers(512, 1300), st.integers(31 * 512, 35 * 512)), piece=st.binary(min_size=1, max_size=40)
)
def test_mutated_descriptors_and_grafts(tmp_path: Path, grafted: bytes, place: int, piece: bytes) -> None:
    data = bytearray(grafted)
    data[place : place + len(piece)] = piece
    try_everything(tmp_path / "x.vmdk", data)


@FUZZ
@given(place=st.integers(0, 1 << 20), piece=st.binary(min_size=1, max_size=12))
def test_mutated_streams(tmp_path: Path, place: int, piece: bytes) -> None:
    data = bytearray(stream_image(tmp_path / "s.vmdk").read_bytes())
    place %= len(data) - 12
    data[place : place + len(piece)] = piece
    try_everything(tmp_path / "x.vmdk", data)


def try_everything(path: Path, data: bytearray) -> None:
    """Reading and detaching end well or in one of our errors, and touch nothing but descriptor and gap."""
    path.write_bytes(data)
    for action in (lambda: use_everything(path), lambda: read_graft(path), lambda: detach_image(path)):
        try:
            action()
        except VmgraftError as error:
            assert str(error)
    after = path.read_bytes()
    assert len(after) == len(data)
    assert after[:512] == data[:512]
    assert after[OVERHEAD * 512 :] == data[OVERHEAD * 512 :]


def read_graft(path: Path) -> None:
    with open_image(path) as image:
        open_graft(image).format_problem()
