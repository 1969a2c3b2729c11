"""Where the guest contents of two images differ, as ranges of guest bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from vmgraft.imagefmt.contract import Image, Kind, Progress

#: Ranges are told to the sector: the smallest unit a guest can write.
SECTOR: Final = 512
#: Bytes compared at a time.
CHUNK: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Range:
    """Guest bytes ``start`` to ``end`` (exclusive); ``only_in`` is "a" or "b" past the end of the shorter content."""

    start: int
    end: int
    only_in: str | None = None

    def to_dict(self) -> dict[str, int | str | None]:
        """Return the JSON form."""
        return {"start": self.start, "end": self.end, "length": self.end - self.start, "onlyIn": self.only_in}


def diff_images(a: Image, b: Image, progress: Progress | None = None) -> list[Range]:
    """Compare the pristine guest contents of two images.

    Runs that are holes or zeros on both sides are skipped unread, so sparse images compare in the time of their data.

    Returns:
        Differing ranges in ascending order, merged, rounded outwards to sectors of 512 bytes.
    """
    common = min(a.virtual_size, b.virtual_size)
    found: list[Range] = []
    for start, end in _data_runs(a, b, common):
        for offset in range(start, end, CHUNK):
            length = min(CHUNK, end - offset)
            left, right = a.read(offset, length), b.read(offset, length)
            if left != right:
                found.extend(_differing_sectors(offset, left, right, common))
            if progress is not None:
                progress(offset + length, common)
    if a.virtual_size != b.virtual_size:
        longer = "a" if a.virtual_size > b.virtual_size else "b"
        found.append(Range(common, max(a.virtual_size, b.virtual_size), longer))
    return list(_merge(found))


def _data_runs(a: Image, b: Image, end: int) -> Iterator[tuple[int, int]]:
    """Yield the runs where at least one side stores data, sector-aligned, merged, in order."""
    runs = sorted(
        (extent.start, min(extent.start + extent.length, end))
        for image in (a, b)
        for extent in image.extents()
        if extent.kind is Kind.DATA and extent.start < end
    )
    current_start, current_end = 0, 0
    for raw_start, raw_end in runs:
        start, stop = raw_start - raw_start % SECTOR, min(raw_end + -raw_end % SECTOR, end)
        if start > current_end:
            if current_end > current_start:
                yield current_start, current_end
            current_start, current_end = start, stop
        else:
            current_end = max(current_end, stop)
    if current_end > current_start:
        yield current_start, current_end


def _differing_sectors(offset: int, left: bytes, right: bytes, end: int) -> Iterator[Range]:
    """Yield the runs of differing sectors in two equally placed chunks."""
    import numpy as np

    pad = -len(left) % SECTOR
    x = np.frombuffer(left + bytes(pad), dtype=np.uint8).reshape(-1, SECTOR)
    y = np.frombuffer(right + bytes(pad), dtype=np.uint8).reshape(-1, SECTOR)
    differs = (x != y).any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], differs, [False]))))
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield Range(offset + first * SECTOR, min(offset + last * SECTOR, end))


def _merge(ranges: list[Range]) -> Iterator[Range]:
    """Join neighbours that touch and say the same."""
    pending: Range | None = None
    for item in ranges:
        if pending is not None and pending.end == item.start and pending.only_in == item.only_in:
            pending = Range(pending.start, item.end, item.only_in)
            continue
        if pending is not None:
            yield pending
        pending = item
    if pending is not None:
        yield pending
