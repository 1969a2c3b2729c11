"""What an image may lead to: names, roots, loops, formats."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from qcow2_testkit import (
    MIB,
    TREE,
    extensions,
    make,
    open_qcow2,
    pattern,
    put_extensions,
    raw_base,
    read_all,
    record_of,
    run,
)

from vmgraft.errors import FileError, MalformedImageError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.contract import OpenOptions, Placement
from vmgraft.imagefmt.raw import FORMAT as RAW


def _overlay(path: Path, name: str, fmt: str | None = "raw") -> Path:
    """An image that names ``name``, which need not exist."""
    if not path.exists():
        make(path)
    run("qemu-img", "rebase", "-q", "-u", "-b", name, *(["-F", fmt] if fmt else ["-F", "raw"]), path)
    if fmt is None:
        put_extensions(path, [ext for ext in extensions(path) if ext[0] != 0xE2792ACA])
    return path


def _refused(path: Path, root: Path | None = None) -> VmgraftError:
    with open_qcow2(path, root=root) as image, pytest.raises(VmgraftError) as caught:
        assert image.metadata()["backing"] is not None  # facts are there all the same
        image.read(0, 512)
    return caught.value


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"file","filename":"/etc/passwd"}',
        "nbd://localhost/x",
        "http://localhost/x",
        "file:base.raw",
        "nbd:unix:/tmp/x",
        "fat:rw:.",
    ],
)
def test_protocols_are_never_followed(tmp_path: Path, name: str) -> None:
    raw_base(tmp_path)
    path = make(tmp_path / "x.qcow2", backing="base.raw")
    with path.open("r+b") as file:
        at = struct.unpack(">Q", file.read(16)[8:])[0]
        file.seek(16)
        file.write(struct.pack(">I", len(name)))
        file.seek(at)
        file.write(name.encode())
    error = _refused(path)
    assert isinstance(error, UnsupportedError)
    assert error.field == "backing_file_name"
    assert error.hint and error.offset == at


def test_a_colon_behind_a_slash_is_a_file_name(tmp_path: Path) -> None:
    raw_base(tmp_path, name="a:b.raw")
    assert read_all(_overlay(tmp_path / "x.qcow2", "./a:b.raw"))


def test_absolute_names_need_a_named_root(tmp_path: Path) -> None:
    base = raw_base(tmp_path)
    path = _overlay(tmp_path / "x.qcow2", str(base))
    assert "absolute" in _refused(path).message
    assert read_all(path, root=tmp_path)[: MIB // 2] == base.read_bytes()[: MIB // 2]
    (tmp_path / "other").mkdir()
    assert "outside" in _refused(path, root=tmp_path / "other").message


def test_names_may_not_climb_out(tmp_path: Path) -> None:
    raw_base(tmp_path)
    (tmp_path / "sub").mkdir()
    path = _overlay(tmp_path / "sub" / "x.qcow2", "../base.raw")
    assert "outside" in _refused(path).message
    assert read_all(path, root=tmp_path)
    inside = _overlay(tmp_path / "y.qcow2", "sub/../base.raw")
    assert read_all(inside)


def test_symbolic_links_may_not_lead_out(tmp_path: Path) -> None:
    raw_base(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link.raw").symlink_to(tmp_path / "base.raw")
    path = _overlay(tmp_path / "sub" / "x.qcow2", "link.raw")
    assert "outside" in _refused(path).message
    assert read_all(path, root=tmp_path)
    (tmp_path / "sub" / "round").symlink_to("round")
    assert isinstance(_refused(_overlay(tmp_path / "sub" / "y.qcow2", "round")), FileError)


def test_special_and_missing_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert isinstance(_refused(_overlay(tmp_path / "a.qcow2", "fifo")), FileError)
    assert "cannot be found" in _refused(_overlay(tmp_path / "b.qcow2", "nowhere.raw")).message
    (tmp_path / "folder").mkdir()
    assert isinstance(_refused(_overlay(tmp_path / "c.qcow2", "folder")), FileError)


def test_an_image_that_is_its_own_backing_file(tmp_path: Path) -> None:
    for fmt in ("qcow2", "raw"):
        error = _refused(_overlay(tmp_path / f"{fmt}.qcow2", f"{fmt}.qcow2", fmt))
        assert isinstance(error, MalformedImageError)
        assert "leads back" in error.message


def test_loops_over_several_files_and_hard_links(tmp_path: Path) -> None:
    _overlay(tmp_path / "b.qcow2", "c.qcow2", "qcow2")
    _overlay(tmp_path / "a.qcow2", "b.qcow2", "qcow2")
    (tmp_path / "c.qcow2").hardlink_to(tmp_path / "a.qcow2")
    assert "leads back" in _refused(tmp_path / "a.qcow2").message


def test_very_deep_chains(tmp_path: Path) -> None:
    make(tmp_path / "0.qcow2", size=65536)
    for depth in range(1, 64):
        make(tmp_path / f"{depth}.qcow2", size=65536, backing=f"{depth - 1}.qcow2", backing_format="qcow2")
    with open_qcow2(tmp_path / "63.qcow2") as image:
        assert len(image.backing_chain()) == 63
        assert image.read(0, 9) == bytes(9)
    make(tmp_path / "64.qcow2", size=65536, backing="63.qcow2", backing_format="qcow2")
    assert "deeper" in _refused(tmp_path / "64.qcow2").message


def test_the_format_of_the_backing_file_is_never_guessed_to_be_raw(tmp_path: Path) -> None:
    raw_base(tmp_path)
    error = _refused(_overlay(tmp_path / "a.qcow2", "base.raw", None))
    assert error.field == "backing_format"
    assert "rebase" in str(error.hint)
    pattern(make(tmp_path / "base.qcow2"))
    assert any(read_all(_overlay(tmp_path / "b.qcow2", "base.qcow2", None)))


def test_a_qcow2_file_named_raw_is_read_as_raw(tmp_path: Path) -> None:
    base = pattern(make(tmp_path / "base.qcow2"))
    data = read_all(_overlay(tmp_path / "a.qcow2", "base.qcow2", "raw"))
    assert data[: 4 * 65536] == base.read_bytes()[: 4 * 65536]


def test_the_trailer_of_a_grafted_raw_backing_file_is_hidden(tmp_path: Path) -> None:
    base = raw_base(tmp_path, size=2 * MIB)
    path = _overlay(tmp_path / "a.qcow2", "base.raw")
    before = read_all(path)
    with RAW.open(base, OpenOptions(writable=True)) as image:
        image.attach(lambda undo: record_of(undo, 3000), Placement.INLINE, TREE)
    assert base.stat().st_size > 2 * MIB
    assert read_all(path) == before


def test_names_that_are_not_text(tmp_path: Path) -> None:
    raw_base(tmp_path)
    path = make(tmp_path / "x.qcow2", backing="base.raw")
    with path.open("r+b") as file:
        at = struct.unpack(">Q", file.read(16)[8:])[0]
        file.seek(at)
        file.write(b"\xff\xfe\x80/..\n")
    error = _refused(path)
    assert error.message.isprintable()


@pytest.mark.parametrize("shown", [2, 4])
def test_a_raw_backing_file_that_grew_behind_its_trailer(tmp_path: Path, shown: int) -> None:
    """QEMU shows the guest what was appended, so a digest that leaves it out would vouch for nothing."""
    base = raw_base(tmp_path, size=2 * MIB)
    path = make(tmp_path / "a.qcow2", size=shown * MIB, backing="base.raw")
    before = read_all(path)
    with RAW.open(base, OpenOptions(writable=True)) as image:
        image.attach(lambda undo: record_of(undo, 3000), Placement.INLINE, TREE)
    with base.open("ab") as file:
        file.write(b"EVIL" * 4096)
    if shown == 2:
        assert read_all(path) == before  # the image ends before it
        return
    with open_qcow2(path) as image, pytest.raises(UnsupportedError, match="file-grown") as caught:
        image.read(0, 512)
    assert caught.value.file == str(base)
    assert caught.value.hint
