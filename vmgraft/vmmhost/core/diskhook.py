"""The disk service on the way to a drive: hints may move reading earlier, and a write may be refused.

Whoever serves it sees sector numbers, never content, and changes none: what the guest reads is what the drive holds, in
whatever order it was fetched, and every block is checked as ever. What is hinted at is fetched beside the guest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmgraft.vmmhost.core.disk import BLOCK, OverlayFullError
from vmgraft.vmmhost.core.drives import Disk, DiskAround
from vmgraft.vmmhost.core.readahead import ReadAhead
from vmgraft.vmmhost.core.services import Service, ServiceTable

#: Unit in which the service counts, whatever the drive's own sector is.
SECTOR: Final = 512
#: Bytes that the hints of one answer may have read ahead: half of what the drive's cache holds.
AHEAD_MAX: Final = 8 << 20


class WriteRefusedError(OverlayFullError):
    """The disk service refused a write; the guest sees the error of a drive that is full."""


class HookedDisk(DiskAround):
    """A drive behind the disk service; without anybody serving it, only a look at the table away.

    Args:
        disk: The drive.
        services: The machine's services.
        number: What the service calls the drive: 0 is the one booted from.
    """

    def __init__(self, disk: Disk, services: ServiceTable, number: int) -> None:
        super().__init__(disk)
        self._services, self._number = services, number
        self._last_block: int | None = None  # the last that was asked about for a read
        prefetch: Callable[[int, int], None] | None = getattr(disk, "prefetch", None)
        self._reader = None if prefetch is None else ReadAhead(prefetch)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes as the guest sees them; see `core.drives.Disk`."""
        if self._services.served(Service.DISK) and 0 <= offset <= offset + length <= self.size:
            self._ask_once(offset, length)
        return self.inner.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Change what the guest sees; see `core.drives.Disk`.

        Raises:
            WriteRefusedError: the disk service says no; nothing was changed.
        """
        if self._services.served(Service.DISK) and not self._ask(offset, len(data), write=True):
            raise WriteRefusedError("the disk service refused a write")
        self.inner.write(offset, data)

    def _ask_once(self, offset: int, length: int) -> None:
        """Ask about a read, unless it goes on in the block of the last one: firmware reads sector by sector."""
        last = max(offset, offset + length - 1) // BLOCK
        if offset // BLOCK != self._last_block or last != self._last_block:
            self._last_block = last
            self._ask(offset, length, write=False)

    def _ask(self, offset: int, length: int, *, write: bool) -> bool:
        first = offset // SECTOR
        count = (offset + length + SECTOR - 1) // SECTOR - first
        allowed, ranges = self._services.disk(max(0, first), max(0, count), write=write, drive=self._number)
        self._ahead(ranges)
        return allowed

    def _ahead(self, ranges: tuple[tuple[int, int], ...]) -> None:
        """Have fetched what is hinted at, in whole blocks, up to the budget; what is outside the drive is left out."""
        budget = AHEAD_MAX
        for sector, count in ranges:
            start = min(sector * SECTOR, self.size)
            length = min(count * SECTOR, self.size - start, budget)
            if self._reader is None or length <= 0:
                continue
            self._reader.want(start // BLOCK, (start + length + BLOCK - 1) // BLOCK - start // BLOCK)
            budget -= length

    def settle(self) -> None:
        """Wait until everything that was hinted at is there."""
        if self._reader is not None:
            self._reader.settle()

    def close(self) -> None:
        """End reading ahead; the drive stays the caller's."""
        if self._reader is not None:
            self._reader.close()
