"""The acceptance property: detach(op(attach(x))) == op(x), byte for byte, for what qemu-img does to an image."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from qcow2_testkit import (
    MIB,
    attach,
    detach,
    extensions,
    make,
    open_qcow2,
    pattern,
    put_extensions,
    qemu_check,
    qemu_io,
    raw_base,
    run,
)

from vmgraft.errors import NoRoomError
from vmgraft.imagefmt.contract import GraftState

Op = Callable[[Path], None]


def _img(*args: str) -> Op:
    def op(path: Path) -> None:
        run("qemu-img", args[0], "-q", *[str(path) if a == "IMAGE" else a for a in args[1:]])

    return op


def _write(path: Path) -> None:
    qemu_io(path, "write -P 6 5M 300k", "write -z 64k 64k", "discard 1M 128k")


def _write_and_resize(path: Path) -> None:
    _write(path)
    _img("resize", "IMAGE", "+3M")(path)
    qemu_io(path, "write -P 2 9M 64k")


def _two_rewrites(path: Path) -> None:
    _img("rebase", "-u", "-b", "b2.raw", "-F", "raw", "IMAGE")(path)
    _img("amend", "-o", "compat=0.10", "IMAGE")(path)
    _img("amend", "-o", "compat=1.1", "IMAGE")(path)


def _commit_into(path: Path) -> None:
    overlay = path.with_suffix(".overlay")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", path.name, "-F", "qcow2", overlay)
    qemu_io(overlay, "write -P 9 2M 1M")
    run("qemu-img", "commit", "-q", overlay)
    overlay.unlink()


OPS: dict[str, Op] = {
    "nothing": lambda path: None,
    "upgrade": _img("amend", "-o", "compat=1.1", "IMAGE"),
    "downgrade": _img("amend", "-o", "compat=0.10", "IMAGE"),
    "lazy": _img("amend", "-o", "compat=1.1,lazy_refcounts=on", "IMAGE"),
    "grow": _img("resize", "IMAGE", "+9M"),
    "shrink": _img("resize", "--shrink", "IMAGE", "7680k"),
    "snapshot": _img("snapshot", "-c", "one", "IMAGE"),
    "write": _write,
    "write+resize": _write_and_resize,
    "bitmap": lambda path: (run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "b0"), None)[1],
    "rebase": _img("rebase", "-u", "-b", "b2.raw", "-F", "raw", "IMAGE"),
    "rebase-long": _img("rebase", "-u", "-b", "d" * 150 + "/b.raw", "-F", "raw", "IMAGE"),
    "rebase-none": _img("rebase", "-u", "-b", "", "IMAGE"),
    "check": _img("check", "-r", "all", "IMAGE"),
    "commit": _commit_into,
    "rewrites": _two_rewrites,
}


def _without_dates(path: Path) -> bytes:
    """The file with the date of every snapshot zeroed (spec, "Snapshots": two 32-bit fields at byte 16)."""
    data = bytearray(path.read_bytes())
    count, at = struct.unpack(">IQ", data[60:72])
    for _ in range(count):
        data[at + 16 : at + 24] = bytes(8)
        id_size, name_size = struct.unpack(">HH", data[at + 12 : at + 16])
        (extra,) = struct.unpack(">I", data[at + 36 : at + 40])
        at += 40 + extra + id_size + name_size + 7 & ~7
    return bytes(data)


def _cases() -> list[tuple[int, int, bool, str]]:
    """Bitmaps need version 3; a long name does not fit beside a locator in 512 bytes: see the test of full headers."""
    every = product([2, 3], [512, 4096, 65536, 2 * MIB], [False, True], OPS)
    return [c for c in every if (c[0], c[3]) != (2, "bitmap") and (c[1], c[3]) != (512, "rebase-long")]


@cache
def _original(version: int, cluster: int, backed: bool) -> bytes:
    with TemporaryDirectory() as folder:
        raw_base(Path(folder))
        path = make(Path(folder) / "x", version=version, cluster=cluster, backing="base.raw" if backed else None)
        return pattern(path, zeros=version == 3).read_bytes()


def _name(case: tuple[int, int, bool, str]) -> str:
    version, cluster, backed, op = case
    return f"v{version}-{cluster}-{'backed' if backed else 'alone'}-{op}"


def test_the_matrix_is_whole() -> None:
    """At least seven operations for every combination of version, cluster size and backing file."""
    cases = _cases()
    changing = set(OPS) - {"nothing"}
    for version, cluster, backed in product([2, 3], [512, 65536, 2 * MIB], [False, True]):
        ops = {case[3] for case in cases if case[:3] == (version, cluster, backed)}
        assert len(ops & changing) >= 13, (version, cluster, backed)
        wanted = {"upgrade", "downgrade", "grow", "shrink", "snapshot", "write", "rebase", "check", "commit"}
        assert wanted <= ops


@pytest.mark.parametrize(("version", "cluster", "backed", "op"), _cases(), ids=map(_name, _cases()))
def test_detach_of_a_changed_graft_gives_the_changed_original(
    tmp_path: Path, version: int, cluster: int, backed: bool, op: str
) -> None:
    raw_base(tmp_path)
    raw_base(tmp_path, name="b2.raw")
    x = tmp_path / "x.qcow2"
    x.write_bytes(_original(version, cluster, backed))
    y = tmp_path / "y.qcow2"
    shutil.copy(x, y)
    assert attach(y, size=6000).state is GraftState.OK
    OPS[op](x)
    OPS[op](y)
    with open_qcow2(y) as image:
        assert image.locate().state is GraftState.OK
    if "long" not in op:
        qemu_check(y)
    detach(y)
    assert _without_dates(y) == _without_dates(x)
    assert not (tmp_path / "y.qcow2.vmgraft").exists()


def test_a_header_too_full_to_undo_safely_is_refused_and_left_alone(tmp_path: Path) -> None:
    x = make(tmp_path / "x.qcow2", cluster=2048)
    attach(x)
    run("qemu-img", "rebase", "-q", "-u", "-b", "d" * 1000, "-F", "raw", x)
    before = x.read_bytes()
    with open_qcow2(x) as image:
        assert image.locate().state is GraftState.OK
    with pytest.raises(NoRoomError, match="too full"):
        detach(x)
    assert x.read_bytes() == before


@pytest.mark.parametrize("rewrites", [1, 2, 3])
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("size", [1500, 20_000])
def test_other_unknown_extensions_keep_their_order(tmp_path: Path, backed: bool, rewrites: int, size: int) -> None:
    """QEMU reverses unknown extensions at each rewrite, so ours comes to stand before the others."""
    raw_base(tmp_path)
    x = pattern(make(tmp_path / "x.qcow2", backing="base.raw" if backed else None))
    put_extensions(x, [*extensions(x), (0x11111111, b"first"), (0x22222222, b"second, longer" * 9)])
    qemu_check(x)
    y = tmp_path / "y.qcow2"
    shutil.copy(x, y)
    attach(y, size=size)
    for path in (x, y):
        for n in range(rewrites):
            _img("amend", "-o", f"lazy_refcounts={'off' if n % 2 else 'on'}", "IMAGE")(path)
    last = [magic for magic, _ in extensions(y)][-1]
    assert (last == 0x564D4772) == (rewrites % 2 == 0)
    detach(y)
    assert y.read_bytes() == x.read_bytes()


@pytest.mark.parametrize("op", ["nothing", "write", "snapshot", "grow", "lazy", "rebase"])
@pytest.mark.parametrize("gap", [0, 4000])
@pytest.mark.parametrize("behind", [b"", b"some tool left this here", bytes(300) + b"x" * 700 + bytes(99) + b"y"])
def test_headers_that_qemu_did_not_write(tmp_path: Path, behind: bytes, gap: int, op: str) -> None:
    """Foreign bytes and gaps come back verbatim, unless QEMU has rewritten the header meanwhile."""
    raw_base(tmp_path)
    raw_base(tmp_path, name="b2.raw")
    x = pattern(make(tmp_path / "x.qcow2", backing="base.raw"))
    put_extensions(x, extensions(x), behind, gap)
    qemu_check(x)
    y = tmp_path / "y.qcow2"
    shutil.copy(x, y)
    assert attach(y, size=5000).state is GraftState.OK
    OPS[op](x)
    OPS[op](y)
    run("qemu-img", "compare", "-q", x, y)
    detach(y)
    assert _without_dates(y) == _without_dates(x)


@pytest.mark.parametrize("op", ["nothing", "write", "lazy", "rebase"])
@pytest.mark.parametrize("length", [104, 136])
def test_shorter_and_longer_headers(tmp_path: Path, length: int, op: str) -> None:
    """QEMU before 5.1 wrote 104 bytes; later fields that are unknown today must be kept."""
    raw_base(tmp_path, name="b2.raw")
    x = pattern(make(tmp_path / "x.qcow2"))
    with x.open("r+b") as file:
        file.seek(100)
        file.write(struct.pack(">I", length) + bytes(8))
        file.write(b"later".ljust(length - 112, b"\0") if length > 112 else b"")
        file.write(bytes(600))
    qemu_check(x)
    y = tmp_path / "y.qcow2"
    shutil.copy(x, y)
    attach(y, size=5000)
    OPS[op](x)
    OPS[op](y)
    detach(y)
    assert y.read_bytes() == x.read_bytes()
