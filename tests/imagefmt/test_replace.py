"""Replacing a graft in place: before or after at every moment, and the way back when something fails."""

import itertools
import os
import shutil
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from imagefmt_helpers import (
    TREE,
    attach,
    content_of,
    iso_bytes,
    operations_of,
    problem_of,
    run_and_die,
    sample_sections,
    state_of,
    tool,
)

from vmgraft.errors import FileError, GraftFormatError, NoRoomError, UsageError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import detach_image, open_graft, open_image
from vmgraft.imagefmt.journal import journal_path, locate_graft
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.replace import finish_change, replace_sections
from vmgraft.imagefmt.sidecar import sidecar_path

INLINE, SIDECAR = Placement.INLINE, Placement.SIDECAR
RAW = bytes(range(256)) * 40 + b"odd"


def new_sections():
    return [
        *sample_sections()[:1],
        Section(SectionKind.MANIFEST, b'{"id":"com.example.other"}\n'),
        *sample_sections()[3:],
    ]


def qcow2_bytes(folder):
    path = folder / "template.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 64k", path)
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.fixture
def folder():
    """A folder in memory, where there is one: thousands of flushes to a disk would be most of the time."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base) as name:
        yield Path(name)


@pytest.fixture(params=["raw", "iso", "iso-taken", "qcow2"])
def original(request, tmp_path, folder):
    """A clean image, alone in its folder."""
    name, make = {
        "raw": ("disk.img", lambda: RAW),
        "iso": ("disc.iso", iso_bytes),
        "iso-taken": ("disc.iso", lambda: iso_bytes(field=b"x" * 512)),
        "qcow2": ("disk.qcow2", lambda: qcow2_bytes(tmp_path)),
    }[request.param]
    path = folder / name
    path.write_bytes(make())
    return path


def record_of(path):
    """The SHA-256 of the record that a reader finds, which must be sound."""
    with open_image(path) as image:
        graft = open_graft(image)
        assert graft.format_problem() is None
        return graft.located.record.sha256


def files_of(path):
    return {item.name: item.read_bytes() for item in path.parent.iterdir()}


def put_back(path, files):
    for item in path.parent.iterdir():
        item.unlink()
    for name, data in files.items():
        (path.parent / name).write_bytes(data)


def replace(path, placement, *, old=None, **more):
    return replace_sections(
        path, new_sections(), old=old or record_of(path), placement=placement, tree_digest=TREE, **more
    )


@pytest.mark.parametrize("before", [INLINE, SIDECAR])
@pytest.mark.parametrize("after", [INLINE, SIDECAR])
def test_before_or_after_at_every_operation(original, before, after):
    clean, pristine = original.read_bytes(), content_of(original)
    attach(original, before)
    start, old = files_of(original), record_of(original)
    replace(original, after)
    new, seen = record_of(original), []
    assert not journal_path(original).exists()
    for number in range(1, 100):
        put_back(original, start)
        killed = run_and_die(lambda: replace(original, after), number)
        found = record_of(original)
        assert found in (old, new)
        assert content_of(original) == pristine
        seen.append(found)
        finish_change(original)
        assert record_of(original) == found
        assert not journal_path(original).exists()
        if found == old:
            assert files_of(original) == start  # whatever happened in between, not a byte of it is left
        assert finish_change(original) is None
        detach_image(original)
        assert files_of(original) == {original.name: clean}
        if not killed:
            break
    turn = seen.index(new)
    assert turn >= 4 and set(seen[:turn]) == {old} and set(seen[turn:]) == {new}


@pytest.mark.parametrize("before", [INLINE, SIDECAR])
def test_a_restore_is_killed_too(original, before):
    """Killed in the middle, then killed at every operation of the recovery: still the old graft."""
    clean = original.read_bytes()
    attach(original, before)
    old = record_of(original)
    count = len(operations_of(lambda: replace(original, SIDECAR)))
    detach_image(original)
    for first in range(5, count, count // 3):
        attach(original, before)
        run_and_die(lambda: replace(original, SIDECAR), first)
        middle = files_of(original)
        for second in range(1, 200, 2):
            put_back(original, middle)
            expected = record_of(original)
            killed = run_and_die(lambda: finish_change(original), second)
            assert record_of(original) == expected
            finish_change(original)
            assert record_of(original) == expected
            if not killed:
                break
        assert old == record_of(original) or not journal_path(original).exists()
        detach_image(original)
        assert files_of(original) == {original.name: clean}


def apply(data, operations):
    """What the disk holds when these writes and truncations reached it."""
    data = bytearray(data)
    for item in operations:
        data = data.ljust(item.offset, b"\0")
        if item.name == "truncate":
            data = data[: item.offset]
        else:
            data[item.offset : item.offset + len(item.data)] = item.data
    return bytes(data)


def test_power_loss_between_any_two_flushes(original):
    """Of what was not flushed yet, any subset may have reached the disk; the journal was flushed before all of it."""
    pristine = content_of(original)
    attach(original, INLINE)
    start, old, number = original.read_bytes(), record_of(original), 1
    while not journal_path(original).exists():
        run_and_die(lambda: replace(original, INLINE), number)
        number += 1
    journal = journal_path(original).read_bytes()
    journal_path(original).unlink()
    operations = [item for item in operations_of(lambda: replace(original, INLINE)) if item.file == original]
    new, seen, flushed, pending = record_of(original), set(), [], []
    for item in operations:
        if item.name != "sync":
            pending.append(item)
            continue
        for size in range(len(pending) + 1):
            for done in itertools.combinations(pending, size):
                put_back(
                    original, {original.name: apply(start, [*flushed, *done]), journal_path(original).name: journal}
                )
                found = record_of(original)
                assert found in (old, new) and content_of(original) == pristine
                seen.add(found)
        flushed, pending = [*flushed, *pending], []
    assert seen == {old, new} and not pending


@pytest.mark.parametrize("before", [INLINE, SIDECAR])
def test_detach_in_the_middle_gives_the_original(original, before):
    clean = original.read_bytes()
    attach(original, before)
    start = files_of(original)
    for number in range(1, 200, 2):
        put_back(original, start)
        killed = run_and_die(lambda: replace(original, SIDECAR), number)
        detach_image(original)
        assert files_of(original) == {original.name: clean}
        if not killed:
            return
    raise AssertionError("replace never came to its end")


@pytest.mark.parametrize("before", [INLINE, SIDECAR])
@pytest.mark.parametrize("after", [INLINE, SIDECAR])
def test_a_failure_at_every_write_goes_back(original, before, after, monkeypatch):
    """ENOSPC at the n-th write, and again at each one after it until the disk has room for the way back."""
    attach(original, before)
    start, old = files_of(original), record_of(original)
    real = os.pwrite
    for number in range(1, 100):
        put_back(original, start)
        calls = 0

        def full(fd, data, offset, number=number):
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(28, "No space left on device")
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", full)
        try:
            replace(original, after, old=old)
            done = True
        except FileError as error:
            assert "No space left" in str(error)
            done = False
        monkeypatch.setattr(os, "pwrite", real)
        if done:
            assert number > 3
            return
        assert record_of(original) == old
        assert files_of(original) == start
    raise AssertionError("replace never came to its end")


def test_a_disk_that_stays_full_keeps_the_old_graft_in_the_journal(original, monkeypatch):
    attach(original, SIDECAR)
    start, old, pristine = files_of(original), record_of(original), content_of(original)
    real = os.pwrite
    left_over = 0
    for number in range(3, 12):
        put_back(original, start)
        calls = 0

        def full(fd, data, offset, number=number):
            nonlocal calls
            calls += 1
            if calls >= number:
                raise OSError(28, "No space left on device")
            return real(fd, data, offset)

        monkeypatch.setattr(os, "pwrite", full)
        try:
            replace(original, SIDECAR, old=old)
        except FileError:
            left_over += journal_path(original).exists()
        monkeypatch.setattr(os, "pwrite", real)
        assert content_of(original) == pristine
        finish_change(original)
        if record_of(original) == old:
            assert files_of(original) == start
    assert left_over >= 1


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), UsageError("no"), OSError(5, "broken")])
def test_a_check_that_fails_brings_the_old_one_back(original, problem):
    attach(original, INLINE)
    start, old = files_of(original), record_of(original)

    def fail():
        assert record_of(original) != old
        raise problem

    with pytest.raises(type(problem)):
        replace(original, SIDECAR, check=fail)
    assert files_of(original) == start


def test_no_room_brings_the_old_one_back(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(RAW)
    attach(path, INLINE)
    start = files_of(path)
    noise = b"".join(sha256(number.to_bytes(4, "little")).digest() for number in range(40_000))
    with pytest.raises(NoRoomError):
        replace_sections(
            path, [Section(SectionKind.FILES, noise)], old=record_of(path), placement=INLINE, tree_digest=TREE
        )
    assert files_of(path) == start


def test_only_the_graft_that_was_looked_at_is_replaced(original):
    attach(original, INLINE)
    start = files_of(original)
    with pytest.raises(UsageError, match="somebody else"):
        replace(original, INLINE, old=bytes(32))
    assert files_of(original) == start


def test_kinds_that_are_kept(original):
    files = Section(SectionKind.FILES, sha256(b"f").digest() * 1000, compress=True)
    attach(original, INLINE, [*sample_sections(), files])
    replace(original, INLINE, keep=(SectionKind.FILES,))
    with open_image(original) as image:
        record = open_graft(image).record
    (found,) = record.of_kind(SectionKind.FILES)
    assert record.raw(found) == files.raw and found.compressed
    assert len(record.of_kind(SectionKind.MODULE)) == 0


# --- the journal ----------------------------------------------------------------------------------------------------


def interrupted(path, placement=INLINE):
    """Leave ``path`` as a kill right after the detach does."""
    attach(path, placement)
    for number in range(1, 100):
        run_and_die(lambda: replace(path, SIDECAR), number)
        if state_of(path) is not GraftState.OK:
            return
    raise AssertionError("there is no such moment")


def test_readers_say_where_the_graft_is(original):
    interrupted(original)
    with open_image(original) as image:
        assert image.locate().state in (GraftState.NONE, GraftState.ORPHANED)
        located = locate_graft(image)
    assert located.state is GraftState.OK and located.record_file == journal_path(original)
    assert "interrupted" in located.detail and journal_path(original).name in located.detail


def test_attach_refuses_while_a_change_is_unfinished(original):
    interrupted(original)
    before = files_of(original)
    with pytest.raises(UsageError, match="interrupted") as caught:
        attach(original, INLINE)
    assert "recover" in caught.value.hint
    assert {name: files_of(original)[name] for name in before if "journal" in name} == {
        name: data for name, data in before.items() if "journal" in name
    }


def test_a_journal_beside_another_disk_is_not_taken(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(RAW)
    interrupted(path)
    path.write_bytes(RAW + bytes(4096))
    with open_image(path) as image:
        located = locate_graft(image)
    assert located.state is GraftState.NONE and "was made for" in located.detail
    assert finish_change(path) is None
    with pytest.raises(UsageError, match="was made for"):
        attach(path, INLINE)
    kept = journal_path(path).read_bytes()
    journal_path(path).rename(tmp_path / "away")
    attach(path, INLINE)
    detach_image(path)
    assert path.read_bytes() == RAW + bytes(4096) and (tmp_path / "away").read_bytes() == kept


@pytest.mark.parametrize("kind", ["notes", "symlink", "fifo", "folder", "cut", "huge"])
def test_other_things_of_that_name_are_left_alone(original, kind, tmp_path):
    clean = original.read_bytes()
    attach(original, INLINE)
    old = record_of(original)
    path = journal_path(original)
    if kind == "notes":
        path.write_bytes(b"my notes")
    elif kind == "symlink":
        (tmp_path / "target").write_bytes(b"VMGRAFT\0precious")
        path.symlink_to(tmp_path / "target")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "cut":
        path.write_bytes(b"VMGRAFT\0")
    else:
        path.write_bytes(b"VMGRAFT\0")
        os.truncate(path, (1 << 30) + 200)
    assert record_of(original) == old
    if kind in ("notes", "symlink", "fifo", "folder"):
        with pytest.raises((FileError, UsageError)):
            replace(original, INLINE)
        assert record_of(original) == old
    detach_image(original)
    assert original.read_bytes() == clean
    assert os.path.lexists(path)
    assert state_of(original) is GraftState.NONE
    if kind == "symlink":
        assert (tmp_path / "target").read_bytes() == b"VMGRAFT\0precious"
    shutil.rmtree(path) if kind == "folder" else path.unlink()


def test_a_damaged_journal_is_never_taken(original):
    interrupted(original)
    path = journal_path(original)
    data = path.read_bytes()
    for spoiled in (data[:-1], data + b"\0", data[:-1] + bytes([data[-1] ^ 1]), b"X" + data[1:], data[:200], b""):
        path.write_bytes(spoiled)
        with open_image(original) as image:
            assert locate_graft(image).state in (GraftState.NONE, GraftState.ORPHANED)
            assert "of no use" in locate_graft(image).detail
        assert finish_change(original) is None
        assert path.read_bytes() == spoiled


def test_a_stray_sidecar_stands_in_the_way(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(RAW)
    attach(path, SIDECAR)
    kept = sidecar_path(path).read_bytes()
    detach_image(path)
    attach(path, INLINE)
    sidecar_path(path).write_bytes(kept)
    with pytest.raises(UsageError, match="lies beside"):
        replace(path, INLINE)
    assert problem_of(path) is None and sidecar_path(path).read_bytes() == kept


def test_only_sound_grafts_are_replaced(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(RAW)
    with pytest.raises((UsageError, GraftFormatError)):
        replace(path, INLINE, old=bytes(32))
    assert files_of(path) == {"disk.img": RAW}


# --- the other containers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["disk.vhdx", "disk.vmdk", "disk.vdi", "disk.vhd", "disk.zip"])
def test_every_container_is_before_or_after(folder, name):
    """The journal knows nothing of containers; each brings an attach and a detach that it holds together."""
    path = folder / name
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hello" * 100)
    else:
        tool("qemu-img", "create", "-q", "-f", {".vhd": "vpc"}.get(path.suffix, path.suffix[1:]), path, "4M")
    clean, pristine = path.read_bytes(), content_of(path)
    attach(path, Placement.AUTO)
    start, old, seen = files_of(path), record_of(path), []
    replace(path, Placement.AUTO)
    new = record_of(path)
    for number in range(1, 300):
        put_back(path, start)
        killed = run_and_die(lambda: replace(path, Placement.AUTO), number)
        found = record_of(path)
        assert found in (old, new) and content_of(path) == pristine
        seen.append(found)
        finish_change(path)
        assert record_of(path) == found and not journal_path(path).exists()
        assert found == new or files_of(path) == start
        detach_image(path)
        assert files_of(path) == {path.name: clean}
        if not killed:
            break
    turn = seen.index(new)
    assert turn >= 4 and set(seen[:turn]) == {old} and set(seen[turn:]) == {new}
