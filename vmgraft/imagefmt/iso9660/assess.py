"""Telling the state of an ISO image's graft, and what happened to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt._layout import LOCATOR_SIZE, MAGIC
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.contract import GraftState, Kind, Located, Locator, Patch, Placement, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.iso9660 import _layout as layout
from vmgraft.imagefmt.iso9660._layout import Appendix
from vmgraft.imagefmt.locator import pack_locator, parse_locator
from vmgraft.imagefmt.record import parse_record_head
from vmgraft.imagefmt.sidecar import locate_sidecar


class Appended(Enum):
    """What stands behind a graft."""

    NOTHING = "nothing"
    ZEROS = "zeros"
    SESSION = "a session"
    OTHER = "other bytes"


@dataclass(frozen=True, slots=True)
class Found:
    """A graft and what its record says about the original.

    Attributes:
        located: State and record.
        content_size: Bytes of the original file, as far as is known.
        undo: The record's UNDO, where it is sound.
        field: The 128 bytes where the descriptor's locator goes, as they are in the file.
        end: Size the grafted file should have, in bytes.
        footer_sound: Whether the footer is where it should be (or none is needed).
        rewritten: Whether another program wrote the image anew around a copy of the locator.
    """

    located: Located
    content_size: int
    undo: Undo | None
    field: bytes
    end: int
    footer_sound: bool = True
    rewritten: bool = False

    @property
    def original_field(self) -> bytes | None:
        """What to present instead of the 128 bytes: the original ones, zeros if lost, None: as they are."""
        if self.undo is not None and self.undo.patches:
            return self.undo.patches[0].data
        return bytes(LOCATOR_SIZE) if self.field.startswith(MAGIC) else None


@dataclass(frozen=True, slots=True)
class _Case:
    """One thing that may be wrong."""

    applies: bool
    state: GraftState
    detail: str


def parse_place(file: FlatFile, data: bytes, offset: int) -> Locator | str | None:
    """Return a locator, what is wrong with it, or None where none stands."""
    if not data.startswith(MAGIC):
        return None
    try:
        return parse_locator(data, file=file.path, offset=offset)
    except GraftFormatError as problem:
        return str(problem)


def undo_of(file: FlatFile, record: Blob | None, offset: int) -> Undo | None:
    """Return a record's UNDO when it is sound and within what attach can have changed."""
    if record is None:
        return None
    try:
        undo = parse_record_head(record, file=file.path, offset=offset).undo()
    except GraftFormatError:
        return None
    for patch in undo.patches:
        if patch.offset != layout.LOCATOR_OFFSET or patch.data not in layout.BLANKS:
            return None
    return undo if len(undo.patches) <= 1 else None


def assess(file: FlatFile, volume_space_size: int, field: bytes, locator: Locator, offset: int | None) -> Found:
    """Judge the graft that ``locator`` points to.

    Args:
        file: The image.
        volume_space_size: Length of the volume in sectors.
        field: The 128 bytes in the descriptor.
        locator: A sound locator.
        offset: Where it stands, in bytes; None when it was made up from the record.
    """
    inline = locator.placement is Placement.INLINE
    place = Appendix(locator.file_size, locator.record_size if inline else 0)
    if inline:
        record = file.blob(place.record, locator.record_size if locator.record_offset == place.record else 0)
        located = Located(GraftState.OK, "", locator, offset, record if record.size else None)
    else:
        located = locate_sidecar(file.path, locator, offset)
    overrun = layout.MIN_VOLUME <= locator.file_size < volume_space_size * layout.SECTOR_SIZE
    if offset == layout.LOCATOR_OFFSET and overrun and not _is_whole(located, locator):
        return _rewritten(file, volume_space_size, field, locator)
    # A sidecar needs a footer only where the descriptor's field was taken.
    has_footer = inline or offset != layout.LOCATOR_OFFSET
    found = Found(
        located,
        content_size=min(locator.file_size, file.size),
        undo=undo_of(file, located.record, place.record),
        field=field,
        end=place.end if has_footer else locator.file_size,
        footer_sound=not has_footer or _footer_is(file, place, locator),
    )
    state, detail = located.state, located.detail
    if state is GraftState.OK:
        state, detail = _first(_cases(file, found, locator, place))
    if state in (GraftState.OK, GraftState.OVERWRITTEN) and found.undo is not None:
        problem = _first(_original_cases(found.undo, locator, volume_space_size, field))
        if state is GraftState.OK or problem[0] is not GraftState.OK:
            state, detail = problem
    return replace(found, located=replace(located, state=state, detail=detail))


def _rewritten(file: FlatFile, volume_space_size: int, field: bytes, locator: Locator) -> Found:
    """A program that keeps the application-use field has written other files where the record was.

    What stood in the field is what stands around it: a field is blank as a whole.
    """
    around = file.read(layout.APPLICATION_USE_OFFSET, layout.LOCATOR_OFFSET - layout.APPLICATION_USE_OFFSET)
    blank = layout.BLANKS[1] if around and not around.strip(b" ") else layout.BLANKS[0]
    facts = {layout.FACT_VOLUME_SIZE: volume_space_size}
    undo = Undo(file_size=file.size, patches=(Patch(layout.LOCATOR_OFFSET, blank),), facts=facts)
    detail = (
        "another program wrote the image anew and copied the locator: the graft belongs to an image of"
        f" {locator.file_size} bytes, and the volume has {volume_space_size * layout.SECTOR_SIZE} bytes now:"
        " detach takes the locator out"
    )
    located = Located(GraftState.DAMAGED, detail, None, layout.LOCATOR_OFFSET)
    return Found(located, file.size, undo, field, file.size, rewritten=True)


def _first(cases: Iterable[_Case]) -> tuple[GraftState, str]:
    """Return state and detail of the first case that applies."""
    return next(((case.state, case.detail) for case in cases if case.applies), (GraftState.OK, ""))


def _is_whole(located: Located, locator: Locator) -> bool:
    """Return whether the record matches its digest: all of it is read, once."""
    return located.record is not None and located.record.sha256 == locator.record_sha256


def _cases(file: FlatFile, found: Found, locator: Locator, place: Appendix) -> Iterator[_Case]:
    """Yield what sizes, record and footer may have against the locator; the record is read last, as it may be long."""
    misplaced = locator.placement is Placement.INLINE and locator.record_offset != place.record
    missing = found.end - file.size
    yield _Case(misplaced, GraftState.DAMAGED, "the locator points to another place than behind the original image")
    if missing > 0:
        yield _Case(True, GraftState.CUT, _missing(file, found, locator, place, missing))
    yield _Case(found.undo is None, GraftState.DAMAGED, "the record's UNDO section is damaged")
    if not found.footer_sound:
        whole = ": the record is whole, and recover writes the footer again"
        yield _Case(
            True,
            GraftState.DAMAGED,
            "the footer behind the record is not the locator's copy"
            + (whole if _is_whole(found.located, locator) else ""),
        )
    others = "another program wrote before or behind the record"
    yield _Case(padding(file, locator, place), GraftState.DAMAGED, others)
    yield _Case(
        not _is_whole(found.located, locator),
        GraftState.OVERWRITTEN if missing == 0 else GraftState.DAMAGED,
        "the record does not match the locator's digest",
    )
    if missing < 0:
        yield _Case(True, GraftState.GROWN, _grown(file, found.end))


def _missing(file: FlatFile, found: Found, locator: Locator, place: Appendix, missing: int) -> str:
    if file.size < locator.file_size:
        return (
            f"the file was cut to {file.size} bytes, and the original image had {locator.file_size}:"
            " the record is gone, and the end of the original with it"
        )
    if file.size <= place.record:
        return (
            f"the record is gone: the file ends with the original image ({locator.file_size} bytes),"
            " as a copy or a disc does that was made with the volume's size"
        )
    there = found.undo is not None and file.size >= place.record + place.record_size
    whole = there and _is_whole(found.located, locator)
    record = "the record is whole: recover writes the footer again" if whole else "the record was cut"
    return f"the last {missing} bytes are missing: the file was cut; {record}"


def _grown(file: FlatFile, end: int) -> str:
    grown = f"the file grew by {file.size - end} bytes behind the graft since attach"
    if file.is_block_device:
        return f"the device is {file.size - end} bytes longer than the image: copy its first {end} bytes to a file"
    what = appended(file, end)
    if what is Appended.ZEROS:
        return (
            f"{grown}, all of them zero, as burning pads; content and graft are whole: recover, or cutting the file to"
            f" {end} bytes, makes it verify"
        )
    if what is Appended.SESSION:
        return (
            f"{grown}: a session was added; the graft speaks of the one before: cut the file to {end} bytes to go back"
        )
    return f"{grown}; cutting it to {end} bytes makes it verify, and loses them"


def appended(file: FlatFile, end: int) -> Appended:
    """Say what stands behind offset ``end``; what is too much to read counts as other bytes."""
    if file.size <= end:
        return Appended.NOTHING
    looked_at = 0
    result = Appended.ZEROS
    for offset, window in _windows(file, end):
        looked_at += len(window)
        if looked_at > layout.SCAN_LIMIT:
            return Appended.OTHER
        marks = range(-offset % layout.SECTOR_SIZE, len(window), layout.SECTOR_SIZE)
        if any(window.startswith(layout.DESCRIPTOR_MARK, position) for position in marks):
            return Appended.SESSION
        if result is Appended.ZEROS and any(window):
            result = Appended.OTHER
    return result


def _windows(file: FlatFile, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield the data behind ``start`` piece by piece, holes left out."""
    for extent in file.extents_from(start, file.size):
        if extent.kind is Kind.DATA:
            end = extent.start + extent.length
            for offset in range(extent.start, end, layout.TRACE_SIZE):
                yield offset, file.read(offset, min(layout.TRACE_SIZE, end - offset))


def _footer_is(file: FlatFile, place: Appendix, locator: Locator) -> bool:
    sector = file.read(place.footer, layout.SECTOR_SIZE)
    return parse_place(file, sector, place.footer) == locator and not any(sector[LOCATOR_SIZE:])


def padding(file: FlatFile, locator: Locator, place: Appendix) -> bool:
    """Return whether something else than zeros stands before or behind the record."""
    before = file.read(locator.file_size, place.record - locator.file_size)
    end = place.record + place.record_size
    return any(before) or any(file.read(end, place.footer - end))


def _original_cases(undo: Undo, locator: Locator, volume_space_size: int, field: bytes) -> tuple[_Case, ...]:
    """Return what the descriptor may have against what UNDO says about the original."""
    original = undo.patches[0].data if undo.patches else None
    in_descriptor = field == pack_locator(locator)
    foreign = original is not None and not in_descriptor and field != original
    lost = "wiped" if field in layout.BLANKS else "damaged" if field.startswith(MAGIC) else "overwritten"
    recover = "; another program uses the field now" if lost == "overwritten" else ": recover writes it again"
    return (
        _Case(
            undo.file_size != locator.file_size,
            GraftState.DAMAGED,
            "UNDO and locator disagree about the original size",
        ),
        _Case(
            undo.facts.get(layout.FACT_VOLUME_SIZE) != volume_space_size,
            GraftState.DAMAGED,
            "another program changed the volume's size since attach",
        ),
        _Case(
            volume_space_size * layout.SECTOR_SIZE > locator.file_size,
            GraftState.DAMAGED,
            "the volume is larger than the original image",
        ),
        _Case(
            field.startswith(MAGIC) and original is None,
            GraftState.DAMAGED,
            "UNDO lacks what stood in the volume descriptor",
        ),
        _Case(foreign, GraftState.DAMAGED, f"the locator in the volume descriptor was {lost}{recover}"),
        _Case(
            original is None,
            GraftState.OK,
            "the volume descriptor's field was taken: only the footer points to the record",
        ),
        _Case(
            not in_descriptor,
            GraftState.OK,
            "only the footer points to the record: attach or detach was interrupted, or the field was cleared since:"
            " recover writes it again",
        ),
    )
