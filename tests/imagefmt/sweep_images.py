"""A small image of every kind that a graft is written into differently, for the sweeps over all containers."""

import os
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from imagefmt_helpers import iso_bytes, tool

from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.sidecar import sidecar_path

INLINE, SIDECAR = Placement.INLINE, Placement.SIDECAR


@dataclass(frozen=True)
class Kind:
    """A kind of image: its registered format, its file name, and QEMU's format and options, or its bytes."""

    format: str
    name: str
    made_by: str | bytes = ""
    options: str = ""
    placements: tuple[Placement, ...] = (SIDECAR,)


RAW = bytes(range(256)) * 40
KINDS = {
    "raw": Kind("raw", "disk.img", RAW + b"odd", placements=(INLINE, SIDECAR)),
    "iso": Kind("iso9660", "disc.iso", iso_bytes(), placements=(INLINE, SIDECAR)),
    "iso, odd size": Kind("iso9660", "disc.iso", iso_bytes(tail=b"tail"), placements=(INLINE,)),
    "iso, field taken": Kind("iso9660", "disc.iso", iso_bytes(field=b"x" * 512), placements=(INLINE, SIDECAR)),
    "qcow2": Kind("qcow2", "disk.qcow2", "qcow2", placements=(INLINE, SIDECAR)),
    "qcow2, small clusters": Kind("qcow2", "disk.qcow2", "qcow2", "cluster_size=512"),
    "vhdx": Kind("vhdx", "disk.vhdx", "vhdx", "block_size=1M,log_size=1M", placements=(INLINE, SIDECAR)),
    "vmdk": Kind("vmdk", "disk.vmdk", "vmdk", placements=(INLINE, SIDECAR)),
    "vmdk stream": Kind("vmdk", "disk.vmdk", "vmdk", "subformat=streamOptimized", placements=(INLINE, SIDECAR)),
    "vdi": Kind("vdi", "disk.vdi", "vdi"),
    "vhd dynamic": Kind("vhd", "disk.vhd", "vpc"),
    "vhd fixed": Kind("vhd", "disk.vhd", "vpc", "subformat=fixed"),
    "zip": Kind("zip", "archive.zip", placements=(INLINE, SIDECAR)),
}
CASES = [(name, placement) for name, kind in KINDS.items() for placement in kind.placements]
IDS = [f"{name} {placement.value}" for name, placement in CASES]


@cache
def bytes_of(name):
    """Make an image of that kind once, and return its bytes."""
    kind = KINDS[name]
    if isinstance(kind.made_by, bytes):
        return kind.made_by
    with tempfile.TemporaryDirectory() as folder:
        raw, path = Path(folder) / "raw", Path(folder) / "image"
        if kind.format == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for number in range(3):
                    archive.writestr(zipfile.ZipInfo(f"{number}.txt"), RAW)
        else:
            raw.write_bytes(RAW.ljust(1 << 20, b"\0"))
            options = ("-o", kind.options) if kind.options else ()
            tool("qemu-img", "convert", "-q", "-f", "raw", "-O", kind.made_by, *options, raw, path)
        return path.read_bytes()


def put(folder, name):
    """Write a fresh image of that kind into ``folder``, which holds nothing else then; return it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    path = folder / KINDS[name].name
    path.write_bytes(bytes_of(name))
    return path


def restore(path, content):
    """Put the bytes back, and take everything else away."""
    if path.read_bytes() != content:
        path.write_bytes(content)
    for other in path.parent.iterdir():
        if other != path:
            other.unlink()


def is_clean(path, content):
    """Whether the image is as it was, and nothing lies beside it."""
    return path.read_bytes() == content and [item.name for item in path.parent.iterdir()] == [path.name]


def sidecar_bytes(path):
    """The sidecar, or None."""
    side = sidecar_path(path)
    return side.read_bytes() if side.exists() else None


@contextmanager
def memory_folder():
    """A folder in memory where the system has one: a sweep flushes thousands of times, and nothing is to be kept."""
    memory = "/dev/shm"
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vmgraft-sweep-", dir=where) as name:
        yield Path(name)
