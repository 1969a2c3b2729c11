"""The undo note: 104 bytes behind the end of the header extensions that make attach and detach crash-safe.

Readers of qcow2 ignore bytes there. The note is written before anything else is changed and erased last, so as long as
it stands, the first cluster can be taken back to what it was. It serves two more ends: QEMU zeroes everything behind
the extensions whenever it rewrites a header, so a note that is still there proves that nobody did since attach; and its
phase tells an interrupted detach from a graft that a foreign writer dropped. It never crosses a 512-byte sector, so
each write of it is atomic.

Where bytes other than zeros stood behind the extensions, they are kept in a *spill*, a list of patches beside the note.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from hashlib import sha256
from typing import Any, Final

from construct import Bytes, Const, GreedyBytes, GreedyRange, Int16ul, Int32ul, Int64ul, Prefixed, Struct

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.contract import Patch
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.qcow2.header import Header

MAGIC: Final = b"VMGQNOTE"
#: Longest list of foreign bytes behind the extensions that is carried along.
MAX_SPILL: Final = 4096
#: Sectors are written as a whole by every disk.
SECTOR: Final = 512
_VERSION: Final = 1
_FLAG_SIDECAR: Final = 1

_NOTE: Final[Any] = Struct(
    "magic" / Const(MAGIC),
    "version" / Int16ul,
    "phase" / Int16ul,
    "flags" / Int32ul,
    "end_offset" / Int64ul,
    "area_end" / Int64ul,
    "name_old" / Int64ul,
    "name_new" / Int64ul,
    "name_size" / Int32ul,
    "spill_size" / Int32ul,
    "spill_offset" / Int64ul,
    "spill_sha256" / Bytes(32),
    "check" / Bytes(8),
)
_SPILL: Final[Any] = GreedyRange(Struct("offset" / Int32ul, "data" / Prefixed(Int32ul, GreedyBytes)))
NOTE_SIZE: Final[int] = _NOTE.sizeof()


class Phase(IntEnum):
    """What is going on."""

    CHANGING = 1  #: an attach or detach is under way, or was interrupted
    ATTACHED = 2


@dataclass(frozen=True, slots=True)
class Note:
    """What it takes to go back. All offsets are file offsets within the first cluster, in bytes.

    Attributes:
        offset: Where the note itself stands.
        phase: What is going on.
        sidecar: Whether the record is in a sidecar.
        end_offset: Where the end mark of the extensions stands once the graft is gone.
        area_end: Bytes from ``end_offset`` up to here are ours to restore: zeros, but for name and spill.
        name_old: Where the backing file's name stands once the graft is gone; 0 without one.
        name_new: Where it stands with the graft.
        name_size: Its length.
        spill_offset: Where the spill stands.
        spill: The packed patches; empty where only zeros stood.
    """

    offset: int
    phase: Phase
    sidecar: bool
    end_offset: int
    area_end: int
    name_old: int
    name_new: int
    name_size: int
    spill_offset: int = 0
    spill: bytes = b""
    spill_size: int = 0
    spill_sha256: bytes = bytes(32)

    def at(self, phase: Phase) -> Note:
        """Return the same note in another phase."""
        return replace(self, phase=phase)


def pack_spill(patches: tuple[Patch, ...]) -> bytes:
    """Return the bytes of a spill."""
    return bytes(_SPILL.build([{"offset": p.offset, "data": p.data} for p in patches]))


def parse_spill(spill: bytes, file: str) -> tuple[Patch, ...]:
    """Return the patches of a spill whose digest was checked."""
    rows: Any = parse_struct(_SPILL, spill, file=file, offset=0, what="spill", error=GraftFormatError)
    return tuple(Patch(row.offset, bytes(row.data)) for row in rows)


def pack_note(note: Note) -> bytes:
    """Return the bytes of a note."""
    fields = {name: getattr(note, name) for name in ("phase", "end_offset", "area_end", "name_old", "name_new")}
    more = {name: getattr(note, name) for name in ("name_size", "spill_offset", "spill_size", "spill_sha256")}
    flags = _FLAG_SIDECAR if note.sidecar else 0
    body = bytes(_NOTE.build(fields | more | {"version": _VERSION, "flags": flags, "check": bytes(8)}))[:-8]
    return body + sha256(body).digest()[:8]


def with_spill(note: Note, patches: tuple[Patch, ...], offset: int) -> Note:
    """Return the note with a spill at ``offset``."""
    spill = pack_spill(patches)
    digest = sha256(spill).digest()
    return replace(note, spill=spill, spill_size=len(spill), spill_offset=offset, spill_sha256=digest)


def find_bytes(data: bytes, magic: bytes, start: int) -> int:
    """Do what ``data.find(magic, start)`` does, many times as fast where only zeros follow (clusters of 2 MiB)."""
    first = data.find(magic[:1], start)
    return -1 if first < 0 else data.find(magic, first)


def find_note(header: Header, end_offset: int | None = None) -> Note | None:
    """Return the sound note in the first cluster that speaks of an end mark at ``end_offset`` (or anywhere), or None.

    The cluster is untrusted: a note counts only if its digest holds and every place in it lies where attach could have
    put it. Among foreign bytes there may be the note of an older graft whose extension another program dropped. It
    never is in the middle of a change, and the newer note's spill holds it, hence is longer.
    """
    found = _notes(header, end_offset)
    return max(found, key=lambda note: (note.phase is Phase.CHANGING, note.spill_size), default=None)


def _notes(header: Header, end_offset: int | None) -> Iterator[Note]:
    data = header.first_cluster
    at = find_bytes(data, MAGIC, header.header_length if end_offset is None else end_offset)
    while at >= 0:
        piece = data[at : at + NOTE_SIZE]
        if at % 8 == 0 and len(piece) == NOTE_SIZE and sha256(piece[:-8]).digest()[:8] == piece[-8:]:
            note = _parse(piece, at)
            if note is not None and end_offset in (None, note.end_offset) and _is_plausible(note, header):
                yield _with_spill_of(note, header)
        at = data.find(MAGIC, at + 1)


def _parse(piece: bytes, at: int) -> Note | None:
    raw = parse_struct(_NOTE, piece, file=None, offset=at, what="undo note", error=GraftFormatError)
    if raw.version != _VERSION or raw.phase not in list(Phase) or raw.flags & ~_FLAG_SIDECAR:
        return None
    names = ("end_offset", "area_end", "name_old", "name_new", "name_size", "spill_offset", "spill_size")
    return Note(
        offset=at,
        phase=Phase(raw.phase),
        sidecar=bool(raw.flags & _FLAG_SIDECAR),
        spill_sha256=bytes(raw.spill_sha256),
        **{name: getattr(raw, name) for name in names},
    )


def _with_spill_of(note: Note, header: Header) -> Note:
    spill = header.first_cluster[note.spill_offset : note.spill_offset + note.spill_size]
    return replace(note, spill=spill) if sha256(spill).digest() == note.spill_sha256 else note


def _is_plausible(note: Note, header: Header) -> bool:
    low, high = note.end_offset + 8, note.area_end
    spans = [(note.offset, NOTE_SIZE)]
    if note.spill_size:
        spans.append((note.spill_offset, note.spill_size))
    if note.name_size:
        spans += [(note.name_old, note.name_size), (note.name_new, note.name_size)]
    inside = high <= header.cluster_size and all(low <= start and start + size <= high for start, size in spans)
    return inside and note.spill_size <= MAX_SPILL and note.offset // SECTOR == (note.offset + NOTE_SIZE - 1) // SECTOR
