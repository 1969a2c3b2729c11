"""Finding the graft of a qcow2 image: in its header extension, or what is left of it behind the extensions."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.blob import BytesBlob
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement, Undo
from vmgraft.imagefmt.locator import LOCATOR_SIZE, parse_locator
from vmgraft.imagefmt.locator import MAGIC as LOCATOR_MAGIC
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.qcow2.header import Extension, Header
from vmgraft.imagefmt.qcow2.note import Phase, find_bytes, find_note, parse_spill
from vmgraft.imagefmt.qcow2.plan import PREFIX_SIZE, RECORD_AT
from vmgraft.imagefmt.sidecar import Sidecar, locate_sidecar, stray_sidecar

_INTERRUPTED = "an attach or detach was interrupted; the next one, or `vmgraft recover`, cleans up behind it"


def interrupted(header: Header) -> bool:
    """Return whether the leftovers of an interrupted attach or detach stand in the first cluster."""
    if header.find(lay.EXT_GRAFT) is not None:
        return False
    note = find_note(header, header.end_offset)
    return header.find(lay.EXT_DEAD) is not None or (note is not None and note.phase is Phase.CHANGING)


def locate(header: Header, image: Path) -> Located:
    """Find the graft and say in what state it is.

    ``OK``: extension, locator and record agree. ``CUT``, ``OVERWRITTEN``, ``DAMAGED``, ``NO_RECORD``: the extension is
    there, its content is not what it should be. ``ORPHANED``: no extension, but a sound locator stands behind the
    extensions because a foreign writer dropped ours, or a sound sidecar lies beside the image. ``NONE``: anything
    else, an interrupted change included.
    """
    ext = header.find(lay.EXT_GRAFT)
    if ext is not None:
        return _from_extension(header, ext, image)
    changing = interrupted(header)
    if changing and (_owns_sidecar(header) or stray_sidecar(image) is None):
        return Located(GraftState.NONE, _INTERRUPTED)
    at = None if changing else find_orphan(header, str(image))
    if at is None:
        side = stray_sidecar(image)
        return Located(GraftState.NONE) if side is None else _stray(side)
    locator = parse_locator(header.first_cluster[at : at + LOCATOR_SIZE], file=image, offset=at)
    found = _record(header, locator, at, header.cluster_size, image)
    detail = "a foreign writer dropped the header extension"
    if found.state is not GraftState.OK:
        side = stray_sidecar(image)
        if side is not None and side.record is not None and side.record.sha256 == locator.record_sha256:
            return _stray(side)  # the leftovers were being wiped when their recovery was interrupted
        detail = f"{detail}, and {found.detail}"
    return Located(GraftState.ORPHANED, detail, locator, at, found.record)


def _stray(side: Sidecar) -> Located:
    detail = f"nothing in the image points to the sidecar {side.path.name}"
    return Located(GraftState.ORPHANED, detail, side.locator, None, side.record)


def _owns_sidecar(header: Header) -> bool:
    """Return whether the change that was interrupted wrote the sidecar itself, so that cleaning up removes it."""
    note = find_note(header, header.end_offset)
    return note is None or note.sidecar


def extension_locator(header: Header, ext: Extension) -> Locator | None:
    """Return the locator in the graft's extension, or None where it is not sound."""
    try:
        return parse_locator(header.data(ext)[PREFIX_SIZE:RECORD_AT], file=None, offset=ext.data_offset)
    except GraftFormatError:
        return None


def undo_from_note(header: Header, file_size: int, file: str) -> Undo | None:
    """Return an undo without the record: from the undo note, or the plain one where QEMU rewrote the header."""
    ext = header.find(lay.EXT_GRAFT)
    if ext is None:
        return None
    note = find_note(header, ext.offset)
    if note is None:
        return Undo(file_size)
    if len(note.spill) != note.spill_size:
        return None
    patches = parse_spill(note.spill, file) if note.spill else ()
    return Undo(file_size, patches, {"endOffset": note.end_offset, "backingSize": len(header.backing_name)})


def find_orphan(header: Header, file: str) -> int | None:
    """Return the offset of a sound locator behind the extensions, or None."""
    data = header.first_cluster
    at = find_bytes(data, LOCATOR_MAGIC, header.end_offset)
    while at >= 0:
        if at % 8 == 0 and len(data) - at >= LOCATOR_SIZE:
            try:
                parse_locator(data[at : at + LOCATOR_SIZE], file=file, offset=at)
            except GraftFormatError:
                pass  # a record begins with the same magic, and leftovers may be half overwritten
            else:
                return at
        at = data.find(LOCATOR_MAGIC, at + 1)
    return None


def _from_extension(header: Header, ext: Extension, image: Path) -> Located:
    data = header.data(ext)
    at = ext.data_offset + PREFIX_SIZE
    if len(data) < RECORD_AT or any(data[:PREFIX_SIZE]):
        return Located(GraftState.DAMAGED, "the header extension does not begin with 8 zero bytes and a locator")
    try:
        locator = parse_locator(data[PREFIX_SIZE:RECORD_AT], file=image, offset=at)
    except GraftFormatError as exc:
        rest = data[RECORD_AT:]
        return Located(GraftState.DAMAGED, exc.message, None, at, BytesBlob(rest) if rest else None)
    found = _record(header, locator, at, ext.data_offset + ext.length, image)
    used = RECORD_AT + (locator.record_size if locator.placement is Placement.INLINE else 0)
    if found.state is GraftState.OK and (len(data) - used >= 8 or any(data[used:])):
        return Located(GraftState.DAMAGED, "bytes follow the record in the extension", locator, at, found.record)
    return found


def _record(header: Header, locator: Locator, at: int, end: int, image: Path) -> Located:
    """Follow a locator at ``at``; an inline record stands right behind it and ends before ``end``."""
    if locator.placement is Placement.SIDECAR:
        return locate_sidecar(image, locator, at)
    begin = at + LOCATOR_SIZE
    if locator.record_offset:
        return Located(GraftState.DAMAGED, "the locator of an inline record names an offset", locator, at)
    record = header.first_cluster[begin : min(end, begin + locator.record_size)]
    if len(record) < locator.record_size:
        detail = f"the record is cut: {len(record)} of {locator.record_size} bytes"
        return Located(GraftState.CUT, detail, locator, at, BytesBlob(record))
    state, detail = GraftState.OK, ""
    if sha256(record).digest() != locator.record_sha256:
        state, detail = GraftState.OVERWRITTEN, "the record does not match the locator's digest"
    return Located(state, detail, locator, at, BytesBlob(record))
