"""Content against `qemu-img convert`, extents against `qemu-img map`."""

from __future__ import annotations

import json
import struct
import threading
import time
from pathlib import Path

import pytest
from imagefmt_helpers import tool
from vmdk_testkit import (
    AT,
    MIB,
    build,
    descriptor,
    noise,
    open_vmdk,
    qemu_image,
    qemu_io,
    qemu_stream,
    raw_bytes,
    small_image,
    stream_image,
)

from vmgraft.errors import UnsupportedError
from vmgraft.imagefmt.contract import Kind, Placement
from vmgraft.imagefmt.tree import digest_content


def check_content(path: Path) -> None:
    expected = raw_bytes(path)
    with open_vmdk(path) as image:
        assert image.virtual_size == len(expected)
        assert image.read(0, image.virtual_size) == expected
        for offset, length in ((0, 1), (65535, 3), (5000, 90_001), (len(expected) - 5, 99), (len(expected), 1)):
            assert image.read(offset, length) == expected[offset : offset + length]
        position = 0
        for extent in image.extents():
            assert extent.start == position
            position += extent.length
            if extent.kind is not Kind.DATA:
                assert not any(expected[extent.start : position])
        assert position == image.virtual_size


def check_extents(path: Path) -> None:
    rows = json.loads(tool("qemu-img", "map", "--output=json", "-f", "vmdk", path).stdout)
    stored = [(row["start"], row["length"]) for row in rows if row["data"]]
    with open_vmdk(path) as image:
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


@pytest.mark.parametrize("options", ["subformat=monolithicSparse", "subformat=monolithicSparse,zeroed_grain=on"])
@pytest.mark.parametrize("size", ["6M", "5243392", "2G"])
def test_qemu_images(tmp_path: Path, options: str, size: str) -> None:
    path = tmp_path / "a.vmdk"
    tool("qemu-img", "create", "-q", "-f", "vmdk", "-o", options, path, size)
    commands = ["write -P 7 64k 100k", "write -P 9 4M 512k", "write -P 3 5120k 512", "write -z 64k 64k"]
    qemu_io(path, *commands, *(["write -P 1 2047M 1M", "write -P 2 1G 5k"] if size == "2G" else []))
    if size != "2G":
        check_content(path)
    check_extents(path)


def test_two_gigabytes_here_and_there(tmp_path: Path) -> None:
    path = qemu_image(tmp_path / "a.vmdk", size="2G")
    qemu_io(path, "write -P 1 2047M 1M", "write -P 2 1G 5k")
    with open_vmdk(path) as image:
        assert image.read((1 << 30) - 1, 3) == b"\0\2\2"
        assert image.read((2 << 30) - 2, 9) == b"\1\1"
        assert image.read(64 << 10, 4) == b"\7" * 4


def test_compressed_streams_of_qemu(tmp_path: Path) -> None:
    path = qemu_stream(tmp_path / "a.vmdk")
    check_content(path)
    check_extents(path)


def test_streams_with_a_footer(tmp_path: Path) -> None:
    path = stream_image(tmp_path / "a.vmdk")
    check_content(path)
    check_extents(path)
    with open_vmdk(path) as image:
        facts = image.metadata()
    assert (facts["footer"], facts["compression"], facts["createType"]) == (True, "deflate", "streamOptimized")


@pytest.mark.parametrize("grain", [8, 16, 128, 2048])
def test_grains_of_any_size(tmp_path: Path, grain: int) -> None:
    size = grain * 512
    last = 600 if grain < 128 else 20
    grains = {0: noise(size, 5), 3: b"\7" * size, last: noise(size, 6), last + 1: noise(size, 6)}
    path = tmp_path / "a.vmdk"
    path.write_bytes(build(grains, capacity=(last + 2) * grain - 5, grain=grain, overhead=2048, zero=(5, 6)))
    check_content(path)
    check_extents(path)


def test_the_disk_may_end_inside_a_grain_and_the_file_with_it(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vmdk")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 5 * 512])  # the part of the last grain that the disk does not use
    check_content(path)


@pytest.mark.parametrize("redundant", [False, True])
def test_holes_without_tables(tmp_path: Path, redundant: bool) -> None:
    data = bytearray(build({5: noise(4096)}, capacity=8 * 512 * 6, overhead=128, redundant=redundant))
    (gd,) = struct.unpack_from("<Q", data, AT["gd"])
    struct.pack_into("<5I", data, gd * 512 + 4, *[0] * 5)
    path = tmp_path / "a.vmdk"
    path.write_bytes(data)
    check_content(path)


def test_a_terabyte_of_holes_is_walked_quickly(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    tool("qemu-img", "create", "-q", "-f", "vmdk", path, "1T")
    qemu_io(path, "write -P 7 512G 64k")
    started = time.process_time()
    with open_vmdk(path) as image:
        assert [(e.start, e.length) for e in image.extents() if e.kind is Kind.DATA] == [(1 << 39, 65536)]
    assert time.process_time() - started < 2


def test_threads_read_the_same(tmp_path: Path) -> None:
    path = stream_image(tmp_path / "a.vmdk")
    expected = raw_bytes(path)
    wrong: list[int] = []
    with open_vmdk(path) as image:

        def work(seed: int) -> None:
            for at in range(seed * 4096, len(expected), 8 * 4096):
                if image.read(at, 9000) != expected[at : at + 9000]:
                    wrong.append(at)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_the_digest_is_that_of_the_raw_disk(tmp_path: Path) -> None:
    path = qemu_image(tmp_path / "a.vmdk")
    raw = tmp_path / "a.raw"
    raw.write_bytes(raw_bytes(path))
    with open_vmdk(path) as image:
        found = digest_content(image, flat="never")
    printed = tool("fsverity", "digest", "--compact", "--block-size=65536", raw).stdout.strip()
    assert found.tree_digest.hex() == printed


@pytest.mark.parametrize("text", [
    descriptor(91).replace(b"\n", b"\r\n"),
    descriptor(91).replace(b"=", b" = ").replace(b"# Disk DescriptorFile", b"#Disk Descriptor File"),
    descriptor(91, name="grün.vmdk", more='encoding="UTF-8"\nchangeTrackPath="disk-ctk.vmdk"'),
    descriptor(91).replace(b'"disk.vmdk"', b'"disk.vmdk" 0').rstrip(b"\n"),
], ids=["crlf", "spaces", "more", "no newline"])  # fmt: skip
def test_descriptors_as_tools_write_them(tmp_path: Path, text: bytes) -> None:
    path = small_image(tmp_path / "a.vmdk", text=text)
    with open_vmdk(path) as image:
        assert list(image.extents())
        facts = image.metadata()
    assert json.dumps(facts)
    assert facts["cid"] == "7e5b80a7"
    assert facts["extentName"].endswith(".vmdk")


def test_a_delta_disk_is_refused_and_its_parent_named(tmp_path: Path) -> None:
    qemu_image(tmp_path / "base.vmdk")
    path = tmp_path / "delta.vmdk"
    tool("qemu-img", "create", "-q", "-f", "vmdk", "-b", tmp_path / "base.vmdk", "-F", "vmdk", path)
    before = path.read_bytes()
    with open_vmdk(path, writable=True) as image:
        assert image.metadata()["parent"].endswith("base.vmdk")
        for action in (lambda: image.read(0, 1), lambda: list(image.extents()), lambda: attach_any(image)):
            with pytest.raises(UnsupportedError, match=r"base\.vmdk") as caught:
                action()
            assert "qemu-img convert" in caught.value.hint
    assert path.read_bytes() == before


def test_an_image_that_was_not_closed_is_refused(tmp_path: Path) -> None:
    data = bytearray(small_image(tmp_path / "a.vmdk").read_bytes())
    data[AT["unclean"]] = 1
    path = tmp_path / "b.vmdk"
    path.write_bytes(data)
    with open_vmdk(path, writable=True) as image:
        assert image.metadata()["uncleanShutdown"]
        for action in (lambda: image.read(0, 1), lambda: attach_any(image)):
            with pytest.raises(UnsupportedError, match="not closed"):
                action()
    assert path.read_bytes() == data


def attach_any(image):
    image.attach(lambda undo: pytest.fail("a record was built"), Placement.AUTO, bytes(32))


def test_tables_that_follow_each_other(tmp_path: Path) -> None:
    """512 tables for 4 TiB with grains of 16 MiB, one grain in each of the first hundred."""
    grain, tables = 1 << 15, 512
    capacity = grain * 512 * tables
    overhead = 21 + tables * 4 // 512 + tables * 4 + 128
    data = bytearray(
        build({}, capacity=capacity, grain=grain, overhead=overhead, redundant=False, text=descriptor(capacity))
    )
    (gd,) = struct.unpack_from("<Q", data, AT["gd"])
    first = (gd + tables * 4 // 512) * 512
    for table in range(100):
        struct.pack_into("<I", data, first + table * 2048, overhead + table * grain)
    path = tmp_path / "a.vmdk"
    with path.open("wb") as file:
        file.write(data)
        file.truncate((overhead + 100 * grain) * 512)
    with open_vmdk(path) as image:
        stored = [(extent.start, extent.length) for extent in image.extents() if extent.kind is Kind.DATA]
    assert stored == [(table * 512 * 16 * MIB, 16 * MIB) for table in range(100)]
