"""Images written without qemu-img, judged by qemu-img."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from qcow2_testkit import MIB, noise, qemu_check, raw_bytes, read_all, run

from vmgraft.errors import UsageError
from vmgraft.imagefmt.qcow2.create import create_qcow2


@pytest.mark.parametrize("size", [1, 512, 65536, 3 * MIB + 77])
@pytest.mark.parametrize("cluster", [512, 4096, 65536, 2 * MIB])
@pytest.mark.parametrize("version", [2, 3])
def test_fresh_images(tmp_path: Path, version: int, cluster: int, size: int) -> None:
    content = bytearray(size)
    content[-1:] = b"\1"
    for at in range(0, size, 300_000):
        content[at : at + 5000] = noise(5000, at)[: size - at]
    raw, path = tmp_path / "x.raw", tmp_path / "x.qcow2"
    raw.write_bytes(bytes(content).ljust(-(-size // 512) * 512, b"\0"))
    create_qcow2(path, io.BytesIO(bytes(content)), cluster_size=cluster, version=version)
    qemu_check(path)
    run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", path, raw)
    assert raw_bytes(path) == raw.read_bytes() == read_all(path)
    again = tmp_path / "y.qcow2"
    create_qcow2(again, bytes(content), cluster_size=cluster, version=version)
    assert again.read_bytes() == path.read_bytes()


def test_zeros_take_no_space_and_qemu_can_write(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    create_qcow2(path, bytes(32 * MIB))
    assert path.stat().st_size <= 4 * 65536
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 30M 2M", path)
    run("qemu-img", "amend", "-q", "-o", "lazy_refcounts=on", path)
    qemu_check(path)


def test_bad_parameters_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    for arguments in ({"cluster_size": 1000}, {"cluster_size": 4 * MIB}, {"version": 4}, {"cluster_size": 0}):
        with pytest.raises(UsageError):
            create_qcow2(path, b"x", **arguments)
    with pytest.raises(UsageError):
        create_qcow2(path, b"")
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"mine")
    with pytest.raises(UsageError):
        create_qcow2(path, b"x")
    assert path.read_bytes() == b"mine"
