"""Records whose header extension another program dropped, put back: byte-identical, and crash-safe."""

from __future__ import annotations

import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qcow2_testkit import (
    attach,
    detach,
    extensions,
    make,
    noise,
    open_qcow2,
    pattern,
    put_extensions,
    qemu_check,
    raw_base,
    run,
)

from vmgraft.errors import GraftFormatError, NoRoomError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.commit import Operation, observing
from vmgraft.imagefmt.contract import GraftState, Located, Placement
from vmgraft.imagefmt.sidecar import sidecar_path


def drop_extensions(path: Path, *, backing: bool = False) -> None:
    """Write a header as cloud-hypervisor and crosvm do: 104 bytes, an end mark, the backing file name, nothing else."""
    with path.open("r+b") as file:
        head = file.read(65536)
        name_at, size = struct.unpack(">QI", head[8:20])
        file.seek(100)
        file.write(struct.pack(">I", 104) + bytes(8))
        if backing:
            file.write(head[name_at : name_at + size])
            file.seek(8)
            file.write(struct.pack(">Q", 112))


def recover(path: Path) -> None:
    with open_qcow2(path, writable=True) as image:
        located = image.locate()
        if located.state is not GraftState.OK:
            image.reattach(located)


def locate(path: Path) -> Located:
    with open_qcow2(path) as image:
        return image.locate()


def _same_graft(found: Located, wanted: Located) -> bool:
    assert found.record is not None and wanted.record is not None
    return found.record.read_all() == wanted.record.read_all() and found.locator == wanted.locator


Make = Callable[[Path], Path]


def _plain(folder: Path) -> Path:
    return pattern(make(folder / "x.qcow2"))


def _backed(folder: Path) -> Path:
    return pattern(make(folder / "x.qcow2", backing="base.raw"))


def _foreign(folder: Path) -> Path:
    path = _plain(folder)
    put_extensions(path, extensions(path), bytes(40) + b"left by another tool" * 60)
    return path


def _small(folder: Path) -> Path:
    return pattern(make(folder / "x.qcow2", cluster=4096))


CASES: dict[str, tuple[Make, Placement, int]] = {
    "inline": (_plain, Placement.INLINE, 3000),
    "inline-long": (_plain, Placement.INLINE, 25_000),
    "inline-backed": (_backed, Placement.INLINE, 3000),
    "inline-foreign-bytes": (_foreign, Placement.INLINE, 3000),
    "sidecar": (_plain, Placement.SIDECAR, 3000),
    "sidecar-backed": (_backed, Placement.SIDECAR, 3000),
    "sidecar-small-clusters": (_small, Placement.SIDECAR, 3000),
}


def _orphan(folder: Path, case: str) -> tuple[Path, Located]:
    """Return an image whose header a foreign writer wrote anew, and its graft as it was."""
    raw_base(folder)
    make_image, placement, size = CASES[case]
    path = make_image(folder)
    located = attach(path, size=size, placement=placement)
    assert located.state is GraftState.OK
    drop_extensions(path, backing="backed" in case)
    assert locate(path).state is GraftState.ORPHANED
    return path, located


def _content(path: Path) -> bytes:
    """The content as QEMU sees it: the format of the backing file is not recorded any more."""
    out = path.with_suffix(".raw-out")
    run("qemu-img", "convert", "-q", "-f", "qcow2", "-O", "raw", path, out)
    data = out.read_bytes()
    out.unlink()
    return data


@pytest.mark.parametrize("case", CASES)
def test_an_orphan_is_put_back_and_detached_again(tmp_path: Path, case: str) -> None:
    path, located = _orphan(tmp_path, case)
    content = _content(path)
    wiped = Path(shutil.copy(path, tmp_path / "wiped.qcow2"))
    if sidecar_path(path).exists():
        shutil.copy(sidecar_path(path), sidecar_path(wiped))
    detach(wiped)  # what the foreign writer wrote, without our leftovers
    recover(path)
    found = locate(path)
    assert found.state is GraftState.OK
    assert _same_graft(found, located)
    assert extensions(path)[-1][0] == 0x564D4772
    assert sidecar_path(path).exists() is case.startswith("sidecar")
    qemu_check(path)
    assert _content(path) == content
    detach(path)
    assert path.read_bytes() == wiped.read_bytes()
    assert not sidecar_path(path).exists()
    assert locate(path).state is GraftState.NONE


def test_qemu_may_rewrite_the_header_afterwards(tmp_path: Path) -> None:
    path, located = _orphan(tmp_path, "inline")
    plain = Path(shutil.copy(path, tmp_path / "plain.qcow2"))
    detach(plain)
    recover(path)
    for image in (path, plain):
        run("qemu-img", "amend", "-q", "-o", "lazy_refcounts=on", image)
    assert _same_graft(locate(path), located)
    detach(path)
    assert path.read_bytes() == plain.read_bytes()


def test_a_sidecar_beside_an_image_that_was_written_anew(tmp_path: Path) -> None:
    path = _plain(tmp_path)
    before = path.read_bytes()
    located = attach(path, placement=Placement.SIDECAR)
    path.write_bytes(before)
    recover(path)
    assert _same_graft(locate(path), located)
    detach(path)
    assert path.read_bytes() == before


def test_an_inline_record_that_does_not_fit_any_more_stays_in_a_sidecar(tmp_path: Path) -> None:
    path, located = _orphan(tmp_path, "inline-long")
    # The other program has put 8 KiB of its own before what is left of ours.
    data = bytearray(path.read_bytes())
    at = locate(path).locator_offset
    assert at is not None
    grown = bytes(data[at : at + 26_000])
    data[104:65536] = bytes(65536 - 104)
    struct.pack_into(">II", data, 104, 0x11111111, 8000)
    data[9000 : 9000 + len(grown)] = grown
    path.write_bytes(data)
    qemu_check(path)
    recover(path)
    found = locate(path)
    assert found.state is GraftState.OK
    assert found.locator is not None and found.locator.placement is Placement.SIDECAR
    assert found.record is not None and located.record is not None
    assert found.record.read_all() == located.record.read_all()
    detach(path)
    assert not sidecar_path(path).exists()


def test_what_cannot_be_put_back_is_left_alone(tmp_path: Path) -> None:
    path, located = _orphan(tmp_path, "inline")
    orphan = path.read_bytes()
    at = locate(path).locator_offset
    assert at is not None

    def refused(error: type[Exception], match: str) -> None:
        before = path.read_bytes()
        with open_qcow2(path, writable=True) as image, pytest.raises(error, match=match):
            image.reattach(image.locate())
        assert path.read_bytes() == before

    damaged = bytearray(orphan)
    damaged[at + 500] ^= 1
    path.write_bytes(damaged)
    refused(GraftFormatError, "does not match")

    path.write_bytes(orphan)
    (tmp_path / "other").mkdir()
    other = _plain(tmp_path / "other")
    attach(other, size=9000, placement=Placement.SIDECAR)
    shutil.copy(sidecar_path(other), sidecar_path(path))
    refused(GraftFormatError, "another graft is in the way")
    sidecar_path(path).unlink()

    dirty = bytearray(orphan)
    dirty[79] = 1
    path.write_bytes(dirty)
    refused(UnsupportedError, "dirty")

    path.write_bytes(orphan)
    recover(path)
    refused(GraftFormatError, "no orphaned record")  # it is back
    assert _same_graft(locate(path), located)
    detach(path)
    refused(GraftFormatError, "no orphaned record")


def test_a_header_without_room_for_a_locator_is_left_alone(tmp_path: Path) -> None:
    path = pattern(make(tmp_path / "x.qcow2", cluster=512))
    before = path.read_bytes()
    attach(path, placement=Placement.SIDECAR)
    path.write_bytes(before)
    put_extensions(path, [(0x11111111, noise(260))])
    full = path.read_bytes()
    with open_qcow2(path, writable=True) as image, pytest.raises(NoRoomError):
        image.reattach(image.locate())
    assert path.read_bytes() == full
    assert locate(path).state is GraftState.ORPHANED


def _killed_after(count: int, action: Callable[[], None]) -> bool:
    """Run ``action`` in a child that kills itself after ``count`` operations; return whether it got that far."""
    pid = os.fork()
    if pid == 0:
        left = [count]

        def observer(_: Operation) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            with observing(observer):
                action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


@pytest.mark.parametrize("case", ["inline-backed", "inline-foreign-bytes", "sidecar-small-clusters"])
def test_recovery_may_be_killed_anywhere(tmp_path: Path, case: str) -> None:
    """Whatever is left is an orphan as before or the finished graft, and trying again ends the same."""
    path, located = _orphan(tmp_path, case)
    orphan, content = path.read_bytes(), _content(path)
    side = sidecar_path(path).read_bytes() if sidecar_path(path).exists() else None
    recover(path)
    done = path.read_bytes()
    detach(path)
    clean = path.read_bytes()
    states, seen = [], set()
    for count in range(1, 60):
        path.write_bytes(orphan)
        sidecar_path(path).unlink(missing_ok=True)
        if side is not None:
            sidecar_path(path).write_bytes(side)
        if not _killed_after(count, lambda: recover(path)):
            break
        if path.read_bytes() not in seen:  # not again after a mere flush
            seen.add(path.read_bytes())
            qemu_check(path)
            assert _content(path) == content
        found = locate(path)
        states.append(found.state)
        assert found.state in (GraftState.ORPHANED, GraftState.OK), found
        recover(path)
        assert _same_graft(locate(path), located)
        detach(path)
        assert path.read_bytes() == clean
        assert not sidecar_path(path).exists()
    else:
        pytest.fail("recovery never ended")
    assert path.read_bytes() == done
    assert {GraftState.ORPHANED, GraftState.OK} == set(states)


def test_a_kill_between_the_commit_and_the_end_leaves_no_sidecar_for_long(tmp_path: Path) -> None:
    """The copy that made the recovery safe is told from a graft of its own, and removed by the next writer."""
    path, located = _orphan(tmp_path, "inline")
    operations: list[Operation] = []
    orphan = path.read_bytes()
    with observing(operations.append):
        recover(path)
    last = max(n for n, operation in enumerate(operations, 1) if operation.name == "write")
    path.write_bytes(orphan)
    assert _killed_after(last, lambda: recover(path))
    assert sidecar_path(path).exists()
    assert _same_graft(locate(path), located)
    with open_qcow2(path, writable=True):
        assert not sidecar_path(path).exists()
    assert _same_graft(locate(path), located)


def test_content_is_not_read(tmp_path: Path) -> None:
    """Recovery works while the backing file is away."""
    path, located = _orphan(tmp_path, "inline-backed")
    (tmp_path / "base.raw").rename(tmp_path / "away.raw")
    recover(path)
    assert _same_graft(locate(path), located)


@pytest.fixture(scope="module")
def orphan(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path, _ = _orphan(tmp_path_factory.mktemp("orphan"), "inline")
    return path.read_bytes()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(8, 4200), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_mutated_orphans(tmp_path: Path, orphan: bytes, edits: list[tuple[int, bytes]]) -> None:
    """Whatever stands there, recovery ends in a sound graft or in one error, and writes the first cluster only."""
    data = bytearray(orphan)
    for offset, piece in edits:
        data[offset : offset + len(piece)] = piece
    path = tmp_path / "x.qcow2"
    path.write_bytes(data)
    sidecar_path(path).unlink(missing_ok=True)
    try:
        recover(path)
        assert locate(path).state is GraftState.OK
    except VmgraftError as error:
        assert error.message
    assert path.read_bytes()[65536:] == data[65536:]
    assert path.read_bytes()[16:72] == data[16:72]
