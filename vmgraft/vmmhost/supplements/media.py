"""Disks of bytes that were made here: read-only, in memory or in a nameless file; and bytes laid over another disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, Protocol

from vmgraft.errors import FileError
from vmgraft.vmmhost.core.disk import BLOCK, OverlayFullError, require_inside
from vmgraft.vmmhost.core.drives import Disk, DiskAround

#: Bytes of a sector of a CD (ECMA-119, 6.1.2).
CD_SECTOR: Final = 2048


class Bytes(Protocol):
    """What a volume is made of; ``vmgraft.imagefmt.blob.Blob`` has this shape."""

    @property
    def size(self) -> int: ...  # noqa: D102
    def read(self, offset: int, length: int) -> bytes: ...  # noqa: D102


class ReadOnlyDisk:
    """A disk that nobody writes to.

    Args:
        data: Its bytes.
        sector_size: Bytes of a sector.
    """

    def __init__(self, data: Bytes, *, sector_size: int = CD_SECTOR) -> None:
        self._data, self.size, self.sector_size = data, data.size, sector_size
        #: It was made from verified bytes; there is nothing to check again.
        self.blocks_checked = 0

    @property
    def blocks_written(self) -> int:
        """Always 0."""
        return 0

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the disk.

        Raises:
            ValueError: the range is not inside the disk.
            FileError: the file behind it cannot be read.
        """
        require_inside(self.size, offset, length)
        data = self._data.read(offset, length)
        if len(data) != length:
            raise FileError("a volume that was made for the guest became shorter", offset=offset)
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Refuse.

        Raises:
            ValueError: the range is not inside the disk.
            OverlayFullError: always else; the guest sees a write error.
        """
        require_inside(self.size, offset, len(data))
        raise OverlayFullError("this volume cannot be written to")


class OverlaidDisk(DiskAround):
    """Another disk with bytes laid over it, in the guest's view only; what the guest writes wins over both.

    The disk below stays what it is and goes on checking its own blocks: only blocks that the guest writes to hold
    overlaid bytes there, in its copy-on-write part.

    Args:
        base: The disk below.
        patches: Offset in bytes and what is there instead; none overlaps another.

    Raises:
        ValueError: a patch is empty, not inside the disk, or overlaps another.
    """

    def __init__(self, base: Disk, patches: Sequence[tuple[int, bytes]]) -> None:
        super().__init__(base)
        end = 0
        for offset, data in sorted(patches):
            if offset < end or not data or offset + len(data) > self.size:
                raise ValueError(f"an overlay of {len(data)} bytes at {offset} does not fit")
            end = offset + len(data)
        #: Patches that no write of the guest has touched yet, and the first bytes of them.
        self._patches = sorted(patches)
        self._starts = [offset for offset, _ in self._patches]

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes as the guest sees them; raises what the disk below raises."""
        data = self.inner.read(offset, length)
        touched = self._touched(offset, length)
        if not touched:
            return data
        view = bytearray(data)
        for start, patch in touched:
            low, high = max(start, offset), min(start + len(patch), offset + length)
            view[low - offset : high - offset] = patch[low - start : high - start]
        return bytes(view)

    def write(self, offset: int, data: bytes) -> None:
        """Write for the guest; raises what the disk below raises, and has then changed nothing.

        The overlaid bytes of a block that is written to go down with it into the written part of the disk below, so
        that from then on every byte has one place.
        """
        require_inside(self.size, offset, len(data))
        if not self._touched(offset, len(data)):
            self.inner.write(offset, data)
            return
        start = offset // BLOCK * BLOCK
        end = min(-(-(offset + len(data)) // BLOCK) * BLOCK, self.size)
        merged = bytearray(self.read(start, end - start))
        merged[offset - start : offset - start + len(data)] = data
        self.inner.write(start, bytes(merged))
        self._patches = [part for place, patch in self._patches for part in _outside(place, patch, start, end)]
        self._starts = [place for place, _ in self._patches]

    def _touched(self, offset: int, length: int) -> list[tuple[int, bytes]]:
        """Return the patches that share a byte with a range."""
        found = []
        index = max(bisect_right(self._starts, offset) - 1, 0)
        while index < len(self._patches) and self._patches[index][0] < offset + length:
            start, patch = self._patches[index]
            if start + len(patch) > offset:
                found.append((start, patch))
            index += 1
        return found


def _outside(place: int, patch: bytes, start: int, end: int) -> list[tuple[int, bytes]]:
    """Return what of a patch lies before ``start`` or from ``end`` on."""
    left, right = patch[: max(start - place, 0)], patch[max(end - place, 0) :]
    return [part for part in ((place, left), (max(place, end), right)) if part[1]]
