"""Taking our line out of the descriptor's text, so that a crash at any moment leaves the text with it or without.

Where the line is the last, a NUL in its place ends the text: one byte. Where all that changes lies in one sector, that
sector is written at once. Else the new text is first written as a *journal* to the unused end of the descriptor's area;
once the note in the gap says ``REPLAYING``, readers take the journal for the text, and it is put in place.
"""

from __future__ import annotations

from hashlib import sha256

from vmgraft.imagefmt import gap as gaps
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.gapwriter import write_note
from vmgraft.imagefmt.vmdk import _layout as lay
from vmgraft.imagefmt.vmdk.descriptor import Descriptor


def without_lines(descriptor: Descriptor, newline: bool) -> bytes:
    """Return the text without our lines, and without the newline that attach put before the only one."""
    text = descriptor.text
    for line in reversed(descriptor.lines):
        added = newline and len(descriptor.lines) == 1 and text[: line.start].endswith(b"\n")
        text = text[: line.start - int(added)] + text[line.end :]
    return text


def needs_journal(descriptor: Descriptor, new: bytes) -> bool:
    """Return whether the text cannot become ``new``, which is shorter, with a single write."""
    if not descriptor.lines or descriptor.text.startswith(new):
        return False
    first = descriptor.offset + descriptor.lines[0].start - 1
    return first // lay.SECTOR != (descriptor.end - 1) // lay.SECTOR


def plan_journal(descriptor: Descriptor, new: bytes) -> gaps.Journal | None:
    """Return where a journal with ``new`` goes: whole sectors at the end of the area, behind a NUL; None: no room."""
    offset = (descriptor.offset + descriptor.size - len(new)) // lay.SECTOR * lay.SECTOR
    return gaps.Journal(offset, len(new), sha256(new).digest()) if offset > descriptor.end else None


def read_journal(file: FlatFile, note: gaps.Note | None, offset: int, size: int) -> bytes | None:
    """Return the text that a detach was about to put in place; None where there is none, or it is in place already.

    Args:
        file: The image.
        note: The note in its gap.
        offset: Where the descriptor begins in the file, in bytes.
        size: Its room in bytes.
    """
    if note is None or note.phase is not gaps.Phase.REPLAYING:
        return None
    journal = note.journal
    if not offset < journal.offset <= journal.offset + journal.size <= offset + size:
        return None
    text = file.read(journal.offset, journal.size)
    return text if sha256(text).digest() == journal.sha256 and b"\0" not in text else None


def rewrite(writer: Writer, descriptor: Descriptor, new: bytes, note: gaps.Note | None) -> None:
    """Make ``new`` the text; with a note whose journal is planned, by way of the journal."""
    if descriptor.text.startswith(new):
        cut(writer, descriptor.offset + len(new), len(descriptor.text) - len(new))
    elif note is None or note.journal == gaps.NO_JOURNAL:
        start = _first_change(descriptor.text, new)
        writer.write(descriptor.offset + start, new[start:].ljust(len(descriptor.text) - start, b"\0"))
        writer.sync()
    else:
        writer.write(note.journal.offset, new)
        writer.sync()
        write_note(writer, note.at(gaps.Phase.REPLAYING))
        replay(writer, descriptor, new, note.journal)


def replay(writer: Writer, descriptor: Descriptor, new: bytes, journal: gaps.Journal) -> None:
    """Put the journal's text in place, then wipe the journal."""
    writer.write(descriptor.offset, new.ljust(journal.offset - descriptor.offset, b"\0"))
    writer.sync()
    writer.write(journal.offset, bytes(journal.size))
    writer.sync()


def cut(writer: Writer, end: int, size: int) -> None:
    """End the text at file offset ``end``, then wipe the ``size`` bytes from there on."""
    if size:
        writer.wipe(end, 1)
        writer.sync()
        writer.wipe(end, size)
        writer.sync()


def _first_change(old: bytes, new: bytes) -> int:
    """Return the first index at which ``new``, which is shorter and no beginning of ``old``, differs."""
    return next(index for index, byte in enumerate(new) if byte != old[index])
