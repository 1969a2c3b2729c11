"""Interrupted attach and detach: a valid image with the same content at every point, and a repetition ends clean.

Two ways: the process kills itself (SIGKILL) after the N-th operation; and, from the list of operations of a full run,
every file that a power failure could leave is built, also with the last write torn between sectors.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qcow2_testkit import (
    attach,
    detach,
    extensions,
    make,
    open_qcow2,
    pattern,
    put_extensions,
    qemu_check,
    raw_base,
    read_all,
    run,
)

from vmgraft.imagefmt.commit import Operation, observing
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.sidecar import sidecar_path

SECTOR = 512


def _plain(folder: Path) -> Path:
    return pattern(make(folder / "x.qcow2"), zeros=True)


def _v2(folder: Path) -> Path:
    return pattern(make(folder / "x.qcow2", version=2, cluster=4096), zeros=False)


def _backed(folder: Path) -> Path:
    return pattern(make(folder / "x.qcow2", backing="base.raw"))


def _backed_small(folder: Path) -> Path:
    return pattern(make(folder / "x.qcow2", cluster=2048, backing="base.raw"))


def _foreign(folder: Path) -> Path:
    path = _backed(folder)
    put_extensions(path, extensions(path), bytes(40) + b"left by another tool" * 60, gap=16)
    return path


def _long_name(folder: Path) -> Path:
    path = _backed(folder)
    name = "./" * 150 + "base.raw"
    run("qemu-img", "rebase", "-q", "-u", "-b", name, "-F", "raw", path)
    return path


def _others(folder: Path) -> Path:
    path = _long_name(folder)
    put_extensions(path, [*extensions(path), (0x11111111, b"first"), (0x22222222, b"second" * 9)])
    return path


def _older_note(folder: Path) -> Path:
    """What is left when another program overwrote extension and locator of a graft: its record and its note."""
    path = _plain(folder)
    attach(path, size=700, placement=Placement.INLINE)
    data = bytearray(path.read_bytes())
    at = data.index(b"VMGr")
    data[at : at + 8 + 8 + 128] = bytes(8 + 8 + 128)
    assert b"VMGQNOTE" in data
    path.write_bytes(data)
    return path


def _amend(path: Path) -> None:
    run("qemu-img", "amend", "-q", "-o", "lazy_refcounts=on", path)


def _nothing(path: Path) -> None:
    """Leave the header alone."""


Make = Callable[[Path], Path]
Op = Callable[[Path], None]
CASES: dict[str, tuple[Make, Op, Placement]] = {
    "plain": (_plain, _nothing, Placement.AUTO),
    "v2-small": (_v2, _nothing, Placement.AUTO),
    "backed": (_backed, _nothing, Placement.AUTO),
    "backed-sidecar": (_backed_small, _nothing, Placement.SIDECAR),
    "foreign-bytes": (_foreign, _nothing, Placement.INLINE),
    "older-note": (_older_note, _nothing, Placement.INLINE),
    "older-note-sidecar": (_older_note, _nothing, Placement.SIDECAR),
    "rewritten": (_backed, _amend, Placement.AUTO),
    "rewritten-sidecar": (_long_name, _amend, Placement.SIDECAR),
    "rewritten-others": (_others, _amend, Placement.INLINE),
    "rewritten-others-sidecar": (_others, _amend, Placement.SIDECAR),
}


def _attach(path: Path, placement: Placement) -> None:
    attach(path, size=2500, placement=placement)


def _sidecar(path: Path) -> bytes | None:
    return sidecar_path(path).read_bytes() if sidecar_path(path).exists() else None


def _record(path: Path, action: Callable[[], None]) -> list[Operation]:
    operations: list[Operation] = []
    with observing(operations.append):
        action()
    return operations


def _torn(operation: Operation) -> Iterator[bytes]:
    """Yield what may have reached the disk of a write: nothing past some sector boundary."""
    first = SECTOR - operation.offset % SECTOR
    for cut in range(first, len(operation.data), SECTOR):
        yield operation.data[:cut]
    yield operation.data


def _states(path: Path, before: bytes, operations: list[Operation], side: bytes | None) -> Iterator[None]:
    """Put every possible intermediate file at ``path``, one after the other, with the sidecar of that moment."""
    data = bytearray(before)
    there = all(operation.name not in ("link", "rename") for operation in operations)
    for operation in operations:
        if operation.file == sidecar_path(path) and operation.name in ("link", "rename", "unlink"):
            there = operation.name != "unlink"
        if operation.file != path:
            continue
        if operation.name == "write":
            for piece in _torn(operation):
                if side is not None and there:
                    sidecar_path(path).write_bytes(side)
                else:
                    sidecar_path(path).unlink(missing_ok=True)
                path.write_bytes(data[: operation.offset] + piece + data[operation.offset + len(piece) :])
                yield
            data[operation.offset : operation.offset + len(operation.data)] = operation.data
        assert operation.name in ("write", "sync"), f"qcow2 needs no {operation.name} of the image"


def _check_between(path: Path, reference: Path, content: bytes) -> GraftState:
    qemu_check(path)
    run("qemu-img", "compare", "-q", path, reference)
    assert read_all(path) == content
    with open_qcow2(path) as image:
        state = image.locate().state
    assert state in (GraftState.NONE, GraftState.OK)
    return state


@pytest.mark.parametrize("case", CASES)
def test_attach_may_stop_anywhere(tmp_path: Path, case: str) -> None:
    raw_base(tmp_path)
    make_image, _, placement = CASES[case]
    path = make_image(tmp_path)
    reference = tmp_path / "reference.qcow2"
    shutil.copy(path, reference)
    before, content = path.read_bytes(), read_all(path)
    operations = _record(path, lambda: _attach(path, placement))
    after, side = path.read_bytes(), _sidecar(path)
    seen = set()
    for _ in _states(path, before, operations, side):
        seen.add(_check_between(path, reference, content))
        with open_qcow2(path, writable=True) as image:
            if image.locate().state is GraftState.NONE:
                assert path.read_bytes() == before
                assert _sidecar(path) is None
        if path.read_bytes() == before:
            _attach(path, placement)
            assert path.read_bytes() == after
        detach(path)
        assert path.read_bytes() == before
        assert _sidecar(path) is None
    assert seen == {GraftState.NONE, GraftState.OK}


@pytest.mark.parametrize("case", CASES)
def test_detach_may_stop_anywhere(tmp_path: Path, case: str) -> None:
    raw_base(tmp_path)
    make_image, change, placement = CASES[case]
    path = make_image(tmp_path)
    reference = tmp_path / "reference.qcow2"
    shutil.copy(path, reference)
    _attach(path, placement)
    change(path)
    change(reference)
    expected = reference.read_bytes()
    before, content = path.read_bytes(), read_all(path)
    side = _sidecar(path)
    operations = _record(path, lambda: detach(path))
    assert path.read_bytes() == expected
    seen = set()
    for _ in _states(path, before, operations, side):
        seen.add(_check_between(path, reference, content))
        with open_qcow2(path, writable=True) as image:
            grafted = image.locate().state is GraftState.OK
        if grafted:
            detach(path)
        assert path.read_bytes() == expected
        assert _sidecar(path) is None
    assert seen == {GraftState.NONE, GraftState.OK}


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


@pytest.mark.parametrize("case", ["foreign-bytes", "backed-sidecar", "rewritten-others"])
def test_killed_processes(tmp_path: Path, case: str) -> None:
    raw_base(tmp_path)
    make_image, change, placement = CASES[case]
    path = make_image(tmp_path)
    before, content = path.read_bytes(), read_all(path)
    for count in range(1, 100):
        if not _killed_after(count, lambda: _attach(path, placement)):
            break
        assert read_all(path) == content
        qemu_check(path)
        with open_qcow2(path, writable=True) as image:
            grafted = image.locate().state is GraftState.OK
        if grafted:
            detach(path)
        assert path.read_bytes() == before
    else:
        pytest.fail("attach never ended")
    change(path)
    grafted_bytes = path.read_bytes()
    side = _sidecar(path)
    clean = None
    for count in range(1, 100):
        path.write_bytes(grafted_bytes)
        if side is not None:
            sidecar_path(path).write_bytes(side)
        killed = _killed_after(count, lambda: detach(path))
        assert read_all(path) == content
        qemu_check(path)
        with open_qcow2(path, writable=True) as image:
            grafted = image.locate().state is GraftState.OK
        if grafted:
            detach(path)
        clean = clean or path.read_bytes()
        assert path.read_bytes() == clean
        assert _sidecar(path) is None
        if not killed:
            break
    else:
        pytest.fail("detach never ended")
    if case != "rewritten-others":
        assert clean == before


@pytest.mark.parametrize("case", ["foreign-bytes", "backed-sidecar"])
def test_recovery_may_be_killed_too(tmp_path: Path, case: str) -> None:
    raw_base(tmp_path)
    make_image, _, placement = CASES[case]
    path = make_image(tmp_path)
    before, content = path.read_bytes(), read_all(path)
    length = len(_record(path, lambda: _attach(path, placement)))
    after, side = path.read_bytes(), _sidecar(path)
    assert after != before
    for first in (length - 4, length - 6):  # just before the commit; before the data
        path.write_bytes(before)
        assert _killed_after(first, lambda: _attach(path, placement))
        half = path.read_bytes()
        for count in range(1, 50):
            path.write_bytes(half)
            if side is not None:
                sidecar_path(path).write_bytes(side)
            killed = _killed_after(count, lambda: open_qcow2(path, writable=True).close())
            qemu_check(path)
            assert read_all(path) == content
            open_qcow2(path, writable=True).close()
            assert path.read_bytes() == before
            assert _sidecar(path) is None
            if not killed:
                break
        assert count > 4


def test_a_read_only_open_reports_and_a_writable_one_cleans(tmp_path: Path) -> None:
    path = _plain(tmp_path)
    before = path.read_bytes()
    _attach(path, Placement.AUTO)
    assert _killed_after(4, lambda: detach(path))  # note written and synced, commit written and synced
    with open_qcow2(path) as image:
        assert image.metadata()["interruptedChange"] is True
        assert "interrupted" in image.locate().detail
    assert path.read_bytes() != before
    with open_qcow2(path, writable=True) as image:
        assert image.recovered
        assert image.metadata()["interruptedChange"] is False
    assert path.read_bytes() == before
