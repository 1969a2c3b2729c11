"""The crash-safe writer, atomic outputs, and copies."""

import os
import stat
from pathlib import Path

import pytest
from imagefmt_helpers import operations_of, run_and_die

from vmgraft.errors import FileError, UsageError
from vmgraft.imagefmt import commit
from vmgraft.imagefmt.blob import BytesBlob
from vmgraft.imagefmt.commit import Writer, atomic_output, observing, remove_file, write_all
from vmgraft.imagefmt.contract import Locator, Placement
from vmgraft.imagefmt.copy import copy_file
from vmgraft.imagefmt.journal import journal_path
from vmgraft.imagefmt.sidecar import sidecar_path, write_record_file


def save(path, data, **options):
    with atomic_output(path, **options) as fd:
        write_all(fd, data, file=path)


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def test_the_writer_writes_and_tells(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with open(path, "r+b") as file:
        writer = Writer(file.fileno(), file=path)
        seen = operations_of(lambda: (writer.write(2, b"ab"), writer.sync(), writer.truncate(5)))
    assert path.read_bytes() == b"01ab4"
    assert [(item.name, item.offset, item.data) for item in seen] == [
        ("write", 2, b"ab"),
        ("sync", 0, b""),
        ("truncate", 5, b""),
    ]


def test_writer_errors_are_ours(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_RDONLY)
    writer = Writer(fd, file=path)
    for action in (lambda: writer.write(7, b"a"), lambda: writer.truncate(0)):
        with pytest.raises(FileError) as caught:
            action()
        assert caught.value.file == str(path)
    os.close(fd)
    with pytest.raises(FileError):
        writer.sync()


def test_a_full_disk_is_reported():
    fd = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(FileError, match="No space left"):
        Writer(fd, file="/dev/full").write(0, b"data")
    os.close(fd)


def test_observing_ends_with_its_block(tmp_path):
    seen = []
    with observing(seen.append):
        save(tmp_path / "a", b"a")
    count = len(seen)
    save(tmp_path / "b", b"b")
    assert len(seen) == count > 0


@pytest.fixture(params=["unnamed", "named"])
def way(request, monkeypatch):
    """Both ways to make an output: without a name until it is done, and under a temporary one."""
    if request.param == "named":
        monkeypatch.setattr(commit.os, "O_TMPFILE", os.O_DIRECTORY | os.O_WRONLY)
    return request.param


def test_atomic_output(tmp_path, way):
    target = tmp_path / "out"
    save(target, b"first")
    assert target.read_bytes() == b"first"
    with pytest.raises(UsageError, match="exists"):
        save(target, b"second")
    save(target, b"second", replace=True)
    assert target.read_bytes() == b"second"
    assert names_in(tmp_path) == ["out"]


def test_an_error_leaves_nothing(tmp_path, way):
    target = tmp_path / "out"

    def fail():
        with atomic_output(target) as fd:
            os.write(fd, b"half")
            raise FileError("stop")

    with pytest.raises(FileError, match="stop"):
        fail()
    assert names_in(tmp_path) == []


def test_a_name_taken_meanwhile_is_not_replaced(tmp_path, way):
    target = tmp_path / "out"
    with pytest.raises(UsageError), atomic_output(target) as fd:
        os.write(fd, b"ours")
        target.write_bytes(b"theirs")
    assert target.read_bytes() == b"theirs"
    assert names_in(tmp_path) == ["out"]


@pytest.mark.parametrize("replace", [False, True])
def test_links_and_folders_are_not_touched(tmp_path, replace):
    real = tmp_path / "real"
    real.write_bytes(b"keep")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("link", "dangling", "folder"):
        with pytest.raises(UsageError, match="not a regular file"):
            save(tmp_path / name, b"new", replace=replace)
    assert real.read_bytes() == b"keep"
    assert not (tmp_path / "nowhere").exists()


def test_a_missing_folder_is_a_clear_error(tmp_path, way):
    with pytest.raises(FileError, match="created"):
        save(tmp_path / "no" / "out", b"x")


@pytest.mark.parametrize("replace", [False, True])
def test_kill_at_every_step_of_an_output(tmp_path, replace):
    target = tmp_path / "out"
    for after in range(1, 20):
        target.unlink(missing_ok=True)
        if replace:
            target.write_bytes(b"old")
        killed = run_and_die(lambda: save(target, b"new", replace=replace), after)
        assert (target.read_bytes() if target.exists() else None) in (b"old" if replace else None, b"new")
        if not killed:
            assert target.read_bytes() == b"new"
            return
    raise AssertionError("never came to an end")


@pytest.fixture
def disk_log(monkeypatch):
    """What reaches the disk, in order: (step, file or folder); steps are names given and taken, and real flushes."""
    seen, fsync = [], os.fsync

    def flush(fd):
        folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        seen.append(("fsync", Path(f"/proc/self/fd/{fd}").readlink() if folder else None))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", flush)

    def log(operation):
        if operation.name in ("write", "link", "rename", "unlink"):
            seen.append((operation.name, operation.file))

    with observing(log):
        yield seen


@pytest.mark.parametrize("replace", [False, True])
def test_an_output_is_flushed_before_it_gets_its_name_and_the_name_after(tmp_path, way, replace, disk_log):
    target = tmp_path / "out"
    if replace:
        target.write_bytes(b"old")
    save(target, b"new", replace=replace)
    steps = [item for item in disk_log if item[0] != "link" or item[1] == target]
    named = ("rename" if replace else "link", target)
    assert steps == [("write", target), ("fsync", None), named, ("fsync", tmp_path)]


@pytest.mark.parametrize("name", [sidecar_path, journal_path])
def test_sidecar_and_journal_are_flushed_before_they_get_their_names(tmp_path, name, disk_log):
    image = tmp_path / "disk.img"
    image.touch()
    target = name(image)
    record = BytesBlob(b"r" * 100)
    write_record_file(target, image, Locator(Placement.SIDECAR, 0, 100, record.sha256, bytes(32), 0), record)
    assert [item[0] for item in disk_log] == ["write", "write", "fsync", "link", "fsync"]
    assert disk_log[-2:] == [("link", target), ("fsync", tmp_path)]


def test_a_removed_name_is_flushed(tmp_path, disk_log):
    path = tmp_path / "gone"
    path.write_bytes(b"x")
    remove_file(path)
    assert disk_log == [("unlink", path), ("fsync", tmp_path)]


@pytest.mark.parametrize(("offset", "size"), [(0, 20000), (1, 7), (4090, 12), (8000, 300), (5000, 9000), (7, 0)])
def test_wiping_leaves_holes_alone(tmp_path, offset, size):
    path = tmp_path / "file"
    before = bytearray(b"x" * 6000 + bytes(7000) + b"y" * 7000)
    path.write_bytes(before)
    with open(path, "r+b") as file:
        writer = Writer(file.fileno(), file=path)
        seen = operations_of(lambda: writer.wipe(offset, size))
    wanted = before[:offset] + bytes(size) + before[offset + size :]
    assert path.read_bytes() == wanted
    for item in seen:
        assert offset <= item.offset and item.offset + len(item.data) <= offset + size
        assert any(before[item.offset : item.offset + 4096])
    assert sum(len(item.data) for item in seen) <= size - (4096 if size == 20000 else 0)


def test_remove_file(tmp_path):
    path = tmp_path / "gone"
    path.write_bytes(b"x")
    remove_file(path)
    remove_file(path)
    assert not path.exists()


@pytest.fixture(params=["kernel", "buffer"])
def sparse(request, tmp_path, monkeypatch):
    """A sparse file, copied inside the kernel or through a buffer."""
    if request.param == "buffer":

        def refuse(*_args):
            raise OSError(18, "cross-device")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    path = tmp_path / "source"
    with open(path, "wb") as file:
        file.truncate(20 << 20)
        file.seek(3 << 20)
        file.write(os.urandom(100_000))
        file.seek((20 << 20) - 3)
        file.write(b"end")
    path.chmod(0o640)
    return path


def test_copies_keep_bytes_holes_and_mode(tmp_path, sparse):
    target = tmp_path / "copy"
    copy_file(sparse, target)
    assert target.read_bytes() == sparse.read_bytes()
    assert target.stat().st_blocks <= sparse.stat().st_blocks + 64
    assert target.stat().st_mode == sparse.stat().st_mode
    with pytest.raises(UsageError):
        copy_file(sparse, target)
    copy_file(sparse, target, replace=True)


def test_copy_errors(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x")
    with pytest.raises(UsageError, match="same file"):
        copy_file(source, source, replace=True)
    with pytest.raises(FileError):
        copy_file(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(FileError, match="regular file"):
        copy_file(tmp_path, tmp_path / "out")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileError, match="regular file"):
        copy_file(tmp_path / "fifo", tmp_path / "out")


def test_names_too_long_are_a_clear_error(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"x")
    with pytest.raises(FileError, match="too long"):
        copy_file(source, tmp_path / ("n" * 256))
    longest = tmp_path / ("n" * 255)
    for replace in (False, True):
        copy_file(source, longest, replace=replace)
    assert set(names_in(tmp_path)) == {longest.name, "source"}
