"""A record in bytes that a container leaves unused: between a header and the tables, or before the first data.

Such a *gap* holds nothing but zeros. A graft there begins with a *note*, one sector that is written before anything
else is changed and erased last, so that an interrupted attach or detach is recognised and brought to an end; the record
follows in the next sector. What points to it is the container's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from hashlib import sha256
from typing import Any, Final

from construct import Bytes, Const, Int16ul, Int32ul, Int64ul, Struct

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import LOCATOR_SIZE, pack_locator, parse_locator
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.record import parse_record_head
from vmgraft.imagefmt.sidecar import locate_sidecar, read_sidecar, sidecar_path, stray_sidecar

#: Every disk writes this many bytes as a whole; the note has the same size.
SECTOR: Final = 512
#: A gap is used up to this many bytes, so that looking for its end stays quick.
MAX_GAP: Final = 1 << 20
_MAGIC: Final = b"VMGAPNOT"
_VERSION: Final = 1
_CHECK_SIZE: Final = 8
_RESERVED: Final = 296
_NOTE: Final[Any] = Struct(
    "magic" / Const(_MAGIC),
    "version" / Int16ul,
    "phase" / Int16ul,
    "flags" / Int32ul,
    "offset" / Int64ul,
    "area_end" / Int64ul,
    "locator" / Bytes(LOCATOR_SIZE),
    "journal_offset" / Int64ul,
    "journal_size" / Int64ul,
    "journal_sha256" / Bytes(32),
    "reserved" / Bytes(_RESERVED),
    "check" / Bytes(_CHECK_SIZE),
)
#: Undo fact: 1 when attach put a locator into the container, 0 when the container had no place for one.
FACT_LOCATOR: Final = "locator"
#: States in which the sidecar's name is taken by a sound sidecar that is not this graft's: it is left alone.
FOREIGN_SIDECAR: Final = (GraftState.SWAPPED, GraftState.STALE)

_INTERRUPTED: Final = "an attach or detach was interrupted; the next one, or `vmgraft recover`, cleans up behind it"


class Phase(IntEnum):
    """What is going on."""

    CHANGING = 1  #: an attach or detach is under way, or was interrupted
    ATTACHED = 2
    REPLAYING = 3  #: a detach past its commit: what the journal holds has to be put in place


@dataclass(frozen=True, slots=True)
class Journal:
    """Bytes ``offset`` .. ``offset + size`` of the file and their SHA-256; the container knows where they belong."""

    offset: int
    size: int
    sha256: bytes


NO_JOURNAL: Final = Journal(0, 0, bytes(32))


@dataclass(frozen=True, slots=True)
class Gap:
    """Unused bytes ``start`` .. ``end`` of the file, both multiples of 512; empty where ``end <= start``."""

    start: int
    end: int

    @property
    def record(self) -> int:
        """Offset of a record in it, right behind the note."""
        return self.start + SECTOR

    def holds(self, locator: Locator) -> bool:
        """Return whether an inline locator points to where a record in this gap begins, and it fits."""
        return locator.record_offset == self.record and self.record + locator.record_size <= self.end


@dataclass(frozen=True, slots=True)
class Note:
    """The first sector of a used gap.

    Attributes:
        offset: Where it stands in the file.
        phase: What is going on.
        area_end: File offset up to which the bytes behind the note are the graft's; zeros without it.
        locator: What the container points with, or will.
        flags: For the container's own use.
        journal: What a detach in phase ``REPLAYING`` puts in place.
    """

    offset: int
    phase: Phase
    area_end: int
    locator: Locator
    flags: int = 0
    journal: Journal = NO_JOURNAL

    def at(self, phase: Phase) -> Note:
        """Return the same note in another phase."""
        return replace(self, phase=phase)


def pack_note(note: Note) -> bytes:
    """Return the 512 bytes of a note."""
    fields = {"version": _VERSION, "phase": note.phase, "flags": note.flags, "offset": note.offset}
    more = {"area_end": note.area_end, "locator": pack_locator(note.locator), "reserved": bytes(_RESERVED)}
    last = {f"journal_{name}": getattr(note.journal, name) for name in ("offset", "size", "sha256")}
    body = bytes(_NOTE.build(fields | more | last | {"check": bytes(_CHECK_SIZE)}))[:-_CHECK_SIZE]
    return body + sha256(body).digest()[:_CHECK_SIZE]


def read_note(file: FlatFile, gap: Gap) -> Note | None:
    """Return the note at the beginning of ``gap`` when it is sound and speaks of this place, or None."""
    if gap.end < gap.record:
        return None
    data = file.read(gap.start, SECTOR)
    if len(data) < SECTOR or not data.startswith(_MAGIC):
        return None
    if sha256(data[:-_CHECK_SIZE]).digest()[:_CHECK_SIZE] != data[-_CHECK_SIZE:]:
        return None
    raw = parse_struct(_NOTE, data, file=file.path, offset=gap.start, what="gap note", error=GraftFormatError)
    sound = raw.version == _VERSION and raw.phase in list(Phase) and raw.offset == gap.start
    if not sound or not gap.record <= raw.area_end <= gap.end:
        return None
    try:
        locator = parse_locator(raw.locator, file=file.path, offset=gap.start)
    except GraftFormatError:
        return None
    journal = Journal(raw.journal_offset, raw.journal_size, bytes(raw.journal_sha256))
    return Note(gap.start, Phase(raw.phase), raw.area_end, locator, raw.flags, journal)


def is_interrupted(note: Note | None) -> bool:
    """Return whether a note says that a change is under way, or was when something ended it."""
    return note is not None and note.phase is not Phase.ATTACHED


def free_bytes(file: FlatFile, gap: Gap, note: Note | None = None) -> int:
    """Return how many bytes of record fit: those behind the note's place that are zeros or a graft's, at most 1 MiB.

    Args:
        file: The image.
        gap: Its gap.
        note: What says which bytes are a graft's; by default the note that is there.
    """
    size = min(gap.end - gap.start, MAX_GAP)
    if size <= SECTOR:
        return 0
    note = note or read_note(file, gap)
    ours = 0 if note is None else min(note.area_end - gap.start, size)
    data = file.read(gap.start + ours, size - ours)
    zeros = len(data) - len(data.lstrip(b"\0"))
    return max(0, (ours + zeros) // SECTOR * SECTOR - SECTOR)


def is_blank(file: FlatFile, gap: Gap) -> bool:
    """Return whether nothing stands in the first two sectors of the gap, where a note and a record begin."""
    return not any(file.read(gap.start, min(2 * SECTOR, max(0, gap.end - gap.start))))


def locate_in_gap(file: FlatFile, gap: Gap, locator: Locator, locator_offset: int | None) -> Located:
    """Read the record that an inline locator points to, and say in what state it is."""
    if not gap.holds(locator):
        detail = "the locator does not point into the unused bytes before the data"
        return Located(GraftState.DAMAGED, detail, locator, locator_offset)
    record = file.blob(locator.record_offset, locator.record_size)
    state, detail = GraftState.OK, ""
    if record.size < locator.record_size:
        state, detail = GraftState.CUT, f"the file holds {record.size} of {locator.record_size} record bytes"
    elif record.sha256 != locator.record_sha256:
        state, detail = GraftState.OVERWRITTEN, "the record does not match the locator's digest"
    return Located(state, detail, locator, locator_offset, record)


def record_in_gap(file: FlatFile, gap: Gap) -> Blob | None:
    """Return the record that stands in ``gap`` when its header is sound, for when nothing points to it."""
    if gap.end <= gap.record:
        return None
    try:
        head = parse_record_head(file.read(gap.record, min(gap.end - gap.record, MAX_GAP)), file=None, offset=0)
    except GraftFormatError:
        return None
    last = head.sections[-1]
    size = last.offset + last.stored_size
    return file.blob(gap.record, size) if gap.record + size <= gap.end else None


def locate_damaged(file: FlatFile, gap: Gap, problem: str, locator_offset: int) -> Located:
    """Return what is known of a graft whose locator is not sound: the note, the record or a sidecar may tell more."""
    note = read_note(file, gap)
    if note is not None:
        found = _follow(file, gap, note.locator, locator_offset)
        return replace(found, state=GraftState.DAMAGED, detail=problem)
    record = record_in_gap(file, gap)
    if record is None:
        stray = stray_sidecar(file.path)
        record = None if stray is None else stray.record
    return Located(GraftState.DAMAGED, problem, None, locator_offset, record)


def locate_unpointed(file: FlatFile, gap: Gap, can_point: bool) -> Located:
    """Look for what is left of a graft when the container holds no locator.

    Args:
        file: The image.
        gap: Where a record would be.
        can_point: Whether the container has a place for a locator.
    """
    note = read_note(file, gap)
    if is_interrupted(note):
        return Located(GraftState.NONE, _INTERRUPTED)
    detail = "another program dropped the locator that pointed to the record"
    if note is not None:
        return replace(_follow(file, gap, note.locator, None), state=GraftState.ORPHANED, detail=detail)
    record = record_in_gap(file, gap)
    if record is not None:
        return Located(GraftState.ORPHANED, detail, None, None, record)
    return locate_lone_sidecar(file, can_point)


def _follow(file: FlatFile, gap: Gap, locator: Locator, locator_offset: int | None) -> Located:
    if locator.placement is Placement.SIDECAR:
        return locate_sidecar(file.path, locator, locator_offset)
    return locate_in_gap(file, gap, locator, locator_offset)


def locate_lone_sidecar(file: FlatFile, can_point: bool) -> Located:
    """Judge a sidecar that the container does not point to.

    Args:
        file: The image.
        can_point: Whether the container has a place for a locator.

    Returns:
        ``NONE``, ``ORPHANED`` when the container pointed to it once, else the sidecar's own state: attach leaves the
        image alone where there is no place for a locator.
    """
    found = read_sidecar(file.path)
    if found.state is GraftState.OK and found.locator is not None and found.record is not None:
        if _pointed_to(found.record, can_point):
            detail = f"{sidecar_path(file.path).name} lies beside the image, but nothing in the image points to it"
            return Located(GraftState.ORPHANED, detail, found.locator, None, found.record)
        detail = "the container has no place for a locator: only the sidecar's name ties it to the image"
        return Located(GraftState.OK, detail, found.locator, None, found.record)
    if can_point:
        return Located(GraftState.NONE)
    return Located(found.state, found.detail, found.locator, None, found.record)


def _pointed_to(record: Blob, can_point: bool) -> bool:
    undo = undo_of(record)
    return can_point if undo is None else undo.facts.get(FACT_LOCATOR, 1) != 0


def undo_of(record: Blob | None) -> Undo | None:
    """Return a record's UNDO, or None when it is not sound."""
    if record is None:
        return None
    try:
        return parse_record_head(record, file=None, offset=0).undo()
    except GraftFormatError:
        return None
