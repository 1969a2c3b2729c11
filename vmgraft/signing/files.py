"""Reads small files that decide over trust: regular files only, bounded, and on request not through a symbolic link."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vmgraft.errors import VmgraftError


def read_regular(path: Path, limit: int, *, what: str, error: type[VmgraftError], follow: bool = True) -> bytes:
    """Return a file's bytes, at most ``limit + 1`` of them; a longer result is the caller's to refuse.

    Args:
        path: The file.
        limit: Bytes that are of use.
        what: What to call the file in errors.
        error: Error class to raise.
        follow: Follow a symbolic link in the last part of the path.

    Raises:
        VmgraftError: (of class ``error``) missing, not a regular file, a symbolic link, or not readable.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as exc:
        if not follow and path.is_symlink():
            raise error(f"{what} must not be a symbolic link", file=path) from exc
        raise error(f"{what} cannot be read: {exc.strerror}", file=path) from exc
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise error(f"{what} must be a regular file", file=path)
        data = b""
        while len(data) <= limit and (chunk := os.read(fd, limit + 1 - len(data))):
            data += chunk
    except OSError as exc:
        raise error(f"{what} cannot be read: {exc.strerror}", file=path) from exc
    finally:
        os.close(fd)
    return data
