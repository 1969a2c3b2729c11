"""Finding the graft's region, linked or left over, and saying in what state it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmgraft.errors import GraftFormatError, MalformedImageError
from vmgraft.imagefmt.contract import GraftState, Located, Placement
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.sidecar import locate_sidecar, stray_sidecar
from vmgraft.imagefmt.vhdx import _layout as lay
from vmgraft.imagefmt.vhdx import note as notes
from vmgraft.imagefmt.vhdx.bat import Survey
from vmgraft.imagefmt.vhdx.container import Container
from vmgraft.imagefmt.vhdx.note import Head
from vmgraft.imagefmt.vhdx.regions import Region


@dataclass(frozen=True, slots=True)
class Found:
    """A graft as found.

    Attributes:
        located: What readers are told.
        region: Its region, or None when there is no trace of one.
        head: What stands at the region's beginning, as far as it is sound.
        interrupted: An attach or detach was stopped: what it left can be cleared away.
    """

    located: Located
    region: Region | None = None
    head: Head | None = None
    interrupted: bool = False


def find_graft(flat: FlatFile, container: Container, survey: Callable[[], Survey]) -> Found:
    """Look for a graft; never raises for a damaged one.

    Args:
        flat: The file.
        container: What was read from it.
        survey: Looks through the block table; only called where there is something to judge.
    """
    region = container.region(lay.GRAFT_REGION)
    if region is not None:
        return _linked(flat, region, survey)
    found = _left_over(flat, container, survey)
    if found is not None:
        return found
    stray = stray_sidecar(flat.path)
    if stray is not None:
        detail = f"{stray.path.name} lies beside the image, but nothing in the image points to it"
        return Found(Located(GraftState.ORPHANED, detail, stray.locator, None, stray.record))
    return Found(Located(GraftState.NONE))


def _linked(flat: FlatFile, region: Region, survey: Callable[[], Survey]) -> Found:
    try:
        head = notes.read_head(flat, region.offset)
    except GraftFormatError as problem:
        cut = region.offset + lay.SECTOR > flat.size
        detail = "the graft's region lies behind the end of the file: the file was cut" if cut else str(problem)
        return Found(Located(GraftState.DAMAGED, detail, None, region.offset), region)
    locator = head.locator
    if locator.placement is Placement.SIDECAR:
        located = locate_sidecar(flat.path, locator, region.offset)
    else:
        located = _record(flat, region, head)
    state, detail = located.state, located.detail
    if state in (GraftState.OK, GraftState.OVERWRITTEN):
        state, detail = _damage(flat, region, head) or (state, detail)
    if state is GraftState.OK:
        state, detail = _growth(flat, region, survey)
    return Found(Located(state, detail, locator, region.offset, located.record), region, head)


def _record(flat: FlatFile, region: Region, head: Head) -> Located:
    """Read an inline record and compare it with the locator."""
    locator, offset = head.locator, region.offset + lay.RECORD_OFFSET
    record = flat.blob(offset, min(locator.record_size, max(0, region.length - lay.RECORD_OFFSET)))
    state, detail = GraftState.OK, ""
    if record.size < locator.record_size:
        state, detail = GraftState.CUT, f"the record is cut: {record.size} of {locator.record_size} bytes"
    elif record.sha256 != locator.record_sha256:
        state, detail = GraftState.OVERWRITTEN, "the record does not match the locator's digest"
    return Located(state, detail, locator, region.offset, record if record.size else None)


def _damage(flat: FlatFile, region: Region, head: Head) -> tuple[GraftState, str] | None:
    """Return what is wrong with the region besides its record, or None."""
    if head.offset is None or head.undo is None:
        return GraftState.DAMAGED, "the note or the copy of UNDO at the beginning of the graft's region is damaged"
    if not notes.fits(head, region):
        return GraftState.DAMAGED, "the graft's region is not where, or as long as, attach made it"
    if flat.size < region.end:
        missing = region.end - flat.size
        return GraftState.CUT, f"the last {missing} bytes of the graft's region are missing: the file was cut"
    inline = head.locator.record_size if head.locator.placement is Placement.INLINE else 0
    used = region.offset + lay.RECORD_OFFSET + inline
    rest = flat.read(used, region.end - used)
    if rest != bytes(len(rest)):
        return GraftState.DAMAGED, "another program wrote into the graft's region"
    return None


def _growth(flat: FlatFile, region: Region, survey: Callable[[], Survey]) -> tuple[GraftState, str]:
    """Tell blocks that were allocated behind the region, as they should be, from bytes that belong to nothing."""
    if flat.size == region.end:
        return GraftState.OK, ""
    try:
        end = max(survey().end, region.end)
    except MalformedImageError as problem:
        return GraftState.DAMAGED, str(problem)
    if flat.size > end:
        return GraftState.GROWN, f"{flat.size - end} bytes that belong to nothing were added to the file since attach"
    slack = region.length // lay.MIB
    return GraftState.OK, f"blocks were allocated behind the graft: detach will leave {slack} MiB of unused space there"


def _left_over(flat: FlatFile, container: Container, survey: Callable[[], Survey]) -> Found | None:
    """Look for a region that the table does not list: at the end of the file, or listed in the other copy only."""
    other = container.tables[1 - container.table.slot]
    listed = None if other is None else other.find(lay.GRAFT_REGION)
    for region, head in _candidates(flat, listed):
        # A payload block may hold another grafted image: what the table uses is never ours.
        try:
            surveyed = survey()
        except MalformedImageError:
            return None
        last = region.offset >= surveyed.end and region.end >= flat.size
        if region == listed or (last and head.locator.file_size >= surveyed.stored_end):
            return _judge(flat, container, region, head)
    return None


def _candidates(flat: FlatFile, listed: Region | None) -> list[tuple[Region, Head]]:
    last = (flat.size - 1) // lay.MIB * lay.MIB
    first = max(lay.HEADER_SECTION_SIZE, last - lay.MAX_REGION + lay.MIB)
    places = [offset for offset in range(last, first - 1, -lay.MIB) if notes.is_head(flat, offset)]
    if listed is not None:
        places.insert(0, listed.offset)
    found = []
    for offset in places:
        try:
            head = notes.read_head(flat, offset)
        except GraftFormatError:
            continue
        region = Region(lay.GRAFT_REGION, offset, head.length, False)
        if notes.fits(head, region):
            found.append((region, head))
    return found


def _judge(flat: FlatFile, container: Container, region: Region, head: Head) -> Found:
    if notes.is_interrupted(container.headers, head):
        detail = "attach or detach was interrupted: the next of them clears away what it left"
        return Found(Located(GraftState.NONE, detail), region, head, interrupted=True)
    if head.locator.placement is Placement.SIDECAR:
        record = locate_sidecar(flat.path, head.locator, region.offset).record
    else:
        record = _record(flat, region, head).record
    detail = "another program dropped the graft's region from the region table"
    return Found(Located(GraftState.ORPHANED, detail, head.locator, region.offset, record), region, head)
