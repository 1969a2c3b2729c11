"""Writing into a gap, see ``gap``: each step is one write, or several that no reader looks at, followed by a flush."""

from __future__ import annotations

from collections.abc import Callable

from vmgraft.errors import FileError
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.contract import Located, Locator, Placement
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.gap import FOREIGN_SIDECAR, SECTOR, Gap, Note, Phase, pack_note, read_note, record_in_gap

#: Makes the container point to the record, or stop doing so, in steps that flush what they wrote.
Step = Callable[[], None]


def note_for(gap: Gap, locator: Locator, flags: int = 0) -> Note:
    """Return the note that goes with a graft."""
    size = locator.record_size if locator.placement is Placement.INLINE else 0
    area_end = gap.record + -(-size // SECTOR) * SECTOR
    return Note(gap.start, Phase.CHANGING, area_end, locator, flags)


def note_of(file: FlatFile, gap: Gap, located: Located) -> Note | None:
    """Return a note that covers what a graft, or the rest of one, has in the gap; None where it has nothing there."""
    found, locator = read_note(file, gap), located.locator
    flags = 0 if found is None else found.flags
    if locator is not None and locator.placement is Placement.INLINE and gap.holds(locator):
        return note_for(gap, locator, flags)
    if found is not None:
        return found
    record = record_in_gap(file, gap)
    if record is None:
        return None
    return note_for(gap, Locator(Placement.INLINE, gap.record, record.size, record.sha256, bytes(32), 0))


def owns_sidecar(located: Located, note: Note | None) -> bool:
    """Return whether the sidecar's name is this graft's, so that detach removes the file.

    Args:
        located: The graft.
        note: What :func:`note_of` returned.
    """
    if located.state in FOREIGN_SIDECAR:
        return False
    locator = located.locator
    return note is None if locator is None else locator.placement is Placement.SIDECAR


def put(writer: Writer, note: Note, record: Blob | None, point: Step, unpoint: Step) -> None:
    """Write note and record, have the container point to them, and finish the note.

    Args:
        writer: The image.
        note: What :func:`note_for` returned.
        record: The record; None when it is in a sidecar.
        point: The container's own step, which commits.
        unpoint: Takes ``point`` back.

    Raises:
        FileError: when writing fails; the image is as before then, or will be after the next opening for writing.
    """
    try:
        write_note(writer, note)
        if record is not None:
            writer.write_blob(note.offset + SECTOR, record)
            writer.sync()
        point()
        write_note(writer, note.at(Phase.ATTACHED))
    except FileError as error:
        try:
            unpoint()
            clear(writer, note)
        except FileError:
            # A file system that never writes in place needs room for that too.
            error.hint = "the note of an interrupted attach is left: run `vmgraft recover` when the cause is gone"
        raise


def finish(writer: Writer, note: Note, point: Step) -> None:
    """Have the container point to what is there already: a record in the gap, or a sidecar.

    Raises:
        FileError: when writing fails; the record stays.
    """
    point()
    write_note(writer, note.at(Phase.ATTACHED))


def take(writer: Writer, note: Note, unpoint: Step) -> None:
    """Make the container forget the graft, and turn note and record back into zeros.

    Raises:
        FileError: when writing fails; the next opening for writing finishes what was begun.
    """
    write_note(writer, note.at(Phase.CHANGING))
    unpoint()
    clear(writer, note)


def clear(writer: Writer, note: Note) -> None:
    """Turn record and note back into zeros, the note last."""
    start = note.offset + SECTOR
    if note.area_end > start:
        writer.wipe(start, note.area_end - start)
        writer.sync()
    writer.wipe(note.offset, SECTOR)
    writer.sync()


def write_note(writer: Writer, note: Note) -> None:
    """Write a note and flush it."""
    writer.write(note.offset, pack_note(note))
    writer.sync()
