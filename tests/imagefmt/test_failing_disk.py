"""The disk fails at each change of attach and detach in turn: one clear error, before or after, and a retry works."""

import errno
import os
from hashlib import sha256

import pytest
from imagefmt_helpers import attach, content_of, problem_of, sample_sections, state_of
from sweep_images import CASES, IDS, is_clean, memory_folder, put, restore, sidecar_bytes

from vmgraft.errors import FileError
from vmgraft.imagefmt.contract import GraftState
from vmgraft.imagefmt.graft import detach_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.sidecar import sidecar_path

#: Calls that change a file, and those of them that need room on a full disk.
CHANGES = ("pwrite", "fsync", "ftruncate", "link", "unlink", "rename")
NEED_ROOM = ("pwrite", "link", "rename")
#: Incompressible, and several blocks of the file system long.
NOISE = b"".join(sha256(bytes([number])).digest() for number in range(256)) * 2


class FailingDisk:
    """Lets changes fail from the ``turn``-th on: all of them that need room, or just that one."""

    def __init__(self, patch, turn, number, *, full):
        self.turn, self.number, self.full, self.count = turn, number, full, 0
        for name in NEED_ROOM if full else CHANGES:
            patch.setattr(os, name, self.failing(getattr(os, name)))

    def failing(self, call):
        def wrapped(*args, **kwargs):
            self.count += 1
            if self.count == self.turn or (self.full and self.count > self.turn):
                raise OSError(self.number, os.strerror(self.number))
            return call(*args, **kwargs)

        return wrapped

    @property
    def failed(self):
        return self.count >= self.turn


def run_on_failing_disk(action, turn, full):
    """Return whether the disk failed, and the error it led to."""
    number = errno.ENOSPC if full else errno.EIO
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk(patch, turn, number, full=full)
        try:
            action()
        except FileError as error:
            assert os.strerror(number) in error.message
            assert error.file
            return True, error
    return disk.failed, None


@pytest.fixture
def folder():
    with memory_folder() as path:
        yield path


@pytest.mark.parametrize("full", [False, True], ids=["one error", "full"])
@pytest.mark.parametrize("direction", ["attach", "detach"])
@pytest.mark.parametrize(("name", "placement"), CASES, ids=IDS)
def test_every_change_fails_in_turn(folder, name, placement, direction, full):
    path = put(folder / "image", name)
    content, pristine = path.read_bytes(), content_of(path)
    if direction == "detach":
        attach(path, placement)
    start, sidecar = path.read_bytes(), sidecar_bytes(path)
    errors = 0
    for turn in range(1, 100):
        restore(path, start)
        if sidecar is not None:
            sidecar_path(path).write_bytes(sidecar)
        action = (lambda: attach(path, placement)) if direction == "attach" else (lambda: detach_image(path))
        failed, error = run_on_failing_disk(action, turn, full)
        errors += error is not None
        assert content_of(path) == pristine, turn
        state = state_of(path)
        if error is None and direction == "attach":
            assert state is GraftState.OK, turn
        if state is not GraftState.OK:
            attach(path, placement)  # there is room again
        assert problem_of(path) is None, turn
        detach_image(path)
        assert is_clean(path, content), turn
        if not failed:
            assert errors >= 1 or (direction, full) == ("detach", True)  # giving back may need no room at all
            return
    raise AssertionError("it never came to its end")


#: What file systems give out room in, in bytes.
BLOCK = 4096


class FullDisk:
    """Has room for ``room`` more blocks. Writing to a block of zeros needs one: it is taken for a hole."""

    def __init__(self, patch, room):
        self.room, self.failed, self.stored = room, False, set()
        self.pwrite = os.pwrite
        patch.setattr(os, "pwrite", self.write)

    def write(self, fd, data, offset):
        end = offset
        for block in range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)):
            if not self.has(fd, block):
                break
            end = min((block + 1) * BLOCK, offset + len(data))
        if end == offset and len(data):
            self.failed = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.pwrite(fd, bytes(data)[: end - offset], offset)

    def has(self, fd, block):
        key = (os.fstat(fd).st_ino, block)
        if key not in self.stored and not any(os.pread(fd, BLOCK, block * BLOCK)):
            if not self.room:
                return False
            self.room -= 1
        self.stored.add(key)
        return True


@pytest.mark.parametrize(("name", "placement"), CASES, ids=IDS)
def test_a_disk_that_fills_up_during_attach_leaves_nothing(folder, name, placement):
    """Also where the record goes into a hole: undoing that must not need room itself."""
    path = put(folder / "image", name)
    content, pristine = path.read_bytes(), content_of(path)
    sections = [*sample_sections(), Section(SectionKind.FILES, NOISE)]
    for room in range(50):
        restore(path, content)
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, room)
            try:
                attach(path, placement, sections)
            except FileError as error:
                assert disk.failed and "No space left" in error.message
                assert is_clean(path, content), room
                continue
        assert (state_of(path), content_of(path)) == (GraftState.OK, pristine)
        assert room >= 2
        return
    raise AssertionError("it never came to its end")
