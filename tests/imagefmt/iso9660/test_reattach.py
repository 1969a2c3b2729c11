"""Bringing back what an ISO image's graft has lost."""

import errno
import os
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagefmt_helpers import (
    SECTOR,
    attach,
    content_of,
    digest,
    flip,
    iso_bytes,
    operations_of,
    problem_of,
    run_and_die,
    state_of,
    tool,
)
from iso_testkit import FIELD, write_at

from vmgraft.errors import FileError, GraftFormatError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import detach_image, open_image
from vmgraft.imagefmt.sidecar import sidecar_path

ORIGINALS = {
    "zeros": iso_bytes(),
    "spaces": iso_bytes(field=b" " * 512),
    "odd size": iso_bytes(tail=b"odd"),
    "taken": iso_bytes(field=b"taken" * 102 + b".."),
}


def reattach(path):
    with open_image(path, writable=True) as image:
        image.reattach(image.locate())
        return image.locate()


def pad(path, size=300_000):
    os.truncate(path, path.stat().st_size + size)


def footer(path):
    return path.stat().st_size - SECTOR


#: What is lost, and how; "field" cases need a field that is not taken.
LOST = {
    "field zeroed": lambda path: write_at(path, FIELD, bytes(128)),
    "field blanked": lambda path: write_at(path, FIELD, b" " * 128),
    "field damaged": lambda path: flip(path, FIELD + 60),
    "footer damaged": lambda path: flip(path, footer(path) + 60),
    "footer zeroed": lambda path: write_at(path, footer(path), bytes(SECTOR)),
    "footer cut": lambda path: os.truncate(path, footer(path)),
    "footer cut short": lambda path: os.truncate(path, footer(path) + 100),
    "padded": pad,
    "field zeroed and padded": lambda path: [write_at(path, FIELD, bytes(128)), pad(path)],
    "field damaged and footer zeroed": lambda path: [
        flip(path, FIELD + 60),
        write_at(path, footer(path), bytes(SECTOR)),
    ],
    "both damaged and padded": lambda path: [flip(path, FIELD + 60), flip(path, footer(path) + 9), pad(path)],
}
CASES = [
    (original, lost) for original in ORIGINALS for lost in LOST if not (original == "taken" and "field" in lost)
]  # fmt: skip


@pytest.fixture
def image(tmp_path):
    return tmp_path / "disc.iso"


def lose(path, original, lost):
    """A graft that has lost something; returns what the file was before."""
    path.write_bytes(ORIGINALS[original])
    attach(path, Placement.INLINE)
    whole = path.read_bytes()
    if original == "taken" and lost == "both damaged and padded":
        flip(path, footer(path) + 9)
        pad(path)
    else:
        LOST[lost](path)
    return whole


@pytest.mark.parametrize(("original", "lost"), CASES)
def test_what_was_lost_comes_back(image, original, lost):
    whole = lose(image, original, lost)
    if whole == image.read_bytes():
        return
    assert content_of(image) == ORIGINALS[original]
    found = reattach(image)
    assert found.state is GraftState.OK
    assert problem_of(image) is None
    assert content_of(image) == ORIGINALS[original]
    if found.locator.tree_digest != bytes(32):
        assert image.read_bytes() == whole
    detach_image(image)
    assert image.read_bytes() == ORIGINALS[original]


@pytest.mark.parametrize("lost", [lost for _, lost in CASES if _ == "zeros"])
def test_killed_at_any_step(image, lost):
    lose(image, "zeros", lost)
    damaged = image.read_bytes()
    steps = len(operations_of(lambda: reattach(image)))
    for after in range(1, steps + 1):
        image.write_bytes(damaged)
        assert run_and_die(lambda: reattach(image), after)
        assert content_of(image) == ORIGINALS["zeros"]
        assert reattach(image).state is GraftState.OK


@pytest.mark.parametrize("lost", [lost for _, lost in CASES if _ == "zeros"])
def test_a_full_disk(image, lost, monkeypatch):
    lose(image, "zeros", lost)
    damaged, write = image.read_bytes(), os.pwrite
    for good in range(4):
        count = iter(range(100))

        def failing(fd, data, offset, count=count, good=good):
            if next(count) >= good:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(fd, data, offset)

        image.write_bytes(damaged)
        monkeypatch.setattr(os, "pwrite", failing)
        try:
            reattach(image)
            break
        except FileError as problem:
            assert "No space left" in problem.message
        finally:
            monkeypatch.undo()
        assert content_of(image) == ORIGINALS["zeros"]
        assert reattach(image).state is GraftState.OK
    assert good == len([item for item in operations_of_again(image, damaged) if item.name == "write"])


def operations_of_again(image, damaged):
    image.write_bytes(damaged)
    return operations_of(lambda: reattach(image))


@pytest.mark.parametrize("original", ["zeros", "spaces", "odd size"])
def test_a_sound_graft_is_left_alone(image, original):
    image.write_bytes(ORIGINALS[original])
    attach(image, Placement.INLINE)
    assert operations_of(lambda: reattach(image)) == []


def test_a_taken_field_is_nothing_lost(image):
    image.write_bytes(ORIGINALS["taken"])
    attach(image, Placement.INLINE)
    assert "nothing is lost" in refused(image, UnsupportedError).message


@pytest.mark.parametrize("original", ORIGINALS)
def test_orphaned_sidecars(image, original):
    image.write_bytes(ORIGINALS[original])
    attach(image, Placement.SIDECAR)
    whole, size = image.read_bytes(), len(ORIGINALS[original])
    write_at(image, 0, ORIGINALS[original])
    os.truncate(image, size)
    assert state_of(image) is GraftState.ORPHANED
    assert reattach(image).state is GraftState.OK
    assert image.read_bytes() == whole
    assert problem_of(image) is None
    detach_image(image)
    assert image.read_bytes() == ORIGINALS[original]
    assert not sidecar_path(image).exists()


def refused(path, error):
    before = digest(path)
    with pytest.raises(error) as caught:
        reattach(path)
    assert digest(path) == before
    assert caught.value.hint
    return caught.value


def test_a_sidecar_of_another_size_stays_an_orphan(image):
    image.write_bytes(ORIGINALS["zeros"])
    attach(image, Placement.SIDECAR)
    image.write_bytes(iso_bytes(30))
    assert state_of(image) is GraftState.ORPHANED
    refused(image, UnsupportedError)


def test_what_cannot_come_back(image, tmp_path):
    def fresh():
        image.write_bytes(ORIGINALS["zeros"])
        located = attach(image, Placement.INLINE)
        return located.locator.record_offset, located.locator.record_size

    start, size = fresh()
    flip(image, start + size - 1)
    refused(image, GraftFormatError)
    fresh()
    os.truncate(image, start + size // 2)
    refused(image, GraftFormatError)
    fresh()
    write_at(image, image.stat().st_size, b"somebody else's")
    assert "other bytes" in refused(image, UnsupportedError).message
    fresh()
    write_at(image, footer(image), b"somebody else's")
    assert "where the footer goes" in refused(image, UnsupportedError).message
    fresh()
    write_at(image, FIELD, b"somebody else's".ljust(128))
    assert "another program uses the field" in refused(image, UnsupportedError).message
    fresh()
    write_at(image, start + size, b"!")
    assert "before or behind the record" in refused(image, UnsupportedError).message
    image.write_bytes(ORIGINALS["zeros"])
    refused(image, UnsupportedError)


def test_a_locator_made_for_another_record_is_not_written(image):
    """Both locators damaged: the record's own digests must hold, and its UNDO must fit the volume."""
    whole = lose(image, "zeros", "field damaged and footer zeroed")
    assert sha256(whole).digest() != sha256(image.read_bytes()).digest()
    write_at(image, 16 * SECTOR + 80, (23).to_bytes(4, "little") + (23).to_bytes(4, "big"))
    assert "sizes of file or volume differ" in refused(image, UnsupportedError).message


def test_an_image_that_xorriso_let_grow(iso, tmp_path):
    extra = tmp_path / "extra"
    extra.write_bytes(b"extra" * 1000)
    attach(iso, Placement.INLINE)
    tool("xorriso", "-dev", iso, "-add", extra, "--")
    assert "dropped its locator" in refused(iso, UnsupportedError).message


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(ORIGINALS)), st.data())
def test_any_damage_to_a_graft(tmp_path_factory, original, data):
    """Whatever happened to descriptor field and appendix: the original can still be shown, or nothing is touched."""
    path = tmp_path_factory.mktemp("any") / "disc.iso"
    content = ORIGINALS[original]
    path.write_bytes(content)
    located = attach(path, Placement.INLINE)
    image = bytearray(path.read_bytes())
    start, end = located.locator.record_offset, located.locator.record_offset + located.locator.record_size
    places = [start, end, len(image) - SECTOR, len(image) - SECTOR + 100]
    for _ in range(data.draw(st.integers(1, 3))):
        change = data.draw(st.binary(min_size=1, max_size=128) | st.integers(1, 128).map(bytes))
        offset = data.draw(st.sampled_from([*places, FIELD]))
        if offset == FIELD and original != "taken":
            image[FIELD : FIELD + 128] = (change + bytes(image[FIELD : FIELD + 128]))[:128]
        elif offset != FIELD:
            image[offset : offset + len(change)] = change
    image = image[: data.draw(st.sampled_from([len(image), len(image), *places]))]
    image += data.draw(st.sampled_from([b"", bytes(5000), b"x"]))
    path.write_bytes(image)
    try:
        with open_image(path, writable=True) as opened:
            opened.reattach(opened.locate())
            assert opened.locate().state is GraftState.OK
    except VmgraftError:
        assert path.read_bytes() == image
        return
    assert content_of(path) == content
    assert problem_of(path) is None
    detach_image(path)
    assert path.read_bytes() == content
