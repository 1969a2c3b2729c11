"""QEMU-compatible image locks.

QEMU guards an image with open-file-description byte-range locks (``block/file-posix.c``): byte 100 + *p* is
read-locked by a process that uses permission *p*, byte 200 + *p* by one that does not share it. Permission 0 is
"consistent read", 1 is "write" and 3 is "resize". ``flock`` does not see these locks, and they do not see ``flock``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike

from vmgraft.errors import FileError, ImageInUseError

#: "I write", "I resize", "nobody else may write", "nobody else may resize" (QEMU ``block/file-posix.c``).
LOCK_BYTES = (101, 103, 201, 203)
#: Those of them that say "I write" and "I resize".
WRITER_BYTES = (101, 103)
#: "I read": all that a reader of a raw image says, since it lets others write (QEMU ``block/raw-format.c``).
READER_BYTE = 100
#: Those that say "nobody else may".
_NO_WRITER_BYTES = (201, 203)

# Linux <asm-generic/fcntl.h>; Python 3.11 does not name them.
_F_OFD_GETLK = 36
_F_OFD_SETLK = 37
#: struct flock on 64-bit Linux: type, whence, start, len, pid (must be 0 for OFD locks).
_FLOCK = struct.Struct("hhqqi4x")


def acquire(fd: int, *, file: str | PathLike[str]) -> None:
    """Claim an image for writing, until ``fd`` is closed or :func:`release` is called.

    The locks are set first and the others' looked for after, as QEMU does: of two that try at once, none wins.

    Args:
        fd: The image, open for reading and writing.
        file: Its path, for messages.

    Raises:
        ImageInUseError: when another process has the image open.
        FileError: when the file system cannot lock.
    """
    try:
        for byte in LOCK_BYTES:
            _set(fd, byte, fcntl.F_RDLCK)
        taken = [byte for byte in (*LOCK_BYTES, READER_BYTE) if _is_taken(fd, byte)]
    except OSError as problem:
        release(fd)
        if problem.errno in (errno.EACCES, errno.EAGAIN):
            raise _in_use(file) from problem
        raise FileError(
            f"the image cannot be locked: {problem.strerror}",
            file=file,
            hint="copy the image to a file system that supports byte-range locks",
        ) from problem
    if taken:
        release(fd)
        raise _in_use(file)


def refuse_writer(fd: int, *, file: str | PathLike[str]) -> None:
    """Refuse an image that another process writes to; readers do not matter. ``fd`` need not be writable.

    Raises:
        ImageInUseError: when a QEMU program has it open for writing.
    """
    try:
        written = [byte for byte in WRITER_BYTES if _is_taken(fd, byte)]
    except OSError:
        return  # a file system without such locks has no writer that could be seen
    if written:
        raise ImageInUseError(
            "another process writes to the image", file=file, hint="shut down the guest or tool, then try again"
        )


@contextmanager
def writers_kept_out(fd: int, *, file: str | PathLike[str]) -> Iterator[None]:
    """Read an image without anybody writing to it: refuse it when somebody does, and keep QEMU from starting to.

    Other readers do not matter. ``fd`` need not be writable.

    Raises:
        ImageInUseError: when a QEMU program has it open for writing.
    """
    with suppress(OSError):  # a file system without such locks has no writer that could be seen, or kept out
        for byte in _NO_WRITER_BYTES:
            _set(fd, byte, fcntl.F_RDLCK)
    try:
        refuse_writer(fd, file=file)
        yield
    finally:
        with suppress(OSError):
            for byte in _NO_WRITER_BYTES:
                _set(fd, byte, fcntl.F_UNLCK)


def release(fd: int) -> None:
    """Give the locks of :func:`acquire` back; never fails."""
    for byte in LOCK_BYTES:
        try:
            _set(fd, byte, fcntl.F_UNLCK)
        except OSError:
            # Closing the descriptor drops the lock anyway.
            return


@contextmanager
def image_lock(fd: int, *, file: str | PathLike[str]) -> Iterator[None]:
    """Hold the locks of :func:`acquire` for the length of a ``with`` block.

    Raises:
        ImageInUseError: when another process has the image open.
        FileError: when the file system cannot lock.
    """
    acquire(fd, file=file)
    try:
        yield
    finally:
        release(fd)


def _in_use(file: str | PathLike[str]) -> ImageInUseError:
    return ImageInUseError(
        "another process has the image open", file=file, hint="shut down the guest or tool that uses it, then try again"
    )


def _set(fd: int, byte: int, kind: int) -> None:
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _is_taken(fd: int, byte: int) -> bool:
    """Return whether another open file description holds any lock on ``byte``."""
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK
