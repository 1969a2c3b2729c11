"""Guest memory as a worker has it: windows that are mapped here, and windows that the host copies from and to.

A window of whole pages is a memory file of its own, which the host hands over before the module; it is mapped, and its
descriptor closed, before the first byte of the module is read. All others, and those of a run that is recorded, are
reached by a message for every piece of 4 KiB.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from vmgraft.vmmhost.layer.abi import MASK64, MAX_ACCESS_BYTES

#: Windows of one extension (schema ``manifest``, ``capabilities``), and those of them that can be mapped.
MAX_WINDOWS: Final = 64
MAX_MAPPED: Final = 16
#: All mapped windows of one worker, bytes: its limit of address space has room for them.
MAX_MAPPED_BYTES: Final = 128 << 20

_WINDOW: Final = struct.Struct("<QQB")
_WRITABLE, _MAPPED = 1, 2

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_FAILED: Final = ctypes.c_void_p(-1).value


class Window(NamedTuple):
    """``size`` bytes of guest memory from ``gpa`` on; ``mapped`` where a file of it is handed over."""

    gpa: int
    size: int
    writable: bool = False
    mapped: bool = False


def pack_windows(windows: Sequence[Window]) -> bytes:
    """Return the form in which a worker is told its windows."""
    flags = [_WRITABLE * window.writable | _MAPPED * window.mapped for window in windows]
    return b"".join(_WINDOW.pack(each.gpa, each.size, flag) for each, flag in zip(windows, flags, strict=True))


def unpack_windows(data: bytes) -> tuple[Window, ...]:
    """Take that in.

    Raises:
        ValueError: it is none, or has too many windows.
    """
    if len(data) % _WINDOW.size or len(data) > MAX_WINDOWS * _WINDOW.size:
        raise ValueError(f"{len(data)} bytes are no list of windows")
    found = _WINDOW.iter_unpack(data)
    return tuple(Window(gpa, size, bool(flag & _WRITABLE), bool(flag & _MAPPED)) for gpa, size, flag in found)


# --- in the host ------------------------------------------------------------------------------------------------------


class _Sharing(Protocol):
    """Guest memory of which stretches can be had as files (``core.memory.GuestRam``)."""

    def share(self, gpa: int, size: int, *, writable: bool) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Shared:
    """A window as a file: its descriptor, which is open for writing only where the window is, and its inode."""

    window: Window
    fd: int
    inode: int


def share_windows(memory: object, windows: Sequence[Window]) -> list[Shared]:
    """Make files of those windows that can be; `close_shared` closes them.

    Raises:
        OSError: the kernel refuses.
    """
    share: Callable[..., int | None] | None = getattr(memory, "share", None)
    shared: list[Shared] = []
    left = MAX_MAPPED_BYTES
    try:
        for window in dict.fromkeys(windows):
            if share is None or len(shared) == MAX_MAPPED or window.size > left:
                continue
            fd = share(window.gpa, window.size, writable=window.writable)
            if fd is not None:
                shared.append(Shared(window, fd, os.fstat(fd).st_ino))
                left -= window.size
    except BaseException:
        close_shared(shared)
        raise
    return shared


def close_shared(shared: Sequence[Shared]) -> None:
    """Close the descriptors; what workers mapped stays theirs."""
    for each in shared:
        os.close(each.fd)


def keep_shared(memory: object, windows: Sequence[Window]) -> None:
    """Make plain guest memory again of every window that is a file, but for these."""
    keep: Callable[..., None] | None = getattr(memory, "keep_shared", None)
    if keep is not None:
        keep({(window.gpa, window.size) for window in windows})


# --- in the worker ----------------------------------------------------------------------------------------------------


class Messages(Protocol):
    """The way to the host for windows that are not mapped."""

    def read_guest(self, gpa: int, length: int) -> bytes: ...  # noqa: D102
    def write_guest(self, gpa: int, data: bytes) -> None: ...  # noqa: D102


def map_window(fd: int, window: Window) -> memoryview:
    """Map a window's file for as long as this process lives, and close the descriptor.

    Raises:
        OSError: the kernel refuses.
    """
    access = mmap.PROT_READ | (mmap.PROT_WRITE if window.writable else 0)
    try:
        if os.fstat(fd).st_size != window.size:
            raise OSError(errno.EINVAL, "a window of another size")
        ctypes.set_errno(0)
        address = _LIBC.mmap(None, window.size, access, mmap.MAP_SHARED, fd, 0)  # Python's own mmap would keep the fd
        if address == _FAILED:
            raise OSError(ctypes.get_errno() or errno.ENOMEM, "a window cannot be mapped")
    finally:
        os.close(fd)
    return memoryview((ctypes.c_char * window.size).from_address(address)).cast("B")


class GuestView:
    """What a worker reaches of the guest's memory.

    Args:
        windows: Its windows.
        areas: Those that are mapped, by their place in ``windows``.
        messages: The way to the others.
    """

    def __init__(self, windows: Sequence[Window], areas: dict[int, memoryview], messages: Messages) -> None:
        self._windows, self._areas, self._messages = tuple(windows), areas, messages
        #: Something was written into a mapped window since this was last cleared.
        self.touched = False

    def covers(self, gpa: int, length: int, *, write: bool) -> bool:
        """Say whether a range lies wholly inside one window, and may be written where that is asked for."""
        return self._find(gpa, length, write=write) is not None

    def _find(self, gpa: int, length: int, *, write: bool) -> int | None:
        found = None
        for number, window in enumerate(self._windows):
            if window.gpa <= gpa and gpa + length <= window.gpa + window.size and (window.writable or not write):
                if number in self._areas:
                    return number
                found = number
        return found

    def read(self, gpa: int, length: int) -> bytes:
        """Return guest memory. Where that is not granted, the host ends this process instead of answering."""
        number = self._find(gpa, length, write=False)
        area = None if number is None else self._areas.get(number)
        if area is not None and number is not None:
            start = gpa - self._windows[number].gpa
            return area[start : start + length].tobytes()
        pieces = range(0, length, MAX_ACCESS_BYTES)
        ask = self._messages.read_guest
        return b"".join(ask((gpa + at) & MASK64, min(MAX_ACCESS_BYTES, length - at)) for at in pieces)

    def write(self, gpa: int, data: bytes) -> None:
        """Change guest memory, on the same terms."""
        number = self._find(gpa, len(data), write=True)
        area = None if number is None else self._areas.get(number)
        if area is not None and number is not None:
            start = gpa - self._windows[number].gpa
            area[start : start + len(data)] = data
            self.touched = True
            return
        for at in range(0, len(data), MAX_ACCESS_BYTES):
            self._messages.write_guest((gpa + at) & MASK64, data[at : at + MAX_ACCESS_BYTES])
