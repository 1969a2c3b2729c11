"""Stretches of guest RAM that are memory files of their own, so that another process can map one and no more.

The file takes the place of the RAM at the very addresses where the engines expect it: neither KVM, whose slots follow
the host's page tables, nor the software CPU notices.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

#: Granularity of mappings (Intel SDM vol. 3A, 4.3: 4 KiB pages).
PAGE: Final = 4096
#: Name of such files, as /proc/PID/maps shows it.
NAME: Final = "vmgraft-window"
_PIECE: Final = 1 << 16
_MAP_FIXED: Final = 0x10  # asm-generic/mman-common.h
#: Nobody may cut the file short under a process that maps it: that would be a SIGBUS there (memfd_create(2)).
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_FAILED: Final = ctypes.c_void_p(-1).value


@dataclass(frozen=True, slots=True)
class _Window:
    gpa: int
    size: int
    fd: int


class SharedWindows:
    """The windows of one machine's RAM.

    Args:
        area: The mapping of all RAM.
        address: Where it lies in this process.
    """

    def __init__(self, area: mmap.mmap, address: int) -> None:
        self._area, self._address = area, address
        self._windows: list[_Window] = []

    def share(self, gpa: int, size: int, *, writable: bool) -> int | None:
        """Return a descriptor of the file behind a stretch of RAM, for the caller to close.

        Args:
            gpa: Its first byte, counted from the start of the mapping.
            size: Its length in bytes.
            writable: Whether the file may be changed through that descriptor.

        Returns:
            None where it does not end at pages, or overlaps another window that is not the same.

        Raises:
            OSError: the kernel refuses.
        """
        if not size or gpa % PAGE or size % PAGE:
            return None
        window = next((each for each in self._windows if (each.gpa, each.size) == (gpa, size)), None)
        if window is None:
            if any(each.gpa < gpa + size and gpa < each.gpa + each.size for each in self._windows):
                return None
            window = self._make(gpa, size)
            self._windows.append(window)
        access = os.O_RDWR if writable else os.O_RDONLY
        # A descriptor that is open for reading only can never be mapped for writing, whoever holds it.
        return os.open(f"/proc/self/fd/{window.fd}", access | os.O_CLOEXEC)

    def _make(self, gpa: int, size: int) -> _Window:
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            self._copy(gpa, size, fd)
            self._map(gpa, size, mmap.MAP_SHARED, fd)
        except BaseException:
            os.close(fd)
            raise
        return _Window(gpa, size, fd)

    def _copy(self, gpa: int, size: int, fd: int) -> None:
        """Copy the RAM into a file; pieces that are all zero, which most are, take no memory there."""
        zero = bytes(_PIECE)
        for start in range(gpa, gpa + size, _PIECE):
            piece = self._area[start : min(start + _PIECE, gpa + size)]
            if piece != zero[: len(piece)]:
                os.pwrite(fd, piece, start - gpa)

    def _map(self, gpa: int, size: int, flags: int, fd: int) -> None:
        """Map a file, or fresh memory, in the place of the RAM."""
        access = mmap.PROT_READ | mmap.PROT_WRITE
        ctypes.set_errno(0)
        if _LIBC.mmap(self._address + gpa, size, access, flags | _MAP_FIXED, fd, 0) == _FAILED:
            raise OSError(ctypes.get_errno() or errno.EINVAL, "a window of guest memory cannot be mapped")

    def keep(self, wanted: Collection[tuple[int, int]]) -> None:
        """Turn every other window into plain RAM again, with what stands in it, and close its file.

        Who still maps such a file reaches no guest memory by it any more. Where the kernel refuses, a window stays.

        Args:
            wanted: First byte and length of those that stay.
        """
        for window in tuple(self._windows):
            if (window.gpa, window.size) in wanted or not self._take_back(window):
                continue
            self._windows.remove(window)
            os.close(window.fd)

    def _take_back(self, window: _Window) -> bool:
        data = self._area[window.gpa : window.gpa + window.size]
        try:
            self._map(window.gpa, window.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        except OSError:
            return False
        zero = bytes(_PIECE)
        for start in range(0, window.size, _PIECE):
            piece = data[start : start + _PIECE]
            if piece != zero[: len(piece)]:
                self._area[window.gpa + start : window.gpa + start + len(piece)] = piece
        return True

    def close(self) -> None:
        """Close the files; what is mapped stays until the RAM is unmapped."""
        for window in self._windows:
            os.close(window.fd)
        self._windows.clear()
