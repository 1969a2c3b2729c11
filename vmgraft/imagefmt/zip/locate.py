"""Finding the graft of an archive and telling its state.

Read from the end: end records, central directory, and in the 128 bytes before that the locator. It states where the
archive ended before; there the original end records must stand, and the ones behind must be their copy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vmgraft.errors import GraftFormatError, MalformedImageError, UnsupportedError
from vmgraft.imagefmt._layout import LOCATOR_SIZE, MAGIC
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import parse_locator
from vmgraft.imagefmt.sidecar import locate_sidecar, stray_sidecar
from vmgraft.imagefmt.zip import _layout as layout
from vmgraft.imagefmt.zip._layout import Appendix
from vmgraft.imagefmt.zip.directory import EndRecords, read_end
from vmgraft.imagefmt.zip.tail import shifted_tail

_CHANGED = "another program changed the central directory, the end record or the comment since attach"


@dataclass(frozen=True, slots=True)
class Found:
    """A graft and the archive it was put to.

    Attributes:
        located: State and record.
        records: The end records of the original archive.
        place: Where the parts of the graft are; None where there is none, or it does not fit.
        interrupted: Whether attach was stopped before the record was whole.
        detachable: Whether cutting the file to the original size loses nothing of somebody else.
    """

    located: Located
    records: EndRecords
    place: Appendix | None = None
    interrupted: bool = False
    detachable: bool = False


def find_graft(file: FlatFile) -> Found:
    """Look at the end of the file.

    Raises:
        MalformedImageError: when the file ends neither like an archive nor like a graft.
        UnsupportedError: when the archive consists of several files.
    """
    try:
        outer = read_end(file, file.size)
    except MalformedImageError:
        rescued = _rescue(file)
        if rescued is None:
            raise
        return rescued
    offset = outer.directory_offset - LOCATOR_SIZE
    data = file.read(offset, LOCATOR_SIZE) if offset >= 0 else b""
    if not data.startswith(MAGIC):
        return _find_orphan(file, outer)
    try:
        locator = parse_locator(data, file=file.path, offset=offset)
    except GraftFormatError as problem:
        return Found(Located(GraftState.DAMAGED, str(problem), None, offset), outer)
    return _assess(file, outer, locator, offset)


def _assess(file: FlatFile, outer: EndRecords, locator: Locator, offset: int) -> Found:
    fit = _fit(file, locator, offset)
    if fit is None:
        detail = "the locator does not fit the archive before it: bytes were put in or taken out since attach"
        return Found(Located(GraftState.DAMAGED, detail, locator, offset), outer)
    records, place = fit
    located = _record(file, locator, place)
    if not _is_copy(file, records, place):
        return Found(replace(located, state=GraftState.DAMAGED, detail=_CHANGED), records, place)
    found = Found(located, records, place, interrupted=_is_unwritten(located), detachable=True)
    if found.interrupted:
        detail = "attach was interrupted before the record was whole"
        return replace(found, located=replace(located, state=GraftState.CUT, detail=detail))
    if _is_dirty(file, place):
        detail = "another program wrote before or behind the record"
        return replace(found, located=replace(located, state=GraftState.DAMAGED, detail=detail))
    return found


def _fit(file: FlatFile, locator: Locator, offset: int) -> tuple[EndRecords, Appendix] | None:
    """Return the original's end records, and the places, when the locator's numbers lead back to its own offset."""
    inline = locator.placement is Placement.INLINE
    if locator.file_size > offset:
        return None
    try:
        records = read_end(file, locator.file_size)
    except (MalformedImageError, UnsupportedError):
        return None
    place = Appendix(locator.file_size, locator.record_size if inline else 0, records.tail_size)
    stated = place.record if inline else 0
    return (records, place) if place.locator == offset and locator.record_offset == stated else None


def _record(file: FlatFile, locator: Locator, place: Appendix) -> Located:
    if locator.placement is not Placement.INLINE:
        return locate_sidecar(file.path, locator, place.locator)
    record = file.blob(place.record, locator.record_size)
    located = Located(GraftState.OK, "", locator, place.locator, record)
    if record.size != locator.record_size or record.sha256 != locator.record_sha256:
        detail = "the record does not match the locator's digest"
        return replace(located, state=GraftState.OVERWRITTEN, detail=detail)
    return located


def _is_unwritten(located: Located) -> bool:
    """Return whether an inline record lacks its first sector, which attach writes last."""
    locator, record = located.locator, located.record
    if locator is None or locator.placement is not Placement.INLINE or record is None:
        return False
    return not any(record.read(0, layout.SECTOR))


def _is_copy(file: FlatFile, records: EndRecords, place: Appendix) -> bool:
    """Return whether what stands behind the locator is what attach wrote there, to the end of the file."""
    if file.size != place.end:
        return False
    original = file.read(records.directory_offset, records.tail_size)
    return shifted_tail(original, records, place.directory) == file.read(place.directory, records.tail_size)


def _is_dirty(file: FlatFile, place: Appendix) -> bool:
    """Return whether something else than zeros stands before or behind the record."""
    behind = place.record + place.record_size
    before = file.read(place.file_size, place.record - place.file_size)
    return any(before) or any(file.read(behind, place.locator - behind))


def _find_orphan(file: FlatFile, outer: EndRecords) -> Found:
    """Look for a graft that no end record refers to any more, and for a sidecar without one."""
    for locator, offset in _traces(file, outer.directory_offset, layout.ORPHAN_SCAN):
        if _fit(file, locator, offset) is not None:
            detail = "another program added to the archive: its new central directory lies behind the graft"
            return Found(Located(GraftState.ORPHANED, detail, locator, offset), outer)
    stray = stray_sidecar(file.path)
    if stray is None:
        return Found(Located(GraftState.NONE), outer)
    detail = "the archive does not point to the sidecar beside it"
    return Found(Located(GraftState.ORPHANED, detail, stray.locator, None, stray.record), outer)


def _rescue(file: FlatFile) -> Found | None:
    """Look for a graft where the end is not an archive's: the file was cut or grew, or attach was killed in a write."""
    for locator, offset in _traces(file, file.size, layout.RESCUE_SCAN):
        fit = _fit(file, locator, offset)
        if fit is None:
            continue
        records, place = fit
        located = _record(file, locator, place)
        interrupted = _is_unwritten(located)
        missing = place.end - file.size
        if missing > 0:
            state, detail = GraftState.CUT, f"the last {missing} bytes are missing: the file was cut, or attach killed"
        elif missing < 0:
            state, detail = GraftState.GROWN, f"the file grew by {-missing} bytes behind the graft since attach"
        else:
            state, detail = GraftState.DAMAGED, "the end record behind the graft was overwritten"
        located = replace(located, state=state, detail=detail)
        return Found(located, records, place, interrupted=interrupted and missing > 0, detachable=missing >= 0)
    return None


def _traces(file: FlatFile, end: int, reach: int) -> list[tuple[Locator, int]]:
    """Return sound locators on sector boundaries before ``end``, the last one first; a bounded number is looked at."""
    start = layout.round_up(max(0, end - reach), layout.SECTOR)
    data = file.read(start, end - start)
    found: list[tuple[Locator, int]] = []
    tried = 0
    for at in range((len(data) - 1) // layout.SECTOR * layout.SECTOR, -1, -layout.SECTOR):
        if not data.startswith(MAGIC, at):
            continue
        try:
            locator = parse_locator(data[at : at + LOCATOR_SIZE], file=file.path, offset=start + at)
        except GraftFormatError:
            pass
        else:
            found.append((locator, start + at))
        tried += 1
        if tried == layout.MAX_TRACES:
            break
    return found
