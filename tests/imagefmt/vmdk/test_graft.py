"""Attach and detach: placements, what tools do to a grafted image, and every moment at which it can end."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

import pytest
from imagefmt_helpers import (
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
from vmdk_testkit import (
    AT,
    build,
    descriptor,
    noise,
    open_vmdk,
    qemu_check,
    qemu_image,
    qemu_io,
    qemu_stream,
    set_text,
    small_image,
    stream_image,
    text_of,
    without_cid,
)

from vmgraft.errors import (
    GraftFormatError,
    ImageInUseError,
    NoGraftError,
    NoRoomError,
    UnsupportedError,
    UsageError,
)
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_image
from vmgraft.imagefmt.locator import pack_locator, parse_locator
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.sidecar import sidecar_path

INLINE, SIDECAR, AUTO = Placement.INLINE, Placement.SIDECAR, Placement.AUTO
#: Where the small image's gap begins: behind 20 sectors of descriptor and two directories with one table each.
GAP = 31 * 512


def no_gap(path: Path) -> Path:
    return small_image(path, overhead=31)


def full_descriptor(path: Path) -> Path:
    return small_image(path, text=descriptor(91) + b"#" * 9700)


def short_descriptor(path: Path) -> Path:
    return stream_image(path, room=1)


def no_newline(path: Path) -> Path:
    return small_image(path, text=descriptor(91).rstrip(b"\n"))


MAKERS = {
    "qemu": qemu_image, "stream": qemu_stream, "footer": stream_image, "small": small_image, "no newline": no_newline,
    "no gap": no_gap, "full": full_descriptor, "short": short_descriptor,
}  # fmt: skip
WITHOUT_LOCATOR = ("no gap", "full", "short")


@pytest.mark.parametrize("placement", [INLINE, SIDECAR, AUTO])
@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind not in WITHOUT_LOCATOR])
def test_attach_and_detach(tmp_path: Path, kind: str, placement: Placement) -> None:
    path = MAKERS[kind](tmp_path / "a.vmdk")
    before, pristine, text = path.read_bytes(), content_of(path), text_of(path)
    located = attach(path, placement)
    assert located.state is GraftState.OK
    assert located.locator.placement is (INLINE if placement is AUTO else placement)
    assert problem_of(path) is None
    assert content_of(path) == pristine
    assert path.stat().st_size == len(before)
    added = text_of(path).removeprefix(text)
    assert re.fullmatch(rb'\n?ddb\.vmgraft = "[0-9a-f]{256}"\n', added)
    assert added.startswith(b"\n") == (kind == "no newline")
    assert located.locator_offset == path.read_bytes().index(b"ddb.vmgraft")
    qemu_check(path)
    (tmp_path / "plain.vmdk").write_bytes(before)
    tool("qemu-img", "compare", "-q", "-f", "vmdk", "-F", "vmdk", path, tmp_path / "plain.vmdk")
    tool("qemu-img", "info", "-f", "vmdk", path)
    with pytest.raises(UsageError, match="already carries a graft"):
        attach(path, placement)
    detach_image(path)
    assert path.read_bytes() == before
    assert not sidecar_path(path).exists()
    with pytest.raises(NoGraftError):
        detach_image(path)


@pytest.mark.parametrize("kind", WITHOUT_LOCATOR)
def test_without_a_place_for_a_locator_the_image_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "a.vmdk")
    before = path.read_bytes()
    with open_image(path) as image:
        assert image.room().inline == 0
    with pytest.raises(NoRoomError):
        attach(path, INLINE)
    located = attach(path, AUTO)
    assert (located.state, located.locator_offset) == (GraftState.OK, None)
    assert "no place for a locator" in located.detail
    assert problem_of(path) is None
    assert path.read_bytes() == before
    with open_vmdk(path, writable=True) as image, pytest.raises(UnsupportedError):
        image.reattach(image.locate())  # there is nothing to bring back, and no place for a line
    assert path.read_bytes() == before
    whole = sidecar_path(path).read_bytes()
    sidecar_path(path).write_bytes(whole[:-1])
    assert state_of(path) is GraftState.CUT
    sidecar_path(path).write_bytes(whole)
    detach_image(path)
    assert path.read_bytes() == before
    assert not sidecar_path(path).exists()


def test_other_readers_go_on_reading(tmp_path: Path) -> None:
    path = qemu_image(tmp_path / "a.vmdk")
    pristine = content_of(path)
    attach(path, INLINE)
    tool("7z", "x", "-tvmdk", f"-o{tmp_path / 'out'}", path)
    (extracted,) = (tmp_path / "out").iterdir()
    assert extracted.read_bytes() == pristine


def test_the_places_in_the_file(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vmdk")
    attach(path, INLINE)
    data = path.read_bytes()
    value = re.search(rb'ddb\.vmgraft = "([0-9a-f]+)"', data)[1]
    assert parse_locator(bytes.fromhex(value.decode()), file=path, offset=0).record_offset == GAP + 512
    assert data[GAP : GAP + 8] == b"VMGAPNOT"
    assert data[GAP + 512 : GAP + 520] == b"VMGRAFT\0"


def test_the_room_is_what_fits(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vmdk")
    with open_image(path) as image:
        room = image.room().inline
    assert room == 64 * 512 - GAP - 512
    fixed = attach(path, INLINE, [Section(SectionKind.FILES, b"x")]).locator.record_size - 1
    with open_image(path) as image:
        assert image.room().inline == room  # what there would be for another one in its place
    detach_image(path)
    for size, placement in ((room - fixed, INLINE), (room - fixed + 1, SIDECAR)):
        assert attach(path, AUTO, [Section(SectionKind.FILES, b"x" * size)]).locator.placement is placement
        detach_image(path)


@pytest.mark.parametrize(("size", "room"), [("1G", 53248), ("100G", 28672), ("1T", 54272)])
def test_the_room_in_images_of_qemu(tmp_path: Path, size: str, room: int) -> None:
    path = tmp_path / "a.vmdk"
    tool("qemu-img", "create", "-q", "-f", "vmdk", path, size)
    with open_image(path) as image:
        assert image.room().inline == room


@pytest.mark.parametrize(("at", "room"), [(GAP, 0), (GAP + 1023, 0), (GAP + 5000, 4096), (64 * 512 - 1, 15872)])
def test_foreign_bytes_in_the_gap_are_left_alone(tmp_path: Path, at: int, room: int) -> None:
    data = bytearray(small_image(tmp_path / "a.vmdk").read_bytes())
    data[at] = 1
    path = tmp_path / "b.vmdk"
    path.write_bytes(data)
    with open_image(path) as image:
        assert image.room().inline == room
    attach(path, AUTO, [Section(SectionKind.FILES, b"x" * 6000)])
    assert path.read_bytes()[at] == 1
    detach_image(path)
    assert path.read_bytes() == data


def test_a_second_redundant_directory_is_no_gap(tmp_path: Path) -> None:
    """The redundant tables stand behind the first ones here."""
    data = bytearray(small_image(tmp_path / "a.vmdk").read_bytes())
    rgd, gd = struct.unpack_from("<QQ", data, AT["rgd"])
    struct.pack_into("<QQ", data, AT["rgd"], gd, rgd)
    path = tmp_path / "b.vmdk"
    path.write_bytes(data)
    assert attach(path, INLINE).locator.record_offset == GAP + 512
    detach_image(path)
    assert path.read_bytes() == data


# --- what tools do to it -------------------------------------------------------------------------------------------


def _write(path: Path) -> None:
    qemu_io(path, "write -P 6 1M 300k", "write -P 5 4000k 200k")


def _commit_into(path: Path) -> None:
    overlay = path.with_suffix(".qcow2")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", path.name, "-F", "vmdk", overlay)
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 9 3M 1M", overlay)
    tool("qemu-img", "commit", "-q", overlay)
    overlay.unlink()


def _copy_over(path: Path) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes(b"\x2a" * (2 << 20) + bytes(4 << 20))
    tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "vmdk", raw, path)
    raw.unlink()


def _checks(path: Path) -> None:
    for verb in ("check", "info", "map"):
        tool("qemu-img", verb, "-f", "vmdk", path)


def _refused(path: Path) -> None:
    for command in (("resize", "-f", "vmdk", path, "16M"), ("check", "-f", "vmdk", "-r", "all", path)):
        done = tool("qemu-img", *command, check=False)
        assert done.returncode
        assert "not support" in done.stderr


OPS: dict[str, Callable[[Path], None]] = {
    "checks": _checks,
    "write": _write,
    "write three times": lambda path: [_write(path) for _ in range(3)] and None,
    "write zeros": lambda path: qemu_io(path, "write -z 0 1M", "write -P 0 3M 1M"),
    "resize and repair": _refused,
    "discard": lambda path: qemu_io(path, "discard 4M 1M"),
    "flush": lambda path: qemu_io(path, "flush"),
    "commit into": _commit_into,
    "convert into": _copy_over,
}
ZEROED = "subformat=monolithicSparse,zeroed_grain=on"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("options", "placement"), [("subformat=monolithicSparse", INLINE), (ZEROED, SIDECAR)])
def test_detach_of_a_changed_graft_gives_the_changed_original(
    tmp_path: Path, options: str, placement: Placement, op: str
) -> None:
    x, y = qemu_image(tmp_path / "x.vmdk", options), tmp_path / "y.vmdk"
    shutil.copy(x, y)
    attach(y, placement)
    OPS[op](x)
    OPS[op](y)
    assert state_of(y) is GraftState.OK
    assert problem_of(y) is None
    qemu_check(y)
    detach_image(y)
    assert without_cid(y) == without_cid(x)


@pytest.mark.parametrize("cid", [b"1", b"1234567", b"ffffffff"])
@pytest.mark.parametrize("kind", ["small", "no newline"])
def test_a_cid_of_another_length_moves_the_line(tmp_path: Path, kind: str, cid: bytes) -> None:
    """QEMU writes the CID without leading zeros, and all text behind it moves up or down."""
    path = MAKERS[kind](tmp_path / "a.vmdk")
    attach(path, INLINE)
    for image in (path, MAKERS[kind](tmp_path / "b.vmdk")):
        set_text(image, text_of(image).replace(b"CID=7e5b80a7", b"CID=" + cid, 1))
    assert state_of(path) is GraftState.OK
    detach_image(path)
    assert path.read_bytes() == (tmp_path / "b.vmdk").read_bytes()


def test_convert_drops_the_graft(tmp_path: Path) -> None:
    path = qemu_image(tmp_path / "a.vmdk")
    attach(path, INLINE)
    tool("qemu-img", "convert", "-f", "vmdk", "-O", "vmdk", path, tmp_path / "b.vmdk")
    assert state_of(tmp_path / "b.vmdk") is GraftState.NONE


def test_the_image_is_locked_both_ways(tmp_path: Path) -> None:
    path = qemu_image(tmp_path / "a.vmdk")
    with open_image(path, writable=True):
        done = tool("qemu-io", "-f", "vmdk", "-c", "write 0 1k", path, check=False)
        assert done.returncode
        assert "lock" in done.stderr
        with pytest.raises(ImageInUseError):
            open_image(path, writable=True)


# --- what is left when somebody or something interferes ------------------------------------------------------------

LINE = re.compile(rb'\n?ddb\.vmgraft = "[0-9a-f]+"\n')


@pytest.mark.parametrize("placement", [INLINE, SIDECAR])
def test_a_dropped_line_orphans_the_record(tmp_path: Path, placement: Placement) -> None:
    path = small_image(tmp_path / "a.vmdk")
    before = path.read_bytes()
    attach(path, placement)
    set_text(
        path, text_of(before_image := path)[: -len(LINE.search(text_of(before_image))[0]) + 1].rstrip(b"\n") + b"\n"
    )
    with open_vmdk(path, writable=True) as image:
        located = image.locate()
        assert located.state is GraftState.ORPHANED
        assert located.record is not None
        image.reattach(located)
        assert image.locate().state is GraftState.OK
    assert problem_of(path) is None
    set_text(path, LINE.sub(b"\n", text_of(path)).rstrip(b"\n") + b"\n")
    detach_image(path)
    assert path.read_bytes() == before
    assert not sidecar_path(path).exists()


@pytest.mark.parametrize("kind", ["small", "no newline"])
@pytest.mark.parametrize("placement", [INLINE, SIDECAR])
def test_bringing_a_graft_back_is_killed_after_any_operation(tmp_path: Path, placement: Placement, kind: str) -> None:
    path = MAKERS[kind](tmp_path / "a.vmdk")
    before, text = path.read_bytes(), text_of(path)
    attach(path, placement)
    set_text(path, text)
    orphaned, aside = path.read_bytes(), sidecar_path(path)
    kept = aside.read_bytes() if aside.exists() else None

    def bring_back() -> None:
        with open_vmdk(path, writable=True) as image:
            image.reattach(image.locate())

    for after in range(1, 30):
        path.write_bytes(orphaned)
        if kept is not None:
            aside.write_bytes(kept)
        killed = run_and_die(bring_back, after)
        if state_of(path) is GraftState.ORPHANED:
            attach(path, placement) if after % 2 else bring_back()
        assert state_of(path) is GraftState.OK
        assert problem_of(path) is None
        detach_image(path)
        assert path.read_bytes() == before
        if not killed:
            assert after > 3
            return
    raise AssertionError("it never came to its end")


def test_no_gap_to_bring_a_graft_back_into(tmp_path: Path) -> None:
    """An orphan's sidecar beside an image that has no gap any more: nothing is written into its grains."""
    path = small_image(tmp_path / "a.vmdk")
    attach(path, SIDECAR)
    no_gap(path)
    before = path.read_bytes()
    with open_vmdk(path, writable=True) as image:
        assert image.locate().state is GraftState.ORPHANED
        with pytest.raises(NoRoomError):
            image.reattach(image.locate())
    assert path.read_bytes() == before
    detach_image(path)
    assert path.read_bytes() == before


def test_attach_starts_anew_over_an_orphan(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vmdk")
    before = path.read_bytes()
    for placement in (INLINE, SIDECAR):
        attach(path, placement, [Section(SectionKind.FILES, noise(9000))])
        set_text(path, descriptor(91))
        attach(path, placement)
        assert problem_of(path) is None
        detach_image(path)
        assert path.read_bytes() == before


def test_no_room_over_an_orphan_changes_nothing(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vmdk")
    attach(path, INLINE)
    set_text(path, descriptor(91))
    before = path.read_bytes()
    with pytest.raises(NoRoomError):
        attach(path, INLINE, [Section(SectionKind.FILES, bytes(range(256)) * 200)])
    assert path.read_bytes() == before
    attach(path, INLINE, [Section(SectionKind.FILES, b"x" * 2500)])  # the orphan's place counts as free
    assert problem_of(path) is None


def test_an_orphan_without_its_note_is_found(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vmdk")
    before = path.read_bytes()
    attach(path, INLINE)
    set_text(path, descriptor(91))
    data = bytearray(path.read_bytes())
    data[GAP : GAP + 512] = bytes(512)
    path.write_bytes(data)
    located = open_vmdk(path).locate()
    assert (located.state, located.locator) == (GraftState.ORPHANED, None)
    with open_vmdk(path, writable=True) as image, pytest.raises(GraftFormatError, match="no whole record"):
        image.reattach(located)
    detach_image(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", ["digit", "letter", "short", "two lines"])
@pytest.mark.parametrize("placement", [INLINE, SIDECAR])
def test_a_damaged_line(tmp_path: Path, placement: Placement, how: str) -> None:
    path = small_image(tmp_path / "a.vmdk")
    before = path.read_bytes()
    attach(path, placement)
    text = text_of(path)
    at = text.index(b'ddb.vmgraft = "') + 60
    set_text(path, {
        "digit": text[:at] + (b"0" if text[at : at + 1] != b"0" else b"1") + text[at + 1 :],
        "letter": text[:at] + b"z" + text[at + 1 :],
        "short": text[:at] + text[at + 2 :],
        "two lines": text + LINE.search(text)[0].lstrip(b"\n"),
    }[how])  # fmt: skip
    assert state_of(path) is GraftState.DAMAGED
    assert problem_of(path)
    with pytest.raises(UsageError):
        attach(path, placement)
    with open_vmdk(path, writable=True) as image, pytest.raises(UnsupportedError):
        image.reattach(image.locate())
    detach_image(path)
    assert path.read_bytes() == before


def test_a_damaged_line_and_nothing_that_says_what_was_there(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vmdk")
    attach(path, INLINE)
    text = text_of(path)
    set_text(path, text[:-3] + b'z"\n')
    for offset in (GAP + 60, GAP + 520):
        flip(path, offset)
    before = path.read_bytes()
    assert state_of(path) is GraftState.DAMAGED
    with pytest.raises(GraftFormatError):
        detach_image(path)
    assert path.read_bytes() == before


def test_a_damaged_record_is_told_and_the_original_comes_back(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vmdk")
    before = path.read_bytes()
    attach(path, INLINE)
    for offset in (GAP + 521, GAP + 512 + 700):
        flip(path, offset)
    assert state_of(path) is GraftState.OVERWRITTEN
    detach_image(path)
    assert path.read_bytes() == before


def test_a_locator_that_points_elsewhere(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vmdk")
    sound = attach(path, INLINE).locator
    for wrong in (512, GAP, GAP + 513, GAP + 1024, 64 * 512):
        line = b'ddb.vmgraft = "' + pack_locator(replace(sound, record_offset=wrong)).hex().encode() + b'"\n'
        set_text(path, descriptor(91) + line)
        before = path.read_bytes()
        assert state_of(path) is GraftState.DAMAGED
        with pytest.raises(GraftFormatError):
            detach_image(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("placement", [INLINE, SIDECAR])
@pytest.mark.parametrize("behind", [b'ddb.zeta = "1"\n', b'ddb.zeta = "1"\n' * 60])
def test_lines_of_others_behind_ours_move_up(tmp_path: Path, placement: Placement, behind: bytes) -> None:
    path = small_image(tmp_path / "a.vmdk")
    attach(path, placement)
    set_text(path, text_of(path) + behind)
    assert state_of(path) is GraftState.OK
    assert problem_of(path) is None
    detach_image(path)
    expected = small_image(tmp_path / "b.vmdk", text=descriptor(91) + behind)
    assert path.read_bytes() == expected.read_bytes()


def test_a_lost_sidecar(tmp_path: Path) -> None:
    path = small_image(tmp_path / "a.vmdk")
    before = path.read_bytes()
    attach(path, SIDECAR)
    sidecar_path(path).unlink()
    assert state_of(path) is GraftState.NO_RECORD
    detach_image(path)  # line and note tell all that is needed
    assert path.read_bytes() == before


def test_sidecars_of_others(tmp_path: Path) -> None:
    a, b = small_image(tmp_path / "a.vmdk"), qemu_image(tmp_path / "b.vmdk")
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

CRASHES = [("small", INLINE), ("small", SIDECAR), ("no newline", INLINE), ("no gap", SIDECAR), ("behind", INLINE)]
BEHIND = b'ddb.zeta = "1"\n' * 50


def crash_image(path: Path, kind: str) -> bytes:
    """What the image is without a graft."""
    small_image(path, text=descriptor(91) + BEHIND) if kind == "behind" else MAKERS[kind](path)
    return path.read_bytes()


def put_in(path: Path, kind: str, placement: Placement, sections=None) -> None:
    if kind != "behind":
        attach(path, placement, sections)
        return
    set_text(path, descriptor(91))
    attach(path, placement, sections)
    set_text(path, text_of(path) + BEHIND)


def restore(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sidecar_path(path).unlink(missing_ok=True)


def is_grafted(path: Path) -> bool:
    return state_of(path) is GraftState.OK and problem_of(path) is None


@pytest.mark.parametrize(
    ("kind", "placement", "direction"),
    [*[(*one, "attach") for one in CRASHES[:4]], *[(*one, "detach") for one in CRASHES]],
)
def test_killed_after_any_operation(tmp_path: Path, kind: str, placement: Placement, direction: str) -> None:
    path = tmp_path / "a.vmdk"
    before = crash_image(path, kind)
    pristine = content_of(path)
    for after in range(1, 60):
        restore(path, before)
        if direction == "detach":
            put_in(path, kind, placement)
        action = (lambda: attach(path, placement)) if direction == "attach" else (lambda: detach_image(path))
        killed = run_and_die(action, after)
        assert content_of(path) == pristine
        if not is_grafted(path):
            assert state_of(path) in (GraftState.NONE, GraftState.ORPHANED)
            attach(path, placement)
        assert is_grafted(path)
        detach_image(path)
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.vmdk"]
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


@pytest.mark.parametrize(
    ("kind", "direction"), [("small", "attach"), ("small", "detach"), ("no newline", "detach"), ("behind", "detach")]
)
def test_power_loss_between_sectors(tmp_path: Path, kind: str, direction: str) -> None:
    """Of what was not yet flushed, any sectors may be on the disk: none, each, each pair of a few, and all."""
    path = tmp_path / "a.vmdk"
    before = crash_image(path, kind)
    pristine = content_of(path)
    sections = sample_sections(96, compress=False)
    if direction == "detach":
        put_in(path, kind, INLINE, sections)
    start = path.read_bytes()
    action = (lambda: attach(path, INLINE, sections)) if direction == "attach" else (lambda: detach_image(path))
    flushed: list[tuple[int, bytes]] = []
    seen = set()
    for group in _groups([item for item in operations_of(action) if item.file == path]):
        pieces = [piece for operation in group for piece in _sectors(operation)]
        few = (0, 1, 2, len(pieces)) if len(pieces) < 8 else (0, 1, len(pieces))
        for done in chain.from_iterable(combinations(pieces, size) for size in few):
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
    path = small_image(tmp_path / "a.vmdk")
    before = path.read_bytes()
    assert run_and_die(lambda: attach(path, INLINE), 5)
    with open_image(path) as image:
        assert image.metadata()["interruptedChange"]
        assert not image.recovered
    with open_image(path, writable=True) as image:
        assert image.recovered
        assert not image.metadata()["interruptedChange"]
    assert path.read_bytes() == before
    run_and_die(lambda: attach(path, INLINE), 5)
    detach_image(path)
    assert path.read_bytes() == before


def test_the_cost_does_not_grow_with_the_image(tmp_path: Path) -> None:
    """A terabyte has 128 MiB of tables; attach and detach read the two directories only."""
    path = tmp_path / "a.vmdk"
    tool("qemu-img", "create", "-q", "-f", "vmdk", path, "1T")
    with open_vmdk(path, writable=True) as image:
        read: list[int] = []
        original = image._file.read
        image._file.read = lambda offset, length: (read.append(length), original(offset, length))[1]
        image._refresh()
        assert image.locate().state is GraftState.NONE
    assert sum(read) < 1 << 20


def test_build_is_what_qemu_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(build({0: noise(4096)}, capacity=96))
    attach(path, INLINE)
    qemu_check(path)
