"""Finding the graft of an ISO image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from vmgraft.imagefmt._layout import LOCATOR_SIZE, MAGIC
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.iso9660 import _layout as layout
from vmgraft.imagefmt.iso9660._layout import Appendix
from vmgraft.imagefmt.iso9660.assess import Found, assess, parse_place, undo_of
from vmgraft.imagefmt.record import parse_record_head
from vmgraft.imagefmt.sidecar import stray_sidecar


def find_graft(file: FlatFile, volume_space_size: int, root_sector: int) -> Found:
    """Look at the primary volume descriptor, at the end of the file, and for what an interrupted attach leaves.

    Args:
        file: The image.
        volume_space_size: Length of the volume in sectors.
        root_sector: Where the root directory lies; a program that adds a session moves it behind our record.
    """
    field = file.read(layout.LOCATOR_OFFSET, LOCATOR_SIZE)
    primary = parse_place(file, field, layout.LOCATOR_OFFSET)
    footer_offset = file.size - layout.SECTOR_SIZE
    footer = parse_place(file, file.read(footer_offset, LOCATOR_SIZE), footer_offset)
    if isinstance(primary, Locator):
        return assess(file, volume_space_size, field, primary, layout.LOCATOR_OFFSET)
    if isinstance(footer, Locator):
        return assess(file, volume_space_size, field, footer, footer_offset)
    found = _find_record(file, volume_space_size, field)
    problem = primary if isinstance(primary, str) else footer
    if found is None and isinstance(problem, str):
        return _damaged(file, problem, field)
    return found or _find_orphan(file, root_sector, field) or _find_stray_sidecar(file, field)


def _damaged(file: FlatFile, problem: str, field: bytes) -> Found:
    """A locator is there, but not sound; a sidecar may still know the way back."""
    stray = stray_sidecar(file.path)
    if stray is None or stray.locator is None:
        located = Located(GraftState.DAMAGED, problem, None, layout.LOCATOR_OFFSET)
        return Found(located, file.size, None, field, file.size, footer_sound=False)
    located = Located(GraftState.DAMAGED, problem, stray.locator, layout.LOCATOR_OFFSET, stray.record)
    size = min(stray.locator.file_size, file.size)
    return Found(located, size, undo_of(file, stray.record, 0), field, stray.locator.file_size)


def _find_record(file: FlatFile, volume_space_size: int, field: bytes) -> Found | None:
    """Look behind the volume for a record that no locator points to."""
    volume_end = volume_space_size * layout.SECTOR_SIZE
    for offset in islice(_marks(file, volume_end, volume_end + layout.SCAN_LIMIT), layout.MAX_TRACES):
        found = _trace(file, volume_space_size, offset, field)
        if found is not None:
            return found
    return None


def _find_orphan(file: FlatFile, root_sector: int, field: bytes) -> Found | None:
    """Look for a footer before the root directory: a session was added behind the graft, and its locator dropped."""
    end = min(root_sector * layout.SECTOR_SIZE, file.size)
    for offset in islice(_marks(file, max(0, end - layout.TRACE_SIZE), end), layout.MAX_TRACES):
        locator = parse_place(file, file.read(offset, LOCATOR_SIZE), offset)
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
    undo = undo_of(file, stray.record, 0)
    if undo is not None and undo.file_size != file.size:
        undo = None  # another image's
    if undo is not None and undo.patches and field != undo.patches[0].data:
        return _damaged(file, "the locator in the volume descriptor was overwritten", field)
    detail = f"{stray.path.name} lies beside the image, but nothing in the image points to it"
    located = Located(GraftState.ORPHANED, detail, stray.locator, None, stray.record)
    return Found(located, file.size, undo, field, file.size)


def _marks(file: FlatFile, start: int, end: int) -> Iterator[int]:
    """Yield the sectors between ``start`` and ``end`` that begin with our magic."""
    end = min(end, file.size)
    for base in range(start // layout.SECTOR_SIZE * layout.SECTOR_SIZE, end, layout.TRACE_SIZE):
        window = file.read(base, min(layout.TRACE_SIZE, end - base))
        for position in range(0, len(window), layout.SECTOR_SIZE):
            if window.startswith(MAGIC, position):
                yield base + position


def _trace(file: FlatFile, volume_space_size: int, offset: int, field: bytes) -> Found | None:
    """Return what is at ``offset``, if it is a record that says of itself that it belongs there.

    Its footer may be there, with something behind it; else an attach was interrupted, or the file was cut.
    """
    record = file.blob(offset, layout.TRACE_SIZE)
    undo = undo_of(file, record, offset)
    if undo is None or Appendix(undo.file_size, 0).record != offset:
        return None
    last = parse_record_head(record, file=file.path, offset=offset).sections[-1]
    place = Appendix(undo.file_size, last.offset + last.stored_size)
    footer = parse_place(file, file.read(place.footer, LOCATOR_SIZE), place.footer)
    if isinstance(footer, Locator) and (footer.record_offset, footer.record_size) == (offset, place.record_size):
        return assess(file, volume_space_size, field, footer, place.footer)
    record = file.blob(offset, place.record_size)
    if file.size < place.record + place.record_size:
        detail = "a record without locator lies behind the image: attach was interrupted or the file cut"
        located = Located(GraftState.CUT, detail, None, None, record)
        return Found(located, undo.file_size, undo, field, place.end, footer_sound=False)
    # What the content was hashed to is not known any more; the locator's digest is a hint only.
    locator = Locator(Placement.INLINE, offset, record.size, record.sha256, bytes(32), undo.file_size)
    found = assess(file, volume_space_size, field, locator, None)
    detail = "a whole record lies behind the image, but its locators are damaged: recover writes them again"
    state = GraftState.CUT if file.size < place.end else GraftState.DAMAGED
    return replace(found, located=replace(found.located, state=state, detail=detail))
