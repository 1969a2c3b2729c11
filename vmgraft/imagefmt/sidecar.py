"""The sidecar: a record in a file of its own, ``IMAGE.vmgraft``, beside the image.

A sidecar begins with a copy of the locator, so it can be told which image it belongs to; the record follows at byte
128. Its name is always derived from the image's, never read from the image: no path can be smuggled in.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path

from vmgraft.errors import FileError, GraftFormatError
from vmgraft.imagefmt import _layout as layout
from vmgraft.imagefmt.blob import Blob, file_blob
from vmgraft.imagefmt.commit import Writer, atomic_output, remove_file
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement
from vmgraft.imagefmt.locator import LOCATOR_SIZE, MAGIC, pack_locator, parse_locator

SUFFIX = ".vmgraft"
#: Where the record begins in a sidecar, in bytes.
RECORD_OFFSET = LOCATOR_SIZE
#: What systems answer when nothing can be there; an image's name may be too long to append the suffix.
_ABSENT = (errno.ENOENT, errno.ENAMETOOLONG)
_NOT_WRITABLE = "changing a graft needs a file beside the image: make the folder writable, or use -o OUT"
_HINTS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NOT_WRITABLE),
    errno.ENAMETOOLONG: "changing a graft needs a file beside the image: give the image a shorter name, or use -o OUT",
}


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A sidecar file as found: ``record`` holds what is there of the record, sound or not."""

    path: Path
    state: GraftState
    detail: str
    locator: Locator | None = None
    record: Blob | None = None


def sidecar_path(image: Path) -> Path:
    """Return the name of an image's sidecar."""
    return image.with_name(image.name + SUFFIX)


def write_sidecar(image: Path, locator: Locator, record: Blob) -> Path:
    """Write an image's sidecar, whole or not at all, and flush it to the disk. An older sidecar is replaced.

    Raises:
        FileError: when it cannot be written, or a file of that name is not a sidecar.
    """
    path = sidecar_path(image)
    write_record_file(path, image, locator, record)
    return path


def write_record_file(path: Path, image: Path, locator: Locator, record: Blob) -> None:
    """Write a file that is laid out like a sidecar; see :func:`write_sidecar`. Whoever may not read the image, may not
    read the file either.

    Raises:
        FileError: when it cannot be written, or another file has that name.
    """
    if not _may_replace(path):
        raise FileError(
            "a file of the sidecar's name exists and is not a sidecar", file=path, hint="move it out of the way"
        )
    try:
        mode = stat.S_IMODE(image.stat().st_mode) & 0o666
    except OSError as problem:
        raise FileError(f"the file cannot be examined: {problem.strerror}", file=image) from problem
    try:
        with atomic_output(path, replace=lexists(path), mode=mode) as fd:
            writer = Writer(fd, file=path)
            writer.write(0, pack_locator(locator))
            writer.write_blob(RECORD_OFFSET, record)
    except FileError as error:
        number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
        error.hint = error.hint or _HINTS.get(number or 0)
        raise


def refuse_long_name(path: Path) -> None:
    """Refuse the name of a sidecar or journal that the file system cannot hold.

    Args:
        path: What :func:`sidecar_path` or ``journal_path`` returned.

    Raises:
        FileError: the name is too long.
    """
    try:
        os.lstat(path)
    except OSError as problem:
        if problem.errno == errno.ENAMETOOLONG:
            message = f"the file could not be examined: {problem.strerror}"
            raise FileError(message, file=path, hint=_HINTS[errno.ENAMETOOLONG]) from problem


def read_sidecar(image: Path, expected: Locator | None = None) -> Sidecar:
    """Read an image's sidecar and say in what state it is.

    Args:
        image: The image.
        expected: The locator found in the container; ``None`` where the container holds none (raw).

    Returns:
        State ``NONE`` when there is no sidecar and none was expected, ``NO_RECORD`` when an expected one is missing,
        ``SWAPPED`` or ``STALE`` when it is sound but not the one expected, ``CUT``, ``OVERWRITTEN`` or ``DAMAGED`` when
        it is there but not what it should be, else ``OK``.
    """
    return read_record_file(sidecar_path(image), expected)


def read_record_file(path: Path, expected: Locator | None = None) -> Sidecar:
    """Read a file that is laid out like a sidecar and say in what state it is; see :func:`read_sidecar`."""
    found = _read(path)
    if isinstance(found, str):
        if found:
            return Sidecar(path, GraftState.DAMAGED, found)
        if expected is None:
            return Sidecar(path, GraftState.NONE, "")
        detail = f"the sidecar {path.name} is missing: put it back beside the image"
        return Sidecar(path, GraftState.NO_RECORD, detail)
    head, record = found
    try:
        locator = parse_locator(head, file=path, offset=0)
    except GraftFormatError as problem:
        return Sidecar(path, GraftState.DAMAGED, str(problem), None, record)
    state, detail = _judge(record, locator)
    if expected is not None and locator != expected:
        state, detail = _not_expected(path, state, locator, expected)
    return Sidecar(path, state, detail, locator, record)


def locate_sidecar(image: Path, locator: Locator, locator_offset: int | None) -> Located:
    """Follow a container's sidecar locator: one hop, always to ``IMAGE.vmgraft``."""
    found = read_sidecar(image, locator)
    record = None if found.state is GraftState.SWAPPED else found.record  # it says nothing about this image
    return Located(found.state, found.detail, locator, locator_offset, record)


def stray_sidecar(image: Path) -> Sidecar | None:
    """Return a sound sidecar that lies beside an image whose container does not point to it, or None."""
    found = read_sidecar(image)
    return found if found.state is GraftState.OK else None


def remove_sidecar(image: Path) -> None:
    """Remove an image's sidecar if there is one; a file of that name that is none stays.

    Raises:
        FileError: when the system refuses.
    """
    remove_record_file(sidecar_path(image))


def remove_record_file(path: Path) -> None:
    """Remove a file that is laid out like a sidecar, if it is there; any other file stays.

    Raises:
        FileError: when the system refuses.
    """
    if lexists(path) and _may_replace(path):
        remove_file(path)


def _not_expected(path: Path, state: GraftState, found: Locator, expected: Locator) -> tuple[GraftState, str]:
    """Say whose sidecar this is: its locator is sound, but not the one in the image."""
    if state is not GraftState.OK or found.placement is not Placement.SIDECAR:
        return GraftState.DAMAGED, f"the sidecar {path.name} belongs to another graft, and is damaged itself"
    if (found.tree_digest, found.file_size) != (expected.tree_digest, expected.file_size):
        return GraftState.SWAPPED, (
            f"the sidecar {path.name} belongs to another image, or was made for other content of this one: put the one "
            f"in its place whose record has the SHA-256 {expected.record_sha256.hex()}"
        )
    return GraftState.STALE, (
        f"the sidecar {path.name} belongs to an earlier or later graft of the same content: put the one in its place "
        f"whose record has the SHA-256 {expected.record_sha256.hex()}"
    )


def _judge(record: Blob | None, locator: Locator) -> tuple[GraftState, str]:
    size = 0 if record is None else record.size
    if record is None or size < locator.record_size:
        return GraftState.CUT, f"the sidecar holds {size} of {locator.record_size} record bytes"
    if size > locator.record_size:
        return GraftState.DAMAGED, f"the sidecar is {size - locator.record_size} bytes too long"
    if record.sha256 != locator.record_sha256:
        return GraftState.OVERWRITTEN, "the record in the sidecar does not match the locator's digest"
    return GraftState.OK, ""


def _read(path: Path) -> tuple[bytes, Blob | None] | str:
    """Return the file's first 128 bytes and the record, "" when there is no such file, or why it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as problem:
        if problem.errno in _ABSENT:
            return ""
        what = "is a symbolic link" if problem.errno == errno.ELOOP else f"cannot be read: {problem.strerror}"
        return f"the sidecar {path.name} {what}"
    try:
        return _read_open(fd, path)
    except FileError as problem:
        return f"the sidecar {path.name}: {problem.message}"
    except OSError as problem:
        return f"the sidecar {path.name} cannot be read: {problem.strerror}"
    finally:
        os.close(fd)


def _read_open(fd: int, path: Path) -> tuple[bytes, Blob | None] | str:
    """Do what :func:`_read` does with the open file."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return f"the sidecar {path.name} is not a regular file"
    if not 0 < status.st_size <= layout.MAX_RECORD_SIZE + RECORD_OFFSET:
        return f"the sidecar {path.name} is empty or over the size limit"
    head = os.pread(fd, RECORD_OFFSET, 0)
    size = status.st_size - len(head)
    return head, file_blob(fd, len(head), size, file=path) if head.startswith(MAGIC) and size else None


def _may_replace(path: Path) -> bool:
    """Return whether nothing is at ``path``, or a regular file that begins like a sidecar."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as problem:
        return problem.errno in _ABSENT
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, len(MAGIC), 0) == MAGIC
    except OSError:
        return False
    finally:
        os.close(fd)
