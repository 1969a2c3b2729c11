"""Attach and detach: placements, what QEMU does to a grafted image, and every moment at which it can end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

import pytest
from imagefmt_helpers import (
    TREE,
    attach,
    content_of,
    flip,
    operations_of,
    problem_of,
    run_and_die,
    sample_sections,
    state_of,
    tool,
)
from vdi_testkit import COMMENT, MIB, open_vdi, qemu_check, qemu_image, qemu_io, small_image, vbox_image

from vmgraft.errors import GraftFormatError, ImageInUseError, NoGraftError, NoRoomError, UsageError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.locator import parse_locator
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.sidecar import sidecar_path

INLINE, SIDECAR, AUTO = Placement.INLINE, Placement.SIDECAR, Placement.AUTO


def taken_image(path: Path) -> Path:
    return vbox_image(path, comment=b"made for the accounting department")


MAKERS = {"qemu": qemu_image, "vbox": vbox_image, "taken": taken_image, "small": small_image}
#: What an image of each kind can hold, and where a record goes by itself.
PLACES = [("qemu", SIDECAR), ("vbox", INLINE), ("vbox", SIDECAR), ("taken", SIDECAR), ("small", INLINE)]


@pytest.mark.parametrize(("kind", "placement"), [*PLACES, ("qemu", AUTO), ("vbox", AUTO), ("taken", AUTO)])
def test_attach_and_detach(tmp_path: Path, kind: str, placement: Placement) -> None:
    path = MAKERS[kind](tmp_path / "a.vdi")
    before, pristine = path.read_bytes(), content_of(path)
    located = attach(path, placement)
    assert located.state is GraftState.OK
    assert located.locator.placement is (INLINE if (kind, placement) == ("vbox", AUTO) else
                                         SIDECAR if placement is AUTO else placement)  # fmt: skip
    assert located.locator_offset == (None if kind == "taken" else COMMENT)
    assert problem_of(path) is None
    assert content_of(path) == pristine
    assert (path.read_bytes() == before) == (kind == "taken")
    assert path.stat().st_size == len(before)
    if kind != "small":
        qemu_check(path)
        (tmp_path / "plain.vdi").write_bytes(before)
        tool("qemu-img", "compare", "-q", "-f", "vdi", "-F", "vdi", path, tmp_path / "plain.vdi")
        tool("qemu-img", "info", "-f", "vdi", path)
    with pytest.raises(UsageError, match="already carries a graft"):
        attach(path, placement)
    detach_image(path)
    assert path.read_bytes() == before
    assert not sidecar_path(path).exists()
    with pytest.raises(NoGraftError):
        detach_image(path)


def test_other_readers_go_on_reading(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    pristine = content_of(path)
    attach(path, INLINE)
    out = tool("7z", "l", "-tvdi", path).stdout
    assert str(len(pristine)) in out
    tool("7z", "x", "-tvdi", f"-o{tmp_path / 'out'}", path)
    (extracted,) = (tmp_path / "out").iterdir()
    assert extracted.read_bytes() == pristine


def test_the_places_in_the_file(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    attach(path, INLINE)
    data = path.read_bytes()
    locator = parse_locator(data[84:212], file=path, offset=84)
    assert locator.record_offset == 1024
    assert data[512:520] == b"VMGAPNOT"
    assert data[1024:1032] == b"VMGRAFT\0"
    assert not any(data[212:340])


@pytest.mark.parametrize(("kind", "words"), [("qemu", "0 unused bytes"), ("taken", "comment is taken")])
def test_no_room(tmp_path: Path, kind: str, words: str) -> None:
    path = MAKERS[kind](tmp_path / "a.vdi")
    before = path.read_bytes()
    with open_image(path) as image:
        assert image.room().inline == 0
    with pytest.raises(NoRoomError, match=words) as caught:
        attach(path, INLINE)
    assert "--placement sidecar" in caught.value.hint
    assert path.read_bytes() == before


def test_the_room_is_what_fits(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vdi", gap=8192)
    with open_image(path) as image:
        room = image.room().inline
    assert room == 8192 - 512
    fixed = attach(path, INLINE, [Section(SectionKind.FILES, b"x")]).locator.record_size - 1
    with open_image(path) as image:
        assert image.room().inline == room  # what there would be for another one in its place
    detach_image(path)
    for size, placement in ((room - fixed, INLINE), (room - fixed + 1, SIDECAR)):
        assert attach(path, AUTO, [Section(SectionKind.FILES, b"x" * size)]).locator.placement is placement
        detach_image(path)
    with pytest.raises(NoRoomError):
        attach(path, INLINE, [Section(SectionKind.FILES, b"x" * (room - fixed + 1))])


@pytest.mark.parametrize("at", [512, 1500, 4095])
def test_foreign_bytes_in_the_gap_are_left_alone(tmp_path: Path, at: int) -> None:
    path = small_image(tmp_path / "a.vdi", gap=8192)
    data = bytearray(path.read_bytes())
    data[at] = 1
    path.write_bytes(data)
    with open_image(path) as image:
        assert image.room().inline == max(0, at // 512 * 512 - 1024)
    attach(path, AUTO, [Section(SectionKind.FILES, b"x" * 3000)])
    assert path.read_bytes()[at] == 1
    detach_image(path)
    assert path.read_bytes() == data


# --- what tools do to it -------------------------------------------------------------------------------------------


def _write(path: Path) -> None:
    qemu_io(path, "write -P 6 1M 300k", "write -P 5 4000k 200k")


def _commit_into(path: Path) -> None:
    overlay = path.with_suffix(".qcow2")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", path.name, "-F", "vdi", overlay)
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 9 3M 1M", overlay)
    tool("qemu-img", "commit", "-q", overlay)
    overlay.unlink()


def _copy_over(path: Path) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes(b"\x2a" * (2 * MIB) + bytes(3 * MIB))
    tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "vdi", raw, path)
    raw.unlink()


def _checks(path: Path) -> None:
    for verb in ("check", "info", "map"):
        tool("qemu-img", verb, "-f", "vdi", path)


def _refused(path: Path) -> None:
    for command in (("resize", "-f", "vdi", path, "16M"), ("check", "-f", "vdi", "-r", "all", path)):
        done = tool("qemu-img", *command, check=False)
        assert done.returncode
        assert "not support" in done.stderr


OPS: dict[str, Callable[[Path], None]] = {
    "checks": _checks,
    "write": _write,
    "write twice": lambda path: (_write(path), qemu_io(path, "write -P 1 2M 1M"), None)[2],
    "write zeros": lambda path: qemu_io(path, "write -P 0 0 5M"),
    "resize and repair": _refused,
    "discard": lambda path: qemu_io(path, "discard 4M 1M"),
    "flush": lambda path: qemu_io(path, "flush"),
    "commit into": _commit_into,
    "convert into": _copy_over,
}


@pytest.mark.parametrize(
    ("kind", "placement", "op"),
    [*[(kind, placement, op) for kind, placement in PLACES[:2] for op in OPS],
     ("vbox", SIDECAR, "write"), ("taken", SIDECAR, "write")],
)  # fmt: skip
def test_detach_of_a_changed_graft_gives_the_changed_original(
    tmp_path: Path, kind: str, placement: Placement, op: str
) -> None:
    x, y = MAKERS[kind](tmp_path / "x.vdi"), tmp_path / "y.vdi"
    shutil.copy(x, y)
    attach(y, placement)
    OPS[op](x)
    OPS[op](y)
    assert state_of(y) is GraftState.OK
    assert problem_of(y) is None
    qemu_check(y)
    detach_image(y)
    assert y.read_bytes() == x.read_bytes()


def test_convert_drops_the_graft(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    attach(path, INLINE)
    tool("qemu-img", "convert", "-f", "vdi", "-O", "vdi", path, tmp_path / "b.vdi")
    assert state_of(tmp_path / "b.vdi") is GraftState.NONE


def test_the_image_is_locked_both_ways(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    with open_image(path, writable=True):
        done = tool("qemu-io", "-f", "vdi", "-c", "write 0 1k", path, check=False)
        assert done.returncode
        assert "lock" in done.stderr
        with pytest.raises(ImageInUseError):
            open_image(path, writable=True)


# --- what is left when somebody or something interferes ------------------------------------------------------------


def set_comment(path: Path, comment: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(COMMENT)
        file.write(comment.ljust(256, b"\0"))


@pytest.mark.parametrize("placement", [INLINE, SIDECAR])
@pytest.mark.parametrize("comment", [b"", b"a new comment"], ids=["blank", "set"])
def test_a_dropped_comment_orphans_the_record(tmp_path: Path, placement: Placement, comment: bytes) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    attach(path, placement)
    set_comment(path, comment)
    located = open_vdi(path).locate()
    assert (located.state, located.record is not None) == (GraftState.ORPHANED, True)
    with open_vdi(path, writable=True) as image:
        if comment:
            with pytest.raises(NoRoomError, match="comment is taken"):
                image.reattach(located)
        else:
            image.reattach(located)
            assert image.locate().state is GraftState.OK
    detach_image(path)
    expected = vbox_image(tmp_path / "b.vdi", comment=comment)
    assert path.read_bytes() == expected.read_bytes()
    assert not sidecar_path(path).exists()


def test_attach_starts_anew_over_an_orphan(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    before = path.read_bytes()
    attach(path, INLINE, [Section(SectionKind.FILES, os.urandom(50_000))])
    set_comment(path, b"")
    attach(path, INLINE)
    assert problem_of(path) is None
    detach_image(path)
    assert path.read_bytes() == before


def test_no_room_over_an_orphan_changes_nothing(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vdi")
    attach(path, INLINE)
    set_comment(path, b"")
    before = path.read_bytes()
    with pytest.raises(NoRoomError):
        attach(path, INLINE, [Section(SectionKind.FILES, bytes(range(256)) * 200)])
    assert path.read_bytes() == before
    attach(path, INLINE, [Section(SectionKind.FILES, b"x" * 2500)])  # the orphan's place counts as free
    assert problem_of(path) is None


def test_an_orphan_without_its_note_is_found(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    before = path.read_bytes()
    attach(path, INLINE)
    set_comment(path, b"")
    with path.open("r+b") as file:
        file.seek(512)
        file.write(bytes(512))
    located = open_vdi(path).locate()
    assert (located.state, located.locator) == (GraftState.ORPHANED, None)
    with open_vdi(path, writable=True) as image, pytest.raises(GraftFormatError, match="no whole record"):
        image.reattach(located)
    sidecar_path(path).write_bytes(b"VMGRAFT\0 of something else")
    detach_image(path)
    assert path.read_bytes() == before
    assert sidecar_path(path).exists()


@pytest.mark.parametrize("placement", [INLINE, SIDECAR])
def test_a_damaged_locator(tmp_path: Path, placement: Placement) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    before = path.read_bytes()
    attach(path, placement)
    flip(path, COMMENT + 40)
    assert state_of(path) is GraftState.DAMAGED
    assert problem_of(path)
    with pytest.raises(UsageError):
        attach(path, placement)
    detach_image(path)
    assert path.read_bytes() == before


def test_a_damaged_locator_and_nothing_that_says_what_was_there(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    attach(path, INLINE)
    for offset in (COMMENT + 40, 600, 1040):
        flip(path, offset)
    before = path.read_bytes()
    assert state_of(path) is GraftState.DAMAGED
    with pytest.raises(GraftFormatError):
        detach_image(path)
    assert path.read_bytes() == before


def test_a_damaged_record_is_told_and_the_original_comes_back(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    before = path.read_bytes()
    attach(path, INLINE)
    for offset in (1024 + 9, 1024 + 700):
        flip(path, offset)
    assert state_of(path) is GraftState.OVERWRITTEN
    detach_image(path)
    assert path.read_bytes() == before


def test_a_locator_that_points_elsewhere(tmp_path: Path) -> None:
    from vmgraft.imagefmt.locator import pack_locator

    path = vbox_image(tmp_path / "a.vdi")
    sound = attach(path, INLINE).locator
    for wrong in (512, 1025, 1536, MIB - 100, 3 * MIB):
        set_comment(path, pack_locator(replace(sound, record_offset=wrong)))
        before = path.read_bytes()
        assert state_of(path) is GraftState.DAMAGED
        with pytest.raises(GraftFormatError):
            detach_image(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["qemu", "taken"])
def test_sidecars_lost_or_damaged(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "a.vdi")
    before = path.read_bytes()
    attach(path, SIDECAR)
    whole = sidecar_path(path).read_bytes()
    for data, state in ((whole[:-1], GraftState.CUT), (whole[:-1] + b"?", GraftState.OVERWRITTEN)):
        sidecar_path(path).write_bytes(data)
        assert state_of(path) is state
    sidecar_path(path).unlink()
    assert state_of(path) is (GraftState.NONE if kind == "taken" else GraftState.NO_RECORD)
    if kind == "qemu":
        detach_image(path)  # the comment was blank: nothing else is needed
    assert path.read_bytes() == before


def test_sidecars_of_others(tmp_path: Path) -> None:
    a, b = vbox_image(tmp_path / "a.vdi"), qemu_image(tmp_path / "b.vdi")
    attach(a, SIDECAR)
    attach_sections(b, sample_sections(), placement=SIDECAR, tree_digest=bytes(32))
    own, before = sidecar_path(a).read_bytes(), a.read_bytes()
    shutil.copy(sidecar_path(b), sidecar_path(a))
    assert state_of(a) is GraftState.SWAPPED
    with pytest.raises(GraftFormatError, match="another image"):
        detach_image(a)
    assert a.read_bytes() == before
    assert sidecar_path(a).read_bytes() == sidecar_path(b).read_bytes()
    sidecar_path(a).write_bytes(own)
    assert state_of(a) is GraftState.OK


# --- crashes -------------------------------------------------------------------------------------------------------

CRASHES = [("small", INLINE), ("small", SIDECAR), ("taken small", SIDECAR)]


def crash_image(path: Path, kind: str) -> bytes:
    small_image(path, comment=b"mine" if kind == "taken small" else b"")
    return path.read_bytes()


def restore(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sidecar_path(path).unlink(missing_ok=True)


def is_grafted(path: Path) -> bool:
    return state_of(path) is GraftState.OK and problem_of(path) is None


@pytest.mark.parametrize(("kind", "placement"), CRASHES)
@pytest.mark.parametrize("direction", ["attach", "detach"])
def test_killed_after_any_operation(tmp_path: Path, kind: str, placement: Placement, direction: str) -> None:
    path = tmp_path / "a.vdi"
    before = crash_image(path, kind)
    pristine = content_of(path)
    for after in range(1, 60):
        restore(path, before)
        if direction == "detach":
            attach(path, placement)
        action = (lambda: attach(path, placement)) if direction == "attach" else (lambda: detach_image(path))
        killed = run_and_die(action, after)
        assert content_of(path) == pristine
        if not is_grafted(path):
            assert state_of(path) in (GraftState.NONE, GraftState.ORPHANED)
            attach(path, placement)
        assert is_grafted(path)
        detach_image(path)
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.vdi"]
        if not killed:
            assert after > 2
            return
    raise AssertionError("it never came to its end")


def _groups(operations):
    """Split the writes to one file at its flushes: within a group the disk may do any of them, in any order."""
    groups = [[]]
    for operation in operations:
        if operation.name == "sync":
            groups.append([])
        elif operation.name == "write":
            groups[-1].append(operation)
    return groups


def _sectors(operation):
    """Split a write into what a disk does as a whole."""
    at, data = operation.offset, operation.data
    while data:
        size = min(512 - at % 512, len(data))
        yield at, data[:size]
        at, data = at + size, data[size:]


@pytest.mark.parametrize("direction", ["attach", "detach"])
def test_power_loss_between_sectors(tmp_path: Path, direction: str) -> None:
    """Of what was not yet flushed, any sectors may be on the disk: all subsets of a few, and each alone."""
    path = tmp_path / "a.vdi"
    before = crash_image(path, "small")
    pristine = content_of(path)
    sections = sample_sections(96, compress=False)
    if direction == "detach":
        attach(path, INLINE, sections)
    start = path.read_bytes()
    action = (lambda: attach(path, INLINE, sections)) if direction == "attach" else (lambda: detach_image(path))
    flushed: list[tuple[int, bytes]] = []
    seen = set()
    for group in _groups([item for item in operations_of(action) if item.file == path]):
        pieces = [piece for operation in group for piece in _sectors(operation)]
        for done in chain.from_iterable(combinations(pieces, size) for size in (0, 1, 2, len(pieces))):
            data = bytearray(start)
            for at, piece in [*flushed, *done]:
                data[at : at + len(piece)] = piece
            path.write_bytes(data)
            assert content_of(path) == pristine
            state = state_of(path)
            assert state in (GraftState.OK, GraftState.NONE)
            seen.add(state)
            if state is GraftState.NONE:
                attach(path, INLINE, sections)
            assert is_grafted(path)
            detach_image(path)
            assert path.read_bytes() == before
        flushed += pieces
    assert seen == {GraftState.OK, GraftState.NONE}


def test_an_interrupted_change_is_shown_and_finished_by_detach(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    before = crash_image(path, "small")
    assert run_and_die(lambda: attach(path, INLINE), 3)
    with open_image(path) as image:
        assert image.metadata()["interruptedChange"]
        assert not image.recovered
    with open_image(path, writable=True) as image:
        assert image.recovered
        assert not image.metadata()["interruptedChange"]
    assert path.read_bytes() == before
    run_and_die(lambda: attach(path, INLINE), 3)
    detach_image(path)
    assert path.read_bytes() == before


def test_large_records_go_to_the_sidecar(tmp_path: Path) -> None:
    path = vbox_image(tmp_path / "a.vdi")
    before = path.read_bytes()
    sections = [*sample_sections(), Section(SectionKind.FILES, os.urandom(5 << 20))]
    located = attach_sections(path, sections, placement=AUTO, tree_digest=TREE)
    assert located.locator.placement is SIDECAR
    with open_image(path) as image:
        assert open_graft(image).format_problem() is None
    detach_image(path)
    assert path.read_bytes() == before
