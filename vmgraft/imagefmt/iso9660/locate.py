"""Finding the graft of an ISO image and telling its state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt._layout import LOCATOR_SIZE, MAGIC
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.iso9660 import _layout as layout
from vmgraft.imagefmt.iso9660._layout import Appendix
from vmgraft.imagefmt.locator import pack_locator, parse_locator
from vmgraft.imagefmt.record import parse_record_head
from vmgraft.imagefmt.sidecar import locate_sidecar, stray_sidecar


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
    """

    located: Located
    content_size: int
    undo: Undo | None
    field: bytes
    end: int
    footer_sound: bool = True

    @property
    def original_field(self) -> bytes | None:
        """What to present instead of the 128 bytes: the original ones, zeros if lost, None: as they are."""
        if self.undo is not None and self.undo.patches:
            return self.undo.patches[0].data
        return bytes(LOCATOR_SIZE) if self.field.startswith(MAGIC) else None


def find_graft(file: FlatFile, volume_space_size: int, root_sector: int) -> Found:
    """Look at the primary volume descriptor, at the end of the file, and for what an interrupted attach leaves.

    Args:
        file: The image.
        volume_space_size: Length of the volume in sectors.
        root_sector: Where the root directory lies; a program that adds a session moves it behind our record.
    """
    field = file.read(layout.LOCATOR_OFFSET, LOCATOR_SIZE)
    primary = _parse(file, field, layout.LOCATOR_OFFSET)
    footer_offset = file.size - layout.SECTOR_SIZE
    footer = _parse(file, file.read(footer_offset, LOCATOR_SIZE), footer_offset)
    if isinstance(primary, Locator):
        return _assess(file, volume_space_size, field, primary, layout.LOCATOR_OFFSET)
    if isinstance(footer, Locator):
        return _assess(file, volume_space_size, field, footer, footer_offset)
    if isinstance(primary, str):
        return _damaged(file, primary, field)
    found = _find_record(file, volume_space_size, field)
    if found is None and isinstance(footer, str):
        return _damaged(file, footer, field)
    return found or _find_orphan(file, root_sector, field) or _find_stray_sidecar(file, field)


def _damaged(file: FlatFile, problem: str, field: bytes) -> Found:
    """A locator is there, but not sound; a sidecar may still know the way back."""
    stray = stray_sidecar(file.path)
    if stray is None or stray.locator is None:
        located = Located(GraftState.DAMAGED, problem, None, layout.LOCATOR_OFFSET)
        return Found(located, file.size, None, field, file.size, footer_sound=False)
    located = Located(GraftState.DAMAGED, problem, stray.locator, layout.LOCATOR_OFFSET, stray.record)
    size = min(stray.locator.file_size, file.size)
    return Found(located, size, _undo(file, stray.record, 0), field, stray.locator.file_size)


def _parse(file: FlatFile, data: bytes, offset: int) -> Locator | str | None:
    """Return a locator, what is wrong with it, or None where none stands."""
    if not data.startswith(MAGIC):
        return None
    try:
        return parse_locator(data, file=file.path, offset=offset)
    except GraftFormatError as problem:
        return str(problem)


def _assess(file: FlatFile, volume_space_size: int, field: bytes, locator: Locator, offset: int) -> Found:
    inline = locator.placement is Placement.INLINE
    place = Appendix(locator.file_size, locator.record_size if inline else 0)
    if inline:
        record = file.blob(place.record, locator.record_size if locator.record_offset == place.record else 0)
        located = Located(GraftState.OK, "", locator, offset, record if record.size else None)
    else:
        located = locate_sidecar(file.path, locator, offset)
    undo = _undo(file, located.record, place.record)
    # A sidecar needs a footer only where the descriptor's field was taken.
    has_footer = inline or offset != layout.LOCATOR_OFFSET
    found = Found(
        located,
        content_size=min(locator.file_size, file.size),
        undo=undo,
        field=field,
        end=place.end if has_footer else locator.file_size,
        footer_sound=not has_footer or _footer_is(file, place, locator),
    )
    state, detail = located.state, located.detail
    if state is GraftState.OK:
        state, detail = _state(file, found, locator, place)
    if state in (GraftState.OK, GraftState.OVERWRITTEN) and undo is not None:
        problem = _original_problem(undo, locator, volume_space_size, field)
        if state is GraftState.OK or problem[0] is not GraftState.OK:
            state, detail = problem
    return replace(found, located=replace(located, state=state, detail=detail))


def _state(file: FlatFile, found: Found, locator: Locator, place: Appendix) -> tuple[GraftState, str]:
    """Compare sizes, record and footer with what the locator says; the first thing wrong counts."""
    record = found.located.record
    misplaced = locator.placement is Placement.INLINE and locator.record_offset != place.record
    missing = found.end - file.size
    mismatch = record is None or record.sha256 != locator.record_sha256
    mismatch_state = GraftState.OVERWRITTEN if missing == 0 else GraftState.DAMAGED
    checks = (
        (misplaced, GraftState.DAMAGED, "the locator points to another place than behind the original image"),
        (missing > 0, GraftState.CUT, f"the last {missing} bytes are missing: the file was cut"),
        (not found.footer_sound, GraftState.DAMAGED, "the footer behind the record is not the locator's copy"),
        (found.undo is None, GraftState.DAMAGED, "the record's UNDO section is damaged"),
        (_padding(file, locator, place), GraftState.DAMAGED, "another program wrote before or behind the record"),
        (mismatch, mismatch_state, "the record does not match the locator's digest"),
        (missing < 0, GraftState.GROWN, f"the file grew by {-missing} bytes behind the graft since attach"),
    )
    return _first(checks)


def _first(checks: tuple[tuple[bool, GraftState, str], ...]) -> tuple[GraftState, str]:
    """Return state and detail of the first check that strikes."""
    return next(((state, detail) for strikes, state, detail in checks if strikes), (GraftState.OK, ""))


def _footer_is(file: FlatFile, place: Appendix, locator: Locator) -> bool:
    sector = file.read(place.footer, layout.SECTOR_SIZE)
    return _parse(file, sector, place.footer) == locator and not any(sector[LOCATOR_SIZE:])


def _padding(file: FlatFile, locator: Locator, place: Appendix) -> bool:
    """Return whether something else than zeros stands before or behind the record."""
    before = file.read(locator.file_size, place.record - locator.file_size)
    end = place.record + place.record_size
    return any(before) or any(file.read(end, place.footer - end))


def _original_problem(undo: Undo, locator: Locator, volume_space_size: int, field: bytes) -> tuple[GraftState, str]:
    """Compare the descriptor with what UNDO says about the original."""
    original = undo.patches[0].data if undo.patches else None
    in_descriptor = field == pack_locator(locator)
    resized = undo.facts.get(layout.FACT_VOLUME_SIZE) != volume_space_size
    foreign = original is not None and not in_descriptor and field != original
    checks = (
        (undo.file_size != locator.file_size, GraftState.DAMAGED, "UNDO and locator disagree about the original size"),
        (resized, GraftState.DAMAGED, "another program changed the volume's size since attach"),
        (
            volume_space_size * layout.SECTOR_SIZE > locator.file_size,
            GraftState.DAMAGED,
            "the volume is larger than the original image",
        ),
        (
            field.startswith(MAGIC) and original is None,
            GraftState.DAMAGED,
            "UNDO lacks what stood in the volume descriptor",
        ),
        (foreign, GraftState.DAMAGED, "the locator in the volume descriptor was overwritten"),
        (
            original is None,
            GraftState.OK,
            "the volume descriptor's field was taken: only the footer points to the record",
        ),
        (not in_descriptor, GraftState.OK, "only the footer points to the record: attach or detach was interrupted"),
    )
    return _first(checks)


def _undo(file: FlatFile, record: Blob | bytes | None, offset: int) -> Undo | None:
    """Return the record's UNDO when it is sound and within what attach can have changed."""
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


def _find_record(file: FlatFile, volume_space_size: int, field: bytes) -> Found | None:
    """Look behind the volume for a record that no locator points to."""
    volume_end = volume_space_size * layout.SECTOR_SIZE
    for offset in islice(_marks(file, volume_end, volume_end + layout.SCAN_LIMIT), layout.MAX_TRACES):
        found = _trace(file, file.read(offset, layout.TRACE_SIZE), offset, field)
        if found is not None:
            return found
    return None


def _find_orphan(file: FlatFile, root_sector: int, field: bytes) -> Found | None:
    """Look for a footer before the root directory: a session was added behind the graft, and its locator dropped."""
    end = min(root_sector * layout.SECTOR_SIZE, file.size)
    for offset in islice(_marks(file, max(0, end - layout.TRACE_SIZE), end), layout.MAX_TRACES):
        locator = _parse(file, file.read(offset, LOCATOR_SIZE), offset)
        if not isinstance(locator, Locator) or locator.placement is not Placement.INLINE:
            continue
        place = Appendix(locator.file_size, locator.record_size)
        if (place.record, place.footer) == (locator.record_offset, offset):
            detail = "another program added to the image behind the record and dropped its locator"
            record = file.blob(place.record, locator.record_size)
            located = Located(GraftState.ORPHANED, detail, locator, offset, record)
            return Found(located, file.size, None, field, file.size)
    return None


def _find_stray_sidecar(file: FlatFile, field: bytes) -> Found:
    stray = stray_sidecar(file.path)
    if stray is None or stray.locator is None:
        return Found(Located(GraftState.NONE), file.size, None, field, file.size)
    undo = _undo(file, stray.record, 0)
    if undo is not None and undo.patches and undo.file_size == file.size and field != undo.patches[0].data:
        return _damaged(file, "the locator in the volume descriptor was overwritten", field)
    detail = f"{stray.path.name} lies beside the image, but nothing in the image points to it"
    located = Located(GraftState.ORPHANED, detail, stray.locator, None, stray.record)
    return Found(located, file.size, None, field, file.size)


def _marks(file: FlatFile, start: int, end: int) -> Iterator[int]:
    """Yield the sectors between ``start`` and ``end`` that begin with our magic."""
    end = min(end, file.size)
    for base in range(start // layout.SECTOR_SIZE * layout.SECTOR_SIZE, end, layout.TRACE_SIZE):
        window = file.read(base, min(layout.TRACE_SIZE, end - base))
        for position in range(0, len(window), layout.SECTOR_SIZE):
            if window.startswith(MAGIC, position):
                yield base + position


def _trace(file: FlatFile, head: bytes, offset: int, field: bytes) -> Found | None:
    """Return what an interrupted append has left at ``offset``, if it is that."""
    undo = _undo(file, head, offset)
    if undo is None or Appendix(undo.file_size, 0).record != offset:
        return None
    last = parse_record_head(head, file=file.path, offset=offset).sections[-1]
    place = Appendix(undo.file_size, last.offset + last.stored_size)
    state, detail = (
        GraftState.CUT,
        "a record without locator lies behind the image: attach was interrupted or the file cut",
    )
    if file.size >= place.end:
        state, detail = GraftState.DAMAGED, "a record lies behind the image, but its locators are damaged"
    located = Located(state, detail, None, None, file.blob(offset, last.offset + last.stored_size))
    return Found(located, undo.file_size, undo, field, place.end, footer_sound=False)
