"""Attach, locate and detach: placements, room, states, foreign writers, hostile input."""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from qcow2_testkit import (
    MIB,
    TREE,
    attach,
    detach,
    extensions,
    make,
    noise,
    open_qcow2,
    pattern,
    put_extensions,
    qemu_check,
    qemu_io,
    raw_base,
    read_all,
    record_of,
    run,
    undo_of,
)

from vmgraft.errors import FileError, GraftFormatError, ImageInUseError, NoGraftError, NoRoomError, UnsupportedError
from vmgraft.imagefmt.contract import GraftState, Patch, Placement, Undo
from vmgraft.imagefmt.locator import parse_locator
from vmgraft.imagefmt.qcow2.create import create_qcow2
from vmgraft.imagefmt.sidecar import sidecar_path

OURS = 0x564D4772


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
@pytest.mark.parametrize("cluster", [512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 2 * MIB])
@pytest.mark.parametrize("version", [2, 3])
def test_there_and_back(tmp_path: Path, version: int, cluster: int, backed: bool) -> None:
    raw_base(tmp_path)
    path = pattern(
        make(tmp_path / "x.qcow2", version=version, cluster=cluster, backing="base.raw" if backed else None),
        zeros=version == 3,
    )
    twin = shutil.copy(path, tmp_path / "twin.qcow2")
    before, content = path.read_bytes(), read_all(path)
    located = attach(path, size=4000)
    inline = cluster >= 16384
    assert located.state is GraftState.OK
    assert located.locator is not None and located.record is not None
    assert located.locator.placement is (Placement.INLINE if inline else Placement.SIDECAR)
    assert located.locator.tree_digest == TREE
    assert located.locator.file_size == len(before)
    assert sidecar_path(path).exists() is not inline
    qemu_check(path)
    run("qemu-img", "compare", "-q", path, twin)
    assert read_all(path) == content
    assert path.stat().st_size == len(before)
    magic, data = extensions(path)[-1]
    assert magic == OURS
    assert data[:8] == bytes(8) and len(data) % 8 == 0
    assert parse_locator(data[8:136], file=path, offset=None) == located.locator
    if inline:
        assert data[136:].rstrip(b"\0") == located.record.read_all().rstrip(b"\0")
    detach(path)
    assert path.read_bytes() == before
    assert not sidecar_path(path).exists()


@pytest.mark.parametrize("version", [2, 3])
def test_headers_too_full_for_a_locator(tmp_path: Path, version: int) -> None:
    path = pattern(make(tmp_path / "x.qcow2", version=version, cluster=512), zeros=False)
    run("qemu-img", "rebase", "-q", "-u", "-b", "d" * 220, "-F", "raw", path)
    before = path.read_bytes()
    with open_qcow2(path) as image:
        assert image.room().inline == 0
    with pytest.raises(NoRoomError) as caught:
        attach(path)
    assert "cluster_size=64k" in str(caught.value.hint)
    assert path.read_bytes() == before
    assert not sidecar_path(path).exists()


@pytest.mark.parametrize("cluster", [16384, 32768, 65536, 2 * MIB])
@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
def test_room_is_exact_and_leaves_room_for_qemu(tmp_path: Path, cluster: int, backed: bool) -> None:
    raw_base(tmp_path)
    options = {"version": 2, "cluster": cluster, "backing": "base.raw" if backed else None}
    path = make(tmp_path / "x.qcow2", **options)  # type: ignore[arg-type]
    before = path.read_bytes()
    with open_qcow2(path) as image:
        room = image.room()
    assert room.inline > (27_000 if cluster >= 65536 else cluster // 2)
    located = attach(path, size=room.inline, placement=Placement.INLINE)
    assert located.record is not None and located.record.size == room.inline
    end = sum(8 + len(data) + (-len(data) % 8) for _, data in extensions(path)) + 72
    assert end < 32_257, "libvirt would no longer see the backing file name"
    # everything qemu-img may add later still fits: upgrade, the longest backing name, a bitmap
    run("qemu-img", "amend", "-q", "-o", "compat=1.1", path)
    run("qemu-img", "bitmap", "--add", "-f", "qcow2", path, "b0")
    run("qemu-img", "rebase", "-q", "-u", "-b", "d/" * 511 + "r", "-F", "raw", path)
    assert "b0" in run("qemu-img", "info", "--output=json", path).stdout
    with open_qcow2(path) as image:
        assert image.locate().state is GraftState.OK
    path.write_bytes(before)
    with pytest.raises(NoRoomError, match="does not fit inline"):
        attach(path, size=room.inline + 8, placement=Placement.INLINE)
    assert path.read_bytes() == before
    located = attach(path, size=room.inline + 8)
    assert located.locator is not None and located.locator.placement is Placement.SIDECAR


def test_record_may_grow_past_the_room_into_a_sidecar(tmp_path: Path) -> None:
    path = pattern(make(tmp_path / "x.qcow2"))
    before = path.read_bytes()
    located = attach(path, size=3 * MIB)
    assert located.state is GraftState.OK
    assert located.record is not None and located.record.size >= 3 * MIB
    detach(path)
    assert path.read_bytes() == before


def test_a_foreign_file_in_the_sidecars_place(tmp_path: Path) -> None:
    path = pattern(make(tmp_path / "x.qcow2"))
    put_extensions(path, extensions(path), b"foreign bytes")
    before = path.read_bytes()
    sidecar_path(path).write_bytes(b"my diary")
    with pytest.raises(FileError):
        attach(path, placement=Placement.SIDECAR)
    assert path.read_bytes() == before
    assert sidecar_path(path).read_bytes() == b"my diary"


def test_a_second_graft_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2")
    attach(path)
    before = path.read_bytes()
    with pytest.raises(GraftFormatError, match="already"):
        attach(path)
    with open_qcow2(path) as image:
        assert image.room().inline == 0
    assert path.read_bytes() == before


def test_nothing_to_detach(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2")
    with open_qcow2(path, writable=True) as image, pytest.raises(NoGraftError):
        image.detach(Undo(0))
    with open_qcow2(path) as image:
        assert image.locate().state is GraftState.NONE


def test_read_only_images_are_not_written(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2")
    with open_qcow2(path) as image, pytest.raises(FileError, match="read-only"):
        image.attach(lambda undo: record_of(undo, 1000), Placement.AUTO, TREE)


def test_used_images_are_refused_and_used_ones_lock(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2")
    holder = subprocess.Popen(["qemu-io", "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        assert b"read 512/512" in holder.stdout.readline() + holder.stdout.readline()
        with pytest.raises(ImageInUseError):
            attach(path)
    finally:
        holder.communicate(b"quit\n", timeout=20)
    with open_qcow2(path, writable=True):
        refused = run("qemu-io", "-f", "qcow2", "-c", "write 0 512", path, check=False)
        assert refused.returncode != 0
    attach(path)


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def test_states_of_a_damaged_graft(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2")
    located = attach(path, size=3000)
    at = located.locator_offset
    assert at is not None and located.record is not None
    grafted = path.read_bytes()

    def state(*flips: int) -> GraftState:
        path.write_bytes(grafted)
        for flip in flips:
            _flip(path, flip)
        with open_qcow2(path) as image:
            found = image.locate()
        assert found.state is GraftState.OK or found.detail
        return found.state

    assert state() is GraftState.OK
    assert state(at - 1) is GraftState.DAMAGED  # the 8 zero bytes
    assert state(at) is GraftState.DAMAGED
    assert state(at + 100) is GraftState.DAMAGED
    assert state(at + 128) is GraftState.OVERWRITTEN
    assert state(at + 128 + located.record.size - 1) is GraftState.OVERWRITTEN
    path.write_bytes(grafted)
    with path.open("r+b") as file:  # length of the extension
        file.seek(at - 12)
        file.write(struct.pack(">I", 136 + 800))
        file.seek(at + 128 + 800)
        file.write(bytes(8))
    with open_qcow2(path) as image:
        found = image.locate()
    assert found.state is GraftState.CUT
    assert found.record.read_all() == located.record.read(0, 800)


def test_states_of_a_sidecar(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2")
    attach(path, placement=Placement.SIDECAR)
    side = sidecar_path(path)
    sound = side.read_bytes()
    states = {}
    for name, data in {"cut": sound[:-9], "changed": sound[:-1] + b"?", "long": sound + b"x"}.items():
        side.write_bytes(data)
        with open_qcow2(path) as image:
            states[name] = image.locate().state
    side.unlink()
    with open_qcow2(path) as image:
        states["gone"] = image.locate().state
    assert states == {
        "cut": GraftState.CUT,
        "changed": GraftState.OVERWRITTEN,
        "long": GraftState.DAMAGED,
        "gone": GraftState.NO_RECORD,
    }


@pytest.mark.parametrize("backed", [False, True], ids=["alone", "backed"])
def test_detach_without_the_record(tmp_path: Path, backed: bool) -> None:
    """The undo note alone is enough."""
    raw_base(tmp_path)
    path = pattern(make(tmp_path / "x.qcow2", backing="base.raw" if backed else None))
    put_extensions(path, extensions(path), b"foreign bytes")
    before = path.read_bytes()
    located = attach(path, placement=Placement.SIDECAR)
    assert located.locator_offset is not None
    sidecar_path(path).unlink()
    with open_qcow2(path, writable=True) as image:
        undo = image.recovery_undo()
        assert undo is not None
        image.detach(undo)
    assert path.read_bytes() == before


def _drop_like_a_foreign_writer(path: Path) -> None:
    """Write a fresh header without extensions and leave everything behind it, as some other hypervisors do."""
    with path.open("r+b") as file:
        file.seek(100)
        file.write(struct.pack(">I", 104) + bytes(8))


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_orphans_are_reported_and_wiped(tmp_path: Path, placement: Placement) -> None:
    path = pattern(make(tmp_path / "x.qcow2"))
    content = read_all(path)
    located = attach(path, size=3000, placement=placement)
    _drop_like_a_foreign_writer(path)
    with open_qcow2(path) as image:
        found = image.locate()
        undo = undo_of(image)
    assert found.state is GraftState.ORPHANED
    assert found.record == located.record
    assert found.locator == located.locator
    with open_qcow2(path, writable=True) as image:  # opening for writing must not touch a recoverable record
        assert image.locate().state is GraftState.ORPHANED
        image.detach(undo)
        assert image.locate().state is GraftState.NONE
    qemu_check(path)
    assert read_all(path) == content
    assert found.record is not None and found.record.read(200, 100) not in path.read_bytes()
    assert not sidecar_path(path).exists()


def test_attach_over_an_orphan(tmp_path: Path) -> None:
    path = pattern(make(tmp_path / "x.qcow2"))
    attach(path, size=20_000, placement=Placement.INLINE)
    _drop_like_a_foreign_writer(path)
    with open_qcow2(path) as image:
        assert image.locate().state is GraftState.ORPHANED
    assert attach(path, size=3000).state is GraftState.OK
    qemu_check(path)
    detach(path)
    with open_qcow2(path) as image:
        assert image.locate().state is GraftState.NONE


def test_a_sidecar_that_nothing_points_to(tmp_path: Path) -> None:
    path = pattern(make(tmp_path / "x.qcow2"))
    before = path.read_bytes()
    located = attach(path, placement=Placement.SIDECAR)
    path.write_bytes(before)  # a copy was put back, or qemu-img wrote the image anew
    with open_qcow2(path, writable=True) as image:
        found = image.locate()
        assert found.state is GraftState.ORPHANED
        assert found.record == located.record
        image.detach(undo_of(image))
        assert image.locate().state is GraftState.NONE
    assert not sidecar_path(path).exists()
    assert path.read_bytes() == before


def test_an_orphan_with_a_damaged_record_says_so(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2")
    located = attach(path, size=3000)
    assert located.locator_offset is not None
    _drop_like_a_foreign_writer(path)
    _flip(path, located.locator_offset + 1000)
    with open_qcow2(path) as image:
        found = image.locate()
    assert found.state is GraftState.ORPHANED
    assert "does not match" in found.detail


def test_a_hostile_undo_changes_nothing_but_dead_bytes(tmp_path: Path) -> None:
    """UNDO is not signed: whatever it says, header, tables and guest content stay as they are."""
    path = pattern(make(tmp_path / "x.qcow2"))
    twin = Path(shutil.copy(path, tmp_path / "twin.qcow2"))
    attach(path)
    grafted = path.read_bytes()
    with open_qcow2(path) as image:
        honest = undo_of(image)
    end = honest.facts["endOffset"]
    for offset, data in (
        (0, b"evil"),
        (24, bytes(8)),
        (65536 * 3, b"\xff" * 64),
        (end, b"\xe2\x79\x2a\xca\0\0\0\3raw"),
    ):
        path.write_bytes(grafted)
        with open_qcow2(path, writable=True) as image:
            image.detach(replace(honest, patches=(Patch(offset, data),)))
        assert path.read_bytes() == twin.read_bytes()


def test_a_hostile_note_changes_nothing_but_dead_bytes(tmp_path: Path) -> None:
    """Opening for writing rolls an interrupted change back; a forged note must not turn that into a weapon."""
    path = pattern(make(tmp_path / "x.qcow2"))
    clean = path.read_bytes()
    end = 112 + sum(8 + len(data) for _, data in extensions(path))

    def forged(**changes: int) -> bytes:
        fields = {"end": end, "area": 65536, "old": 0, "new": 0, "name": 0, "ssize": 0, "sat": 0} | changes
        spill = clean[fields["sat"] : fields["sat"] + fields["ssize"]] if fields["ssize"] < MIB else b""
        body = b"VMGQNOTE" + struct.pack(
            "<HHIQQQQIIQ", 1, 1, 0, fields["end"], fields["area"], fields["old"], fields["new"], fields["name"],
            fields["ssize"], fields["sat"],
        ) + sha256(spill).digest()  # fmt: skip
        return body + sha256(body).digest()[:8]

    hostile = [
        {"area": 1 << 40}, {"area": 65536 * 4}, {"end": 0}, {"end": 8}, {"old": 0, "new": 24, "name": 8},
        {"old": 24, "new": 2000, "name": 16}, {"old": 2000, "new": 1 << 50, "name": 8}, {"ssize": 1 << 31, "sat": 600},
        {"ssize": 65536, "sat": 65536}, {"area": 0}, {},
    ]  # fmt: skip
    for changes in hostile:
        data = bytearray(clean)
        data[4096 : 4096 + 104] = forged(**changes)
        path.write_bytes(data)
        with open_qcow2(path, writable=True):
            pass
        after = path.read_bytes()
        assert after[:end] == clean[:end] and after[65536:] == clean[65536:], changes
        assert after in (clean, bytes(data)), changes


def test_headers_without_an_end_mark_are_refused(tmp_path: Path) -> None:
    """Very old images have the backing file name right behind the header."""
    raw_base(tmp_path)
    path = make(tmp_path / "x.qcow2", version=2, backing="base.raw")
    with path.open("r+b") as file:
        file.seek(8)
        file.write(struct.pack(">QI", 72, 8))
        file.seek(72)
        file.write(b"base.raw".ljust(200, b"\0"))
    before = path.read_bytes()
    with pytest.raises(UnsupportedError, match="no end mark"):
        attach(path)
    assert path.read_bytes() == before
    with pytest.raises(UnsupportedError, match="does not say which format"):
        read_all(path)


def test_too_many_foreign_bytes(tmp_path: Path) -> None:
    path = make(tmp_path / "x.qcow2")
    put_extensions(path, extensions(path), noise(9000))
    before = path.read_bytes()
    with pytest.raises(NoRoomError, match="foreign bytes"):
        attach(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("bit", [0, 1])
def test_dirty_and_corrupt_images_are_inspected_but_not_changed(tmp_path: Path, bit: int) -> None:
    path = make(tmp_path / "x.qcow2")
    attach(path)
    with path.open("r+b") as file:
        file.seek(79)
        file.write(bytes([1 << bit]))
    with open_qcow2(path) as image:
        assert image.locate().state is GraftState.OK
        assert image.metadata()["features"]["incompatible"]
        with pytest.raises(UnsupportedError, match="corrupt" if bit else "dirty"):
            image.read(0, 512)
        with pytest.raises(UnsupportedError):
            list(image.extents())
    clean = make(tmp_path / "y.qcow2")
    with clean.open("r+b") as file:
        file.seek(79)
        file.write(bytes([1 << bit]))
    with pytest.raises(UnsupportedError):
        attach(clean)


def test_grafted_backing_files_show_pristine_content(tmp_path: Path) -> None:
    base = pattern(make(tmp_path / "base.qcow2"))
    top = make(tmp_path / "top.qcow2", backing="base.qcow2", backing_format="qcow2")
    qemu_io(top, "write -P 3 2M 64k")
    content = read_all(top)
    attach(base)
    attach(top)
    assert read_all(top) == content


def test_own_images_take_grafts(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    create_qcow2(path, noise(300_000))
    before = path.read_bytes()
    attach(path)
    qemu_check(path)
    detach(path)
    assert path.read_bytes() == before
