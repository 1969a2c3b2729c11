"""The device's side of a split virtqueue (VIRTIO 1.2, 2.7). Whatever the driver wrote there is hostile."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Protocol

from vmgraft.vmmhost.layer.abi import MAX_BUFFER_BYTES

#: Bytes of one request that a module gets, and of the answer it gives: the data of a call.
MAX_REQUEST: Final = MAX_BUFFER_BYTES

_DESCRIPTOR: Final = struct.Struct("<QIHH")  # 2.7.5 struct virtq_desc
_USED: Final = struct.Struct("<II")  # 2.7.8 struct virtq_used_elem
_NEXT, _WRITE, _INDIRECT = 1, 2, 4  # 2.7.5
_NO_INTERRUPT: Final = 1  # 2.7.6
_RING_AT: Final = 4  # flags and idx come before the ring: 2.7.6, 2.7.8
#: Alignment of descriptor table, available and used ring: 2.7, table.
_ALIGN: Final = (16, 2, 4)
_MASK16: Final = 0xFFFF
#: Descriptors that one notification may make the device walk, by the queue's size; only indirect tables need so many.
_WALK_FACTOR: Final = 16


class RingError(Exception):
    """The driver broke the rules of a queue: the device needs a reset."""


class Memory(Protocol):
    """Guest memory inside the granted windows (`windows.GuestView`)."""

    def covers(self, gpa: int, length: int, *, write: bool) -> bool: ...  # noqa: D102
    def read(self, gpa: int, length: int) -> bytes: ...  # noqa: D102
    def write(self, gpa: int, data: bytes) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Chain:
    """One request: where its buffers lie, those that the device reads and those that it writes, as (gpa, length)."""

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]

    @property
    def room(self) -> int:
        """Bytes that an answer may have."""
        return min(sum(length for _gpa, length in self.writable), MAX_REQUEST)


class SplitQueue:
    """A queue that is in use.

    Args:
        memory: Guest memory.
        size: Descriptors, a power of two.
        addresses: Of descriptor table, available ring and used ring.
        indirect: VIRTIO_F_INDIRECT_DESC was negotiated.
        taken: Requests taken so far, modulo 2**16.

    Raises:
        RingError: a ring is not aligned, or not wholly inside a window.
    """

    def __init__(
        self, memory: Memory, size: int, addresses: tuple[int, int, int], *, indirect: bool, taken: int = 0
    ) -> None:
        lengths = (_DESCRIPTOR.size * size, _RING_AT + 2 * size, _RING_AT + _USED.size * size)
        for gpa, length, alignment, write in zip(addresses, lengths, _ALIGN, (False, False, True), strict=True):
            if gpa % alignment:
                raise RingError(f"a ring at {gpa:#x}, which is not a multiple of {alignment}")
            if not memory.covers(gpa, length, write=write):
                raise RingError(f"a ring of {length} bytes at {gpa:#x}, outside the granted windows")
        self._memory, self.size, self._indirect = memory, size, indirect
        self._table, self._available, self._used = addresses
        #: Requests taken from the available ring and put into the used ring, modulo 2**16: they are the same.
        self.taken = taken
        self._left = 0

    def begin(self) -> None:
        """Begin to take requests at a notification; bounds how much a driver can make the device walk at once."""
        self._left = _WALK_FACTOR * self.size

    def next(self) -> Chain | None:
        """Return the next request without taking it; None where there is none.

        Raises:
            RingError: the driver broke a rule.
        """
        index = int.from_bytes(self._memory.read(self._available + 2, 2), "little")
        waiting = (index - self.taken) & _MASK16
        if waiting > self.size:
            raise RingError(f"{waiting} requests in a queue of {self.size}")
        if not waiting:
            return None
        entry = self._available + _RING_AT + 2 * (self.taken % self.size)
        return self._walk(int.from_bytes(self._memory.read(entry, 2), "little"))

    def _walk(self, head: int) -> Chain:
        """Follow a chain through one copy of its table, which the driver cannot change meanwhile."""
        table = self._memory.read(self._table, _DESCRIPTOR.size * self.size)
        index, in_table, total = head, False, 0
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        while True:
            if index >= len(table) // _DESCRIPTOR.size:
                raise RingError(f"descriptor {index} of {len(table) // _DESCRIPTOR.size}")
            gpa, length, flags, following = _DESCRIPTOR.unpack_from(table, _DESCRIPTOR.size * index)
            if flags & _INDIRECT:
                if in_table:
                    raise RingError("an indirect table inside an indirect table")
                table, index, in_table = self._enter(gpa, length, flags), 0, True
                continue
            self._left -= 1
            if len(readable) + len(writable) >= self.size or self._left < 0:
                raise RingError(f"more descriptors than a queue of {self.size} has")
            self._check(gpa, length, write=bool(flags & _WRITE), behind=bool(writable))
            (writable if flags & _WRITE else readable).append((gpa, length))
            total += 0 if flags & _WRITE else length
            if total > MAX_REQUEST:
                raise RingError(f"a request of more than {MAX_REQUEST} bytes")
            if not flags & _NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            index = following

    def _enter(self, gpa: int, length: int, flags: int) -> bytes:
        """Check an indirect table (2.7.5.3) and return it."""
        if not self._indirect or flags & _NEXT:
            raise RingError("an indirect table that was not agreed on, or is not the last descriptor")
        if not length or length % _DESCRIPTOR.size or length > _DESCRIPTOR.size * self.size:
            raise RingError(f"an indirect table of {length} bytes for a queue of {self.size}")
        if not self._memory.covers(gpa, length, write=False):
            raise RingError(f"an indirect table at {gpa:#x}, outside the granted windows")
        return self._memory.read(gpa, length)

    def _check(self, gpa: int, length: int, *, write: bool, behind: bool) -> None:
        if behind and not write:
            raise RingError("a buffer to read behind one to write")  # 2.7.4.2
        if not self._memory.covers(gpa, length, write=write):
            raise RingError(f"a buffer of {length} bytes at {gpa:#x}, outside the granted windows")

    def data(self, chain: Chain) -> bytes:
        """Return what the driver sends with a request."""
        return b"".join(self._memory.read(gpa, length) for gpa, length in chain.readable if length)

    def finish(self, chain: Chain, answer: bytes) -> None:
        """Take the request: write the answer into its buffers, and give them back."""
        position = 0
        for gpa, length in chain.writable:
            part = answer[position : position + length]
            if part:
                self._memory.write(gpa, part)
            position += len(part)
        entry = self._used + _RING_AT + _USED.size * (self.taken % self.size)
        self._memory.write(entry, _USED.pack(chain.head, position))
        self.taken = (self.taken + 1) & _MASK16
        self._memory.write(self._used + 2, self.taken.to_bytes(2, "little"))

    def wants_interrupt(self) -> bool:
        """Say whether the driver wants to be told of what was given back."""
        return not int.from_bytes(self._memory.read(self._available, 2), "little") & _NO_INTERRUPT
