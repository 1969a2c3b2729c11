"""Bringing back what a raw trailer has lost."""

import errno
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagefmt_helpers import attach, content_of, digest, flip, operations_of, problem_of, run_and_die, state_of, tool

from vmgraft.errors import FileError, GraftFormatError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import detach_image, open_image


@pytest.fixture
def grafted(raw_image):
    attach(raw_image, Placement.INLINE)
    return raw_image


def reattach(path):
    with open_image(path, writable=True) as image:
        image.reattach(image.locate())
        return image.locate()


def places(path):
    with open_image(path) as image:
        locator = image.locate().locator
    head = -(-locator.file_size // 4096) * 4096
    return {"head": head, "tail": path.stat().st_size - 128, "record": head + 128, "size": locator.record_size}


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


LOST = {
    "first locator flipped": lambda path, at: flip(path, at["head"] + 5),
    "first locator zeroed": lambda path, at: overwrite(path, at["head"], bytes(128)),
    "second locator flipped": lambda path, at: flip(path, at["tail"] + 99),
    "second locator replaced": lambda path, at: overwrite(path, at["tail"], b"GUEST" * 20),
    "both zeroed": lambda path, at: [overwrite(path, at[name], bytes(128)) for name in ("head", "tail")],
    "cut behind the record": lambda path, at: truncate(path, at["record"] + at["size"]),
    "cut by a byte": lambda path, at: truncate(path, at["tail"] + 127),
    "cut and first locator zeroed": lambda path, at: [
        truncate(path, at["tail"]),
        overwrite(path, at["head"], bytes(128)),
    ],
}


def truncate(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("case", LOST)
def test_what_was_lost_comes_back(grafted, case):
    whole, content = grafted.read_bytes(), content_of(grafted)
    LOST[case](grafted, places(grafted))
    assert state_of(grafted) in (GraftState.DAMAGED, GraftState.CUT)
    assert "recover" in problem_of(grafted)
    assert content_of(grafted) == content
    assert reattach(grafted).state is GraftState.OK
    assert problem_of(grafted) is None
    assert content_of(grafted) == content
    if "both" not in case and "and" not in case:  # the hint of the content's digest is lost with both locators
        assert grafted.read_bytes() == whole
    detach_image(grafted)
    assert grafted.read_bytes() == bytes(range(256)) * 40 + b"odd"


@pytest.mark.parametrize("case", LOST)
def test_killed_at_any_step(grafted, case):
    content = content_of(grafted)
    LOST[case](grafted, places(grafted))
    damaged = grafted.read_bytes()
    steps = len(operations_of(lambda: reattach(grafted)))
    assert steps >= 2
    for after in range(1, steps + 1):
        grafted.write_bytes(damaged)
        assert run_and_die(lambda: reattach(grafted), after)
        assert state_of(grafted) in (GraftState.OK, GraftState.DAMAGED, GraftState.CUT)
        assert content_of(grafted) == content
        assert reattach(grafted).state is GraftState.OK


@pytest.mark.parametrize("case", LOST)
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_is_full_or_broken(grafted, case, reason, monkeypatch):
    content = content_of(grafted)
    LOST[case](grafted, places(grafted))
    damaged, write = grafted.read_bytes(), os.pwrite
    for good in range(4):
        count = iter(range(100))

        def failing(fd, data, offset, count=count, good=good):
            if next(count) >= good:
                raise OSError(reason, os.strerror(reason))
            return write(fd, data, offset)

        grafted.write_bytes(damaged)
        monkeypatch.setattr(os, "pwrite", failing)
        try:
            reattach(grafted)
            break
        except FileError as problem:
            assert os.strerror(reason) in problem.message
        finally:
            monkeypatch.undo()
        assert content_of(grafted) == content
        assert reattach(grafted).state is GraftState.OK
    assert good >= 1


def test_a_sound_graft_is_left_alone(grafted):
    before = digest(grafted)
    assert operations_of(lambda: reattach(grafted)) == []
    assert digest(grafted) == before


def refused(path, error):
    before = digest(path)
    with pytest.raises(error) as caught:
        reattach(path)
    assert digest(path) == before
    assert caught.value.hint
    return caught.value


def test_a_damaged_record_stays_damaged(grafted):
    at = places(grafted)
    flip(grafted, at["record"] + at["size"] - 1)
    refused(grafted, GraftFormatError)
    overwrite(grafted, at["tail"], bytes(128))
    refused(grafted, GraftFormatError)
    overwrite(grafted, at["head"], bytes(128))  # no digest of the whole is known: the record's own ones tell
    refused(grafted, GraftFormatError)


def test_a_grown_file_is_not_cut(grafted):
    with open(grafted, "ab") as file:
        file.write(b"more")
    error = refused(grafted, UnsupportedError)
    assert "grew by 4 bytes" in error.message
    assert "shrink the file to" in error.hint


def test_bytes_of_others_are_not_overwritten(grafted):
    overwrite(grafted, places(grafted)["tail"] - 4096, b"somebody else's")
    assert "bytes of another program" in refused(grafted, UnsupportedError).message


def test_a_moved_backup_gpt_is_not_overwritten(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4 << 20))
    tool("sfdisk", "-q", path, stdin="label: gpt\nstart=2048\n")
    attach(path, Placement.INLINE)
    tool("sfdisk", "--relocate", "gpt-bak-std", path)
    assert "let the tool move its backup GPT back" in refused(path, UnsupportedError).hint


def test_a_cut_record_and_no_record(grafted, tmp_path):
    at = places(grafted)
    truncate(grafted, at["record"] + at["size"] - 1)
    refused(grafted, GraftFormatError)
    plain = tmp_path / "plain.img"
    plain.write_bytes(b"plain" * 1000)
    refused(plain, UnsupportedError)


def test_sidecars_are_not_a_matter_of_the_image(raw_image):
    attach(raw_image, Placement.SIDECAR)
    truncate(raw_image, raw_image.stat().st_size + 1)
    refused(raw_image, UnsupportedError)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_damage_to_a_trailer(tmp_path_factory, data):
    """Whatever happened behind the content: it comes back whole, or nothing is touched."""
    path = tmp_path_factory.mktemp("any") / "disk.img"
    original = bytes(range(256)) * 40 + b"odd"
    path.write_bytes(original)
    attach(path, Placement.INLINE)
    image = bytearray(path.read_bytes())
    places = places_of_interest(path)
    for _ in range(data.draw(st.integers(1, 3))):
        offset = data.draw(st.sampled_from(places)) + data.draw(st.integers(-3, 130))
        change = data.draw(st.binary(min_size=1, max_size=140) | st.integers(1, 300).map(bytes))
        offset = max(offset, len(original))
        image[offset : offset + len(change)] = change
    image = image[: data.draw(st.sampled_from([len(image), *places]))] + data.draw(st.sampled_from([b"", b"\0", b"x"]))
    image = image if len(image) >= len(original) else bytearray(original)
    path.write_bytes(image)
    try:
        with open_image(path, writable=True) as opened:
            opened.reattach(opened.locate())
            assert opened.locate().state is GraftState.OK
    except VmgraftError:
        assert path.read_bytes() == image
        return
    assert path.read_bytes()[: len(original)] == original
    assert problem_of(path) is None
    detach_image(path)
    assert path.read_bytes() == original


def places_of_interest(path):
    at = places(path)
    return [at["head"], at["record"], at["record"] + at["size"], at["tail"], at["tail"] - 20000]
