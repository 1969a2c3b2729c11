"""Move: what is signed travels byte for byte, and the graft is never on neither of the two images."""

import os
import shutil

import pytest
from vendor_testkit import carried, files_of, package, run, verifies

from vmgraft.errors import (
    ContentMismatchError,
    FileError,
    GraftFormatError,
    ImageInUseError,
    NoGraftError,
    UsageError,
)
from vmgraft.imagefmt.commit import observing
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.vendor import move as moving
from vmgraft.vendor.carry import carried_sections
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.move import MoveOptions, move_graft

MOVE, COPY = MoveOptions(), MoveOptions(copy=True)


@pytest.fixture
def pair(tmp_path, templates):
    """The same disk as raw and as qcow2."""
    folder = tmp_path / "pair"
    folder.mkdir()
    for name in ("disk.img", "disk.qcow2"):
        shutil.copy(templates / name, folder / name)
    return folder / "disk.img", folder / "disk.qcow2"


def put(path, key, **options):
    attach(path, [package("a"), package("b")], [key], AttachOptions(**options))


def state_of(path):
    with open_image(path) as image:
        return image.locate().state


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_there_and_back(pair, acme, backwards, placement):
    source, destination = pair[::-1] if backwards else pair
    clean = files_of(source.parent)
    put(source, acme, placement=placement)
    envelope = carried(source).envelope
    moved = move_graft(source, destination, MOVE)
    assert moved.located.state is GraftState.OK
    assert carried(destination).envelope == envelope and verifies(destination, acme)
    assert source.read_bytes() == clean[source.name] and not sidecar_path(source).exists()
    if destination.suffix == ".qcow2":
        run("qemu-img", "check", "-q", destination)
        run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", source, destination)
    move_graft(destination, source, MOVE)
    assert carried(source).envelope == envelope and verifies(source, acme)
    assert destination.read_bytes() == clean[destination.name]


def test_every_section_is_the_same(pair, acme):
    put(pair[0], acme)
    move_graft(*pair, COPY)

    def sections(path):
        with open_image(path) as image:
            record = open_graft(image).record
            return [(s.name, s.critical, s.compressed, record.raw(s)) for s in record.sections if s.name != "UNDO"]

    assert sections(pair[0]) == sections(pair[1])
    assert verifies(pair[0], acme) and verifies(pair[1], acme)


def test_a_copy_leaves_the_source_alone(pair, acme):
    put(pair[0], acme)
    before = pair[0].read_bytes()
    move_graft(*pair, COPY)
    assert pair[0].read_bytes() == before


def test_an_iso_to_a_raw_copy_of_it(tmp_path, templates, acme):
    """The graft of an ISO is good for the same bytes as a raw disk."""
    iso, disk = tmp_path / "disc.iso", tmp_path / "disc.qcow2"
    shutil.copy(templates / "disc.iso", iso)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", iso, disk)
    put(iso, acme)
    move_graft(iso, disk, MOVE)
    assert verifies(disk, acme) and iso.read_bytes() == (templates / "disc.iso").read_bytes()


# --- refused --------------------------------------------------------------------------------------------------------


def refused(source, destination, error, match, options=MOVE):
    before = files_of(source.parent)
    with pytest.raises(error, match=match) as caught:
        move_graft(source, destination, options)
    assert files_of(source.parent) == before
    return caught.value


def test_unequal_content_names_the_first_difference(pair, acme):
    put(pair[0], acme)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 200000 10", pair[1])
    error = refused(*pair, ContentMismatchError, "the first difference lies within bytes 196608 to 262143")
    assert "vmgraft diff" in error.hint
    refused(*pair, ContentMismatchError, "same content", MoveOptions(any_content=True))  # it is bound to its content


def test_unequal_sizes(pair, acme):
    put(pair[0], acme)
    run("qemu-img", "resize", "-q", "-f", "qcow2", pair[1], "4M")
    refused(*pair, ContentMismatchError, "1304576 and 4194304 bytes")


def test_equal_content_that_is_not_the_signed_one(pair, acme):
    put(pair[0], acme)
    with pair[0].open("r+b") as file:
        file.write(b"changed")
    raw = pair[0].read_bytes()[:1304576]
    other = pair[0].with_name("same.img")
    other.write_bytes(raw)
    refused(pair[0], other, ContentMismatchError, "not the one that the statement is bound to")


def test_portable_grafts(pair, acme):
    put(pair[0], acme, binding="any")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 512", pair[1])
    error = refused(*pair, ContentMismatchError, "same content")
    assert "--any-content" in error.hint
    move_graft(*pair, MoveOptions(any_content=True))
    assert verifies(pair[1], acme) and state_of(pair[0]) is GraftState.NONE


def test_requests_that_make_no_sense(pair, acme):
    raw, qcow2 = pair
    refused(raw, qcow2, NoGraftError, "no graft")
    put(raw, acme)
    refused(raw, raw, UsageError, "same image")
    link = raw.with_name("link")
    link.symlink_to(raw)
    refused(raw, link, UsageError, "same image")
    put(qcow2, acme)
    error = refused(raw, qcow2, UsageError, "carries a graft already")
    assert error.hint


def test_a_damaged_graft_stays_where_it_is(pair, acme):
    put(pair[0], acme)
    data = pair[0].read_bytes()
    at = data.index(b'"attached"')
    pair[0].write_bytes(data[:at] + b"X" + data[at + 1 :])
    refused(*pair, GraftFormatError, "not intact")


def test_images_in_use(pair, acme):
    put(pair[0], acme)
    with open_image(pair[0], writable=True):
        refused(*pair, ImageInUseError, "use")
        move_graft(*pair, COPY)


# --- on the way -----------------------------------------------------------------------------------------------------


def test_a_kill_at_every_operation_leaves_it_somewhere(pair, acme):
    source, destination = pair
    put(source, acme)
    start = files_of(source.parent)
    seen = set()
    for number in range(1, 100):
        for name, data in start.items():
            (source.parent / name).write_bytes(data)
        child = os.fork()
        if child == 0:
            count = 0

            def observer(_operation, number=number):
                nonlocal count
                count += 1
                if count == number:
                    os._exit(9)

            try:
                with observing(observer):
                    move_graft(source, destination, MOVE)
            finally:
                os._exit(0)
        killed = os.waitpid(child, 0)[1] != 0
        on = tuple(state_of(path) is GraftState.OK and verifies(path, acme) for path in pair)
        assert any(on)
        seen.add(on)
        if not killed:
            break
    assert seen == {(True, False), (True, True), (False, True)}


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), ContentMismatchError("no")])
def test_a_check_that_fails_takes_the_new_one_away(pair, acme, monkeypatch, problem):
    put(pair[0], acme)

    def fail(*_args):
        raise problem

    monkeypatch.setattr(moving, "_check", fail)
    before = files_of(pair[0].parent)
    with pytest.raises(type(problem)):
        move_graft(*pair, MOVE)
    assert files_of(pair[0].parent) == before


def test_a_source_that_does_not_let_go_is_told(pair, acme, monkeypatch):
    put(pair[0], acme)
    real = moving.detach_image

    def fail(path, opening):
        if path == pair[0]:
            raise FileError("the disk is read-only")
        real(path, opening)

    monkeypatch.setattr(moving, "detach_image", fail)
    with pytest.raises(FileError, match="both images carry the graft") as caught:
        move_graft(*pair, MOVE)
    assert "disk.qcow2 is done" in caught.value.hint
    assert verifies(pair[0], acme) and verifies(pair[1], acme)


def test_carried_sections_leave_the_container_behind(raw, acme):
    put(raw, acme)
    with open_image(raw) as image:
        sections = carried_sections(open_graft(image))
        kinds = [section.kind for section in sections]
        assert SectionKind.UNDO not in kinds and SectionKind.TREE not in kinds
        assert kinds[0] is SectionKind.ENVELOPE and kinds[-1] is SectionKind.HINTS
        for section in sections:
            assert isinstance(section, Section)
            whole = section.raw.read_all()
            assert b"".join(section.raw.chunks()) == whole
            assert section.raw.read(3, 5) == whole[3:8] and section.raw.read(-1, 5) == b""
