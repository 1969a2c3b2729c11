"""Finding a raw image's trailer, also when something else has been at the end of the file since."""

from __future__ import annotations

from collections.abc import Iterator

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt._layout import LOCATOR, LOCATOR_SIZE, MAGIC
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.contract import GraftState, Kind, Located, Locator, Placement
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import parse_locator
from vmgraft.imagefmt.raw._layout import ALIGNMENT, SECTOR_SIZE, TRAILER_LIMIT, Trailer, round_up

#: UEFI 2.10, 5.3.2 "GPT Header": signature at LBA 1, AlternateLBA at byte 32 of the header.
_GPT_SIGNATURE = b"EFI PART"
_GPT_ALTERNATE_LBA = slice(32, 40)


def find_trailer(file: FlatFile) -> Located | None:
    """Look for a trailer and say in what state it is; None when there is no trace of one.

    A trailer says where it must lie, so a locator counts only at one of its two places. Looked at are, in this order:
    the end of the file, the last MiB, the MiB before the end of the last data (a file that was grown by a hole), and
    where a GPT says that the disk ended.
    """
    damaged: Located | None = None
    for offset in _candidates(file):
        data = file.read(offset, LOCATOR_SIZE)
        if not data.startswith(MAGIC):
            continue
        try:
            locator = parse_locator(data, file=file.path, offset=offset)
        except GraftFormatError as problem:
            if damaged is None and _was_locator(file, data, offset):
                damaged = Located(GraftState.DAMAGED, str(problem), None, offset)
            continue
        trailer = Trailer(locator.file_size, locator.record_size)
        if _is_in_place(locator, trailer, offset):
            return _assess(file, locator, trailer, offset)
    return damaged


def _is_in_place(locator: Locator, trailer: Trailer, offset: int) -> bool:
    return (
        locator.placement is Placement.INLINE
        and locator.record_offset == trailer.record
        and trailer.fits
        and offset in (trailer.head, trailer.tail)
    )


def _was_locator(file: FlatFile, data: bytes, offset: int) -> bool:
    """Return whether 128 bytes that are no sound locator were one of this file's.

    Our magic alone says little: records begin with it too, and a disk may hold grafted images as files.
    """
    if offset == file.size - LOCATOR_SIZE or file.read(offset + LOCATOR_SIZE, len(MAGIC)) == MAGIC:
        return True
    numbers = LOCATOR.parse(data.ljust(LOCATOR_SIZE, b"\0"))
    trailer = Trailer(numbers.file_size, numbers.record_size)
    return numbers.record_offset == trailer.record and offset in (trailer.head, trailer.tail)


def _candidates(file: FlatFile) -> Iterator[int]:
    if file.size < LOCATOR_SIZE:
        return
    yield file.size - LOCATOR_SIZE
    yield from _in_window(file, file.size)
    end = _end_of_data(file)
    if end < file.size:
        yield max(0, end - LOCATOR_SIZE)
        yield from _in_window(file, end)
    header = file.read(SECTOR_SIZE, SECTOR_SIZE)
    if header.startswith(_GPT_SIGNATURE):
        alternate = int.from_bytes(header[_GPT_ALTERNATE_LBA], "little")
        if alternate < file.size // SECTOR_SIZE:
            yield round_up((alternate + 1) * SECTOR_SIZE, ALIGNMENT)


def _in_window(file: FlatFile, end: int) -> Iterator[int]:
    """Yield the aligned offsets in the last MiB before ``end`` at which our magic stands, last first."""
    start = max(0, end - TRAILER_LIMIT) // ALIGNMENT * ALIGNMENT
    window = file.read(start, end - start)
    for position in reversed(range(0, len(window), ALIGNMENT)):
        if window.startswith(MAGIC, position):
            yield start + position


def _end_of_data(file: FlatFile) -> int:
    """Return where the last data of the file ends, by bisection: "there is data behind x" holds up to one x only."""
    low, high = 0, file.size
    while high - low > ALIGNMENT:
        middle = (low + high) // 2 // ALIGNMENT * ALIGNMENT
        if middle <= low:
            break
        if _has_data(file, middle):
            low = middle
        else:
            high = middle
    return high


def _has_data(file: FlatFile, offset: int) -> bool:
    first = next(file.extents_from(offset, file.size), None)
    return first is not None and (first.kind is Kind.DATA or first.start + first.length < file.size)


def _assess(file: FlatFile, locator: Locator, trailer: Trailer, offset: int) -> Located:
    record = file.blob(trailer.record, locator.record_size)
    state, detail = _state(file, locator, trailer, record)
    return Located(state, detail, locator, offset, record if record.size else None)


def _state(file: FlatFile, locator: Locator, trailer: Trailer, record: Blob) -> tuple[GraftState, str]:
    """Judge what stands where the trailer should; the worst thing counts."""
    grown = file.size - trailer.end
    if grown < 0:
        return GraftState.CUT, f"the last {-grown} bytes are missing: attach was interrupted or the file cut"
    head, tail = (file.read(place, LOCATOR_SIZE) for place in (trailer.head, trailer.tail))
    if head != tail:
        return GraftState.DAMAGED, "the two locators of the trailer differ: another program wrote there"
    if _padding(file, locator, trailer):
        return GraftState.DAMAGED, "the padding of the trailer is not zero: another program wrote there"
    if record.sha256 != locator.record_sha256:
        state = GraftState.DAMAGED if grown else GraftState.OVERWRITTEN
        return state, "the record does not match the locator's digest"
    if grown:
        return GraftState.GROWN, f"the file grew by {grown} bytes behind the trailer since attach"
    return GraftState.OK, ""


def _padding(file: FlatFile, locator: Locator, trailer: Trailer) -> bool:
    """Return whether something else than zeros stands between the parts of the trailer."""
    before = file.read(locator.file_size, trailer.head - locator.file_size)
    end = trailer.record + locator.record_size
    return any(before) or any(file.read(end, trailer.tail - end))
