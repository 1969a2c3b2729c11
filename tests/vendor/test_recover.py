"""Recover: what was lost half-way comes back, what cannot come back is told, and nothing is done twice."""

import os
import struct
import zipfile

import pytest
from vendor_testkit import carried, files_of, package, run, verifies

from vmgraft.errors import FileError, GraftFormatError, ImageInUseError, NoGraftError, UsageError, VmgraftError
from vmgraft.imagefmt.commit import observing
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import detach_image, open_image
from vmgraft.imagefmt.journal import journal_path
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.inspect.report import inspect_image, list_extensions, state_warnings
from vmgraft.vendor.edit import EditOptions, add_extensions
from vmgraft.vendor.graft import AttachOptions, attach, detach
from vmgraft.vendor.recover import recover


class Stopped(BaseException):
    """Stands for a kill: nothing catches it to clean up, since a real kill runs no code."""


@pytest.fixture
def put(acme):
    def attach_one(path, placement=Placement.AUTO):
        attach(path, [package("a")], [acme], AttachOptions(placement=placement))

    return attach_one


def dies(action, after):
    """Run ``action`` in a child that ends without any clean-up right after operation number ``after``."""
    child = os.fork()
    if child == 0:
        count = 0

        def observer(_operation):
            nonlocal count
            count += 1
            if count == after:
                os._exit(9)

        try:
            with observing(observer):
                action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def state_of(path):
    with open_image(path) as image:
        return image.locate().state


@pytest.mark.parametrize("grafted", [False, True])
def test_nothing_to_recover(image, put, grafted):
    if grafted:
        put(image)
    before = files_of(image.parent)
    result = recover(image)
    assert (result.found, result.done) == ((), ())
    assert result.before is result.after is (GraftState.OK if grafted else GraftState.NONE)
    assert files_of(image.parent) == before


def test_every_kill_of_an_edit(image, put, acme):
    put(image)
    start = files_of(image.parent)
    ends = set()
    for number in range(1, 100):
        for item in image.parent.iterdir():
            item.unlink()
        for name, data in start.items():
            (image.parent / name).write_bytes(data)
        killed = dies(lambda: add_extensions(image, [package("b")], [acme], EditOptions()), number)
        reads = carried(image).extensions
        before = files_of(image.parent)
        dry = recover(image, dry_run=True)
        assert files_of(image.parent) == before and dry.done == ()
        result = recover(image)
        assert bool(result.found) == bool(result.done) == (journal_path(image).name in before)
        assert result.found == dry.found
        assert carried(image).extensions == reads and verifies(image, acme)
        assert not journal_path(image).exists()
        assert recover(image).found == ()
        ends.add(len(reads))
        if not killed:
            break
    assert ends == {1, 2}


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
@pytest.mark.parametrize("what", ["attach", "detach"])
def test_every_kill_of_attach_and_detach(image, put, acme, placement, what):
    clean = files_of(image.parent)
    put(image, placement)
    grafted = files_of(image.parent)
    start = clean if what == "attach" else grafted
    for number in range(1, 100):
        for item in image.parent.iterdir():
            item.unlink()
        for name, data in start.items():
            (image.parent / name).write_bytes(data)
        killed = dies(lambda: put(image, placement) if what == "attach" else detach_image(image), number)
        result = recover(image)
        assert result.after in (GraftState.NONE, GraftState.OK)
        if result.after is GraftState.OK:
            assert verifies(image, acme)
            detach_image(image)
        assert files_of(image.parent) == clean
        if not killed:
            return
    raise AssertionError(f"{what} never came to its end")


# --- what other programs do -----------------------------------------------------------------------------------------


def test_a_qcow2_header_rewritten_by_a_foreign_writer(tmp_path, put, acme):
    """As cloud-hypervisor does: the extensions are gone from the chain, the bytes behind them are not."""
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    put(path)
    data = bytearray(path.read_bytes())
    header_length = struct.unpack_from(">I", data, 100)[0]
    at = header_length
    while True:
        _magic, length = struct.unpack_from(">II", data, at)
        following = at + 8 + (length + 7 & ~7)
        if struct.unpack_from(">I", data, following)[0] == 0:
            break
        at = following
    data[at : at + 8] = bytes(8)  # the last extension, which is ours, becomes the end mark
    start = bytes(data).rfind(b"VMGQNOTE")
    data[start : start + 104] = bytes(104)
    path.write_bytes(data)
    assert state_of(path) is GraftState.ORPHANED
    with pytest.raises(NoGraftError):
        carried(path)
    result = recover(path)
    assert (result.before, result.after) == (GraftState.ORPHANED, GraftState.OK)
    assert result.done == ("pointed to the record again",)
    assert verifies(path, acme)
    run("qemu-img", "check", "-q", path)
    assert recover(path).found == ()


def test_a_raw_image_that_lost_a_locator(raw, put, acme):
    whole = None
    for place in (0, -128):
        clean = raw.read_bytes()
        put(raw)
        whole = raw.read_bytes()
        start = -(-len(clean) // 4096) * 4096 if place == 0 else len(whole) - 128
        with raw.open("r+b") as file:
            file.seek(start)
            file.write(bytes(128))
        assert state_of(raw) is GraftState.DAMAGED
        assert recover(raw).after is GraftState.OK
        assert raw.read_bytes() == whole and verifies(raw, acme)
        detach_image(raw)
        assert raw.read_bytes() == clean


def test_an_iso_whose_descriptor_lost_the_locator(tmp_path, templates, put, acme):
    path = tmp_path / "disc.iso"
    path.write_bytes((templates / "disc.iso").read_bytes())
    put(path)
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(34035)
        file.write(bytes(128))
    result = recover(path)
    assert result.found and result.after is GraftState.OK
    assert path.read_bytes() == whole and verifies(path, acme)


def test_the_first_part_of_a_record_is_removed(raw, put):
    clean = raw.read_bytes()
    put(raw)
    os.truncate(raw, len(clean) // 4096 * 4096 + 4096 + 512)
    assert state_of(raw) is GraftState.CUT
    result = recover(raw)
    assert (result.before, result.after) == (GraftState.CUT, GraftState.NONE)
    assert files_of(raw.parent) == {raw.name: clean}
    assert recover(raw).found == ()


@pytest.mark.parametrize("name", ["disk.vhd", "disk.vhdx", "archive.zip"])
def test_a_lone_sidecar_is_pointed_to_again(tmp_path, put, acme, name):
    """As an attach killed behind the sidecar leaves it; where the image has changed since, it is not believed."""
    path = tmp_path / name
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo("a"), b"content")
    else:
        run("qemu-img", "create", "-q", "-f", "vpc" if path.suffix == ".vhd" else "vhdx", path, "1M")
    clean = path.read_bytes()
    put(path, Placement.SIDECAR)
    whole = path.read_bytes()
    path.write_bytes(clean)
    assert recover(path, dry_run=True).before is GraftState.ORPHANED
    assert recover(path).done == ("pointed to the record again",)
    assert verifies(path, acme) and len(path.read_bytes()) == len(whole)
    detach_image(path)
    assert files_of(path.parent) == {name: clean}


def test_a_lone_sidecar_of_a_changed_archive_is_left_alone(tmp_path, put):
    path = tmp_path / "archive.zip"
    for content in (b"content", b"another content"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(zipfile.ZipInfo("a"), content)
        if not sidecar_path(path).exists():
            put(path, Placement.SIDECAR)
    assert state_of(path) is GraftState.ORPHANED
    before = files_of(path.parent)
    with pytest.raises(GraftFormatError, match="does not point to the sidecar") as caught:
        recover(path)
    assert "has changed since" in str(caught.value.__cause__)
    assert caught.value.hint and files_of(path.parent) == before


# --- beyond repair --------------------------------------------------------------------------------------------------


def beyond(path, match):
    before = files_of(path.parent)
    with pytest.raises(GraftFormatError, match=match) as caught:
        recover(path)
    assert files_of(path.parent) == before
    assert caught.value.hint
    assert recover(path, dry_run=True).found
    return caught.value


def test_a_lost_sidecar_cannot_be_made_up(tmp_path, put):
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    put(path, Placement.SIDECAR)
    kept = sidecar_path(path).read_bytes()
    sidecar_path(path).unlink()
    assert "put the sidecar back" in beyond(path, "missing").hint
    sidecar_path(path).write_bytes(kept[:-5])
    beyond(path, "record-cut")
    sidecar_path(path).write_bytes(kept)
    assert recover(path).found == ()


def test_a_damaged_record_stays_damaged(raw, put):
    put(raw)
    data = raw.read_bytes()
    at = data.index(b'"attached"')
    raw.write_bytes(data[:at] + b"X" + data[at + 1 :])
    beyond(raw, "record-overwritten|digest")


def test_a_file_that_grew_keeps_what_others_wrote(raw, put):
    put(raw)
    with raw.open("ab") as file:
        file.write(b"theirs" * 100)
    beyond(raw, "grew")


def test_a_journal_of_another_disk_is_reported_and_kept(raw, put, acme):
    put(raw)
    number = 0
    while not journal_path(raw).exists() or state_of(raw) is not GraftState.NONE:
        number += 1
        dies(lambda: add_extensions(raw, [package("b")], [acme], EditOptions()), number)
    with raw.open("ab") as file:
        file.write(bytes(4096))
    before = files_of(raw.parent)
    with pytest.raises(GraftFormatError, match="was made for"):
        recover(raw)
    assert files_of(raw.parent) == before


def test_in_use_and_unreadable(image, put, tmp_path):
    put(image)
    with open_image(image, writable=True):
        assert recover(image).found == ()  # nothing to do needs no lock
    with pytest.raises(FileError):
        recover(tmp_path / "missing")


def test_in_use_with_something_to_do(raw, put):
    put(raw)
    start = raw.stat().st_size - 128
    with raw.open("r+b") as file:
        file.seek(start)
        file.write(bytes(128))
    before = files_of(raw.parent)
    with open_image(raw, writable=True), pytest.raises(ImageInUseError):
        recover(raw)
    assert files_of(raw.parent) == before


def test_a_full_disk_during_recovery(raw, put, acme, monkeypatch):
    put(raw)
    number = 0
    while not journal_path(raw).exists() or state_of(raw) is not GraftState.NONE:
        number += 1
        dies(lambda: add_extensions(raw, [package("b")], [acme], EditOptions()), number)

    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(VmgraftError, match="No space"):
            recover(raw)
    assert carried(raw).extensions == [("a", "1")] and verifies(raw, acme)
    assert recover(raw).after is GraftState.OK
    assert verifies(raw, acme)


# --- other commands on an image whose change was interrupted --------------------------------------------------------


@pytest.fixture
def halfway(image, put, acme):
    """An image that carries nothing itself: the edit died between detach and attach."""
    clean = image.read_bytes()
    put(image)
    grafted = image.read_bytes()
    for number in range(1, 100):
        journal_path(image).unlink(missing_ok=True)
        image.write_bytes(grafted)
        dies(lambda: add_extensions(image, [package("b")], [acme], EditOptions()), number)
        if state_of(image) is not GraftState.OK:
            return image, clean
    raise AssertionError("there is no such moment")


def test_list_and_inspect_show_the_journal(halfway):
    path, _ = halfway
    listing = list_extensions(path)
    assert (listing["state"], listing["recordFile"]) == ("ok", journal_path(path).name)
    assert [item["id"] for item in listing["unverified"]["extensions"]] == ["com.example.a"]
    assert "interrupted" in inspect_image(path)["graft"]["detail"]
    with open_image(path) as opened:
        (warning,) = state_warnings(opened)
    assert journal_path(path).name in warning


def test_the_next_edit_goes_on_from_there(halfway, acme):
    path, clean = halfway
    add_extensions(path, [package("c")], [acme], EditOptions())
    assert carried(path).extensions == [("a", "1"), ("c", "1")] and verifies(path, acme)
    detach(path)
    assert files_of(path.parent) == {path.name: clean}


def test_copies_of_it(halfway, acme):
    path, clean = halfway
    before = files_of(path.parent)
    original, edited = path.with_name(f"original{path.suffix}"), path.with_name(f"edited{path.suffix}")
    assert detach(path, output=original).read_bytes() == clean
    add_extensions(path, [package("c")], [acme], EditOptions(output=edited))
    assert carried(edited).extensions == [("a", "1"), ("c", "1")] and verifies(edited, acme)
    assert files_of(path.parent) == {**before, original.name: clean, edited.name: edited.read_bytes()}


def test_attach_is_refused(halfway, put):
    path, _ = halfway
    before = files_of(path.parent)
    with pytest.raises(UsageError, match="carries a graft already") as caught:
        put(path)
    assert "vmgraft recover" in caught.value.hint
    assert files_of(path.parent) == before


def test_an_output_beside_a_journal_is_refused(raw, put, acme):
    put(raw)
    output = raw.with_name("out.img")
    journal_path(output).write_bytes(b"VMGRAFT\0")
    with pytest.raises(FileError, match="exists already"):
        add_extensions(raw, [package("b")], [acme], EditOptions(output=output))
    assert not output.exists()
