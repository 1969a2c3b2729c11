"""Content against `qemu-img convert`, extents against `qemu-img map`."""

from __future__ import annotations

import json
import struct
import threading
import time
from pathlib import Path

import pytest
from imagefmt_helpers import tool
from vdi_testkit import (
    FREE,
    LINKAGE,
    MIB,
    TYPE,
    ZERO,
    build,
    noise,
    open_vdi,
    qemu_image,
    qemu_io,
    raw_bytes,
    small_image,
    vbox_image,
)

from vmgraft.errors import UnsupportedError
from vmgraft.imagefmt.contract import Kind
from vmgraft.imagefmt.tree import digest_content


def check_content(path: Path, expected: bytes) -> None:
    with open_vdi(path) as image:
        assert image.virtual_size == len(expected)
        assert image.read(0, image.virtual_size) == expected
        for offset, length in ((0, 1), (MIB - 1, 3), (70_001, 2 * MIB), (len(expected) - 5, 99), (len(expected), 1)):
            assert image.read(offset, length) == expected[offset : offset + length]
        position = 0
        for extent in image.extents():
            assert extent.start == position
            position += extent.length
            if extent.kind is not Kind.DATA:
                assert not any(expected[extent.start : position])
        assert position == image.virtual_size


def check_extents(path: Path) -> None:
    rows = json.loads(tool("qemu-img", "map", "--output=json", "-f", "vdi", path).stdout)
    stored = [(row["start"], row["length"]) for row in rows if "offset" in row]
    with open_vdi(path) as image:
        found = [(extent.start, extent.length) for extent in image.extents() if extent.kind is Kind.DATA]
    assert joined(found) == joined(stored)


def joined(runs: list[tuple[int, int]]) -> list[list[int]]:
    out: list[list[int]] = []
    for start, length in runs:
        if out and sum(out[-1]) == start:
            out[-1][1] += length
        else:
            out.append([start, length])
    return out


@pytest.mark.parametrize("options", [(), ("-o", "static=on")], ids=["dynamic", "static"])
@pytest.mark.parametrize("size", ["6M", "5632k", "5243392"])
def test_qemu_images(tmp_path: Path, options: tuple[str, ...], size: str) -> None:
    path = tmp_path / "a.vdi"
    tool("qemu-img", "create", "-q", "-f", "vdi", *options, path, size)
    qemu_io(path, "write -P 7 64k 100k", "write -P 9 4M 512k", "write -P 3 5120k 512")
    check_content(path, raw_bytes(path))
    check_extents(path)


def test_the_layout_of_virtualbox(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    check_content(path, raw_bytes(path))
    with open_vdi(path) as image:
        kinds = [(extent.start // MIB, extent.length // MIB, extent.kind) for extent in image.extents()]
    assert kinds == [
        (0, 1, Kind.HOLE),
        (1, 1, Kind.DATA),
        (2, 1, Kind.ZERO),
        (3, 1, Kind.DATA),
        (4, 1, Kind.HOLE),
    ]


def test_blocks_of_another_size(tmp_path: Path) -> None:
    expected = b"vdi" * 1365 + b"!" + bytes(4096) + noise(4096, 5) + bytes(4096)
    check_content(small_image(tmp_path / "a.vdi"), expected)


def test_a_disk_that_ends_inside_a_block_and_a_sector(tmp_path: Path) -> None:
    """VBoxManage makes such sizes; QEMU rounds them up to a sector, and needs no more of the last block."""
    blocks = [noise(MIB, 3), noise(MIB, 4)[:1024]]
    path = tmp_path / "a.vdi"
    path.write_bytes(build([0, 1], blocks, size=MIB + 1000))
    expected = raw_bytes(path)
    assert len(expected) == MIB + 1024
    check_content(path, expected)


def test_more_blocks_than_the_disk_needs(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    path.write_bytes(build([0, FREE, ZERO, FREE], [noise(MIB, 3)], size=MIB + 512))
    check_content(path, raw_bytes(path))


def test_a_dense_terabyte_is_checked_and_walked_quickly(tmp_path: Path) -> None:
    count = 1 << 20
    path = tmp_path / "a.vdi"
    with path.open("wb") as file:
        file.write(build(list(range(count)), [], map_at=512)[: 512 + 4 * count])
        struct.pack_into("<I", head := bytearray(4), 0, count)
        file.seek(388)
        file.write(head)
        file.truncate(512 + 4 * count + count * MIB)
    started = time.process_time()
    with open_vdi(path) as image:
        assert [(extent.start, extent.length) for extent in image.extents()] == [(0, count * MIB)]
    assert time.process_time() - started < 2


def test_threads_read_the_same(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    expected = raw_bytes(path)
    wrong: list[int] = []
    with open_vdi(path) as image:

        def work(seed: int) -> None:
            for at in range(seed * 4096, len(expected), 8 * 65536):
                if image.read(at, 65536) != expected[at : at + 65536]:
                    wrong.append(at)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_the_digest_is_that_of_the_raw_disk(tmp_path: Path) -> None:
    path = qemu_image(tmp_path / "a.vdi")
    raw = tmp_path / "a.raw"
    raw.write_bytes(raw_bytes(path))
    with open_vdi(path) as image:
        found = digest_content(image, flat="never")
    printed = tool("fsverity", "digest", "--compact", "--block-size=65536", raw).stdout.strip()
    assert found.tree_digest.hex() == printed


def test_metadata(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi", comment=b"for \xff people\0rest")
    with open_vdi(path) as image:
        facts = image.metadata()
    assert json.dumps(facts)
    assert (facts["imageType"], facts["blocks"], facts["blocksAllocated"]) == ("dynamic", 5, 2)
    assert facts["comment"] == "for \ufffd people"
    assert facts["creator"].startswith("<<< Oracle")


@pytest.mark.parametrize("what", ["undo", "differencing", "linked"])
def test_what_builds_on_another_image_is_refused_and_named(tmp_path: Path, what: str) -> None:
    data = bytearray(vbox_image(tmp_path / "a.vdi").read_bytes())
    struct.pack_into("<I", data, TYPE, {"undo": 3, "differencing": 4, "linked": 1}[what])
    data[LINKAGE : LINKAGE + 16] = bytes(range(16))
    path = tmp_path / "b.vdi"
    path.write_bytes(data)
    with open_vdi(path, writable=True) as image:
        assert image.metadata()["parent"] == "03020100-0504-0706-0809-0a0b0c0d0e0f"
        for action in (lambda: image.read(0, 1), lambda: list(image.extents()), lambda: attach_any(image)):
            with pytest.raises(UnsupportedError, match="03020100-0504-0706-0809-0a0b0c0d0e0f") as caught:
                action()
            assert caught.value.hint
    assert path.read_bytes() == data


def attach_any(image):
    from vmgraft.imagefmt.contract import Placement

    image.attach(lambda undo: pytest.fail("a record was built"), Placement.AUTO, bytes(32))
