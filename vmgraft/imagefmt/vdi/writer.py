"""Attach to and detach from VDI images.

The commit is a write of 128 bytes into the comment, within the first sector of the file: disks write it as a whole.
Placement *inline* goes through a note (see ``gap``), so nothing is left behind by whatever interrupts it.
"""

from __future__ import annotations

from contextlib import suppress

from vmgraft.errors import FileError, GraftFormatError, NoRoomError, UsageError
from vmgraft.imagefmt import gap as gaps
from vmgraft.imagefmt import gapwriter
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement, RecordBuilder, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import LOCATOR_SIZE, MAGIC, pack_locator
from vmgraft.imagefmt.sidecar import remove_sidecar, write_sidecar
from vmgraft.imagefmt.vdi import _layout as lay
from vmgraft.imagefmt.vdi.graft import is_blank
from vmgraft.imagefmt.vdi.header import Header

_NO_PLACE = "the comment is taken, so nothing in the image could point to a record"


def attach(
    file: FlatFile,
    header: Header,
    build: RecordBuilder,
    placement: Placement,
    tree_digest: bytes,
    *,
    located: Located,
) -> None:
    """Write a record.

    Raises:
        UsageError: when the image already carries a graft.
        NoRoomError: when the record does not fit inline and that was asked for; nothing was written.
        FileError: when writing fails; the image is as before then.
    """
    if located.state not in (GraftState.NONE, GraftState.ORPHANED):
        raise UsageError("the image already carries a graft", file=file.path, hint="detach it first")
    leftover = gapwriter.note_of(file, header.gap, located)
    blank, limit = is_blank(header), gaps.free_bytes(file, header.gap, leftover)
    if placement is Placement.INLINE and not blank:
        raise NoRoomError(_NO_PLACE, file=file.path, offset=lay.COMMENT_OFFSET, hint="use --placement sidecar")
    size = file.current_size()
    record = build(Undo(file_size=size, facts={gaps.FACT_LOCATOR: int(blank)}))
    if placement is Placement.INLINE and record.size > limit:
        raise NoRoomError(
            f"a record of {record.size} bytes does not fit into the {limit} unused bytes before the block map",
            file=file.path,
            hint="use --placement sidecar",
        )
    if leftover is not None:
        gapwriter.take(file.writer(), leftover, lambda: None)
    if placement is Placement.SIDECAR or not blank or record.size > limit:
        locator = Locator(Placement.SIDECAR, 0, record.size, record.sha256, tree_digest, size)
        write_sidecar(file.path, locator, record)
        if blank:
            _point_to_sidecar(file.writer(), locator)
    else:
        place = header.gap.record
        locator = Locator(Placement.INLINE, place, record.size, record.sha256, tree_digest, size)
        _put_inline(file.writer(), header, locator, record)


def _point_to_sidecar(writer: Writer, locator: Locator) -> None:
    try:
        _set_comment(writer, pack_locator(locator))
    except FileError:
        with suppress(FileError):
            _set_comment(writer, bytes(LOCATOR_SIZE))
            remove_sidecar(writer.file)
        raise


def _put_inline(writer: Writer, header: Header, locator: Locator, record: Blob) -> None:
    gapwriter.put(
        writer,
        gapwriter.note_for(header.gap, locator),
        record,
        point=lambda: _set_comment(writer, pack_locator(locator)),
        unpoint=lambda: _set_comment(writer, bytes(LOCATOR_SIZE)),
    )


def _set_comment(writer: Writer, data: bytes) -> None:
    writer.write(lay.COMMENT_OFFSET, data)
    writer.sync()


def detach(file: FlatFile, header: Header, undo: Undo, located: Located) -> None:
    """Give the original bytes back: what attach wrote over were zeros, always.

    Raises:
        GraftFormatError: when the record's place cannot be trusted.
        FileError: when writing fails; opening for writing goes on from there.
    """
    in_comment = header.comment.startswith(MAGIC)
    if in_comment and undo.facts.get(gaps.FACT_LOCATOR, 1) == 0:
        raise _untrusted(file, "undo", "UNDO does not fit this image")
    locator, gap = located.locator, header.gap
    if locator is not None and locator.placement is Placement.INLINE and not gap.holds(locator):
        raise _untrusted(file, "locator.record_offset", "the record is not where attach puts it")
    note = gapwriter.note_of(file, gap, located)
    if note is None and located.state is GraftState.DAMAGED and not gaps.is_blank(file, gap):
        raise _untrusted(file, "locator", "the locator is damaged, and so is what stands before the block map")
    writer = file.writer()

    def unpoint() -> None:
        if in_comment:
            _set_comment(writer, bytes(LOCATOR_SIZE))
        if gapwriter.owns_sidecar(located, note):
            remove_sidecar(file.path)

    if note is None:
        unpoint()
    else:
        gapwriter.take(writer, note, unpoint)


def _untrusted(file: FlatFile, field: str, message: str) -> GraftFormatError:
    hint = "restore the image from a copy"
    return GraftFormatError(message, file=file.path, offset=lay.COMMENT_OFFSET, field=field, hint=hint)


def recover(file: FlatFile, header: Header) -> bool:
    """Bring an interrupted attach or detach to an end; return whether there was one."""
    note = gaps.read_note(file, header.gap)
    if note is None or not gaps.is_interrupted(note) or header.comment.startswith(MAGIC):
        return False
    gapwriter.clear(file.writer(), note)
    return True


def reattach(file: FlatFile, header: Header, located: Located) -> None:
    """Write the locator of a whole record into the comment again.

    Raises:
        NoRoomError: when something else stands in the comment.
        GraftFormatError: when the record or its locator is not whole.
    """
    locator, record = located.locator, located.record
    if not is_blank(header):
        raise NoRoomError(_NO_PLACE, file=file.path, offset=lay.COMMENT_OFFSET, hint="remove the comment first")
    if locator is None or record is None or record.sha256 != locator.record_sha256:
        raise GraftFormatError("no whole record was found", file=file.path, field="record")
    _set_comment(file.writer(), pack_locator(locator))
