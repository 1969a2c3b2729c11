"""Every feature of the container, made by qemu-img or by hand, read as `qemu-img convert` reads it."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest
from qcow2_testkit import (
    MIB,
    attach,
    detach,
    extensions,
    make,
    noise,
    open_qcow2,
    pattern,
    put_extensions,
    qemu_io,
    raw_base,
    raw_bytes,
    read_all,
    run,
)

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.contract import Extent, GraftState, Kind
from vmgraft.imagefmt.qcow2.create import create_qcow2
from vmgraft.imagefmt.registry import format_names
from vmgraft.imagefmt.tree import build_tree

CLUSTER = 65536
FEATURE_NAMES = 0x6803F857


def _same_as_qemu(path: Path) -> None:
    expected = raw_bytes(path)
    with open_qcow2(path) as image:
        assert image.virtual_size == len(expected)
        assert image.read(0, image.virtual_size) == expected
        position = 0
        for extent in image.extents():
            assert extent.start == position
            position += extent.length
            assert extent.kind is Kind.DATA or not any(expected[extent.start : position])
        assert position == len(expected)


def _u64(path: Path, offset: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(">Q", value))


def _table(path: Path) -> int:
    """The file offset of the first L2 table."""
    data = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", data, 40)
    return int(struct.unpack_from(">Q", data, l1)[0]) & 0x00FFFFFFFFFFFE00


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcount_widths(tmp_path: Path, bits: int) -> None:
    path = pattern(make(tmp_path / "x.qcow2", options=f"refcount_bits={bits}"))
    before = path.read_bytes()
    _same_as_qemu(path)
    with open_qcow2(path) as image:
        assert image.metadata()["refcountBits"] == bits
    assert attach(path).state is GraftState.OK
    _same_as_qemu(path)
    detach(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("exponent", range(9, 22))
def test_cluster_sizes(tmp_path: Path, exponent: int) -> None:
    _same_as_qemu(pattern(make(tmp_path / "x.qcow2", cluster=1 << exponent)))


@pytest.mark.parametrize("named", [True, False])
def test_feature_name_table_present_or_absent(tmp_path: Path, named: bool) -> None:
    path = pattern(make(tmp_path / "x.qcow2"))
    if not named:
        put_extensions(path, [ext for ext in extensions(path) if ext[0] != FEATURE_NAMES])
    assert any(magic == FEATURE_NAMES for magic, _ in extensions(path)) is named
    before = path.read_bytes()
    _same_as_qemu(path)
    assert attach(path).state is GraftState.OK
    detach(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("rest", [1, 200, 511])
def test_sizes_that_are_no_whole_sectors(tmp_path: Path, rest: int) -> None:
    """qemu-img makes none, other programs do; QEMU shows whole sectors only."""
    path = make(tmp_path / "x.qcow2", size=MIB)
    qemu_io(path, "write -P 7 1000k 24k")
    _u64(path, 24, MIB - rest)
    assert read_all(path) == raw_bytes(path)
    with open_qcow2(path) as image:
        assert image.virtual_size == MIB - 512
        assert sum(extent.length for extent in image.extents()) == MIB - 512


def _deduplicated(path: Path, copies: int) -> Path:
    """Let ``copies`` guest clusters share one cluster of the file."""
    create_qcow2(path, (noise(CLUSTER) + noise(CLUSTER, 2)) * (copies // 2 + 1))
    table = _table(path)
    data = bytearray(path.read_bytes())
    first = struct.unpack_from(">Q", data, table)[0] & ~(1 << 63)  # shared clusters are not "copied"
    for index in range(copies):
        struct.pack_into(">Q", data, table + 8 * index, first)
    path.write_bytes(data)
    return path


def test_deduplicated_clusters(tmp_path: Path) -> None:
    path = _deduplicated(tmp_path / "x.qcow2", 40)
    _same_as_qemu(path)
    assert read_all(path)[: 40 * CLUSTER] == noise(CLUSTER) * 40


@pytest.mark.parametrize(("gib", "honest"), [(0.25, True), (4, False)])
def test_sharing_is_bounded(tmp_path: Path, gib: float, honest: bool) -> None:
    """A small file may show a quarter of a gigabyte whatever it does, and 16 times its own size, and no more."""
    path = make(tmp_path / "x.qcow2", cluster=2 * MIB, size=8 << 30)
    qemu_io(path, "write -P 7 0 2M")
    table, count = _table(path), int(gib * 512)
    data = bytearray(path.read_bytes())
    data[table : table + 8 * count] = data[table : table + 8] * count
    path.write_bytes(data)
    started = time.monotonic()
    with open_qcow2(path) as image:
        if honest:
            assert next(image.extents()) == Extent(0, count * 2 * MIB, Kind.DATA)
        else:
            with pytest.raises(MalformedImageError, match="many times"):
                build_tree(image)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_compressed_bombs_are_bounded_by_what_a_cluster_takes_at_least(tmp_path: Path, method: str) -> None:
    options = "compression_type=zstd" if method == "zstd" else ""
    path = make(tmp_path / "x.qcow2", cluster=2 * MIB, size=512 << 30, options=options)
    qemu_io(path, "write -c -P 7 0 2M")
    table = _table(path)
    data = bytearray(path.read_bytes())
    data[table : table + 2 * MIB] = data[table : table + 8] * (2 * MIB // 8)
    path.write_bytes(data)
    with open_qcow2(path) as image, pytest.raises(MalformedImageError, match="many times"):
        list(image.extents())


CONTAINERS = {"vmdk": "vmdk", "vdi": "vdi", "vhdx": "vhdx", "vpc": "vhd"}


@pytest.mark.parametrize("driver", CONTAINERS)
@pytest.mark.parametrize("size", [4, 12], ids=["shorter", "longer"])
def test_backing_files_of_other_containers(tmp_path: Path, driver: str, size: int) -> None:
    raw = raw_base(tmp_path)
    base = tmp_path / f"base.{driver}"
    options = ["-o", "force_size=on"] if driver == "vpc" else []
    run("qemu-img", "convert", "-f", "raw", "-O", driver, *options, raw, base)
    path = make(tmp_path / "x.qcow2", size=size * MIB, backing=base.name, backing_format=driver)
    qemu_io(path, "write -P 9 1000k 700k", "write -z 3M 64k")
    if CONTAINERS[driver] in format_names():
        _same_as_qemu(path)
        with open_qcow2(path) as image:
            assert image.backing_chain() == (base.resolve(),)
        return
    with open_qcow2(path) as image, pytest.raises(UnsupportedError, match=f"format '{driver}' are not supported"):
        image.read(0, 512)


def test_formats_that_are_no_backing_files(tmp_path: Path) -> None:
    raw_base(tmp_path)
    path = make(tmp_path / "x.qcow2", backing="base.raw")
    run("qemu-img", "rebase", "-q", "-u", "-b", "base.raw", "-F", "parallels", path)
    with open_qcow2(path) as image, pytest.raises(UnsupportedError, match="'parallels'") as caught:
        image.read(0, 512)
    assert caught.value.field == "backing_format"


@pytest.mark.parametrize("top", [3, 6, 9])
@pytest.mark.parametrize("middle", [2, 8])
def test_chains_of_mixed_formats_and_lengths(tmp_path: Path, middle: int, top: int) -> None:
    """qcow2 over qcow2 (version 2, other clusters, compressed) over raw: each longer or shorter than the next."""
    raw_base(tmp_path, size=6 * MIB - 512)
    make(tmp_path / "m.qcow2", version=2, cluster=4096, size=middle * MIB + 512, backing="base.raw")
    qemu_io(tmp_path / "m.qcow2", "write -P 9 1M 64k", "write -c -P 3 512k 64k", "discard 64k 64k")
    path = make(tmp_path / "x.qcow2", size=top * MIB, backing="m.qcow2", backing_format="qcow2")
    qemu_io(path, "write -P 1 1100k 4k", "write -z 256k 64k")
    _same_as_qemu(path)
    with open_qcow2(path) as image:
        assert [one.name for one in image.backing_chain()] == ["m.qcow2", "base.raw"]


@pytest.mark.parametrize("cluster", [16384, CLUSTER, 2 * MIB])
def test_subclusters_over_a_backing_file(tmp_path: Path, cluster: int) -> None:
    """Partly allocated, partly zero, partly the backing file's: all in one cluster, and over the end of the base."""
    raw_base(tmp_path, size=5 * MIB + 512)
    path = make(tmp_path / "x.qcow2", cluster=cluster, options="extended_l2=on", backing="base.raw", size=9 * MIB)
    part = cluster // 32
    places = [(2, "-P 1"), (5, "-z"), (6, "-P 8"), (40, "-z"), (64 + 31, "-P 2")]
    writes = [f"write {what} {at * part} {part}" for at, what in places]
    qemu_io(path, *writes, f"write -P 6 5M {part}", f"write -z {6 * MIB} {part}", f"discard 3M {cluster}")
    _same_as_qemu(path)
    rows = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path).stdout)
    data = sum(row["length"] for row in rows if row["data"] and not row["zero"])
    with open_qcow2(path) as image:
        assert sum(e.length for e in image.extents() if e.kind is Kind.DATA) == data


@pytest.mark.parametrize("version", [2, 3])
def test_discarded_clusters_show_zeros_or_the_backing_file(tmp_path: Path, version: int) -> None:
    """Version 2 has no zero clusters: over a backing file, QEMU allocates; without, it forgets the cluster."""
    raw_base(tmp_path)
    for backing in (None, "base.raw"):
        path = make(tmp_path / f"{backing}.qcow2", version=version, backing=backing)
        qemu_io(path, "write -P 5 0 1M", "discard 128k 128k", "write -z 512k 128k", "write -z -u 768k 64k")
        _same_as_qemu(path)


@pytest.mark.parametrize("raw", ["on", "off"])
def test_external_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "x.qcow2", options=f"data_file=x.data,data_file_raw={raw}")
    qemu_io(path, "write -P 6 0 64k", "write -P 1 2M 100k", "write -z 64k 64k", "discard 2M 64k")
    _same_as_qemu(path)
    before, data = path.read_bytes(), (tmp_path / "x.data").read_bytes()
    assert attach(path).state is GraftState.OK
    _same_as_qemu(path)
    detach(path)
    assert (path.read_bytes(), (tmp_path / "x.data").read_bytes()) == (before, data)


def test_a_pebibyte_with_a_few_clusters(tmp_path: Path) -> None:
    """Unmapped parts are skipped in one step each, whatever lies between."""
    path = make(tmp_path / "x.qcow2", size=1 << 50, cluster=2 * MIB)
    places = [0, *(1 << shift for shift in range(30, 50, 2))]
    qemu_io(path, *(f"write -P 7 {at} 2M" for at in places))
    started = time.monotonic()
    with open_qcow2(path) as image:
        found = [extent.start for extent in image.extents() if extent.kind is Kind.DATA]
        assert image.read((1 << 48) + 5, 2) == b"\7\7"
    assert found == places
    assert time.monotonic() - started < 20


def test_every_l2_table_far_apart(tmp_path: Path) -> None:
    """Five hundred small islands in a terabyte: time goes with the islands, not with the L1 table."""
    path = make(tmp_path / "x.qcow2", size=1 << 40, cluster=4096)
    step = 512 << 20
    qemu_io(path, *(f"write -P 1 {index * step} 4k" for index in range(500)))
    started = time.monotonic()
    with open_qcow2(path) as image:
        found = [extent.start for extent in image.extents() if extent.kind is Kind.DATA]
    assert found == [index * step for index in range(500)]
    assert time.monotonic() - started < 20
