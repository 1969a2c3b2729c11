"""Helpers: real qemu-img, and attach and detach through the format's own contract."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
from functools import lru_cache
from pathlib import Path

from vmgraft.imagefmt.assemble import build_record
from vmgraft.imagefmt.blob import BytesBlob
from vmgraft.imagefmt.contract import Image, Located, OpenOptions, Placement, Undo
from vmgraft.imagefmt.qcow2 import FORMAT
from vmgraft.imagefmt.record import Section, SectionKind, parse_record
from vmgraft.imagefmt.undo import pack_undo

MIB = 1 << 20
TREE = hashlib.sha256(b"tree").digest()


def run(*args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program; a missing one or an exit code other than 0 fails the test."""
    done = subprocess.run([str(a) for a in args], check=False, capture_output=True, text=True, timeout=120)
    if check:
        assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
    return done


def qemu_io(path: Path, *commands: str, check: bool = True) -> None:
    flags = [flag for command in commands for flag in ("-c", command)]
    run("qemu-io", "-t", "unsafe", "-f", "qcow2", *flags, path, check=check)


def qemu_check(path: Path) -> None:
    run("qemu-img", "check", "-q", "-f", "qcow2", path)


@lru_cache
def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def make(path: Path, *, version: int = 3, cluster: int = 65536, size: int = 8 * MIB, options: str = "",
         backing: str | None = None, backing_format: str = "raw") -> Path:  # fmt: skip
    """Create an image with qemu-img and write a pattern into it."""
    compat = "0.10" if version == 2 else "1.1"
    opts = f"compat={compat},cluster_size={cluster}" + (f",{options}" if options else "")
    base = ["-b", backing, "-F", backing_format] if backing else []
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", opts, *base, path, size)
    return path


def pattern(path: Path, *, zeros: bool = True) -> Path:
    commands = ["write -P 7 64k 128k", "write -P 9 1000k 700k", "write -P 3 7M 1k"]
    qemu_io(path, *commands, *(["write -z 1200k 64k", "discard 1300k 64k"] if zeros else []))
    return path


def raw_base(folder: Path, size: int = 6 * MIB, name: str = "base.raw") -> Path:
    path = folder / name
    data = bytearray(size)
    data[: 1 * MIB] = noise(MIB, 5)
    data[3 * MIB : 3 * MIB + 65536] = noise(65536, 6)
    path.write_bytes(data)
    return path


def raw_bytes(path: Path) -> bytes:
    """What QEMU says the guest sees."""
    out = path.with_suffix(".converted")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, out)
    data = out.read_bytes()
    out.unlink()
    return data


def open_qcow2(path: Path, *, writable: bool = False, root: Path | None = None) -> Image:
    return FORMAT.open(path, OpenOptions(writable=writable, root=root))


def read_all(path: Path, root: Path | None = None) -> bytes:
    with open_qcow2(path, root=root) as image:
        return image.read(0, image.virtual_size)


def record_of(undo: Undo, size: int) -> BytesBlob:
    """A record of about ``size`` bytes, with the undo in it as in real life."""
    fixed = len(build_record([Section(SectionKind.ENVELOPE, b""), Section(SectionKind.UNDO, pack_undo(undo))]))
    body = noise(max(1, size - fixed), 9)
    return BytesBlob(build_record([Section(SectionKind.ENVELOPE, body), Section(SectionKind.UNDO, pack_undo(undo))]))


def attach(path: Path, size: int = 1500, placement: Placement = Placement.AUTO, root: Path | None = None) -> Located:
    with open_qcow2(path, writable=True, root=root) as image:
        return image.attach(lambda undo: record_of(undo, size), placement, TREE)


def undo_of(image: Image) -> Undo:
    located = image.locate()
    assert located.record is not None, located
    return parse_record(located.record, file=image.path, offset=0).undo()


def detach(path: Path, root: Path | None = None) -> None:
    with open_qcow2(path, writable=True, root=root) as image:
        image.detach(undo_of(image))


def extensions(path: Path) -> list[tuple[int, bytes]]:
    """Walk the header extensions independently of the package: (magic, data)."""
    data = path.read_bytes()[: 2 * MIB]
    version, name_at = struct.unpack(">IQ", data[4:16])
    at = 72 if version == 2 else struct.unpack(">I", data[100:104])[0]
    found = []
    while not name_at or at < name_at:
        magic, length = struct.unpack(">II", data[at : at + 8])
        if magic == 0:
            break
        found.append((magic, data[at + 8 : at + 8 + length]))
        at += 8 + (length + 7 & ~7)
    return found


def put_extensions(path: Path, exts: list[tuple[int, bytes]], behind: bytes = b"", gap: int = 0) -> None:
    """Rewrite the header with these extensions, as another tool would; ``behind`` is left behind the end mark.

    The backing file name, if any, is moved ``gap`` bytes behind that.
    """
    with path.open("r+b") as file:
        head = file.read(1 << struct.unpack(">I", file.read(24)[20:24])[0])
        file.seek(0)
        cluster = 1 << struct.unpack(">I", file.read(24)[20:24])[0]
        file.seek(0)
        head = file.read(cluster)
        version, name_at, name_size = struct.unpack(">IQI", head[4:20])
        length = 72 if version == 2 else struct.unpack(">I", head[100:104])[0]
        out = bytearray(head[:length])
        for magic, data in exts:
            out += struct.pack(">II", magic, len(data)) + data + bytes(-len(data) % 8)
        out += bytes(8)
        if name_at:
            out += bytes(gap)
            out[8:16] = struct.pack(">Q", len(out))
            out += head[name_at : name_at + name_size]
            out += bytes(-len(out) % 8)
        out += behind
        assert len(out) <= cluster
        file.seek(0)
        file.write(out.ljust(cluster, b"\0"))
