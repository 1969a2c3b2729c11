"""Attach to and detach from raw images. Each is a single step on disk: one write, one truncate or one rename."""

from __future__ import annotations

from contextlib import suppress
from hashlib import sha256

from vmgraft.errors import FileError, GraftFormatError, NoRoomError, UnsupportedError, UsageError
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement, RecordBuilder, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import pack_locator
from vmgraft.imagefmt.raw._layout import Trailer
from vmgraft.imagefmt.raw.trailer import Condition, condition
from vmgraft.imagefmt.record import parse_record
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
    if placement is Placement.AUTO and record.size > room:
        file.check_sidecar_lasts()
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


def reattach_raw(file: FlatFile, located: Located) -> None:
    """Write again what a whole record has lost of its trailer: either locator, or the end of the file.

    Raises:
        GraftFormatError: when the record is not whole.
        UnsupportedError: when bytes of somebody else stand where the trailer should be.
    """
    locator, record = located.locator, located.record
    if located.state is GraftState.OK:
        return
    if locator is None or record is None or locator.placement is not Placement.INLINE:
        raise _beyond_repair(file, located, located.detail or "no record was found", "attach again")
    file.size = file.current_size()
    found = condition(file, locator, record)
    trailer = Trailer(locator.file_size, locator.record_size)
    if not found.whole or _damaged_section(file, record, trailer):
        raise GraftFormatError(
            "the record is damaged, and nothing can bring it back",
            file=file.path,
            offset=trailer.record,
            hint="detach, which gives the original back, and attach again",
        )
    if found.grown > 0:
        hint = f"shrink the file to {trailer.end} bytes if nothing of value lies there: the graft is whole then"
        raise _beyond_repair(file, located, f"the file grew by {found.grown} bytes behind the trailer", hint)
    if not found.clean:
        hint = (
            "detach, let the tool move its backup GPT back, and attach again"
            if found.gpt
            else "detach, and attach again"
        )
        raise _beyond_repair(file, located, "bytes of another program stand in the trailer", hint)
    _restore(file, trailer, pack_locator(locator), found)


def _restore(file: FlatFile, trailer: Trailer, locator: bytes, found: Condition) -> None:
    """Write what is missing; a graft that is found by one locator stays so until the other one is there."""
    writer = file.writer()
    if not found.head:
        writer.write(trailer.head, locator)
        writer.sync()
    if found.grown < 0:
        # One write to the end, so that a file cut short again is found by its first locator, as before.
        start = min(trailer.tail, max(trailer.record_end, file.size))
        writer.write(start, locator.rjust(trailer.end - start, b"\0"))
        writer.sync()
    elif not found.tail:
        writer.write(trailer.tail, locator)
        writer.sync()


def _damaged_section(file: FlatFile, record: Blob, trailer: Trailer) -> bool:
    """Return whether the record does not hold what its own table says."""
    try:
        parsed = parse_record(record, file=file.path, offset=trailer.record)
        parsed.undo()
        for section in parsed.sections:
            parsed.raw(section)
    except GraftFormatError:
        return True
    return False


def _beyond_repair(file: FlatFile, located: Located, reason: str, hint: str) -> UnsupportedError:
    return UnsupportedError(
        f"the graft ({located.state.value}) cannot be brought back: {reason}",
        file=file.path,
        offset=located.locator_offset,
        hint=hint,
    )
