"""Images made by the real qemu-img: content against `qemu-img convert`, extents against `qemu-img map`."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import pytest
from qcow2_testkit import MIB, make, noise, open_qcow2, pattern, qemu_io, raw_base, raw_bytes, read_all, run

from vmgraft.imagefmt.contract import Kind
from vmgraft.imagefmt.qcow2 import FORMAT

CLUSTERS = (512, 4096, 65536, 2 * MIB)


def _check_content(path: Path) -> None:
    expected = raw_bytes(path)
    with open_qcow2(path) as image:
        assert image.virtual_size == len(expected)
        assert image.read(0, image.virtual_size) == expected
        for offset, length in ((0, 1), (65535, 3), (1 * MIB - 7, 70_001), (len(expected) - 5, 99), (len(expected), 1)):
            assert image.read(offset, length) == expected[offset : offset + length]
        position = 0
        for extent in image.extents():
            assert extent.start == position
            assert extent.length > 0
            position += extent.length
            if extent.kind is not Kind.DATA:
                assert not any(expected[extent.start : position])
        assert position == image.virtual_size


def _check_extents(path: Path) -> None:
    rows = json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path).stdout)
    expected: list[list[int]] = []
    for row in rows:
        data = int(row["data"] and not row["zero"])
        if expected and expected[-1][2] == data:
            expected[-1][1] += row["length"]
        else:
            expected.append([row["start"], row["length"], data])
    found: list[list[int]] = []
    with open_qcow2(path) as image:
        for extent in image.extents():
            data = int(extent.kind is Kind.DATA)
            if found and found[-1][2] == data:
                found[-1][1] += extent.length
            else:
                found.append([extent.start, extent.length, data])
    assert found == expected


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("version", [2, 3])
def test_plain(tmp_path: Path, version: int, cluster: int) -> None:
    path = pattern(make(tmp_path / "a.qcow2", version=version, cluster=cluster))
    _check_content(path)
    _check_extents(path)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("base", ["raw", "qcow2"])
def test_backing_shorter_than_the_image(tmp_path: Path, base: str, cluster: int) -> None:
    raw = raw_base(tmp_path, size=6 * MIB - 512)
    if base == "qcow2":
        run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, tmp_path / "base.qcow2")
    path = make(tmp_path / "a.qcow2", cluster=cluster, backing=f"base.{base}", backing_format=base)
    pattern(path)
    _check_content(path)
    _check_extents(path)
    with open_qcow2(path) as image:
        assert image.backing_chain() == ((tmp_path / f"base.{base}").resolve(),)


@pytest.mark.parametrize(("version", "method"), [(2, "zlib"), (3, "zlib"), (3, "zstd")])
@pytest.mark.parametrize("cluster", [4096, 65536, 2 * MIB])
def test_compressed(tmp_path: Path, version: int, method: str, cluster: int) -> None:
    raw = tmp_path / "in.raw"
    text = b"".join(b"%08d some text that shrinks\n" % i for i in range(60_000))
    raw.write_bytes(text[: 2 * MIB].ljust(3 * MIB, b"\0") + noise(MIB) + text[:12345].ljust(MIB, b"\0"))
    path = tmp_path / "a.qcow2"
    options = f"compat={'0.10' if version == 2 else '1.1'},cluster_size={cluster}"
    if method == "zstd":
        options += ",compression_type=zstd"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    qemu_io(path, "write -P 5 512k 8k")
    _check_content(path)
    _check_extents(path)


@pytest.mark.parametrize("cluster", [16384, 65536, 2 * MIB])
@pytest.mark.parametrize("backed", [False, True])
def test_extended_l2(tmp_path: Path, cluster: int, backed: bool) -> None:
    if backed:
        raw_base(tmp_path)
    path = make(tmp_path / "a.qcow2", cluster=cluster, options="extended_l2=on", backing="base.raw" if backed else None)
    pattern(path)
    qemu_io(path, "write -P 1 66k 2k", "write -z 70k 4k", "write -P 8 5M 2k", "write -z 2M 128k")
    _check_content(path)
    _check_extents(path)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation(tmp_path: Path, mode: str) -> None:
    path = make(tmp_path / "a.qcow2", options=f"preallocation={mode}")
    pattern(path)
    _check_content(path)


@pytest.mark.parametrize("raw", ["on", "off"])
def test_external_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: str) -> None:
    monkeypatch.chdir(tmp_path)  # qemu-img resolves data_file from the working directory when it creates the image
    path = make(tmp_path / "a.qcow2", options=f"data_file=a.data,data_file_raw={raw}")
    pattern(path)
    qemu_io(path, "write -P 6 0 64k")
    _check_content(path)
    with open_qcow2(path) as image:
        assert image.backing_chain() == (tmp_path.resolve() / "a.data",)


def test_snapshots_and_bitmaps_do_not_disturb(tmp_path: Path) -> None:
    path = pattern(make(tmp_path / "a.qcow2"))
    run("qemu-img", "snapshot", "-c", "one", path)
    qemu_io(path, "write -P 4 0 256k")
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "b0")
    _check_content(path)
    _check_extents(path)
    with open_qcow2(path) as image:
        facts = image.metadata()
    assert [one["name"] for one in facts["snapshots"]] == ["one"]
    assert "bitmaps" in facts["features"]["autoclear"]
    assert json.dumps(facts)


@pytest.mark.parametrize("virtual", [512, 65536 + 512, 5 * MIB - 1536])
def test_sizes_that_end_inside_a_cluster(tmp_path: Path, virtual: int) -> None:
    path = make(tmp_path / "a.qcow2", size=virtual)
    qemu_io(path, f"write -P 5 {virtual - 512} 512")
    _check_content(path)


def test_a_terabyte_costs_nothing_and_its_end_is_read(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", size=1 << 40)
    qemu_io(path, "write -P 7 512G 64k", "write -P 8 1099511562240 64k")
    with open_qcow2(path) as image:
        kinds = [(e.start, e.length) for e in image.extents() if e.kind is Kind.DATA]
        assert kinds == [(1 << 39, 65536), ((1 << 40) - 65536, 65536)]
        assert image.read((1 << 39) - 1, 3) == b"\0\7\7"
        assert image.read((1 << 40) - 2, 9) == b"\x08\x08"


def test_threads_read_the_same(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", cluster=512)
    qemu_io(path, *(f"write -P {i + 1} {i * 33}k 20k" for i in range(40)))
    expected = raw_bytes(path)
    wrong: list[int] = []
    with open_qcow2(path) as image:

        def work(seed: int) -> None:
            for at in range(seed * 4096, len(expected), 8 * 65536):
                buffer = bytearray(65536)
                count = image.readinto(at, memoryview(buffer))
                if buffer[:count] != expected[at : at + 65536]:
                    wrong.append(at)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_compressed_clusters_with_extended_l2(tmp_path: Path) -> None:
    raw = tmp_path / "in.raw"
    raw.write_bytes((b"some text that shrinks\n" * 99_999)[: 2 * MIB] + noise(MIB) + bytes(MIB))
    path = tmp_path / "a.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "extended_l2=on", raw, path)
    qemu_io(path, "write -P 5 512k 2k")
    _check_content(path)
    _check_extents(path)


def test_probe_and_lazy_import(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2")
    head = path.read_bytes()[:65536]
    assert FORMAT.name == "qcow2"
    assert FORMAT.probe(head, path.stat().st_size)
    assert not FORMAT.probe(b"QFI", 3)
    assert not FORMAT.probe(bytes(65536), 1 << 30)
    heavy = "{'numpy', 'construct', 'zstandard'}"
    code = f"import sys, vmgraft.imagefmt.qcow2; print(sorted({heavy} & set(sys.modules)))"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"


def test_chain_of_three_through_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    raw_base(tmp_path / "sub")
    make(tmp_path / "sub" / "mid.qcow2", backing="base.raw")
    qemu_io(tmp_path / "sub" / "mid.qcow2", "write -P 9 2M 64k")
    top = make(tmp_path / "top.qcow2", backing="sub/mid.qcow2", backing_format="qcow2")
    qemu_io(top, "write -P 1 0 4k")
    _check_content(top)
    assert read_all(top)[2 * MIB] == 9
