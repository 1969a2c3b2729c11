"""Attach to and detach from ZIP archives.

Nothing of the archive is changed: a graft stands behind it. Attach first writes locator, central directory and end
records at their final places, with one write; from then on every program finds the archive by them, and the space
before is a hole. Then it writes the record, its first sector last: a record that begins with zeros was not finished.
Detach is one truncation.
"""

from __future__ import annotations

from contextlib import suppress

from vmgraft.errors import FileError, GraftFormatError, NoRoomError, UnsupportedError, UsageError
from vmgraft.imagefmt._layout import LOCATOR_SIZE, MAX_RECORD_SIZE
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.contract import GraftState, Locator, Placement, RecordBuilder, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import pack_locator
from vmgraft.imagefmt.sidecar import remove_sidecar, write_sidecar
from vmgraft.imagefmt.zip import _layout as layout
from vmgraft.imagefmt.zip._layout import Appendix
from vmgraft.imagefmt.zip.directory import EndRecords, check_directory
from vmgraft.imagefmt.zip.locate import Found
from vmgraft.imagefmt.zip.tail import fits, shifted_tail


def room(records: EndRecords) -> int:
    """Return how long an inline record may be, in bytes; without ZIP64 the directory must begin below 4 GiB."""
    if records.zip64_offset is not None:
        return MAX_RECORD_SIZE
    padding = layout.SECTOR + layout.PAGE
    free = layout.MARK32 + records.base - LOCATOR_SIZE - padding - layout.round_up(records.end, layout.SECTOR)
    return max(0, min(MAX_RECORD_SIZE, free))


def attach_zip(file: FlatFile, build: RecordBuilder, placement: Placement, tree_digest: bytes, *, found: Found) -> None:
    """Write a record behind the archive, or beside it.

    Raises:
        UsageError: when the archive already carries a graft.
        UnsupportedError: for archives that other programs could not read afterwards.
        NoRoomError: when the record does not fit.
        FileError: when writing fails; the file is as before then.
    """
    if found.located.state not in (GraftState.NONE, GraftState.ORPHANED):
        raise UsageError("the archive already carries a graft", file=file.path, hint="detach it first")
    records = found.records
    _check_suitable(file, records)
    size, limit = records.end, room(records)
    record = build(Undo(file_size=size))
    if placement is Placement.INLINE and record.size > limit:
        raise NoRoomError(
            f"a record of {record.size} bytes does not fit: without ZIP64 the central directory must begin below "
            f"4 GiB, which leaves {limit} bytes",
            file=file.path,
            hint="use --placement sidecar",
        )
    inline = placement is not Placement.SIDECAR and record.size <= limit
    place = Appendix(size, record.size if inline else 0, records.tail_size)
    if not fits(records, place.directory):
        raise NoRoomError("the archive is too close to 4 GiB, where it would need ZIP64", file=file.path)
    where = (Placement.INLINE, place.record) if inline else (Placement.SIDECAR, 0)
    locator = Locator(*where, record.size, record.sha256, tree_digest, size)
    if not inline:
        write_sidecar(file.path, locator, record)
    try:
        _write(file, records, place, locator, record if inline else None)
    except FileError:
        with suppress(FileError):
            file.writer().truncate(size)
            if not inline:
                remove_sidecar(file.path)
        raise


def _check_suitable(file: FlatFile, records: EndRecords) -> None:
    if not records.entries:
        message = "the archive is empty, and programs do not find the end of one whose central directory was moved"
        raise UnsupportedError(message, file=file.path, offset=records.offset, field="entries")
    before = records.directory_offset - len(layout.APK_MAGIC)
    if before >= 0 and file.read(before, len(layout.APK_MAGIC)) == layout.APK_MAGIC:
        raise UnsupportedError(
            "the archive has an APK Signing Block, a signature over all its bytes that a graft would break",
            file=file.path,
            offset=before,
            field="APK Signing Block",
        )
    check_directory(file, records)


def _write(file: FlatFile, records: EndRecords, place: Appendix, locator: Locator, record: Blob | None) -> None:
    original = file.read(records.directory_offset, records.tail_size)
    writer = file.writer()
    writer.write(place.locator, pack_locator(locator) + shifted_tail(original, records, place.directory))
    writer.sync()
    if record is None:
        return
    at = 0
    for chunk in record.chunks():
        skip = layout.SECTOR if at == 0 else 0
        if chunk[skip:]:
            writer.write(place.record + at + skip, chunk[skip:])
        at += len(chunk)
    writer.sync()
    writer.write(place.record, record.read(0, layout.SECTOR))
    writer.sync()


def detach_zip(file: FlatFile, undo: Undo, *, found: Found) -> None:
    """Cut the graft off, and remove the sidecar if there is one.

    Raises:
        GraftFormatError: when the file is not the archive with the graft behind it.
        UsageError: when bytes of somebody else would be lost.
    """
    located = found.located
    if located.state is GraftState.ORPHANED and located.locator_offset is None:
        remove_sidecar(file.path)
        return
    offset, hint = located.locator_offset, "go back to a copy from before, or pack the entries into a new archive"
    if located.state is GraftState.ORPHANED or found.place is None:
        message = f"the original cannot be given back: {located.detail}"
        raise GraftFormatError(message, file=file.path, offset=offset, field="locator", hint=hint)
    if undo.file_size != found.place.file_size or undo.patches:
        raise GraftFormatError("UNDO and locator disagree about the original file", file=file.path, offset=offset)
    if not found.detachable:
        raise UsageError(f"{located.detail}; that would be lost", file=file.path, offset=found.place.end, hint=hint)
    cut_off(file, found.place)
    locator = located.locator
    foreign = located.state in (GraftState.SWAPPED, GraftState.STALE)
    if locator is not None and locator.placement is Placement.SIDECAR and not foreign:
        remove_sidecar(file.path)


def cut_off(file: FlatFile, place: Appendix) -> None:
    """Give the file its original size, and flush.

    Raises:
        FileError: when the system refuses.
    """
    writer = file.writer()
    writer.truncate(place.file_size)
    writer.sync()
