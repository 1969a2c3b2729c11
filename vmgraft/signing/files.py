"""Small files: read as regular files only, bounded, on request not through a link; never written over another."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from vmgraft.errors import FileError, VmgraftError


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
            raise error(f"{what} must not be a symbolic link", file=path, hint="name the file itself") from exc
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


def write_new(path: Path, data: bytes, *, what: str, mode: int = 0o666) -> None:
    """Write a file that must not exist, and flush it to the disk.

    Args:
        path: The file.
        data: Its bytes.
        what: What to call the file in errors.
        mode: Permissions, less the umask; in force before the first byte is written.

    Raises:
        FileError: it exists or cannot be written; nothing is left behind.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, mode)
    except FileExistsError as exc:
        hint = "files are never overwritten; choose another name"
        raise FileError(f"{what} cannot be written: the file exists already", file=path, hint=hint) from exc
    except OSError as exc:
        hint = "is it in a folder that exists and that you may write to?"
        raise FileError(f"{what} cannot be written: {exc.strerror}", file=path, hint=hint) from exc
    try:
        with open(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(fd)
    except BaseException as exc:
        path.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            raise FileError(f"{what} cannot be written: {exc.strerror}", file=path, hint="is there room?") from exc
        raise


def write_folder(folder: Path, files: Sequence[tuple[str, bytes]], *, what: str) -> list[Path]:
    """Write new files into a folder, all of them or none; the folder is made if missing, and scripts are executable.

    Args:
        folder: The folder.
        files: Names and bytes.
        what: What to call a file in errors.

    Raises:
        FileError: one exists or cannot be written, or the folder cannot be made; no file is left behind.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise FileError(f"cannot make the folder: {exc.strerror}", file=folder, hint="name another") from exc
    written: list[Path] = []
    try:
        for name, data in files:
            write_new(folder / name, data, what=what, mode=0o777 if name.endswith(".sh") else 0o666)
            written.append(folder / name)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return written
