"""Where the parts of a raw trailer lie; see docs/format.md, "raw"."""

from __future__ import annotations

from dataclasses import dataclass

from vmgraft.imagefmt._layout import LOCATOR_SIZE

#: Trailers begin and end on multiples of this many bytes.
ALIGNMENT = 4096
#: A trailer, counted from the end of the content, stays below this: growpart ignores smaller growth.
TRAILER_LIMIT = 1 << 20
#: At least so many bytes lie between the record and the end of the file, zeros but for the second locator. It is what a
#: partitioning tool overwrites when it moves a backup GPT to the end of the file: 33 sectors of 512 bytes, or 5 of 4096
#: (UEFI 2.10, 5.3.1: a header and 16 KiB of entries). First locator and record survive that.
FOOT_SIZE = 20480
#: Bytes of a guest sector; the content is rounded up to it.
SECTOR_SIZE = 512


def round_up(value: int, multiple: int) -> int:
    """Return ``value`` rounded up to ``multiple``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Trailer:
    """Places of a trailer as file offsets in bytes, implied by the sizes of content and record."""

    file_size: int
    record_size: int

    @property
    def head(self) -> int:
        """Offset of the first locator."""
        return round_up(self.file_size, ALIGNMENT)

    @property
    def record(self) -> int:
        """Offset of the record."""
        return self.head + LOCATOR_SIZE

    @property
    def record_end(self) -> int:
        """Offset behind the record."""
        return self.record + self.record_size

    @property
    def end(self) -> int:
        """Offset behind the trailer, the size of the grafted file."""
        return round_up(self.record_end + FOOT_SIZE, ALIGNMENT)

    @property
    def tail(self) -> int:
        """Offset of the second locator."""
        return self.end - LOCATOR_SIZE

    @property
    def fits(self) -> bool:
        """Whether the trailer stays below the limit."""
        return self.end - self.file_size < TRAILER_LIMIT


def room(file_size: int) -> int:
    """Return how long an inline record may be, in bytes."""
    last_end = (file_size + TRAILER_LIMIT - 1) // ALIGNMENT * ALIGNMENT
    return last_end - round_up(file_size, ALIGNMENT) - LOCATOR_SIZE - FOOT_SIZE
