"""Writing so that a crash at any moment leaves the file before or after, never between.

Every operation that changes a file on disk goes through here, one at a time, and is shown to an observer when it is
done. Nobody observes by default; the crash tests do, and stop the process after any operation they like.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from vmgraft.errors import FileError, UsageError
from vmgraft.imagefmt.blob import CHUNK, Blob

#: File systems give out room in blocks of this many bytes, or multiples.
BLOCK = 4096


@dataclass(frozen=True, slots=True)
class Operation:
    """A change that has just been made.

    Attributes:
        name: ``write``, ``sync``, ``truncate``, ``link``, ``rename``, ``unlink`` or ``sync-dir``.
        file: The file (or folder) it was made to.
        offset: Byte offset of a write; new size of a truncate.
        data: Bytes of a write.
    """

    name: str
    file: Path
    offset: int = 0
    data: bytes = b""


Observer = Callable[[Operation], None]

_observer: ContextVar[Observer | None] = ContextVar("vmgraft_commit_observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Show every operation of this context to ``observer``, right after it was made."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def _done(operation: Operation) -> None:
    observer = _observer.get()
    if observer is not None:
        observer(operation)


class Writer:
    """Changes one open file. All offsets and sizes in bytes.

    Args:
        fd: The file, open for writing; stays open.
        file: Its path, for messages.
    """

    def __init__(self, fd: int, *, file: str | PathLike[str]) -> None:
        self.fd = fd
        self.file = Path(file)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of ``data`` at ``offset``.

        Raises:
            FileError: when not all of it could be written.
        """
        view = memoryview(data)
        position = offset
        try:
            while view:
                count = os.pwrite(self.fd, view, position)
                view, position = view[count:], position + count
        except OSError as problem:
            raise _failed("written", self.file, problem, position) from problem
        if _observer.get() is not None:  # the copy of the data is for the observer only
            _done(Operation("write", self.file, offset, bytes(data)))

    def write_blob(self, offset: int, blob: Blob) -> None:
        """Write a blob at ``offset``, 1 MiB at a time.

        Raises:
            FileError: when not all of it could be written, or the blob cannot be read.
        """
        for data in blob.chunks():
            self.write(offset, data)
            offset += len(data)

    def wipe(self, offset: int, size: int) -> None:
        """Turn bytes into zeros. Those that are zeros already are not written: in a hole they would need room.

        The file must be open for reading too, and reach as far.

        Raises:
            FileError: when they cannot be read, or not all of them could be written.
        """
        start = offset
        for position in _blocks(offset, size):
            end = min(position - position % BLOCK + BLOCK, offset + size)
            if not any(self.read(position, end - position)):
                self._write_zeros(start, position)
                start = end
        self._write_zeros(start, offset + size)

    def read(self, offset: int, size: int) -> bytes:
        """Return what stands in the file now, of up to 4 MiB; shorter at its end.

        Raises:
            FileError: when it cannot be read.
        """
        try:
            return os.pread(self.fd, size, offset)
        except OSError as problem:
            raise _failed("read", self.file, problem, offset) from problem

    def _write_zeros(self, start: int, end: int) -> None:
        for offset in range(start, end, CHUNK):
            self.write(offset, bytes(min(CHUNK, end - offset)))

    def sync(self) -> None:
        """Wait until everything written so far is on the disk.

        Raises:
            FileError: when the system reports that it is not.
        """
        try:
            os.fsync(self.fd)
        except OSError as problem:
            raise _failed("flushed to the disk", self.file, problem) from problem
        _done(Operation("sync", self.file))

    def truncate(self, size: int) -> None:
        """Cut or extend the file to ``size``.

        Raises:
            FileError: when the system refuses.
        """
        try:
            os.ftruncate(self.fd, size)
        except OSError as problem:
            raise _failed("truncated", self.file, problem, size) from problem
        _done(Operation("truncate", self.file, size))


def _blocks(offset: int, size: int) -> Iterator[int]:
    """Yield ``offset`` and every start of a block up to ``offset + size``."""
    if size > 0:
        yield offset
        yield from range(offset - offset % BLOCK + BLOCK, offset + size, BLOCK)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk.

    Raises:
        FileError: when the folder cannot be opened or flushed.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as problem:
        raise _failed("flushed to the disk", folder, problem) from problem
    _done(Operation("sync-dir", folder))


def remove_file(path: Path) -> None:
    """Remove a file's name and flush its folder; a name that is gone already is fine.

    Raises:
        FileError: when the system refuses.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as problem:
        raise _failed("removed", path, problem) from problem
    _done(Operation("unlink", path))
    sync_folder(path.parent)


@contextmanager
def atomic_output(destination: str | PathLike[str], *, replace: bool = False, mode: int | None = None) -> Iterator[int]:
    """Yield a descriptor for a new file that gets its name only when the block ends well.

    The file has no name until then where the file system can do that, so a crash leaves nothing behind. Symbolic links
    are never followed or replaced.

    Args:
        destination: The name it gets.
        replace: Whether a regular file of that name may be replaced.
        mode: Its permission bits, where the file system knows any; None leaves them to the umask.

    Raises:
        UsageError: when the destination exists and may not be replaced.
        FileError: when the file cannot be created, flushed or named.
    """
    target = Path(destination)
    _check_destination(target, replace)
    fd, temporary = _open_unnamed(target, 0o666 if mode is None else mode)
    try:
        if mode is not None:
            with suppress(OSError):  # it has fewer bits then, never more
                os.fchmod(fd, mode)
        yield fd
        Writer(fd, file=target).sync()
        temporary = _give_name(fd, temporary, target, replace)
        _keep_name(target, replace)
    finally:
        os.close(fd)
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_all(fd: int, data: bytes, *, file: str | PathLike[str]) -> None:
    """Write ``data`` to the beginning of a fresh file.

    Raises:
        FileError: when not all of it could be written.
    """
    Writer(fd, file=file).write(0, data)


def _check_destination(target: Path, replace: bool) -> None:
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as problem:
        raise _failed("examined", target, problem) from problem
    if not stat.S_ISREG(mode):
        raise UsageError("the output exists and is not a regular file", file=target, hint="name another output")
    if not replace:
        raise UsageError("the output exists already", file=target, hint="remove it first, or name another output")


def _open_unnamed(target: Path, mode: int) -> tuple[int, Path | None]:
    """Create the file without a name, or under a temporary one where the file system needs it."""
    try:
        return os.open(target.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode), None
    except OSError as problem:
        if problem.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise _failed("created", target, problem) from problem
    temporary = _temporary_name(target)
    try:
        return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, mode), temporary
    except OSError as problem:
        raise _failed("created", target, problem) from problem


def _give_name(fd: int, temporary: Path | None, target: Path, replace: bool) -> Path | None:
    """Put the finished file at ``target``; return a name that is left to be removed, if any."""
    try:
        if not replace:
            _link(fd, temporary, target)
            return temporary
        if temporary is None:
            temporary = _temporary_name(target)
            _link(fd, None, temporary)
        temporary.rename(target)
        _done(Operation("rename", target))
    except FileExistsError as problem:
        raise UsageError("the output exists already", file=target, hint="remove it first") from problem
    except OSError as problem:
        raise _failed("put in place", target, problem) from problem
    return None


def _keep_name(target: Path, replace: bool) -> None:
    """Flush the name of a file; where that fails, take a new one back: what is reported as failed is not there."""
    try:
        sync_folder(target.parent)
    except FileError:
        if not replace:
            with suppress(OSError):
                target.unlink()
        raise


def _link(fd: int, source: Path | None, target: Path) -> None:
    if source is None:
        # Giving a descriptor makes Python call linkat(2), which alone follows /proc/self/fd; the path is absolute.
        os.link(f"/proc/self/fd/{fd}", target, src_dir_fd=fd, follow_symlinks=True)
    else:
        os.link(source, target, follow_symlinks=False)
    _done(Operation("link", target))


def _temporary_name(target: Path) -> Path:
    # Independent of the target's name, which may have the greatest length that the file system allows.
    return target.with_name(f".vmgraft-{secrets.token_hex(8)}.tmp")


def _failed(action: str, file: Path, problem: OSError, offset: int | None = None) -> FileError:
    reason = problem.strerror or str(problem)
    return FileError(f"the file could not be {action}: {reason}", file=file, offset=offset)
