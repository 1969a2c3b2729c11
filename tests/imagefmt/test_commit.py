"""The crash-safe writer, atomic outputs, and copies."""

import os

import pytest
from imagefmt_helpers import operations_of, run_and_die

from vmgraft.errors import FileError, UsageError
from vmgraft.imagefmt import commit
from vmgraft.imagefmt.commit import Writer, atomic_output, observing, remove_file, write_all
from vmgraft.imagefmt.copy import copy_file


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
