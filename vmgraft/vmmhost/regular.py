"""Opening files of the operator's for reading: regular ones only, so that nothing is waited for and none has no end."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from vmgraft.errors import FileError


def open_regular(path: Path, what: str, *, follow: bool = True) -> BinaryIO:
    """Open a file for reading; a pipe or a device is refused and not waited for.

    Args:
        path: The file.
        what: What to call it in messages.
        follow: Follow a symbolic link in the last part of the path.

    Raises:
        FileError: it cannot be opened, or is no regular file.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise FileError(f"cannot read {what}: {error.strerror}", file=path) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FileError(f"{what} is no regular file", file=path)
    return os.fdopen(fd, "rb")
