"""A virtqueue in the legacy layout, read from guest memory that may hold anything.

Layout: Virtual I/O Device (VIRTIO) 1.2, sections 2.7 and 2.7.2 (legacy: one area, little-endian, pages of 4 KiB).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final

from vmgraft.vmmhost.core.memory import GuestRam
from vmgraft.vmmhost.core.state import Remembering

PAGE: Final = 4096
_DESCRIPTOR: Final = struct.Struct("<QIHH")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT: Final = 1
_USED: Final = struct.Struct("<II")


class QueueError(Exception):
    """The ring makes no sense: the device stops until it is reset."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """A stretch of guest memory named by a descriptor; whether it is memory at all is looked at on use."""

    gpa: int
    size: int


@dataclass(frozen=True, slots=True)
class Chain:
    """One request: what the device reads, then what it writes."""

    head: int
    readable: tuple[Buffer, ...]
    writable: tuple[Buffer, ...]

    def sizes(self) -> tuple[int, int]:
        """Return the bytes to read and to write."""
        return sum(each.size for each in self.readable), sum(each.size for each in self.writable)


class Virtqueue(Remembering):
    """One queue.

    Args:
        ram: The memory it lies in.
        size: Number of descriptors, a power of two.
    """

    REMEMBERED: ClassVar = {"page": range(1 << 32), "_next": range(1 << 16)}

    def __init__(self, ram: GuestRam, size: int) -> None:
        self._ram, self.size = ram, size
        self.page = 0
        self._next = 0  # avail index up to which requests were taken

    def place(self, page: int) -> None:
        """Set the page number the queue lies at; 0 takes it away."""
        self.page, self._next = page & 0xFFFFFFFF, 0

    def _areas(self) -> tuple[int, int, int]:
        """Return the addresses of descriptors, available ring and used ring, all of them in RAM."""
        base = self.page * PAGE
        avail = base + _DESCRIPTOR.size * self.size
        used = (avail + 6 + 2 * self.size + PAGE - 1) & -PAGE
        if not self.page or not self._ram.writable(base, used + 6 + _USED.size * self.size - base):
            raise QueueError("the queue does not lie in RAM")
        return base, avail, used

    def take(self) -> Chain | None:
        """Return the next request, None when there is none.

        Raises:
            QueueError: when ring or descriptors make no sense.
        """
        base, avail, _used = self._areas()
        waiting = (self._ram.get(avail + 2, 2) - self._next) & 0xFFFF
        if not waiting:
            return None
        if waiting > self.size:
            raise QueueError(f"{waiting} requests in a queue of {self.size}")
        head = self._ram.get(avail + 4 + 2 * (self._next % self.size), 2)
        chain = self._chain(base, head)
        self._next = (self._next + 1) & 0xFFFF
        return chain

    def _chain(self, base: int, head: int) -> Chain:
        readable: list[Buffer] = []
        writable: list[Buffer] = []
        index = head
        for _ in range(self.size):
            if index >= self.size:
                raise QueueError(f"descriptor {index} in a queue of {self.size}")
            gpa, size, flags, following = _DESCRIPTOR.unpack(
                self._ram.read(base + index * _DESCRIPTOR.size, _DESCRIPTOR.size)
            )
            if flags & _INDIRECT:
                raise QueueError("an indirect descriptor, which was not offered")
            if flags & _WRITE:
                writable.append(Buffer(gpa, size))
            elif writable:
                raise QueueError("a buffer to read behind one to write")
            else:
                readable.append(Buffer(gpa, size))
            if not flags & _NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            index = following
        raise QueueError("descriptors form a loop")

    def give_back(self, head: int, written: int) -> bool:
        """Tell the guest that a request is done; True when it wants an interrupt.

        Raises:
            QueueError: when the queue is no longer where it was.
        """
        _base, avail, used = self._areas()
        index = self._ram.get(used + 2, 2)
        self._ram.write(used + 4 + _USED.size * (index % self.size), _USED.pack(head, written))
        self._ram.put(used + 2, 2, index + 1)
        return not self._ram.get(avail, 2) & _NO_INTERRUPT


def gather(ram: GuestRam, buffers: tuple[Buffer, ...]) -> bytes | None:
    """Return what the buffers hold, None when one of them is not memory. The caller has bounded the sum."""
    if not all(ram.readable(each.gpa, each.size) for each in buffers):
        return None
    return b"".join(ram.read(each.gpa, each.size) for each in buffers)


def scatter(ram: GuestRam, buffers: tuple[Buffer, ...], data: bytes) -> bool:
    """Write data into the buffers, as far as both reach; False, and nothing written, when one is not RAM."""
    if not all(ram.writable(each.gpa, each.size) for each in buffers):
        return False
    position = 0
    for each in buffers:
        piece = data[position : position + each.size]
        if piece:
            ram.write(each.gpa, piece)
        position += len(piece)
    return True
