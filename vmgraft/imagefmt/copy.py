"""Copying images: shared blocks where the file system can, holes kept elsewhere."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from vmgraft.errors import FileError, UsageError
from vmgraft.imagefmt.commit import atomic_output
from vmgraft.imagefmt.contract import Kind
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locks import refuse_writer

#: Linux <linux/fs.h>: _IOW(0x94, 9, int).
_FICLONE = 0x40049409
_CHUNK = 64 << 20
#: What systems answer when two files cannot share blocks, or cannot be copied inside the kernel.
_NO_SHARING = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EBADF)


def copy_file(source: str | Path, destination: str | Path, *, replace: bool = False) -> None:
    """Copy a file so that the destination appears whole or not at all.

    Args:
        source: A regular file or block device.
        destination: A name that must not be a symbolic link.
        replace: Whether a regular file of that name may be replaced.

    Raises:
        UsageError: when the destination exists and may not be replaced, or is the source.
        ImageInUseError: when another process writes to the source: the copy could be torn.
        FileError: when reading or writing fails.
    """
    target = Path(destination)
    original = FlatFile(Path(source))
    try:
        if _is_same(original, target):
            raise UsageError("source and output are the same file", file=target)
        refuse_writer(original.fd, file=source)
        with atomic_output(target, replace=replace) as fd:
            try:
                _copy(original, fd)
            except OSError as problem:
                raise FileError(f"the copy failed: {problem.strerror}", file=target) from problem
    finally:
        original.close()


def _is_same(original: FlatFile, target: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(original.fd), target.stat())
    except OSError:  # not there, or not reachable: creating it says why
        return False


def _copy(original: FlatFile, fd: int) -> None:
    if not original.is_block_device:
        os.fchmod(fd, stat.S_IMODE(os.fstat(original.fd).st_mode) & 0o777)
    if _clone(original.fd, fd):
        return
    os.ftruncate(fd, original.size)
    for extent in original.extents(original.size):
        if extent.kind is Kind.DATA:
            _copy_range(original, fd, extent.start, extent.length)


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as problem:
        if problem.errno in _NO_SHARING:
            return False
        raise
    return True


def _copy_range(original: FlatFile, fd: int, start: int, length: int) -> None:
    position, end = start, start + length
    while position < end:
        count = _copy_some(original, fd, position, min(_CHUNK, end - position))
        if count == 0:
            raise FileError("the file became shorter while it was copied", file=original.path, offset=position)
        position += count


def _copy_some(original: FlatFile, fd: int, position: int, length: int) -> int:
    """Copy some bytes inside the kernel, or through a buffer where it cannot."""
    try:
        return os.copy_file_range(original.fd, fd, length, position, position)
    except OSError as problem:
        if problem.errno not in _NO_SHARING:
            raise
    data = original.read(position, min(length, 4 << 20))
    written = 0
    while written < len(data):
        written += os.pwrite(fd, memoryview(data)[written:], position + written)
    return len(data)
