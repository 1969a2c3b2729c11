"""Attach to and detach from VMDK images.

The locator's line goes behind the descriptor's text. All of it but the first byte is written behind the NUL that ends
the text, where nobody reads; the one byte that replaces the NUL is the commit. Detach puts the NUL back first; see
``text`` for lines that others have written behind ours. A note in the gap (see ``gap``) tells what was going on, if
anything interrupts this.
"""

from __future__ import annotations

from dataclasses import replace

from vmgraft.errors import GraftFormatError, NoRoomError, UsageError
from vmgraft.imagefmt import gap as gaps
from vmgraft.imagefmt import gapwriter
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement, RecordBuilder, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.sidecar import read_sidecar, remove_sidecar, write_sidecar
from vmgraft.imagefmt.vmdk import _layout as lay
from vmgraft.imagefmt.vmdk import text
from vmgraft.imagefmt.vmdk.descriptor import Descriptor
from vmgraft.imagefmt.vmdk.graft import Anatomy, has_place, line_for


def attach(
    file: FlatFile,
    parts: Anatomy,
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
    leftover = gapwriter.note_of(file, parts.gap, located)
    fits = has_place(file, parts, leftover)
    limit = gaps.free_bytes(file, parts.gap, leftover) if fits else 0
    newline = not parts.descriptor.text.endswith(b"\n")
    size = file.current_size()
    record = build(Undo(file_size=size, facts={gaps.FACT_LOCATOR: int(fits), lay.FACT_NEWLINE: int(fits and newline)}))
    if placement is Placement.INLINE and record.size > limit:
        raise NoRoomError(
            f"a record of {record.size} bytes does not fit into the {limit} unused bytes behind the tables",
            file=file.path,
            hint="use --placement sidecar",
        )
    if leftover is not None:
        gapwriter.take(file.writer(), leftover, lambda: _clean_tail(file.writer(), parts.descriptor))
    inline = placement is not Placement.SIDECAR and record.size <= limit
    kind, place = (Placement.INLINE, parts.gap.record) if inline else (Placement.SIDECAR, 0)
    locator = Locator(kind, place, record.size, record.sha256, tree_digest, size)
    if fits:
        _put(file.writer(), parts, locator, record, b"\n" if newline else b"")
    else:
        write_sidecar(file.path, locator, record)


def _put(writer: Writer, parts: Anatomy, locator: Locator, record: Blob, newline: bytes) -> None:
    descriptor = parts.descriptor
    piece = newline + line_for(locator)
    inline = locator.placement is Placement.INLINE
    note = gapwriter.note_for(parts.gap, locator, lay.NOTE_NEWLINE if newline else 0)

    def point() -> None:
        if not inline:
            write_sidecar(writer.file, locator, record)
        _append(writer, descriptor, piece)

    def unpoint() -> None:
        text.cut(writer, descriptor.end, len(piece))
        if not inline:
            _drop_sidecar(writer, locator)

    gapwriter.put(writer, note, record if inline else None, point, unpoint)


def _drop_sidecar(writer: Writer, locator: Locator) -> None:
    """Remove the sidecar if it is the one that ``locator`` stands for."""
    if read_sidecar(writer.file).locator == locator:
        remove_sidecar(writer.file)


def detach(file: FlatFile, parts: Anatomy, undo: Undo, located: Located) -> None:
    """Give the original bytes back: the text without our line, and zeros where the record was.

    Raises:
        GraftFormatError: when the record's place cannot be trusted, or our line cannot be taken out safely.
        FileError: when writing fails; opening for writing goes on from there.
    """
    descriptor, locator = parts.descriptor, located.locator
    if descriptor.lines and undo.facts.get(gaps.FACT_LOCATOR, 1) == 0:
        raise _untrusted(file, descriptor, "undo", "UNDO does not fit this image")
    if locator is not None and locator.placement is Placement.INLINE and not parts.gap.holds(locator):
        raise _untrusted(file, descriptor, "locator.record_offset", "the record is not where attach puts it")
    note = gapwriter.note_of(file, parts.gap, located)
    if note is None and located.state is GraftState.DAMAGED and not gaps.is_blank(file, parts.gap):
        raise _untrusted(file, descriptor, "locator", "the locator is damaged, and so is what stands behind the tables")
    newline = bool(undo.facts.get(lay.FACT_NEWLINE)) or (note is not None and bool(note.flags & lay.NOTE_NEWLINE))
    new = text.without_lines(descriptor, newline)
    if text.needs_journal(descriptor, new):
        note = _with_journal(file, parts, note, new)
    writer = file.writer()

    def unpoint() -> None:
        text.rewrite(writer, descriptor, new, note)
        if located.state is GraftState.ORPHANED and note is not None:
            _clean_tail(writer, descriptor)
        if gapwriter.owns_sidecar(located, note):
            remove_sidecar(file.path)

    if note is None:
        unpoint()
    else:
        gapwriter.take(writer, note, unpoint)


def _with_journal(file: FlatFile, parts: Anatomy, note: gaps.Note | None, new: bytes) -> gaps.Note:
    """Return the note with a place for the journal, which the new text needs."""
    journal = text.plan_journal(parts.descriptor, new)
    if note is None or journal is None:
        raise _untrusted(
            file,
            parts.descriptor,
            "ddb.vmgraft",
            "other lines stand behind ours, and the descriptor has no room to move them up safely",
            "take the line `ddb.vmgraft = ...` out of the descriptor by hand, then detach again",
        )
    return replace(note, journal=journal)


def _untrusted(
    file: FlatFile, descriptor: Descriptor, field: str, message: str, hint: str = "restore the image from a copy"
) -> GraftFormatError:
    return GraftFormatError(message, file=file.path, offset=descriptor.offset, field=field, hint=hint)


def recover(file: FlatFile, parts: Anatomy) -> bool:
    """Bring an interrupted attach or detach to an end; return whether there was one."""
    descriptor, note = parts.descriptor, gaps.read_note(file, parts.gap)
    if note is None or not gaps.is_interrupted(note):
        return False
    writer = file.writer()
    if text.read_journal(file, note, descriptor.offset, descriptor.size) is not None:
        text.replay(writer, descriptor, descriptor.text, note.journal)
    else:
        _clean_tail(writer, descriptor)
    if descriptor.lines:
        return False  # past the commit of an attach, or before that of a detach: the graft is whole
    if note.locator.placement is Placement.SIDECAR:
        _drop_sidecar(writer, note.locator)
    gapwriter.clear(writer, note)
    return True


def reattach(file: FlatFile, parts: Anatomy, located: Located) -> None:
    """Write the locator of a whole record into the descriptor again.

    Raises:
        NoRoomError: when there is no place for its line.
        GraftFormatError: when the record or its locator is not whole.
    """
    descriptor, locator, record = parts.descriptor, located.locator, located.record
    if locator is None or record is None or record.sha256 != locator.record_sha256:
        raise GraftFormatError("no whole record was found", file=file.path, field="record")
    if not has_place(file, parts, gapwriter.note_of(file, parts.gap, located)):
        message = "there is no place for the locator's line behind the descriptor's text"
        raise NoRoomError(message, file=file.path, offset=descriptor.end, field="ddb.vmgraft")
    newline = b"" if descriptor.text.endswith(b"\n") else b"\n"
    writer = file.writer()
    _clean_tail(writer, descriptor)
    note = gapwriter.note_for(parts.gap, locator, lay.NOTE_NEWLINE if newline else 0)
    gapwriter.finish(writer, note, lambda: _append(writer, descriptor, newline + line_for(locator)))


def _append(writer: Writer, descriptor: Descriptor, piece: bytes) -> None:
    """Write behind the text's NUL first, where nobody reads, then the byte in its place."""
    writer.write(descriptor.end + 1, piece[1:])
    writer.sync()
    writer.write(descriptor.end, piece[:1])
    writer.sync()


def _clean_tail(writer: Writer, descriptor: Descriptor) -> None:
    """Wipe what stands behind the text's NUL: attach found nothing there, so it is of our line, or of a journal."""
    if not descriptor.blank_tail:
        text.cut(writer, descriptor.end, descriptor.size - len(descriptor.text))
