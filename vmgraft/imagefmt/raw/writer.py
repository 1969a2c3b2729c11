"""Attach to and detach from raw images. Each is a single step on disk: one write, one truncate or one rename."""

from __future__ import annotations

from contextlib import suppress
from hashlib import sha256

from vmgraft.errors import FileError, GraftFormatError, NoRoomError, UsageError
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement, RecordBuilder, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import pack_locator
from vmgraft.imagefmt.raw._layout import Trailer
from vmgraft.imagefmt.sidecar import remove_sidecar, write_sidecar


def attach_raw(
    file: FlatFile, build: RecordBuilder, placement: Placement, tree_digest: bytes, *, located: Located, room: int
) -> None:
    """Write a record behind the content or beside the file.

    Raises:
        UsageError: when the image already carries a graft.
        NoRoomError: when the record does not fit inline and that was asked for.
        FileError: when writing fails; the image is as before then.
    """
    if located.state not in (GraftState.NONE, GraftState.ORPHANED):
        raise UsageError("the image already carries a graft", file=file.path, hint="detach it first")
    size = file.current_size()
    record = build(Undo(file_size=size))
    if placement is Placement.INLINE and record.size > room:
        raise NoRoomError(
            f"a record of {record.size} bytes does not fit into the {room} bytes that a raw trailer may hold",
            file=file.path,
            hint="use --placement sidecar",
        )
    if placement is Placement.SIDECAR or record.size > room:
        locator = Locator(Placement.SIDECAR, 0, record.size, record.sha256, tree_digest, size)
        write_sidecar(file.path, locator, record)
    else:
        _append(file, size, record.read_all(), tree_digest)


def _append(file: FlatFile, size: int, record: bytes, tree_digest: bytes) -> None:
    """Write the whole trailer with one call.

    The locator at its head goes first to the disk: a write that is cut short by a crash is recognised by it, and the
    content's size is known.
    """
    trailer = Trailer(size, len(record))
    locator = pack_locator(
        Locator(Placement.INLINE, trailer.record, len(record), sha256(record).digest(), tree_digest, size)
    )
    body = (locator + record).ljust(trailer.tail - trailer.head, b"\0") + locator
    writer = file.writer()
    try:
        writer.write(trailer.head, body)
        writer.sync()
    except FileError:
        with suppress(FileError):
            writer.truncate(size)
        raise


def detach_raw(file: FlatFile, undo: Undo, located: Located) -> None:
    """Give the original file back.

    Raises:
        GraftFormatError: when the graft does not say where the content ends, or contradicts itself.
        UsageError: when the file grew behind the trailer: cutting would lose those bytes.
    """
    locator = located.locator
    if locator is None:
        raise GraftFormatError(
            f"the original size is not known: {located.detail}", file=file.path, offset=located.locator_offset
        )
    if undo.file_size != locator.file_size or undo.patches:
        raise GraftFormatError(
            "UNDO and locator disagree about the original file", file=file.path, offset=located.locator_offset
        )
    if locator.placement is Placement.SIDECAR:
        remove_sidecar(file.path)
        return
    trailer = Trailer(locator.file_size, locator.record_size)
    size = file.current_size()
    if size > trailer.end:
        raise UsageError(
            f"the file grew by {size - trailer.end} bytes behind the trailer since attach, and they would be lost",
            file=file.path,
            offset=trailer.end,
            hint=f"shrink the file to {trailer.end} bytes if nothing of value lies there, or copy the content out",
        )
    writer = file.writer()
    writer.truncate(locator.file_size)
    writer.sync()
