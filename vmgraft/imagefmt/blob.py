"""Bytes that need not be in memory: what records and large sections are passed around as."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from vmgraft.errors import FileError, UsageError

#: Bytes read at a time.
CHUNK = 1 << 20
#: Up to this size bytes are read into memory at once, and are then safe from later changes to the file.
SMALL = 4 << 20
_ZEROS = bytes(CHUNK)


class Blob(ABC):
    """A fixed run of bytes with random access.

    Attributes:
        size: Its length in bytes.
    """

    size: int

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset``; fewer at the end of the blob, or where a file was cut since.

        Raises:
            FileError: when the file behind it cannot be read.
        """

    def read_all(self) -> bytes:
        """Return everything; for blobs whose size the caller knows to be small."""
        return self.read(0, self.size)

    def chunks(self) -> Iterator[bytes]:
        """Yield everything in order, 1 MiB at a time.

        Raises:
            FileError: when the file behind it cannot be read, or became shorter.
        """
        for offset in range(0, self.size, CHUNK):
            want = min(CHUNK, self.size - offset)
            data = self.read(offset, want)
            if len(data) != want:
                raise self._cut(offset + len(data))
            yield data

    def _cut(self, end: int) -> FileError:
        return FileError(f"{self.size} bytes were there, and now the file ends at byte {end} of them")

    @cached_property
    def sha256(self) -> bytes:
        """SHA-256 over everything, computed once (32 bytes).

        Raises:
            FileError: as :meth:`chunks`.
        """
        digest = sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.digest()

    def __eq__(self, other: object) -> bool:
        """Two blobs are equal when their bytes are."""
        return isinstance(other, Blob) and self.size == other.size and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash((self.size, self.sha256))


class BytesBlob(Blob):
    """Bytes in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        """Return a slice."""
        return self._data[offset : offset + length] if offset >= 0 and length > 0 else b""


class FileBlob(Blob):
    """A part of an open file. It keeps a descriptor of its own, closed when the blob goes away.

    Args:
        fd: The file; it is duplicated.
        start: Where the blob begins in it, in bytes.
        size: Its length; the caller has made sure that the file holds as much.
        file: The file's path, for messages.
    """

    def __init__(self, fd: int, start: int, size: int, *, file: str | os.PathLike[str]) -> None:
        self.size = size
        self._start = start
        self._file = os.fspath(file)
        self._fd = os.dup(fd)
        weakref.finalize(self, os.close, self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """Read from the file."""
        length = min(length, self.size - offset)
        if length <= 0 or offset < 0:
            return b""
        try:
            data = os.pread(self._fd, length, self._start + offset)
            while data and len(data) < length:
                more = os.pread(self._fd, length - len(data), self._start + offset + len(data))
                if not more:
                    break
                data += more
        except OSError as problem:
            reason = f"the file cannot be read: {problem.strerror}"
            raise FileError(reason, file=self._file, offset=self._start + offset) from problem
        return data

    def chunks(self) -> Iterator[bytes]:
        """Yield everything in order, 1 MiB at a time; a hole is not read, so that a claim of 1 GiB stays cheap."""
        for offset in range(0, self.size, CHUNK):
            want = min(CHUNK, self.size - offset)
            data = _ZEROS[:want] if self._is_hole(offset, want) else self.read(offset, want)
            if len(data) != want:
                raise self._cut(offset + len(data))
            yield data

    def _is_hole(self, offset: int, length: int) -> bool:
        """Return whether the file system says that nothing is stored there, and the file goes on behind it."""
        start = self._start + offset
        try:
            data = os.lseek(self._fd, start, os.SEEK_DATA)
        except OSError as problem:
            # ENXIO: no data from there to the end of the file. Anything else: the file system does not tell.
            return problem.errno == errno.ENXIO and os.lseek(self._fd, 0, os.SEEK_END) >= start + length
        return data >= start + length


class Spool:
    """A nameless file that a blob is written to piece by piece; it goes away with the blob.

    Args:
        folder: Where it is made; the folder of the image, which is known to hold large files.

    Raises:
        FileError: when it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by finish
        except OSError as problem:
            raise _unwritable(folder, problem) from problem

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data`` at ``offset``.

        Raises:
            FileError: when not all of it could be written.
        """
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[count:], offset + count
        except OSError as problem:
            raise _unwritable(self._folder, problem) from problem

    def finish(self, size: int) -> Blob:
        """Return the first ``size`` bytes as a blob; the spool cannot be written any more."""
        with self._file:
            return FileBlob(self._file.fileno(), 0, size, file=self._folder)

    def close(self) -> None:
        """Give up what was written."""
        self._file.close()


def blob_of(data: bytes | Blob) -> Blob:
    """Return bytes as a blob; blobs as they are."""
    return data if isinstance(data, Blob) else BytesBlob(data)


def file_blob(fd: int, start: int, size: int, *, file: str | os.PathLike[str]) -> Blob:
    """Return a part of an open file: in memory when it is small, else read when it is asked for.

    Raises:
        FileError: when it cannot be read.
    """
    blob = FileBlob(fd, start, max(0, size), file=file)
    return BytesBlob(blob.read_all()) if blob.size <= SMALL else blob


def open_blob(path: Path, limit: int) -> Blob:
    """Return a whole regular file as a blob.

    Args:
        path: The file; a symbolic link is followed.
        limit: Most bytes it may have.

    Raises:
        FileError: when it cannot be opened or is no regular file.
        UsageError: when it is over the limit.
    """
    if not path.is_file():
        raise FileError("not a regular file", file=path)
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size > limit:
                raise UsageError(f"{size} bytes long, at most {limit} allowed", file=path)
            return file_blob(file.fileno(), 0, size, file=path)
    except OSError as problem:
        raise FileError(f"the file cannot be opened: {problem.strerror}", file=path) from problem


def _unwritable(folder: Path, problem: OSError) -> FileError:
    hint = "make room there" if problem.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return FileError(f"the record could not be written to a temporary file: {problem.strerror}", file=folder, hint=hint)
