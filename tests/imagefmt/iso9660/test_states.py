"""What other programs do to a grafted ISO image: each case is told apart, and said in words."""

import io
import os
from pathlib import Path

import pytest
from imagefmt_helpers import GRUB_ISO, SECTOR, attach, content_of, digest, iso_bytes, problem_of, state_of, tool
from iso_testkit import FIELD, volume_size, write_at

from vmgraft.errors import GraftFormatError, NoGraftError, UnsupportedError, UsageError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_image
from vmgraft.imagefmt.tree import digest_content

BURNER_PADDING = 150 * SECTOR  # what wodim and mkisofs -pad add


def located(path):
    with open_image(path) as image:
        return image.locate()


def grafted(path):
    attach(path, Placement.INLINE)
    return path


def xorriso_grow(path):
    extra = path.with_name("extra")
    extra.write_bytes(b"extra" * 1000)
    tool("xorriso", "-dev", path, "-add", extra, "--")


def pycdlib_rewrite(path):
    import pycdlib

    volume = pycdlib.PyCdlib()
    volume.open(str(path))
    volume.add_fp(io.BytesIO(b"x" * 50_000), 50_000, "/NEW.;1", rr_name="new", joliet_path="/new")
    volume.write(str(path) + ".new")
    volume.close()
    Path(f"{path}.new").replace(path)


def xorriso_remaster(path):
    other = path.with_name("other.iso")
    tool("xorriso", "-indev", path, "-outdev", other, "-volid", "OTHER")
    other.replace(path)


def genisoimage_remaster(path):
    tree, other = path.with_name("extracted"), path.with_name("other.iso")
    tool("xorriso", "-osirrox", "on", "-indev", path, "-extract", "/", tree)
    tool("genisoimage", "-quiet", "-R", "-J", "-o", other, tree)
    other.replace(path)


def burn_padded(path):
    tool("sh", "-c", f"head -c {BURNER_PADDING} /dev/zero >> {path}")


def burn_volume_size(path):
    tool("dd", f"if={path}", f"of={path}.copy", f"bs={SECTOR}", f"count={volume_size(path) // SECTOR}")
    Path(f"{path}.copy").replace(path)


def burn_sectors_less(path):
    tool("dd", f"if={path}", f"of={path}.copy", f"bs={SECTOR}", f"count={path.stat().st_size // SECTOR - 1}")
    Path(f"{path}.copy").replace(path)


def wipe_locator(path):
    with open(path, "rb") as file:
        file.seek(FIELD - 1)
        around = file.read(1)
    write_at(path, FIELD, (b" " if around == b"\0" else b"\0") * 128)


def implant(path):
    tool("implantisomd5", "--force", path)


def append_session(path):
    end = path.stat().st_size
    start = -(-end // (16 * SECTOR)) * 16 * SECTOR
    session, extra = path.with_name("session.iso"), path.with_name("extra")
    extra.write_bytes(b"extra" * 1000)
    tool("genisoimage", "-quiet", "-R", "-C", f"0,{start // SECTOR}", "-M", path, "-o", session, extra)
    write_at(path, start, session.read_bytes())


def append_bytes(path):
    with open(path, "ab") as file:
        file.write(os.urandom(5000))


CASES = {
    xorriso_grow: (GraftState.ORPHANED, "added to the image behind the record"),
    pycdlib_rewrite: (GraftState.DAMAGED, "wrote the image anew and copied the locator"),
    xorriso_remaster: (GraftState.NONE, ""),
    genisoimage_remaster: (GraftState.NONE, ""),
    burn_padded: (GraftState.GROWN, "307200 bytes behind the graft since attach, all of them zero, as burning pads"),
    burn_volume_size: (GraftState.CUT, "the record is gone: the file ends with the original image"),
    burn_sectors_less: (GraftState.CUT, "the record is whole: recover writes the footer again"),
    wipe_locator: (GraftState.DAMAGED, "the locator in the volume descriptor was wiped"),
    append_session: (GraftState.GROWN, "a session was added"),
    append_bytes: (GraftState.GROWN, "makes it verify, and loses them"),
    implant: (GraftState.OK, "only the footer points to the record"),
}


@pytest.mark.parametrize("operation", CASES, ids=lambda operation: operation.__name__)
def test_told_apart(any_iso, operation):
    state, detail = CASES[operation]
    if operation is implant and not field_is_spaces(any_iso):
        detail = "the locator in the volume descriptor was wiped"
        state = GraftState.DAMAGED  # it fills the field with spaces, and zeros stood there
    grafted(any_iso)
    operation(any_iso)
    found = located(any_iso)
    assert (found.state, detail in found.detail) == (state, True), found
    assert state is not GraftState.NONE or found.detail == ""
    details = [text for _, text in CASES.values() if text]
    assert sum(text in found.detail for text in details) == (0 if state is GraftState.NONE else 1)


def field_is_spaces(path):
    with open(path, "rb") as file:
        file.seek(FIELD)
        return file.read(1) == b" "


def test_padding_can_be_cut_off(any_iso):
    original = digest(any_iso)
    size = grafted(any_iso).stat().st_size
    burn_padded(any_iso)
    content = content_of(any_iso)
    assert f"cutting the file to {size} bytes" in located(any_iso).detail
    with pytest.raises(UsageError):
        detach_image(any_iso)
    os.truncate(any_iso, size)
    assert problem_of(any_iso) is None
    assert content_of(any_iso) == content
    detach_image(any_iso)
    assert digest(any_iso) == original


def attach_with_digest(path, *, placement=Placement.INLINE):
    from imagefmt_helpers import sample_sections

    with open_image(path) as image:
        tree = digest_content(image, flat="never").tree_digest
    attach_sections(path, sample_sections(), placement=placement, tree_digest=tree)


def test_the_way_back_without_a_record(any_iso):
    """A copy of the volume's size has lost the record; the digest in the locator still tells what the field held."""
    original = digest(any_iso)
    attach_with_digest(any_iso)
    burn_volume_size(any_iso)
    assert state_of(any_iso) is GraftState.CUT
    assert digest(any_iso) != original
    detach_image(any_iso)
    assert digest(any_iso) == original


def test_no_way_back_to_content_that_changed(any_iso):
    attach_with_digest(any_iso)
    burn_volume_size(any_iso)
    write_at(any_iso, 40 * SECTOR, b"changed")
    changed = digest(any_iso)
    with pytest.raises(GraftFormatError, match="way back"):
        detach_image(any_iso)
    assert digest(any_iso) == changed


def test_attach_again_after_a_lost_record(any_iso):
    attach_with_digest(any_iso)
    burn_volume_size(any_iso)
    attach_with_digest(any_iso)
    assert problem_of(any_iso) is None


def test_detach_takes_a_copied_locator_out(any_iso):
    """detach(op(attach(x))) == op(x) also where op writes a new file around our bytes."""
    import pycdlib

    plain = any_iso.with_name("plain.iso")
    plain.write_bytes(any_iso.read_bytes())
    grafted(any_iso)
    for path in (plain, any_iso):
        pycdlib_rewrite(path)
    with open_image(any_iso) as image:
        assert image.virtual_size == any_iso.stat().st_size
        assert digest_content(image, flat="always").flat.hex() == digest(plain)
    detach_image(any_iso)
    assert digest(any_iso) == digest(plain)
    assert state_of(any_iso) is GraftState.NONE
    volume = pycdlib.PyCdlib()
    volume.open(str(any_iso))
    volume.close()


def test_pycdlib_in_place_keeps_the_graft(iso):
    import pycdlib

    grafted(iso)
    with pycdlib.InPlaceEditor(str(iso)) as editor:
        editor.modify_file(io.BytesIO(b"HALLO\n"), 6, iso_path="/HELLO.TXT;1")
    assert state_of(iso) is GraftState.OK
    assert b"HALLO\n" in content_of(iso)


def test_an_added_session_is_not_given_up(iso):
    grafted(iso)
    append_session(iso)
    with_session = digest(iso)
    with pytest.raises(UsageError, match="would be lost"):
        detach_image(iso)
    assert digest(iso) == with_session


def test_xorriso_grow_leaves_no_graft(iso):
    grafted(iso)
    xorriso_grow(iso)
    with pytest.raises(NoGraftError, match="another program"):
        problem_of(iso)


def test_a_real_image_burnt_and_read_back(tmp_path):
    path = tmp_path / "grub.iso"
    path.write_bytes(GRUB_ISO.read_bytes())
    attach_with_digest(path)
    burn_padded(path)
    with open_image(path) as image:
        assert digest_content(image, flat="always").flat.hex() == digest(GRUB_ISO)
    with open_image(path, writable=True) as image:
        image.reattach(image.locate())
        assert image.locate().state is GraftState.OK
    detach_image(path)
    assert digest(path) == digest(GRUB_ISO)


def test_a_taken_field_and_padding(tmp_path):
    """Only the footer points to the record, and it is not at the end any more."""
    path = tmp_path / "disc.iso"
    original = iso_bytes(field=b"taken" * 102 + b"..")
    path.write_bytes(original)
    grafted(path)
    burn_padded(path)
    assert located(path).state is GraftState.GROWN
    assert content_of(path) == original


def test_a_taken_field_whose_footer_is_gone(tmp_path):
    """The record says by itself where it belongs; in front of a sidecar nothing does."""
    path = tmp_path / "disc.iso"
    original = iso_bytes(field=b"taken" * 102 + b"..")
    path.write_bytes(original)
    grafted(path)
    size = path.stat().st_size
    os.truncate(path, size - SECTOR)
    found = located(path)
    assert (found.state, "recover writes them again" in found.detail) == (GraftState.CUT, True)
    assert content_of(path) == original
    detach_image(path)
    assert path.read_bytes() == original
    attach(path, Placement.SIDECAR)
    os.truncate(path, len(original))
    found = located(path)
    assert found.state is GraftState.ORPHANED
    assert "nothing in the image points to it" in found.detail


def test_zeros_as_a_hole_cost_nothing(iso):
    grafted(iso)
    os.truncate(iso, 1 << 42)
    assert "all of them zero" in located(iso).detail


def test_much_data_is_not_read_through(iso):
    """Of what was appended 64 MiB are looked at: more than that is not called zero."""
    grafted(iso)
    end = iso.stat().st_size
    with open(iso, "ab") as file:
        for _ in range(65):
            file.write(bytes(1 << 20))
    assert "all of them zero" not in located(iso).detail
    with open_image(iso, writable=True) as image, pytest.raises(UnsupportedError):
        image.reattach(image.locate())
    os.truncate(iso, end)
    assert state_of(iso) is GraftState.OK
