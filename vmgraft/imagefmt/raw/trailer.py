"""Finding a raw image's trailer, also when something else has been at the end of the file since."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt._layout import LOCATOR, LOCATOR_SIZE, MAGIC, MAX_RECORD_SIZE
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.contract import GraftState, Kind, Located, Locator, Placement
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import parse_locator
from vmgraft.imagefmt.raw._layout import ALIGNMENT, SECTOR_SIZE, TRAILER_LIMIT, Trailer, round_up
from vmgraft.imagefmt.record import parse_record_head

#: UEFI 2.10, 5.3.2 "GPT Header": signature at LBA 1, AlternateLBA at byte 32 of the header; sectors of either size.
_GPT_SIGNATURE = b"EFI PART"
_GPT_ALTERNATE_LBA = slice(32, 40)
_GPT_SECTORS = (SECTOR_SIZE, 4096)
#: How many places are looked at for a record without locators.
_MAX_TRACES = 16
#: How often a hole at the end of the file is followed by data that something wrote behind it.
_MAX_RUNS = 3


@dataclass(frozen=True, slots=True)
class Condition:
    """What stands where a trailer should.

    Attributes:
        head: Whether the first locator is there.
        tail: Whether the second one is.
        clean: Whether all between the parts is zero, as far as the file reaches.
        whole: Whether the record matches its digest.
        grown: Bytes behind the trailer; negative when so many are missing.
        gpt: Whether a backup GPT stands at the end of the file.
    """

    head: bool
    tail: bool
    clean: bool
    whole: bool
    grown: int
    gpt: bool


def find_trailer(file: FlatFile) -> Located | None:
    """Look for a trailer and say in what state it is; None when there is no trace of one.

    A trailer says where it must lie, so a locator counts only at one of its two places. Looked at are, in this order:
    the end of the file, the last MiB, the MiB before the end of each of the last runs of data (a file that was grown by
    a hole, and perhaps got a backup GPT at its new end), and where a GPT says that the disk ended. Last, a record that
    says of itself that it must lie where it is counts without any locator.
    """
    damaged: Located | None = None
    records: list[int] = []
    for offset in _candidates(file):
        data = file.read(offset, LOCATOR_SIZE + len(MAGIC))
        if data.endswith(MAGIC) and len(records) < _MAX_TRACES:
            records.append(offset)
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
    traced = (_trace(file, head) for head in records)
    return next((found for found in traced if found is not None), damaged)


def condition(file: FlatFile, locator: Locator, record: Blob) -> Condition:
    """Look at every part of the trailer that ``locator`` speaks of."""
    trailer = Trailer(locator.file_size, locator.record_size)
    places = ((trailer.head, trailer.record), (trailer.tail, trailer.end))
    head, tail = (_is_locator(file, start, locator) for start, _ in places)
    return Condition(
        head=head,
        tail=tail,
        clean=not any(file.read(locator.file_size, trailer.head - locator.file_size))
        and not any(file.read(trailer.record_end, trailer.tail - trailer.record_end)),
        whole=record.size == locator.record_size and record.sha256 == locator.record_sha256,
        grown=file.size - trailer.end,
        gpt=any(file.read(max(0, file.size - size), len(_GPT_SIGNATURE)) == _GPT_SIGNATURE for size in _GPT_SECTORS),
    )


def _is_locator(file: FlatFile, offset: int, locator: Locator) -> bool:
    try:
        return parse_locator(file.read(offset, LOCATOR_SIZE), file=file.path, offset=offset) == locator
    except GraftFormatError:
        return False


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
    if offset == file.size - LOCATOR_SIZE or data.endswith(MAGIC):
        return True
    numbers = LOCATOR.parse(data.ljust(LOCATOR_SIZE, b"\0"))
    trailer = Trailer(numbers.file_size, numbers.record_size)
    return numbers.record_offset == trailer.record and offset in (trailer.head, trailer.tail)


# --- where to look -------------------------------------------------------------------------------------------------


def _candidates(file: FlatFile) -> Iterator[int]:
    if file.size < LOCATOR_SIZE:
        return
    yield file.size - LOCATOR_SIZE
    yield from _in_window(file, file.size)
    end = file.size
    for _ in range(_MAX_RUNS):
        before = _end_of_data(file, end) if end > ALIGNMENT else 0
        if before <= ALIGNMENT:
            break
        if before < end:
            yield max(0, before - LOCATOR_SIZE)
            yield from _in_window(file, before)
        end = _start_of_run(file, before)
    for sector in _GPT_SECTORS:
        header = file.read(sector, SECTOR_SIZE)
        alternate = int.from_bytes(header[_GPT_ALTERNATE_LBA], "little")
        if header.startswith(_GPT_SIGNATURE) and alternate < file.size // sector:
            yield round_up((alternate + 1) * sector, ALIGNMENT)


def _in_window(file: FlatFile, end: int) -> Iterator[int]:
    """Yield aligned offsets in the last MiB before ``end`` that have our magic, or 128 bytes behind; last first."""
    start = max(0, end - TRAILER_LIMIT) // ALIGNMENT * ALIGNMENT
    if next(file.extents_from(start, end)).kind is Kind.HOLE and not _has(file, start, end, Kind.DATA):
        return
    window = file.read(start, end - start)
    # Looking at these places only is ten times as fast as a search.
    for position in reversed(range(0, len(window), ALIGNMENT)):
        if window.startswith(MAGIC, position) or window.startswith(MAGIC, position + LOCATOR_SIZE):
            yield start + position


def _end_of_data(file: FlatFile, limit: int) -> int:
    """Return where the last data before ``limit`` ends: "there is data from x on" holds up to one x only."""
    return _bisect(limit, lambda start: _has(file, start, limit, Kind.DATA))


def _start_of_run(file: FlatFile, end: int) -> int:
    """Return where the run of data that ends at ``end`` begins, or 0 when it is longer than a MiB."""
    limit = max(0, end - TRAILER_LIMIT) // ALIGNMENT * ALIGNMENT
    start = _bisect(end, lambda start: _has(file, start, end, Kind.HOLE), limit)
    return start if start > limit + ALIGNMENT else 0


def _bisect(limit: int, holds: Callable[[int], bool], first: int = 0) -> int:
    """Return where the offsets between ``first`` and ``limit`` end at which ``holds`` is true, aligned upwards."""
    low, high = first, limit
    while high - low > ALIGNMENT:
        middle = (low + high) // 2 // ALIGNMENT * ALIGNMENT
        if middle <= low:
            break
        if holds(middle):
            low = middle
        else:
            high = middle
    return high


def _has(file: FlatFile, start: int, end: int, kind: Kind) -> bool:
    first = next(file.extents_from(start, end), None)
    return first is not None and (first.kind is kind or first.start + first.length < end)


# --- what is there -------------------------------------------------------------------------------------------------


def _assess(file: FlatFile, locator: Locator, trailer: Trailer, offset: int | None) -> Located:
    record = file.blob(trailer.record, locator.record_size)
    state, detail = _judge(condition(file, locator, record), trailer)
    return Located(state, detail, locator, offset, record if record.size else None)


def _judge(found: Condition, trailer: Trailer) -> tuple[GraftState, str]:
    """Say what happened; the first thing that applies counts."""
    record = "the record is whole" if found.whole else "the record is damaged too"
    lost = "first" if found.tail else "second"
    also = ", and a partitioning tool moved the backup GPT to its new end" if found.gpt else ""
    cases = (
        (
            found.grown < 0,
            GraftState.CUT,
            f"the last {-found.grown} bytes are missing: attach was interrupted or the file cut"
            + ("; the record is whole: recover writes them again" if found.whole else ""),
        ),
        (
            found.gpt and not found.tail and found.grown == 0,
            GraftState.DAMAGED,
            "a partitioning tool moved the backup GPT to the end of the file, into the trailer (as sgdisk -e, parted's"
            f" fix and growpart do); {record}: detach, then let the tool move it back",
        ),
        (
            found.clean and found.whole and found.head != found.tail,
            GraftState.DAMAGED,
            f"another program wrote over the {lost} locator of the trailer; {record}: recover writes it again",
        ),
        (
            not found.clean,
            GraftState.DAMAGED,
            f"the padding of the trailer is not zero: another program wrote there; {record}",
        ),
        (
            not (found.head and found.tail),
            GraftState.DAMAGED,
            f"a locator of the trailer differs: another program wrote there; {record}",
        ),
        (
            not found.whole,
            GraftState.DAMAGED if found.grown else GraftState.OVERWRITTEN,
            "the record does not match the locator's digest",
        ),
        (
            found.grown > 0,
            GraftState.GROWN,
            f"the file grew by {found.grown} bytes behind the trailer since attach{also}: shrink it to"
            f" {trailer.end} bytes",
        ),
    )
    return next(((state, detail) for applies, state, detail in cases if applies), (GraftState.OK, ""))


def _trace(file: FlatFile, head: int) -> Located | None:
    """Return the graft whose locators are lost, if a record behind ``head`` says that it belongs there."""
    start = head + LOCATOR_SIZE
    try:
        record = parse_record_head(file.blob(start, TRAILER_LIMIT), file=file.path, offset=start)
        undo = record.undo()
    except GraftFormatError:
        return None
    last = record.sections[-1]
    trailer = Trailer(undo.file_size, last.offset + last.stored_size)
    if (trailer.head, trailer.record) != (head, start) or not trailer.fits or trailer.record_size > MAX_RECORD_SIZE:
        return None
    if file.size < trailer.record_end:
        return None
    data = file.blob(start, trailer.record_size)
    # What the content was hashed to is not known any more; the locator's digest is a hint only.
    locator = Locator(Placement.INLINE, start, data.size, data.sha256, bytes(32), undo.file_size)
    detail = "both locators of the trailer were overwritten, and its record is left: recover writes them again"
    return Located(GraftState.DAMAGED, detail, locator, None, data)
