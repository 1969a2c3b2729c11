"""The system says no, in the middle of it: full disks, read-only files, files that shrink while they are read."""

import errno
import os
import resource
import shutil
import signal
import tempfile
import traceback
from contextlib import suppress
from pathlib import Path

import pytest
from imagefmt_helpers import GRUB_ISO, attach, content_of, digest, iso_bytes, problem_of, state_of, tool

from vmgraft.errors import FileError, MalformedImageError, NoGraftError, VmgraftError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import Graft, detach_image, open_graft, open_image
from vmgraft.imagefmt.sidecar import sidecar_path


@pytest.fixture(params=["raw", "iso9660", "qcow2"])
def image(request, tmp_path):
    path = tmp_path / "image"
    if request.param == "raw":
        path.write_bytes(os.urandom(20_001))
    elif request.param == "iso9660":
        path.write_bytes(iso_bytes(tail=b"odd"))
    else:
        tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
        tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 64k", path)
    return path


def in_child(action):
    """Run ``action`` in a child process; return class and last words of the error it ended with, or "done" twice."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = ""
        try:
            action()
            answer = "done: done"
        except VmgraftError as error:
            answer = f"{type(error).__name__}: {error.message.rsplit(': ')[-1]}"
        finally:
            os.write(writer, (answer or traceback.format_exc()).encode())
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        answer = file.read().decode()
    os.waitpid(child, 0)
    name, _, words = answer.partition(": ")
    return name, words


def with_file_limit(action, size):
    """Run ``action`` where no file may grow beyond ``size`` bytes: the kernel cuts writes as a full disk does."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        action()

    return in_child(limited)


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_a_full_disk_leaves_the_image_as_it_was(image, placement):
    before, pristine = digest(image), content_of(image)
    size = image.stat().st_size
    answers = set()
    for limit in (0, 100, size, size + 100, size + 3000, size + 5000, size + (1 << 20)):
        answer = with_file_limit(lambda: attach(image, placement), limit)
        answers.add(answer[0])
        assert content_of(image) == pristine
        if answer[0] == "done":
            assert problem_of(image) is None
            detach_image(image)
        else:
            assert answer == ("FileError", "File too large"), answer
            assert state_of(image) is GraftState.NONE
        attach(image, placement)  # works at once when there is room again
        detach_image(image)
        assert digest(image) == before
        assert [path.name for path in image.parent.iterdir()] == [image.name]
    assert answers == {"done", "FileError"}


@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
def test_a_full_disk_does_not_keep_from_detaching(image, placement):
    """Detach needs no new room: raw and ISO get shorter, qcow2 changes its first cluster."""
    before = digest(image)
    attach(image, placement)
    assert with_file_limit(lambda: detach_image(image), image.stat().st_size) == ("done", "done")
    assert digest(image) == before


def test_a_file_that_shrinks_while_it_is_read(image):
    attach(image, Placement.INLINE)
    for left in (0, 1, 600, 33_000, 40_000, 66_000):
        whole = image.read_bytes()
        with open_image(image) as opened:
            graft = open_graft(opened)
            stored = graft.located.locator.file_size
            os.truncate(image, min(left, len(whole)))
            try:
                graft.content(True)
            except (FileError, MalformedImageError) as error:
                assert error.file
            else:
                assert left >= stored or opened.format_name == "qcow2"
            try:
                opened.metadata()
                Graft(opened).format_problem()
            except VmgraftError as error:
                assert error.file
        image.write_bytes(whole)


def test_a_file_that_grows_while_it_is_read_shows_what_was_there(image):
    attach(image, Placement.INLINE)
    with open_image(image) as opened:
        expected = opened.read(0, opened.virtual_size)
        with image.open("ab") as file:
            file.write(b"more" * 5000)
        assert opened.read(0, opened.virtual_size) == expected
        assert open_graft(opened).content(True).virtual_size == len(expected)


@pytest.fixture
def open_folder():
    """A folder that an unprivileged user can reach; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(path.stat().st_mode | 0o055)
        yield path


@pytest.mark.parametrize("what", ["file", "folder"])
def test_read_only(image, open_folder, what):
    path = Path(shutil.copy(image, open_folder))
    before = digest(path)
    path.chmod(0o444 if what == "file" else 0o666)
    open_folder.chmod(0o555)

    def act():
        if os.geteuid() == 0:  # root may write anything
            os.setgid(65534)
            os.setuid(65534)
        attach(path, Placement.INLINE if what == "file" else Placement.SIDECAR)

    assert in_child(act) == ("FileError", "Permission denied")
    open_folder.chmod(0o755)
    assert digest(path) == before
    assert state_of(path) is GraftState.NONE
    assert not sidecar_path(path).exists()


def test_the_grub_disc_on_a_full_disk(tmp_path):
    image = tmp_path / "grub.iso"
    image.write_bytes(GRUB_ISO.read_bytes())
    before = digest(image)
    limit = image.stat().st_size + 2048
    assert with_file_limit(lambda: attach(image, Placement.INLINE), limit) == ("FileError", "File too large")
    assert digest(image) == before


#: The calls that change a file, and what a failing disk makes of them.
CALLS = ("pwrite", "fsync", "ftruncate", "link", "unlink")


class FailingDisk:
    """Lets the ``turn``-th change fail with EIO, and with ``broken`` every one behind it as well."""

    def __init__(self, monkeypatch, turn, *, broken):
        self.turn, self.broken, self.count = turn, broken, 0
        for name in CALLS:
            monkeypatch.setattr(os, name, self.failing(getattr(os, name)))

    def failing(self, call):
        def wrapped(*args, **kwargs):
            self.count += 1
            if self.count == self.turn or (self.broken and self.count > self.turn):
                raise OSError(errno.EIO, "Input/output error")
            return call(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize("broken", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("placement", [Placement.INLINE, Placement.SIDECAR])
@pytest.mark.parametrize("direction", ["attach", "detach"])
def test_every_change_fails_in_turn(image, placement, direction, broken):
    """One clear error, the content untouched whatever failed, and the next try goes through."""
    before, pristine = image.read_bytes(), content_of(image)
    for turn in range(1, 60):
        if direction == "detach":
            attach(image, placement)
        with pytest.MonkeyPatch.context() as patch:
            disk = FailingDisk(patch, turn, broken=broken)
            try:
                attach(image, placement) if direction == "attach" else detach_image(image)
                failed = False
            except FileError as error:
                failed = True
                assert "Input/output error" in error.message
        assert content_of(image) == pristine, turn
        if failed and direction == "attach" and state_of(image) is not GraftState.OK:
            attach(image, placement)
        if state_of(image) is GraftState.OK:
            assert problem_of(image) is None
            detach_image(image)
        else:
            with suppress(NoGraftError):
                detach_image(image)
        assert image.read_bytes() == before, turn
        assert [path.name for path in image.parent.iterdir()] == [image.name], turn
        if disk.count < turn:
            assert turn > 2
            return
    raise AssertionError("it never came to its end")
