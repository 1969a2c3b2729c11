"""The guest's disk: verified content below, copy-on-write overlay above. The image itself is never written."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from vmgraft.errors import ContentMismatchError, HostError, VmgraftError

#: Unit of checking, of caching and of the overlay: the content tree's block (docs/format.md).
BLOCK: Final = 65536
#: Verified blocks kept in memory (16 MiB).
CACHE_BLOCKS: Final = 256
#: Blocks that reading ahead takes at once (1 MiB): who wants one of them waits for no more than that.
AHEAD_BLOCKS: Final = 16
#: Default bound of what a guest may write, in bytes.
OVERLAY_MAX: Final = 256 << 20


class ContentReader(Protocol):
    """Guest content; every open ``vmgraft.imagefmt`` image is one."""

    virtual_size: int
    sector_size: int

    def read(self, offset: int, length: int) -> bytes: ...  # noqa: D102


#: (block index, the block's bytes: 65536, fewer at the end) -> is it what was verified?
BlockCheck = Callable[[int, bytes], bool]


class OverlayFullError(HostError):
    """The guest wrote more than the overlay may hold; it sees a write error."""


def require_inside(size: int, offset: int, length: int) -> None:
    """Refuse a range outside a disk.

    Raises:
        ValueError: it is not inside.
    """
    if offset < 0 or length < 0 or offset + length > size:
        raise ValueError(f"bytes {offset}+{length} are not inside a disk of {size} bytes")


def mismatch(index: int) -> ContentMismatchError:
    """Return the error for a block that is not what was verified."""
    message, hint = f"block {index} of the guest content is not what was verified", "the image changed; verify it"
    return ContentMismatchError(message, offset=index * BLOCK, field=f"block {index}", hint=hint)


def touched(offset: int, length: int) -> range:
    """Return the blocks of which a range has a byte."""
    return range(offset // BLOCK, (offset + length + BLOCK - 1) // BLOCK)


def require_room(overlay: Mapping[int, bytearray], new: int, blocks: int) -> None:
    """Refuse to let an overlay grow over its bound, in blocks.

    Raises:
        OverlayFullError: it would.
    """
    if len(overlay) + new > blocks:
        raise OverlayFullError(f"the guest changed more than {blocks * BLOCK} bytes of its disk")


def put(overlay: Mapping[int, bytearray], offset: int, data: bytes) -> None:
    """Write into blocks that the overlay holds."""
    position = 0
    while position < len(data):
        index, start = divmod(offset + position, BLOCK)
        part = data[position : position + BLOCK - start]
        overlay[index][start : start + len(part)] = part
        position += len(part)


class VerifiedDisk:
    """Guest content of which every block is checked whenever it is taken from the image.

    Args:
        reader: The pristine content.
        check: Says whether a block is the one that was verified.
        overlay_max: Bytes the guest may change, in whole blocks.
    """

    def __init__(self, reader: ContentReader, check: BlockCheck, *, overlay_max: int = OVERLAY_MAX) -> None:
        self._reader, self._check = reader, check
        self._overlay_blocks = overlay_max // BLOCK
        self._cache: OrderedDict[int, bytes] = OrderedDict()
        self._overlay: dict[int, bytearray] = {}
        #: Guards the cache, and tells when blocks have come that are being read ahead by another thread.
        self._changed = threading.Condition(threading.Lock())
        self._fetching = threading.Lock()
        self._coming = range(0)
        self.size = reader.virtual_size
        self.sector_size = reader.sector_size
        #: Blocks taken from the image and checked, and blocks changed by the guest.
        self.blocks_checked = 0

    @property
    def blocks_written(self) -> int:
        """How many blocks the overlay holds."""
        return len(self._overlay)

    def overlay(self) -> Mapping[int, bytearray]:
        """Return what the guest changed, block by block."""
        return self._overlay

    def set_overlay(self, blocks: Mapping[int, bytearray]) -> None:
        """Replace what the guest changed.

        Raises:
            OverlayFullError: when it is more than the overlay may hold; nothing was changed.
        """
        if len(blocks) > self._overlay_blocks:
            raise OverlayFullError(f"more than {self._overlay_blocks * BLOCK} bytes of the disk are changed")
        self._overlay = dict(blocks)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes at ``offset`` as the guest sees them.

        Raises:
            ValueError: when the range is not inside the disk.
            ContentMismatchError: when a block differs from what was verified.
            FileError: when the image cannot be read.
        """
        require_inside(self.size, offset, length)
        parts = []
        while length:
            index, start = divmod(offset, BLOCK)
            part = self._block(index)[start : start + length]
            parts.append(bytes(part))
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Change the guest's view; the image stays as it is.

        Raises:
            ValueError: when the range is not inside the disk.
            OverlayFullError: when the overlay would grow over its bound; nothing was changed.
            ContentMismatchError: when a block that is written in part differs from what was verified.
        """
        require_inside(self.size, offset, len(data))
        new = [index for index in touched(offset, len(data)) if index not in self._overlay]
        require_room(self._overlay, len(new), self._overlay_blocks)
        for index in new:
            self._overlay[index] = bytearray(self._block(index))
        put(self._overlay, offset, data)

    def _block(self, index: int) -> bytes | bytearray:
        changed = self._overlay.get(index)
        if changed is not None:
            return changed
        with self._changed:
            while index in self._coming:
                self._changed.wait()
            cached = self._cache.get(index)
            if cached is not None:
                self._cache.move_to_end(index)
                return cached
        return self._load(index)

    def prefetch(self, first: int, count: int) -> None:
        """Take blocks into the cache by as few reads as possible; a wish, so what goes wrong shows when they are read.

        It may be called in another thread than the guest's.

        Args:
            first: Index of the first block.
            count: Blocks wanted, of which the cache must have room for twice as many.
        """
        last = min(first + min(count, CACHE_BLOCKS // 2), (self.size + BLOCK - 1) // BLOCK)
        run: list[int] = []
        for index in range(max(0, first), last + 1):
            wanted = index < last and index not in self._overlay and index not in self._cache
            if run and (not wanted or len(run) == AHEAD_BLOCKS):
                self._fetch(run[0], len(run))
                run = []
            if wanted:
                run.append(index)

    def _fetch(self, first: int, count: int) -> None:
        with self._fetching:
            with self._changed:
                self._coming = range(first, first + count)
            try:
                self._take(first, count)
            except VmgraftError:
                return
            finally:
                with self._changed:
                    self._coming = range(0)
                    self._changed.notify_all()

    def _take(self, first: int, count: int) -> None:
        offset = first * BLOCK
        data = self._reader.read(offset, min(count * BLOCK, self.size - offset))
        for index in range(first, first + count):
            block = data[(index - first) * BLOCK : (index - first + 1) * BLOCK]
            if len(block) == min(BLOCK, self.size - index * BLOCK) and self._check(index, block):
                self._keep(index, block)
            with self._changed:  # whoever waits for this one goes on
                self._coming = range(index + 1, first + count)
                self._changed.notify_all()

    def _keep(self, index: int, block: bytes) -> None:
        with self._changed:
            self.blocks_checked += 1
            self._cache[index] = block
            if len(self._cache) > CACHE_BLOCKS:
                self._cache.popitem(last=False)

    def _load(self, index: int) -> bytes:
        offset = index * BLOCK
        wanted = min(BLOCK, self.size - offset)
        block = self._reader.read(offset, wanted)
        if len(block) != wanted or not self._check(index, block):
            raise mismatch(index)
        self._keep(index, block)
        return block
