"""Malformed headers and maps: one clear error with the field at fault, in bounded time and memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import vdi_testkit as kit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagefmt_helpers import attach
from vdi_testkit import FREE, MIB, build, noise, open_vdi

from vmgraft.errors import MalformedImageError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.tree import build_tree

Edit = Callable[[bytearray], None]
MAP = 512


def u32(at: int, value: int) -> Edit:
    return lambda data: struct.pack_into("<I", data, at, value)


def u64(at: int, value: int) -> Edit:
    return lambda data: struct.pack_into("<Q", data, at, value)


def cut(size: int) -> Edit:
    def edit(data: bytearray) -> None:
        del data[size:]

    return edit


def sample() -> bytearray:
    """Four blocks of 1 MiB, two of them in the file."""
    return bytearray(build([1, FREE, 0, FREE], [noise(MIB, 3), b"\7" * MIB]))


#: What is wrong, the field it is laid at, and whether QEMU refuses or reports it too.
MALFORMED: dict[str, tuple[Edit, str]] = {
    "signature": (u32(64, 0xBEDA1080), "VDI header.signature"),
    "unknown type": (u32(kit.TYPE, 5), "image_type"),
    "type 0": (u32(kit.TYPE, 0), "image_type"),
    "header too short": (u32(kit.HEADER_SIZE, 383), "header_size"),
    "header of 4 GiB": (u32(kit.HEADER_SIZE, 0xFFFFFFFF), "header_size"),
    "header on the map": (u32(kit.HEADER_SIZE, 441), "offset_blocks"),
    "blocks of 3 KiB": (u32(kit.BLOCK_SIZE, 3072), "block_size"),
    "blocks of nothing": (u32(kit.BLOCK_SIZE, 0), "block_size"),
    "blocks of 2 GiB": (u32(kit.BLOCK_SIZE, 1 << 31), "block_size"),
    "no blocks": (u32(kit.BLOCKS, 0), "disk_size"),
    "2^32 blocks": (u32(kit.BLOCKS, 0xFFFFFFFF), "blocks"),
    "map longer than the file": (u32(kit.BLOCKS, 1 << 25), "offset_data"),
    "disk of nothing": (u64(kit.DISK_SIZE, 0), "disk_size"),
    "disk larger than its map": (u64(kit.DISK_SIZE, 4 * MIB + 1), "disk_size"),
    "disk of 2^64": (u64(kit.DISK_SIZE, (1 << 64) - 1), "disk_size"),
    "more allocated than there are": (u32(kit.ALLOCATED, 5), "blocks_allocated"),
    "map not at a sector": (u32(kit.MAP_AT, 513), "offset_blocks"),
    "map in the header": (u32(kit.MAP_AT, 0), "offset_blocks"),
    "map behind the data": (u32(kit.MAP_AT, 4096), "offset_data"),
    "map behind the file": (lambda data: struct.pack_into("<II", data, kit.MAP_AT, 1 << 31, 1 << 31 | 512),
                            "offset_blocks"),
    "data not at a sector": (u32(kit.DATA_AT, 1025), "offset_data"),
    "data on the map": (u32(kit.DATA_AT, 512), "offset_data"),
    "modified parent, but no parent": (u32(kit.PARENT_MODIFY, 1), "uuid_parent_modify"),
    "file ends in the header": (cut(400), "VDI header.uuid_create"),
    "file ends in the sector": (cut(470), "VDI header"),
    "file ends in the map": (cut(520), "offset_blocks"),
    "block used twice": (u32(MAP + 4, 1), "block map"),
    "block not allocated": (u32(MAP + 4, 2), "block map"),
    "block far away": (u32(MAP + 4, 0xFFFFFFFD), "block map"),
    "block behind the file": (lambda data: (u32(kit.ALLOCATED, 4)(data), u32(MAP + 4, 3)(data), None)[2], "block map"),
    "block cut": (cut(1024 + 2 * MIB - 1), "block map"),
}  # fmt: skip
UNSUPPORTED: dict[str, tuple[Edit, str]] = {
    "version 0.1": (u32(kit.VERSION, 1), "version"),
    "version 1.0": (u32(kit.VERSION, 0x10000), "version"),
    "version 1.2": (u32(kit.VERSION, 0x10002), "version"),
    "version 0": (u32(kit.VERSION, 0), "version"),
    "sectors of 4096": (u32(kit.SECTOR_SIZE, 4096), "sector_size"),
    "extra bytes": (u32(kit.BLOCK_EXTRA, 512), "block_extra"),
}


def use_everything(path: Path) -> None:
    with open_image(path) as image:
        image.metadata()
        image.room()
        image.locate()
        list(image.extents())
        image.read(0, 2 * MIB)
        image.read(image.virtual_size - 1, 1)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path: Path, case: str) -> None:
    edit, field = MALFORMED[case]
    data = sample()
    edit(data)
    path = tmp_path / "x.vdi"
    path.write_bytes(data)
    with pytest.raises(MalformedImageError) as caught, open_vdi(path) as image:
        list(image.extents())
    assert caught.value.field == field
    assert caught.value.file == str(path)
    assert caught.value.offset is not None
    with pytest.raises(MalformedImageError), open_vdi(path) as image:
        image.read(0, 1)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(tmp_path: Path, case: str) -> None:
    edit, field = UNSUPPORTED[case]
    data = sample()
    edit(data)
    path = tmp_path / "x.vdi"
    path.write_bytes(data)
    with pytest.raises(UnsupportedError) as caught:
        open_image(path)
    assert (caught.value.field, caught.value.file) == (field, str(path))
    assert "convert" in caught.value.hint


def test_the_sample_itself_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.vdi"
    path.write_bytes(sample())
    use_everything(path)
    kit.qemu_check(path)


def test_one_block_mapped_a_million_times(tmp_path: Path) -> None:
    """A file of 65 MiB that claims 16 TiB of data would keep every digest busy for an hour."""
    count = 1 << 24
    path = tmp_path / "bomb.vdi"
    head = kit.header(count, 1)
    path.write_bytes(bytes(head) + bytes(4 * count) + noise(MIB, 3))
    started = time.process_time()
    with open_vdi(path) as image, pytest.raises(MalformedImageError, match="used twice"):
        build_tree(image)
    assert time.process_time() - started < 2


def test_the_largest_map_takes_little_time_and_memory(tmp_path: Path) -> None:
    count = 1 << 26
    path = tmp_path / "large.vdi"
    with path.open("wb") as file:
        file.write(kit.header(count, count))
        file.truncate(512 + 4 * count)
    tracemalloc.start()
    started = time.process_time()
    with open_vdi(path) as image, pytest.raises(MalformedImageError, match="behind the end"):
        list(image.extents())
    assert time.process_time() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 128 << 20
    tracemalloc.stop()


def test_a_gap_of_gigabytes_is_not_searched(tmp_path: Path) -> None:
    path = tmp_path / "x.vdi"
    with path.open("wb") as file:
        head = kit.header(1, 0, map_at=3 << 30, data_at=(3 << 30) + 512)
        file.write(head)
        file.truncate((3 << 30) + 512)
    started = time.process_time()
    with open_vdi(path) as image:
        assert image.room().inline == MIB - 512
    attach(path, Placement.INLINE)
    detach_image(path)
    assert time.process_time() - started < 2


FUZZ = settings(max_examples=40, deadline=2000, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
NUMBERS = st.one_of(st.integers(0, 8), st.sampled_from([511, 512, 4096, MIB, FREE, 1 << 31]), st.integers(0, FREE))


@pytest.fixture
def grafted(tmp_path: Path) -> bytes:
    path = kit.small_image(tmp_path / "g.vdi")
    attach(path, Placement.INLINE)
    return path.read_bytes()


@FUZZ
@given(edits=st.lists(st.tuples(st.integers(16, 127), NUMBERS), min_size=1, max_size=3))
def test_mutated_headers(tmp_path: Path, grafted: bytes, edits: list[tuple[int, int]]) -> None:
    data = bytearray(grafted)
    for place, number in edits:
        u32(4 * place, number)(data)
    try_everything(tmp_path / "x.vdi", data)


@FUZZ
@given(place=st.integers(0, 3), number=NUMBERS)
def test_mutated_maps(tmp_path: Path, grafted: bytes, place: int, number: int) -> None:
    data = bytearray(grafted)
    u32(4608 + 4 * place, number)(data)
    try_everything(tmp_path / "x.vdi", data)


@FUZZ
@given(place=st.integers(84, 2400), piece=st.binary(min_size=1, max_size=40))
def test_mutated_grafts(tmp_path: Path, grafted: bytes, place: int, piece: bytes) -> None:
    data = bytearray(grafted)
    data[place : place + len(piece)] = piece
    try_everything(tmp_path / "x.vdi", data)


def try_everything(path: Path, data: bytearray) -> None:
    """Reading and detaching end well or in one of our errors, and touch nothing from the block map on."""
    path.write_bytes(data)
    for action in (lambda: use_everything(path), lambda: read_graft(path), lambda: detach_image(path)):
        try:
            action()
        except VmgraftError as error:
            assert str(error)
    after = path.read_bytes()
    assert len(after) == len(data)
    assert after[4608:] == data[4608:]
    assert after[:84] == data[:84]
    assert after[212:512] == data[212:512]


def read_graft(path: Path) -> None:
    with open_image(path) as image:
        open_graft(image).format_problem()
