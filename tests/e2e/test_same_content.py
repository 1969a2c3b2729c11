"""One disk stored in every container and option that qemu-img knows has one content and one digest."""

import hashlib
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vmgraft.cli.app import cli
from vmgraft.imagefmt.registry import detect, format_names
from vmgraft.imagefmt.write import writable_formats

MIB = 1 << 20
SIZE = 24 * MIB + 5 * 512

#: Container: (our name for it, qemu-img's, its options).
STORED = {
    "raw": ("raw", "raw", ""),
    "qcow2 v2": ("qcow2", "qcow2", "compat=0.10"),
    "qcow2 v3": ("qcow2", "qcow2", "compat=1.1"),
    "qcow2, clusters of 512": ("qcow2", "qcow2", "cluster_size=512"),
    "qcow2, clusters of 2 MiB": ("qcow2", "qcow2", "cluster_size=2M"),
    "qcow2, subclusters": ("qcow2", "qcow2", "extended_l2=on,cluster_size=128k"),
    "qcow2, 64-bit refcounts": ("qcow2", "qcow2", "refcount_bits=64"),
    "qcow2, 1-bit refcounts": ("qcow2", "qcow2", "refcount_bits=1"),
    "qcow2, preallocated": ("qcow2", "qcow2", "preallocation=metadata"),
    "qcow2, zlib": ("qcow2", "qcow2", "compression_type=zlib -c"),
    "qcow2, zstd": ("qcow2", "qcow2", "compression_type=zstd -c"),
    "qcow2, data file": ("qcow2", "qcow2", "data_file=DATA"),
    "qcow2, raw data file": ("qcow2", "qcow2", "data_file=DATA,data_file_raw=on"),
    "vmdk sparse": ("vmdk", "vmdk", "subformat=monolithicSparse"),
    "vmdk sparse, zeroed grains": ("vmdk", "vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    "vmdk stream-optimised": ("vmdk", "vmdk", "subformat=streamOptimized"),
    "vhd dynamic": ("vhd", "vpc", "subformat=dynamic,force_size=on"),
    "vhd fixed": ("vhd", "vpc", "subformat=fixed,force_size=on"),
    "vhdx dynamic": ("vhdx", "vhdx", "subformat=dynamic"),
    "vhdx fixed": ("vhdx", "vhdx", "subformat=fixed"),
    "vdi dynamic": ("vdi", "vdi", ""),
    "vdi static": ("vdi", "vdi", "STATIC"),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    """A GPT disk: partitions, data, explicit zeros, holes, and a size that no container's unit divides."""
    path = tmp_path_factory.mktemp("same") / "disk.raw"
    noise = random.Random(17)
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset, data in (
            (2 * MIB, noise.randbytes(3 * MIB + 100)),
            (10 * MIB - 1, b"x"),
            (12 * MIB, bytes(2 * MIB)),
            (16 * MIB, b"text that compresses " * 60_000),
            (20 * MIB + 4096, noise.randbytes(4096)),
            (23 * MIB + 512, noise.randbytes(512)),
        ):
            file.seek(offset)
            file.write(data)
    layout = ["-n", "1:2M:18M", "-n", "2:19M:22M", "-t", "2:8200"]
    subprocess.run(["sgdisk", *layout, str(path)], check=True, capture_output=True)
    with path.open("r+b") as file:  # the last sector would hold the backup header; the tail of the disk is data too
        file.seek(SIZE - 40 * 512)
        file.write(noise.randbytes(2048))
    return path


@pytest.fixture(scope="module")
def names(disk: Path) -> dict[str, object]:
    """The disk's digests, made by programs of others."""
    said = subprocess.run(
        ["fsverity", "digest", "--block-size=65536", "--compact", str(disk)], check=True, capture_output=True, text=True
    )
    return {"tree": said.stdout.strip(), "sha256": hashlib.sha256(disk.read_bytes()).hexdigest()}


def store(disk: Path, target: Path, case: str, tool) -> None:
    _, name, options = STORED[case]
    if options == "STATIC":  # this QEMU reads static images and makes none: all blocks stored, in order, is one
        tool("qemu-img", "convert", "-S", "0", "-f", "raw", "-O", name, disk, target)
        with target.open("r+b") as file:
            file.seek(76)  # VDICore.h, VDIHEADER1: the image's type
            file.write((2).to_bytes(4, "little"))
        return
    options = options.replace("DATA", str(target.with_suffix(".data")))
    create, *more = options.split() or [""]
    tool("qemu-img", "convert", "-f", "raw", "-O", name, *more, *(["-o", create] if create else []), disk, target)


def said_by(*args: str | Path) -> dict[str, Any]:
    """Run a command in this process and return its JSON object."""
    result = CliRunner().invoke(cli, [*map(str, args), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", STORED)
def test_the_digest_is_that_of_the_disk(tmp_path, disk, names, tool, sha256, case: str) -> None:
    ours, name, _ = STORED[case]
    target = tmp_path / "stored"
    store(disk, target, case, tool)
    said = said_by("digest", target, "--flat-digest", "always", "--root", tmp_path)
    assert said["virtualSize"] == SIZE
    assert (said["tree"]["digest"], said["sha256"]) == (names["tree"], names["sha256"])
    assert detect(target).name == ours
    tool("qemu-img", "convert", "-f", name, "-O", "raw", target, tmp_path / "oracle.raw")
    assert sha256(tmp_path / "oracle.raw") == names["sha256"]


@pytest.mark.parametrize(
    "case", ["raw", "qcow2, zstd", "vmdk stream-optimised", "vhd fixed", "vhdx dynamic", "vdi static"]
)
def test_convert_keeps_it(tmp_path, disk, names, tool, case: str) -> None:
    """From containers that qemu-img wrote to containers that we write."""
    store(disk, tmp_path / "stored", case, tool)
    for name in ("qcow2", "vmdk"):
        said = said_by("convert", tmp_path / "stored", tmp_path / f"out.{name}")
        assert (said["virtualSize"], said["contentTree"]) == (SIZE, names["tree"])
        tool("qemu-img", "compare", "-f", "raw", "-F", name, disk, tmp_path / f"out.{name}")


def test_the_formats_offered_are_those_that_can_be_written() -> None:
    offered = CliRunner().invoke(cli, ["convert", "x", "y", "-O", "nothing"]).output
    assert all(f"'{name}'" in offered for name in writable_formats())
    assert set(writable_formats()) <= set(format_names())


def test_every_disk_format_is_here() -> None:
    assert {ours for ours, _, _ in STORED.values()} == set(writable_formats()) - {"iso9660"}
