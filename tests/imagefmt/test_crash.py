"""kill -9 and power loss at every step of attach and detach, in every container: before or after, never between."""

import os
import signal
import time
from hashlib import sha256
from itertools import chain, combinations

import pytest
from imagefmt_helpers import (
    attach,
    content_of,
    operations_of,
    problem_of,
    run_and_die,
    sample_sections,
    state_of,
)
from sweep_images import CASES, IDS, INLINE, KINDS, bytes_of, is_clean, memory_folder, put, restore, sidecar_bytes

from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import detach_image, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.registry import format_names
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.vendor.recover import recover


@pytest.fixture(params=CASES, ids=IDS)
def case(request):
    name, placement = request.param
    with memory_folder() as folder:
        path = put(folder / "image", name)
        yield path, path.read_bytes(), placement


def test_every_format_and_placement_is_swept(tmp_path):
    assert {kind.format for kind in KINDS.values()} == set(format_names())
    for name, kind in KINDS.items():
        with open_image(put(tmp_path / "folder", name)) as image:
            assert image.format_name == kind.format
            assert (image.room().inline > 4096) is (INLINE in kind.placements)


def is_grafted(path, pristine):
    return state_of(path) is GraftState.OK and problem_of(path) is None and content_of(path) == pristine


def check_recover(path, content, pristine):
    """`vmgraft recover` finds what a crash has left, and brings it to before or after; the files are put back then."""
    left, side = path.read_bytes(), sidecar_bytes(path)
    announced = recover(path, dry_run=True).found
    assert (path.read_bytes(), sidecar_bytes(path)) == (left, side)
    assert announced or is_clean(path, content) or is_grafted(path, pristine)
    result = recover(path)
    assert result.found == announced
    assert is_clean(path, content) or is_grafted(path, pristine)
    assert recover(path).done == ()
    restore(path, left)
    if side is not None:
        sidecar_path(path).write_bytes(side)


def settle(path, content, placement, pristine):
    """What a crash has left is before or after; either way the next attach and detach work, and leave no trace.

    Returns:
        Whether it was after.
    """
    assert content_of(path) == pristine
    check_recover(path, content, pristine)
    after = is_grafted(path, pristine)
    if not after:
        # A sidecar is there before anything points to it; a second end of an archive before the record.
        begun = GraftState.CUT if path.suffix == ".zip" and content == path.read_bytes()[: len(content)] else None
        assert state_of(path) in (GraftState.NONE, GraftState.ORPHANED, begun)
        attach(path, placement)  # what the interrupted run left behind is no obstacle
        assert is_grafted(path, pristine)
    detach_image(path)
    assert is_clean(path, content)
    return after


def test_kill_during_attach(case):
    path, content, placement = case
    pristine, grafted, untouched = content_of(path), 0, 0
    for after in range(1, 100):
        restore(path, content)
        killed = run_and_die(lambda: attach(path, placement), after)
        if settle(path, content, placement, pristine):
            grafted += 1
        else:
            untouched += 1
        if not killed:
            assert grafted >= 2  # killed after the commit, and not at all
            return
    raise AssertionError("attach never came to its end")


def test_kill_during_detach(case):
    path, content, placement = case
    pristine = content_of(path)
    attach(path, placement)
    start, sidecar = path.read_bytes(), sidecar_bytes(path)
    for after in range(1, 100):
        restore(path, start)
        if sidecar is not None:
            sidecar_path(path).write_bytes(sidecar)
        killed = run_and_die(lambda: detach_image(path), after)
        settle(path, content, placement, pristine)
        if not killed:
            return
    raise AssertionError("detach never came to its end")


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
    """Split operations at the syncs: within a group the disk may do any of them, in any order."""
    groups = [[]]
    for operation in operations:
        if operation.name == "sync":
            groups.append([])
        elif operation.name in ("write", "truncate"):
            groups[-1].append(operation)
    return groups


def subsets(group):
    return chain.from_iterable(combinations(group, size) for size in range(len(group) + 1))


@pytest.mark.parametrize("direction", ["attach", "detach"])
def test_power_loss_between_any_two_syncs(case, direction):
    """Replay every subset of what was not yet flushed, on top of everything that was."""
    path, content, placement = case
    pristine = content_of(path)
    if direction == "detach":
        attach(path, placement)
    start = path.read_bytes()
    sidecar = sidecar_path(path)
    action = (lambda: attach(path, placement)) if direction == "attach" else (lambda: detach_image(path))
    kept = sidecar.read_bytes() if sidecar.exists() else None
    operations = [item for item in operations_of(action) if item.file == path]
    kept = kept or (sidecar.read_bytes() if sidecar.exists() else None)
    flushed, seen = [], 0
    for group in epochs(operations):
        for done in subsets(group):
            restore(path, apply(start, [*flushed, *done]))
            if kept is not None:
                sidecar.write_bytes(kept)
            settle(path, content, placement, pristine)
            seen += 1
        flushed += group
    assert seen >= 1 or kept is not None


@pytest.mark.parametrize("name", ["raw", "iso", "iso, odd size", "iso, field taken"])
def test_a_write_cut_short_is_recognised_and_undone(tmp_path, name):
    """A kill inside the one large write leaves whole pages of it: not between, as the content is known and safe."""
    content, placement = bytes_of(name), INLINE
    path = put(tmp_path / "folder", name)
    pristine = content_of(path)
    noise = b"".join(sha256(bytes([number, 7])).digest() for number in range(250)) * 4
    sections = [*sample_sections(), Section(SectionKind.FILES, noise)]
    operations = [item for item in operations_of(lambda: attach(path, placement, sections)) if item.name == "write"]
    start, end = operations[0].offset, operations[0].offset + len(operations[0].data)
    cuts = list(range((start // 4096 + 1) * 4096, end, 4096))
    assert len(cuts) >= 6
    for size in cuts:
        # The descriptor of an ISO is written later, so it is still the original one.
        path.write_bytes(content.ljust(start, b"\0") + operations[0].data[: size - start])
        assert state_of(path) is GraftState.CUT
        assert content_of(path) == pristine
        assert problem_of(path)
        left_behind = path.read_bytes()
        detach_image(path)
        assert path.read_bytes() == content
        path.write_bytes(left_behind)
        attach(path, placement, sections)
        assert is_grafted(path, pristine)
        detach_image(path)
        assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["raw", "iso"])
def test_kill_at_any_moment_of_a_real_write(tmp_path, name):
    """Not between two operations, but whenever the signal happens to arrive."""
    content, placement = bytes_of(name), INLINE
    path = put(tmp_path / "folder", name)
    pristine = content_of(path)
    noise = os.urandom(900_000 if name == "raw" else 24 << 20)
    sections = [*sample_sections(), Section(SectionKind.FILES, noise)]
    start = time.monotonic()
    attach(path, placement, sections)
    whole = time.monotonic() - start
    seen = set()
    for turn in range(16):
        restore(path, content)
        child = os.fork()
        if child == 0:
            try:
                attach(path, placement, sections)
            finally:
                os._exit(0)
        if turn < 15:
            time.sleep(whole * turn / 12)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert content_of(path) == pristine
        state = state_of(path)
        seen.add(state)
        assert state in (GraftState.NONE, GraftState.OK, GraftState.CUT)
        if state is GraftState.NONE:
            assert path.read_bytes() == content
        else:
            detach_image(path)
        assert path.read_bytes() == content
    assert seen >= {GraftState.NONE, GraftState.OK}
