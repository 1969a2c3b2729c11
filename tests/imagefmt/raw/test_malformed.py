"""Raw images with hostile trailers: bounded, clear, and never believed."""

import os
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmgraft.errors import GraftFormatError, MalformedImageError, VmgraftError
from vmgraft.imagefmt.contract import GraftState, Locator, Placement
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.locator import pack_locator

CONTENT = b"content of a disk" * 300
HEAD = 8192
RECORD = b"R" * 500
END = 32768  # the record, 20480 bytes, and the rest of a page
SOUND = Locator(Placement.INLINE, HEAD + 128, len(RECORD), sha256(RECORD).digest(), bytes(32), len(CONTENT))


def build(path, locator=SOUND, *, head=None, tail=None, record=RECORD, size=END):
    data = bytearray(CONTENT.ljust(size, b"\0"))
    head = pack_locator(locator) if head is None else head
    tail = pack_locator(locator) if tail is None else tail
    data[HEAD : HEAD + len(head)] = head
    data[HEAD + 128 : HEAD + 128 + len(record)] = record
    data[size - len(tail) :] = tail
    path.write_bytes(bytes(data))
    return path


CASES = {
    "wrong record offset": (replace(SOUND, record_offset=HEAD), GraftState.NONE),
    "record offset far away": (replace(SOUND, record_offset=1 << 60), GraftState.NONE),
    "content as long as the file": (replace(SOUND, file_size=END), GraftState.NONE),
    "content of 8 EiB": (replace(SOUND, file_size=(1 << 62)), GraftState.NONE),
    "content of nothing": (replace(SOUND, file_size=0), GraftState.NONE),
    "record of 1 GiB": (replace(SOUND, record_size=1 << 30), GraftState.NONE),
    "record over the trailer limit": (replace(SOUND, record_size=(1 << 20) - 4096), GraftState.NONE),
    "sidecar locator inside": (replace(SOUND, placement=Placement.SIDECAR), GraftState.NONE),
    "other digest": (replace(SOUND, record_sha256=bytes(32)), GraftState.OVERWRITTEN),
}


@pytest.mark.parametrize("case", CASES)
def test_locators_that_do_not_fit(tmp_path, case):
    locator, state = CASES[case]
    path = build(tmp_path / "disk.img", locator)
    with open_image(path) as image:
        assert image.locate().state is state
        if state is GraftState.NONE:
            assert image.virtual_size == END


def test_a_record_that_is_none(tmp_path):
    path = build(tmp_path / "disk.img")
    with open_image(path) as image:
        assert image.locate().state is GraftState.OK  # digest and place fit; the record itself is read by open_graft
        assert "record.magic" in open_graft(image).format_problem()
        with pytest.raises(VmgraftError):
            open_graft(image).payload("00" * 32)
        assert open_graft(image).envelopes() == ()


@pytest.mark.parametrize("place", ["head", "tail"])
def test_a_locator_with_a_wrong_digest(tmp_path, place):
    broken = pack_locator(SOUND)[:-1] + b"!"
    path = build(tmp_path / "disk.img", **{place: broken})
    with open_image(path) as image:
        assert image.locate().state is GraftState.DAMAGED
        assert image.virtual_size == -(-len(CONTENT) // 512) * 512


def test_only_broken_locators(tmp_path):
    broken = pack_locator(SOUND)[:-1] + b"!"
    path = build(tmp_path / "disk.img", head=broken, tail=broken)
    with open_image(path) as image:
        located = image.locate()
        assert located.state is GraftState.DAMAGED
        assert located.locator is None
        assert image.recovery_undo() is None
    with pytest.raises(GraftFormatError) as caught:
        detach_image(path)
    assert caught.value.file == str(path)
    assert caught.value.offset is not None


def test_undo_that_contradicts_the_locator_is_not_followed(tmp_path, raw_image):
    from imagefmt_helpers import sample_sections

    from vmgraft.imagefmt.assemble import build_record
    from vmgraft.imagefmt.contract import Patch, Undo
    from vmgraft.imagefmt.record import Section, SectionKind
    from vmgraft.imagefmt.undo import pack_undo

    for undo in (Undo(5), Undo(len(CONTENT), (Patch(0, b"evil"),))):
        record = build_record([Section(SectionKind.UNDO, pack_undo(undo)), *sample_sections()])
        locator = replace(SOUND, record_size=len(record), record_sha256=sha256(record).digest())
        path = build(tmp_path / "disk.img", locator, record=record)
        before = path.read_bytes()
        with pytest.raises(GraftFormatError, match="disagree"):
            detach_image(path)
        assert path.read_bytes() == before


def test_an_empty_file(tmp_path):
    from vmgraft.imagefmt.contract import OpenOptions
    from vmgraft.imagefmt.raw import FORMAT

    path = tmp_path / "disk.img"
    path.touch()
    with pytest.raises(MalformedImageError, match="empty"):
        FORMAT.open(path, OpenOptions())


def test_thousands_of_magics_are_looked_at_in_bounded_time(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(pack_locator(SOUND).ljust(4096, b"\0") * 512)
    with open_image(path) as image:
        assert image.locate().state in (GraftState.NONE, GraftState.OVERWRITTEN, GraftState.CUT, GraftState.GROWN)


def test_a_gpt_that_points_nowhere(tmp_path):
    path = tmp_path / "disk.img"
    head = bytearray(os.urandom(8192))
    head[512:520] = b"EFI PART"
    for alternate in (0, 15, 16, (1 << 64) - 1):
        head[544:552] = alternate.to_bytes(8, "little")
        path.write_bytes(bytes(head))
        with open_image(path) as image:
            assert image.locate().state is GraftState.NONE


locators = st.builds(
    Locator,
    placement=st.sampled_from([Placement.INLINE, Placement.SIDECAR]),
    record_offset=st.sampled_from([0, HEAD, HEAD + 128, 1 << 40]),
    record_size=st.integers(64, 8192) | st.just(1 << 30),
    record_sha256=st.just(SOUND.record_sha256) | st.just(bytes(32)),
    tree_digest=st.just(bytes(32)),
    file_size=st.integers(0, 34000) | st.just(len(CONTENT)) | st.just(1 << 61),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(locators, locators, st.integers(1, 40000), st.binary(max_size=300))
def test_any_trailer(tmp_path, head, tail, size, junk):
    path = build(tmp_path / "disk.img", head=pack_locator(head), tail=pack_locator(tail))
    data = (path.read_bytes() + junk).ljust(size, b"\x33")[: max(size, 1)]
    path.write_bytes(data)
    try:
        with open_image(path) as image:
            assert 0 < image.virtual_size <= len(data) + 511
            assert len(image.read(0, 1 << 40)) == image.virtual_size
            graft = open_graft(image)
            graft.format_problem()
            image.metadata()
    except VmgraftError:
        pass
