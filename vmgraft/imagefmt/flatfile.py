"""A file read by offset through one descriptor: what raw and ISO images, and probing, stand on."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vmgraft.errors import FileError, NoRoomError
from vmgraft.imagefmt import locks
from vmgraft.imagefmt.blob import Blob, file_blob
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.contract import Extent, Image, Kind


class FlatFile:
    """An open regular file or block device. Offsets and sizes in bytes; safe to read from several threads.

    Args:
        path: The file.
        writable: Open for reading and writing, and take QEMU-compatible locks until :meth:`close`.

    Raises:
        FileError: when it cannot be opened, or is neither a regular file nor a block device.
        ImageInUseError: when it is to be written and another process has it open.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        self.path = path
        self.writable = writable
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self.fd = os.open(path, flags)
        except OSError as problem:
            raise FileError(
                f"the file cannot be opened: {problem.strerror}", file=path, hint="check the name and its permissions"
            ) from problem
        try:
            self.is_block_device = self._check_type()
            if writable:
                locks.acquire(self.fd, file=path)
            self.size = self.current_size()
        except BaseException:
            os.close(self.fd)
            raise

    def _check_type(self) -> bool:
        mode = os.fstat(self.fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise FileError(
                "neither a regular file nor a block device", file=self.path, hint="name the image file itself"
            )
        return stat.S_ISBLK(mode)

    def current_size(self) -> int:
        """Return the file's size as it is now; ``size`` keeps what it was when opened."""
        try:
            return os.lseek(self.fd, 0, os.SEEK_END)
        except OSError as problem:
            raise FileError(f"the file has no size: {problem.strerror}", file=self.path) from problem

    def check_sidecar_lasts(self) -> None:
        """Refuse to choose a sidecar beside a node in /dev: it would be gone after the next start.

        Raises:
            NoRoomError: when the file is a block device, named by its node.
        """
        if self.is_block_device and Path("/dev") in self.path.parents:
            raise NoRoomError(
                "a block device has no room behind its end, and a sidecar in /dev is gone after the next start",
                file=self.path,
                hint="name the device by a symbolic link in a folder that lasts, or say --placement sidecar",
            )

    def writer(self) -> Writer:
        """Return a crash-safe writer on the same descriptor.

        Raises:
            FileError: when the file was opened read-only.
        """
        if not self.writable:
            raise FileError("the image was opened read-only", file=self.path)
        return Writer(self.fd, file=self.path)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` from ``offset`` on and return the number of bytes, short only at the end of the file.

        Raises:
            FileError: when the system cannot read it.
        """
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self.fd, [buffer[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as problem:
            message = f"the file cannot be read: {problem.strerror}"
            raise FileError(message, file=self.path, offset=offset + done) from problem
        return done

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes, short only at the end of the file.

        Raises:
            FileError: when the system cannot read it.
        """
        # Never allocate more than the file can fill.
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as problem:
            raise FileError(f"the file cannot be read: {problem.strerror}", file=self.path, offset=offset) from problem
        if len(data) in (0, length):
            return data
        rest = bytearray(length - len(data))
        count = self.readinto(offset + len(data), memoryview(rest))
        return data + rest[:count]

    def blob(self, offset: int, length: int) -> Blob:
        """Return up to ``length`` bytes as a blob, fewer at the end of the file; nothing large is held in memory.

        Raises:
            FileError: when the system cannot read it.
        """
        return file_blob(self.fd, offset, min(length, self.size - offset), file=self.path)

    def extents(self, end: int) -> Iterator[Extent]:
        """Yield data and hole runs of the first ``end`` bytes, without gaps."""
        return self.extents_from(0, end)

    def extents_from(self, start: int, end: int) -> Iterator[Extent]:
        """Yield data and hole runs between ``start`` and ``end``, without gaps."""
        position = start
        while position < end:
            data = self._seek(position, os.SEEK_DATA, end)
            if data > position:
                yield Extent(position, data - position, Kind.HOLE)
            if data >= end:
                return
            position = self._seek(data, os.SEEK_HOLE, end)
            yield Extent(data, position - data, Kind.DATA)

    def _seek(self, offset: int, whence: int, end: int) -> int:
        """Return where the next data or hole begins, at most ``end``."""
        try:
            return min(os.lseek(self.fd, offset, whence), end)
        except OSError as problem:
            if problem.errno == errno.ENXIO:  # nothing of that sort behind offset
                self._check_not_cut(end)
                return end
            if problem.errno == errno.EINVAL:  # the file system or device does not tell: all of it is data
                return offset if whence == os.SEEK_DATA else end
            raise FileError(f"the file cannot be read: {problem.strerror}", file=self.path, offset=offset) from problem

    def _check_not_cut(self, end: int) -> None:
        """Tell a hole at the end of the file from content that was there when the file was opened."""
        size = self.current_size()
        if size < min(end, self.size):
            raise FileError("the file became shorter while it was read", file=self.path, offset=size)

    def close(self) -> None:
        """Close the descriptor, and with it give up the locks; closing twice is fine."""
        if self.fd >= 0:
            if self.writable:  # a blob may hold a duplicate of the descriptor, and with it the locks
                locks.release(self.fd)
            os.close(self.fd)
            self.fd = -1


class FlatImage(Image):
    """An image in one file; subclasses say which bytes of it are content by ``readinto``."""

    _file: FlatFile

    def read(self, offset: int, length: int) -> bytes:
        """Return guest content; short only at its end.

        Raises:
            FileError: when the file cannot be read.
        """
        buffer = bytearray(max(0, min(length, self.virtual_size - offset)))
        return bytes(buffer[: self.readinto(offset, memoryview(buffer))])

    def close(self) -> None:
        """Close the file and give up its locks."""
        self._file.close()
