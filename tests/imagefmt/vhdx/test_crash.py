"""kill -9, power loss, torn writes and full disks at every step: the file before or after, never between."""

import errno
import os
from itertools import chain, combinations

import pytest
from imagefmt_helpers import attach, content_of, operations_of, problem_of, run_and_die, sample_sections, state_of
from vhdx_testkit import HEADERS, MIB, disk, entry, put, qemu_check, simple, write_sparse

from vmgraft.errors import FileError, NoGraftError
from vmgraft.imagefmt import commit
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.sidecar import sidecar_path

PLACEMENTS = (Placement.INLINE, Placement.SIDECAR)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _fd: None)  # what it is for is played through below, without the wait
    return simple(tmp_path / "disk.vhdx")


@pytest.fixture
def odd(path):
    """One header that was never written, and an end within a MiB and within the last block."""
    disk(path, [0, entry(4 * MIB)], [b"odd" * 99], size=2 * MIB + 1024, block=2 * MIB, places=[(4 * MIB + 5000, b"\0")])
    put(path, HEADERS[0], b"never written")
    return path


def restore(path, content):
    write_sparse(path, content)
    sidecar_path(path).unlink(missing_ok=True)


def is_grafted(path):
    with open_image(path) as image:
        return image.locate().state is GraftState.OK and open_graft(image).format_problem() is None


def check_settled(path, original, pristine):
    """Whatever stopped it: readers see a sound image, and the next open for writing finds before or after."""
    assert content_of(path) == pristine
    grafted = is_grafted(path)
    if not grafted:
        assert state_of(path) in (GraftState.NONE, GraftState.ORPHANED)  # orphaned: a sidecar without its image
        changed = path.read_bytes() != original
        with open_image(path, writable=True) as image:
            assert image.recovered is changed
        assert path.read_bytes() == original
    return grafted


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_kill_during_attach(path, placement):
    original, pristine, seen = path.read_bytes(), content_of(path), []
    for after in range(1, 100):
        restore(path, original)
        killed = run_and_die(lambda: attach(path, placement), after)
        if placement is Placement.INLINE:
            qemu_check(path)
        seen.append(check_settled(path, original, pristine))
        if not seen[-1]:
            attach(path, placement)
            assert is_grafted(path)
        detach_image(path)
        assert path.read_bytes() == original
        assert not sidecar_path(path).exists()
        if not killed:
            break
    assert seen == sorted(seen)  # once there, the graft stays
    assert seen.count(False) >= 8
    assert seen.count(True) >= 2


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_kill_during_detach(path, placement):
    original, pristine, seen = path.read_bytes(), content_of(path), []
    for after in range(1, 100):
        restore(path, original)
        attach(path, placement)
        killed = run_and_die(lambda: detach_image(path), after)
        if placement is Placement.INLINE:
            qemu_check(path)
        seen.append(check_settled(path, original, pristine))
        assert not seen[-1]  # the first write is the one that counts
        assert not sidecar_path(path).exists()
        if not killed:
            break
    assert len(seen) >= 10


def test_a_killed_detach_is_finished_by_the_next_one(path):
    original = path.read_bytes()
    attach(path, Placement.INLINE)
    assert run_and_die(lambda: detach_image(path), 3)
    assert path.read_bytes() != original
    with open_image(path) as image:
        assert image.metadata()["interruptedChange"]
        assert "interrupted" in image.locate().detail
    detach_image(path)
    assert path.read_bytes() == original
    with pytest.raises(NoGraftError):
        detach_image(path)


def apply(content, operations):
    data = bytearray(content)
    for operation in operations:
        if operation.name == "truncate":
            data = data[: operation.offset].ljust(operation.offset, b"\0")
        elif operation.name == "write":
            data = data.ljust(operation.offset, b"\0")
            data[operation.offset : operation.offset + len(operation.data)] = operation.data
    return bytes(data)


def epochs(operations):
    groups = [[]]
    for operation in operations:
        if operation.name == "sync":
            groups.append([])
        elif operation.name in ("write", "truncate"):
            groups[-1].append(operation)
    return groups


def subsets(group):
    return chain.from_iterable(combinations(group, size) for size in range(len(group) + 1))


def torn(group):
    """Sectors of writes that reach the disk in parts: the first half, the second, every other."""
    for operation in group:
        if operation.name != "write" or len(operation.data) <= 512:
            continue
        sectors = range(0, len(operation.data), 512)
        for kept in (sectors[: len(sectors) // 2], sectors[len(sectors) // 2 :], sectors[::2], sectors[1::2]):
            yield [
                commit.Operation("write", operation.file, operation.offset + at, operation.data[at : at + 512])
                for at in kept
            ]


@pytest.mark.parametrize("direction", ["attach", "detach"])
@pytest.mark.parametrize("kind", ["path", "odd"])
def test_power_loss_between_any_two_syncs(request, kind, direction):
    """Replay every subset of what was not yet flushed, and torn writes, on top of everything that was."""
    path = request.getfixturevalue(kind)
    original, pristine = path.read_bytes(), content_of(path)
    sections = [*sample_sections(), Section(SectionKind.FILES, os.urandom(20_000))]
    if direction == "detach":
        attach(path, Placement.INLINE, sections)
    start = path.read_bytes()
    action = (lambda: attach(path, Placement.INLINE, sections)) if direction == "attach" else lambda: detach_image(path)
    flushed, seen = [], []
    for group in epochs(operations_of(action)):
        for done in chain(subsets(group), torn(group)):
            write_sparse(path, apply(start, [*flushed, *done]))
            seen.append(check_settled(path, original, pristine))
        flushed += group
    assert len(seen) > 15
    assert set(seen) == {False, True}


class FailingDisk:
    """Makes one call, or all from one on, fail as a full or broken disk does."""

    def __init__(self, monkeypatch, call, *, for_good):
        self.left, self.for_good, self.failed = call, for_good, False
        for name in ("pwrite", "ftruncate", "fsync"):
            monkeypatch.setattr(commit.os, name, self._wrap(getattr(os, name)))

    def _wrap(self, function):
        def call(*args):
            self.left -= 1
            if self.left == 0 or (self.left < 0 and self.for_good):
                self.failed = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args)

        return call


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_full_disk_during_attach(path, monkeypatch, placement, for_good):
    original, pristine = path.read_bytes(), content_of(path)
    for call in range(1, 100):
        restore(path, original)
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, call, for_good=for_good)
            if not disk.failed:
                try:
                    attach(path, placement)
                except FileError as problem:
                    assert "No space left" in str(problem)
        if not disk.failed:
            assert is_grafted(path)
            assert call > 12
            return
        if not for_good:
            assert path.read_bytes() == original
            assert not sidecar_path(path).exists()
        check_settled(path, original, pristine)
    raise AssertionError("attach never came to its end")


def test_a_full_disk_during_detach(path, monkeypatch):
    original, pristine = path.read_bytes(), content_of(path)
    for call in range(1, 100):
        restore(path, original)
        attach(path, Placement.INLINE)
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, call, for_good=True)
            try:
                detach_image(path)
            except FileError as problem:
                assert "No space left" in str(problem)
        if check_settled(path, original, pristine):
            assert problem_of(path) is None
        if not disk.failed:
            assert call > 8
            return
    raise AssertionError("detach never came to its end")


def test_a_full_disk_leaves_an_older_sidecar_alone(path, monkeypatch):
    """It may be all that is left of a graft that can still be recovered."""
    attach(path, Placement.SIDECAR, sample_sections(64))
    kept = sidecar_path(path).read_bytes()
    sidecar_path(path).unlink()
    detach_image(path)
    sidecar_path(path).write_bytes(kept)
    original = path.read_bytes()
    for call in (1, 2, 3):
        with monkeypatch.context() as patch:
            FailingDisk(patch, call, for_good=False)
            with pytest.raises(FileError, match="No space left"):
                attach(path, Placement.SIDECAR)
        assert (path.read_bytes(), sidecar_path(path).read_bytes()) == (original, kept)
