"""Sidecars: lost, cut, foreign, hostile."""

import dataclasses
import errno
import os
import stat
import struct
import tracemalloc
from hashlib import sha256

import pytest
from imagefmt_helpers import attach, content_of, digest, iso_bytes, problem_of, sample_sections, state_of, tool

from vmgraft.errors import FileError, GraftFormatError, NoGraftError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.journal import write_journal
from vmgraft.imagefmt.locator import pack_locator
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.sidecar import read_sidecar, refuse_long_name, sidecar_path, write_sidecar
from vmgraft.imagefmt.tree import digest_content


@pytest.fixture
def grafted_iso(iso_image):
    attach(iso_image, Placement.SIDECAR)
    return iso_image


@pytest.fixture
def grafted_raw(raw_image):
    attach(raw_image, Placement.SIDECAR)
    return raw_image


def test_layout(grafted_iso, grafted_raw):
    data = sidecar_path(grafted_iso).read_bytes()
    assert data[:128] == grafted_iso.read_bytes()[34035 : 34035 + 128]
    assert data[128:136] == b"VMGRAFT\0"
    assert struct.unpack_from("<Q", data, 24)[0] == len(data) - 128
    assert sidecar_path(grafted_raw).name == "disk.img.vmgraft"


def test_a_raw_image_is_not_touched(raw_image):
    before = digest(raw_image)
    attach(raw_image, Placement.SIDECAR)
    assert digest(raw_image) == before


def test_automatic_placement_by_size(raw_image):
    before = digest(raw_image)
    large = [*sample_sections(), Section(SectionKind.FILES, os.urandom(1 << 20))]
    assert attach(raw_image, Placement.AUTO, large).locator.placement is Placement.SIDECAR
    assert problem_of(raw_image) is None
    detach_image(raw_image)
    assert digest(raw_image) == before


def test_lost(grafted_iso, grafted_raw):
    for path in (grafted_iso, grafted_raw):
        sidecar_path(path).unlink()
    assert state_of(grafted_iso) is GraftState.NO_RECORD
    assert "missing" in problem_of(grafted_iso)
    with pytest.raises(GraftFormatError, match="lost"):
        detach_image(grafted_iso)
    assert state_of(grafted_raw) is GraftState.NONE


@pytest.mark.parametrize(
    ("spoil", "state"),
    [
        (lambda data: data[:-1], GraftState.CUT),
        (lambda data: data[:128], GraftState.CUT),
        (lambda data: data[:100], GraftState.DAMAGED),
        (lambda _data: b"", GraftState.DAMAGED),
        (lambda data: data + b"\0", GraftState.DAMAGED),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), GraftState.OVERWRITTEN),
        (lambda data: b"X" + data[1:], GraftState.DAMAGED),
    ],
)
@pytest.mark.parametrize("image", ["grafted_iso", "grafted_raw"])
def test_spoiled(request, image, spoil, state):
    path = request.getfixturevalue(image)
    original = content_of(path)
    sidecar = sidecar_path(path)
    sidecar.write_bytes(spoil(sidecar.read_bytes()))
    assert state_of(path) is state
    assert content_of(path) == original


@pytest.fixture(params=["disc.iso", "disk.qcow2"])
def pointing(request, tmp_path):
    """Images whose container points to the sidecar: two of different content."""
    paths = tmp_path / request.param, tmp_path / f"other-{request.param}"
    for number, path in enumerate(paths):
        if path.suffix == ".iso":
            path.write_bytes(iso_bytes(24 + number))
        else:
            tool("qemu-img", "create", "-q", "-f", "qcow2", path, f"{number + 1}M")
    return paths


def attach_aside(path, sections=None):
    with open_image(path) as image:
        tree = digest_content(image, flat="never").tree_digest
    attach_sections(path, sections or sample_sections(), placement=Placement.SIDECAR, tree_digest=tree)


def test_swapped(pointing):
    """The sidecar of another image is told apart, is not read as if it were this one's, and survives detach."""
    path, other = pointing
    for image in pointing:
        attach_aside(image)
    own, foreign = sidecar_path(path).read_bytes(), sidecar_path(other).read_bytes()
    sidecar_path(path).write_bytes(foreign)
    before = digest(path)
    assert state_of(path) is GraftState.SWAPPED
    assert "another image" in problem_of(path) and sha256(own[128:]).hexdigest() in problem_of(path)
    with open_image(path) as image:
        assert open_graft(image).manifests() == ()
    with pytest.raises(GraftFormatError, match="another image") as caught:
        detach_image(path)
    assert "move it away" in caught.value.hint
    assert (sidecar_path(path).read_bytes(), digest(path)) == (foreign, before)
    sidecar_path(path).write_bytes(own)
    assert problem_of(path) is None


def test_stale(pointing):
    """An earlier graft's sidecar of the same content."""
    path, _ = pointing
    clean = digest(path)
    attach_aside(path)
    earlier = sidecar_path(path).read_bytes()
    detach_image(path)
    attach_aside(path, [*sample_sections(), Section(SectionKind.FILES, b"more")])
    later = sidecar_path(path).read_bytes()
    sidecar_path(path).write_bytes(earlier)
    assert state_of(path) is GraftState.STALE
    assert "earlier or later" in problem_of(path) and sha256(later[128:]).hexdigest() in problem_of(path)
    with pytest.raises(GraftFormatError):
        detach_image(path)
    assert sidecar_path(path).read_bytes() == earlier
    sidecar_path(path).write_bytes(later)
    detach_image(path)
    assert digest(path) == clean and not sidecar_path(path).exists()


def test_neither_swapped_nor_stale_but_damaged(pointing):
    path, other = pointing
    for image in pointing:
        attach_aside(image)
    foreign = sidecar_path(other).read_bytes()
    sidecar_path(path).write_bytes(foreign[:-1])
    assert state_of(path) is GraftState.DAMAGED
    assert "damaged itself" in problem_of(path)


def test_a_raw_image_that_changed_its_size(grafted_raw):
    before = grafted_raw.read_bytes()
    with open(grafted_raw, "ab") as file:
        file.write(bytes(1024))
    assert state_of(grafted_raw) is GraftState.GROWN
    detach_image(grafted_raw)
    assert grafted_raw.read_bytes() == before + bytes(1024)
    assert not sidecar_path(grafted_raw).exists()


def test_a_raw_image_that_shrank(grafted_raw):
    os.truncate(grafted_raw, 512)
    assert state_of(grafted_raw) is GraftState.DAMAGED
    assert problem_of(grafted_raw)


def test_a_sidecar_that_nothing_points_to(iso_image, grafted_iso):
    clean = iso_bytes()
    iso_image.write_bytes(clean)
    assert state_of(iso_image) is GraftState.ORPHANED
    with open_image(iso_image) as image, pytest.raises(NoGraftError, match="any more"):
        open_graft(image)
    detach_image(iso_image)
    assert not sidecar_path(iso_image).exists()
    assert iso_image.read_bytes() == clean


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
def test_other_things_of_that_name(tmp_path, iso_image, raw_image, kind):
    for image in (iso_image, raw_image):
        path = sidecar_path(image)
        if kind == "symlink":
            path.symlink_to(tmp_path / "elsewhere")
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.mkdir()
        before = digest(image)
        assert read_sidecar(image).state is GraftState.DAMAGED
        with pytest.raises((FileError, NoGraftError, GraftFormatError)):
            detach_image(image)
        assert digest(image) == before
        path.unlink() if kind != "folder" else path.rmdir()


def test_a_users_file_of_that_name_is_never_replaced(iso_image):
    path = sidecar_path(iso_image)
    path.write_bytes(b"my notes")
    before = digest(iso_image)
    with pytest.raises(FileError, match="not a sidecar"):
        attach(iso_image, Placement.SIDECAR)
    assert path.read_bytes() == b"my notes"
    assert digest(iso_image) == before


def test_an_old_sidecar_is_replaced(tmp_path, grafted_iso):
    iso = tmp_path / "second.iso"
    iso.write_bytes(iso_bytes())
    with open_image(grafted_iso) as image:
        located = image.locate()
    write_sidecar(iso, located.locator, located.record)
    attach(iso, Placement.SIDECAR)
    assert problem_of(iso) is None


def test_a_large_file_that_is_no_sidecar_is_not_read(raw_image):
    """A sparse gigabyte beside the image costs an auditor neither memory nor time."""
    with sidecar_path(raw_image).open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    try:
        assert read_sidecar(raw_image).state is GraftState.DAMAGED
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_sidecar_beyond_the_limit_is_not_read(raw_image):
    sidecar_path(raw_image).write_bytes(b"VMGRAFT\0")
    os.truncate(sidecar_path(raw_image), (1 << 30) + 129)
    assert "over the size limit" in read_sidecar(raw_image).detail


def test_a_sidecar_whose_locator_says_inline_does_not_shape_a_raw_image(raw_image):
    locator = attach(raw_image, Placement.SIDECAR).locator
    path = sidecar_path(raw_image)
    forged = dataclasses.replace(locator, placement=Placement.INLINE, file_size=512)
    path.write_bytes(pack_locator(forged) + path.read_bytes()[128:])
    with open_image(raw_image) as image:
        assert image.locate().state is GraftState.DAMAGED
        assert image.virtual_size >= raw_image.stat().st_size
    assert "not one of a sidecar" in problem_of(raw_image)


@pytest.mark.parametrize("length", [230, 247, 248, 255])
@pytest.mark.parametrize("suffix", [".img", ".iso"])
def test_image_names_up_to_the_longest(tmp_path, length, suffix):
    """The suffix may not fit behind an image's name; an inline graft does not need it."""
    path = tmp_path / ("n" * (length - 4) + suffix)
    path.write_bytes(iso_bytes() if suffix == ".iso" else b"raw disk" * 100)
    before = digest(path)
    assert state_of(path) is GraftState.NONE
    attach(path, Placement.INLINE)
    assert problem_of(path) is None
    detach_image(path)
    assert digest(path) == before
    if length + len(".vmgraft") > 255:
        with pytest.raises(FileError, match="too long"):
            attach(path, Placement.SIDECAR)
    else:
        attach(path, Placement.SIDECAR)
        detach_image(path)
    assert digest(path) == before
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


# --- permissions and names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
@pytest.mark.parametrize("unnamed", [True, False])
def test_sidecar_and_journal_have_the_permissions_of_the_image(raw_image, mode, unnamed, monkeypatch):
    if not unnamed:  # as on a file system without files that have no name
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
    raw_image.chmod(mode)
    attach(raw_image, Placement.SIDECAR)
    with open_image(raw_image) as image:
        journal = write_journal(image, image.locate()).path
    for path in (sidecar_path(raw_image), journal):
        assert stat.S_IMODE(path.stat().st_mode) == mode & 0o666


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_told_with_a_way_out(raw_image, monkeypatch, number):
    really = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return really(path, flags, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(FileError, match="could not be created") as caught:
        patch.setattr(os, "open", refuse)
        attach(raw_image, Placement.SIDECAR)
    assert "make the folder writable, or use -o OUT" in caught.value.hint


def test_a_name_too_long_for_a_sidecar(tmp_path, raw_image):
    path, longer = raw_image.rename(tmp_path / ("n" * 247)), tmp_path / ("n" * 248)
    refuse_long_name(sidecar_path(path))
    attach(path, Placement.SIDECAR)
    detach_image(path)
    path.rename(longer)
    before = longer.read_bytes()
    for action in (lambda: attach(longer, Placement.SIDECAR), lambda: refuse_long_name(sidecar_path(longer))):
        with pytest.raises(FileError, match="File name too long") as caught:
            action()
        assert "shorter name, or use -o OUT" in caught.value.hint
    assert longer.read_bytes() == before
