"""Guest content as a server hands it out: checked whenever it is taken from the image, by many threads at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Final, Protocol

from vmgraft.vmmhost.core.disk import BLOCK, OVERLAY_MAX, mismatch, put, require_inside, require_room, touched
from vmgraft.vmmhost.core.drives import Disk

_ZERO: Final = memoryview(bytes(1 << 20))
_ZERO_HASH: Final = sha256(_ZERO[:BLOCK]).digest()
#: Checked blocks kept because only a part of them was asked for (16 MiB).
_CACHE_BLOCKS: Final = 256
#: Bytes that a thread keeps for what it reads: the size of requests at which most clients stop.
_SCRATCH: Final = 512 << 10

Part = bytes | bytearray | memoryview


class ContentReader(Protocol):
    """Guest content; every open ``vmgraft.imagefmt`` image is one. ``readinto`` is called from several threads."""

    virtual_size: int
    sector_size: int

    def readinto(self, offset: int, buffer: memoryview) -> int: ...  # noqa: D102


class Leaves(Protocol):
    """What was verified: the SHA-256 of each zero-padded 64 KiB block (``imagefmt.tree.ContentTree`` is one)."""

    def leaf(self, index: int) -> bytes: ...  # noqa: D102


class Served(Protocol):
    """What an export needs of its content; safe to call from several threads."""

    size: int
    sector_size: int

    def parts(self, offset: int, length: int) -> Sequence[Part]: ...  # noqa: D102
    def write(self, offset: int, data: bytes) -> None: ...  # noqa: D102
    def extents(self, offset: int, length: int) -> Iterator[tuple[int, bool]]: ...  # noqa: D102


class CheckedContent:
    """Verified content with a throw-away overlay; a ``core.drives.Disk`` that many threads may use at once.

    No byte leaves that was not hashed here, in this process's own memory, after it was read: what is handed out is
    what was compared, and the page cache of the system is not trusted to have stayed as it was. Blocks that were
    verified to be zeros are not read at all.

    Args:
        reader: The pristine content.
        tree: Its verified leaf hashes.
        overlay_max: Bytes that may be changed, in whole blocks.
    """

    def __init__(self, reader: ContentReader, tree: Leaves, *, overlay_max: int = OVERLAY_MAX) -> None:
        self._reader, self._tree = reader, tree
        self._overlay_blocks = overlay_max // BLOCK
        self._overlay: dict[int, bytearray] = {}
        self._cache: OrderedDict[int, memoryview] = OrderedDict()
        self._lock, self._scratch = threading.Lock(), threading.local()
        self.size = reader.virtual_size
        self.sector_size = reader.sector_size
        self.blocks_checked = 0

    @property
    def blocks_written(self) -> int:
        """How many blocks the overlay holds."""
        return len(self._overlay)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes at ``offset``; errors as :meth:`core.disk.VerifiedDisk.read`."""
        return b"".join(self.parts(offset, length))

    def parts(self, offset: int, length: int) -> list[Part]:
        """Return ``length`` bytes at ``offset`` in pieces, with as few copies as can be; errors as :meth:`read`.

        The pieces are good until the same thread asks again: what they lie in is used over and over.
        """
        require_inside(self.size, offset, length)
        room = self._room(length)
        found: list[Part] = []
        end = offset + length
        while offset < end:
            index, start = divmod(offset, BLOCK)
            stop = min(end, (index + 1) * BLOCK)
            if (changed := self._changed(index, start, stop - offset)) is not None:
                found.append(changed)
            elif self._tree.leaf(index) == _ZERO_HASH:
                found.append(_ZERO[: stop - offset])
            elif start or stop - offset < min(BLOCK, self.size - offset):
                found.append(self._cached(index)[start : start + stop - offset])
            else:
                stop = self._whole(index, end)
                found.append(self._load(index, room[: stop - offset]))
                room = room[stop - offset :]
            offset = stop
        return found

    def write(self, offset: int, data: bytes) -> None:
        """Change the client's view; the image stays as it is. Errors as :meth:`core.disk.VerifiedDisk.write`."""
        require_inside(self.size, offset, len(data))
        # Blocks below are read before the lock is taken: others go on reading meanwhile.
        below = {index: self._below(index, offset, offset + len(data)) for index in touched(offset, len(data))}
        with self._lock:
            new = below.keys() - self._overlay.keys()
            require_room(self._overlay, len(new), self._overlay_blocks)
            self._overlay.update((index, below[index]) for index in new)
            put(self._overlay, offset, data)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Yield (bytes, are they verified zeros) from ``offset`` on; read from what was verified, not from the image.

        Raises:
            ValueError: when the range is not inside the disk.
        """
        require_inside(self.size, offset, length)
        end, start, zeros = offset + length, offset, False
        while offset < end:
            index = offset // BLOCK
            now = index not in self._overlay and self._tree.leaf(index) == _ZERO_HASH
            if offset > start and now != zeros:
                yield offset - start, zeros
                start = offset
            zeros, offset = now, min(end, (index + 1) * BLOCK)
        if offset > start:
            yield offset - start, zeros

    def _bounds(self, index: int) -> tuple[int, int]:
        return index * BLOCK, min(BLOCK, self.size - index * BLOCK)

    def _below(self, index: int, start: int, end: int) -> bytearray:
        """Return a block that is about to be written from ``start`` to ``end``; what is wholly written is not read."""
        first, length = self._bounds(index)
        if start <= first and first + length <= end:
            return bytearray(length)
        return bytearray().join(self.parts(first, length))

    def _changed(self, index: int, start: int, length: int) -> bytes | None:
        if index not in self._overlay:
            return None
        with self._lock:
            return bytes(self._overlay[index][start : start + length])

    def _whole(self, index: int, end: int) -> int:
        """Return where the run of blocks ends that are wanted whole, unchanged and not zeros, from ``index`` on."""
        stop = index * BLOCK
        while stop < end:
            index = stop // BLOCK
            length = min(BLOCK, self.size - stop)
            if stop + length > end or index in self._overlay or self._tree.leaf(index) == _ZERO_HASH:
                break
            stop += length
        return stop

    def _cached(self, index: int) -> memoryview:
        with self._lock:
            block = self._cache.get(index)
            if block is not None:
                self._cache.move_to_end(index)
                return block
        block = self._load(index, memoryview(bytearray(self._bounds(index)[1])))
        with self._lock:
            self._cache[index] = block
            if len(self._cache) > _CACHE_BLOCKS:
                self._cache.popitem(last=False)
        return block

    def _room(self, length: int) -> memoryview:
        """Return memory for whole blocks of one request: this thread's own, which is still in the processor's cache."""
        if length > _SCRATCH:
            return memoryview(bytearray(length))
        room: memoryview | None = getattr(self._scratch, "room", None)
        if room is None:
            room = self._scratch.room = memoryview(bytearray(_SCRATCH))
        return room

    def _load(self, index: int, view: memoryview) -> memoryview:
        """Read whole blocks and compare each with what was verified."""
        length = len(view)
        if self._reader.readinto(index * BLOCK, view) != length:
            raise mismatch(index)
        for start in range(0, length, BLOCK):
            block = view[start : start + BLOCK]
            digest = sha256(block)
            if len(block) < BLOCK:
                digest.update(_ZERO[: BLOCK - len(block)])
            if digest.digest() != self._tree.leaf(index + start // BLOCK):
                raise mismatch(index + start // BLOCK)
        with self._lock:
            self.blocks_checked += -(-length // BLOCK)
        return view.toreadonly()


class LockedDisk:
    """Any disk, for a server with many threads: one of them at a time reaches it."""

    def __init__(self, disk: Disk) -> None:
        self._disk, self._lock = disk, threading.Lock()
        self.size, self.sector_size = disk.size, disk.sector_size

    def parts(self, offset: int, length: int) -> list[Part]:
        """Return content in one piece."""
        with self._lock:
            return [self._disk.read(offset, length)]

    def write(self, offset: int, data: bytes) -> None:
        """Change content."""
        with self._lock:
            self._disk.write(offset, data)

    def extents(self, _offset: int, length: int) -> Iterator[tuple[int, bool]]:
        """Say that all of it is data: nothing else is known."""
        yield length, False


def served(disk: Disk) -> Served:
    """Return a disk in the form that a server needs."""
    return disk if isinstance(disk, CheckedContent) else LockedDisk(disk)
