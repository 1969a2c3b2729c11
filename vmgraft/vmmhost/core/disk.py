"""The guest's disk: verified content below, copy-on-write overlay above. The image itself is never written."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from vmgraft.errors import ContentMismatchError, HostError

#: Unit of checking, of caching and of the overlay: the content tree's block (docs/format.md).
BLOCK: Final = 65536
#: Verified blocks kept in memory (16 MiB).
CACHE_BLOCKS: Final = 256
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
        self.size = reader.virtual_size
        self.sector_size = reader.sector_size
        #: Blocks taken from the image and checked, and blocks changed by the guest.
        self.blocks_checked = 0

    @property
    def blocks_written(self) -> int:
        """How many blocks the overlay holds."""
        return len(self._overlay)

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes at ``offset`` as the guest sees them.

        Raises:
            ValueError: when the range is not inside the disk.
            ContentMismatchError: when a block differs from what was verified.
            FileError: when the image cannot be read.
        """
        self._inside(offset, length)
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
        self._inside(offset, len(data))
        touched = range(offset // BLOCK, (offset + len(data) + BLOCK - 1) // BLOCK)
        new = [index for index in touched if index not in self._overlay]
        if len(self._overlay) + len(new) > self._overlay_blocks:
            raise OverlayFullError(f"the guest changed more than {self._overlay_blocks * BLOCK} bytes of its disk")
        for index in new:
            self._overlay[index] = bytearray(self._block(index))
        position = 0
        while position < len(data):
            index, start = divmod(offset + position, BLOCK)
            part = data[position : position + BLOCK - start]
            self._overlay[index][start : start + len(part)] = part
            position += len(part)

    def _inside(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"bytes {offset}+{length} are not inside a disk of {self.size} bytes")

    def _block(self, index: int) -> bytes | bytearray:
        changed = self._overlay.get(index)
        if changed is not None:
            return changed
        cached = self._cache.get(index)
        if cached is not None:
            self._cache.move_to_end(index)
            return cached
        return self._load(index)

    def _load(self, index: int) -> bytes:
        offset = index * BLOCK
        wanted = min(BLOCK, self.size - offset)
        block = self._reader.read(offset, wanted)
        if len(block) != wanted or not self._check(index, block):
            message = f"block {index} of the guest content is not what was verified"
            raise ContentMismatchError(
                message, offset=offset, field=f"block {index}", hint="the image changed; verify it"
            )
        self.blocks_checked += 1
        self._cache[index] = block
        if len(self._cache) > CACHE_BLOCKS:
            self._cache.popitem(last=False)
        return block
