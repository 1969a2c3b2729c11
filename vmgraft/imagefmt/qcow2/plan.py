"""Where in the first cluster a graft goes: pure arithmetic over a parsed header, nothing is written here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from vmgraft.errors import NoRoomError, UnsupportedError
from vmgraft.imagefmt.contract import Patch, Room, Undo
from vmgraft.imagefmt.locator import LOCATOR_SIZE
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.qcow2.header import Header
from vmgraft.imagefmt.qcow2.note import MAX_SPILL, NOTE_SIZE, SECTOR, pack_spill

#: An extension's data begins with 8 zero bytes: readers that lose their way in it meet an end mark at once.
PREFIX_SIZE: Final = 8
#: Where the record begins in the extension's data.
RECORD_AT: Final = PREFIX_SIZE + LOCATOR_SIZE
#: libvirt looks at this many bytes of an image (VIR_STORAGE_MAX_HEADER); the backing file name, 1023 bytes at most,
#: must end within them.
LIBVIRT_READS: Final = 33_280
#: Hence extensions and end mark end here at the latest.
MAX_EXTENSIONS_END: Final = LIBVIRT_READS - 1024
#: Attach and detach care for this much of the first cluster and leave the rest alone.
WINDOW: Final = 65536
#: From this cluster size on, records may be inline.
MIN_INLINE_CLUSTER: Final = 16384
#: What later qemu-img operations may add to a header: v2 → v3 (40 + 8 + 392 bytes of feature names), bitmaps (32),
#: backing format (24), a longer backing file name. A header without room makes `bitmap --add` lose the bitmap silently.
RESERVE: Final = 2048
_UPGRADE: Final = 40
_FEATURE_NAMES: Final = 8 + 392
#: QEMU writes feature names only into clusters of this size and more (measured with 7.2).
_FEATURE_NAMES_CLUSTER: Final = 8192
_BITMAPS: Final = 32
_BACKING_FORMAT: Final = 24

_FOREIGN = re.compile(rb"[^\0]+(?:\0{1,16}[^\0]+)*")
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """Places of an attach, as file offsets in bytes.

    Attributes:
        end_offset: The end mark that the extension's header replaces.
        name_new: Where the backing file name goes, or 0 if it stays.
        note_offset: Where the undo note goes.
        spill_offset: Where the spill goes (0 if there is none).
    """

    end_offset: int
    data_size: int
    name_new: int
    note_offset: int
    spill_offset: int


def align8(value: int) -> int:
    """Round up to a multiple of 8."""
    return value + 7 & ~7


def window_end(header: Header) -> int:
    """Return where the part of the first cluster ends that attach cares for."""
    return min(header.cluster_size, WINDOW)


def reserve(header: Header) -> int:
    """Return the bytes left free for later growth of the header."""
    if header.cluster_size >= MIN_INLINE_CLUSTER:
        return RESERVE
    # Small clusters: what the header does not have yet, and a name of an eighth of the cluster.
    wanted = max(0, min(256, header.cluster_size // 8) - len(header.backing_name))
    wanted += 0 if header.find(lay.EXT_BITMAPS) else _BITMAPS
    wanted += 0 if header.find(lay.EXT_BACKING_FORMAT) else _BACKING_FORMAT
    if header.version < 3:
        wanted += _UPGRADE + (_FEATURE_NAMES if header.cluster_size >= _FEATURE_NAMES_CLUSTER else 0)
    return wanted


def original_bytes(header: Header) -> tuple[Patch, ...]:
    """Return what stands behind the extensions that is neither zero nor the backing file name."""
    area = bytearray(header.first_cluster[: window_end(header)])
    begin = header.backing_file_offset
    if header.backing_name and begin < len(area):
        stop = min(len(area), begin + len(header.backing_name))
        area[begin:stop] = bytes(stop - begin)
    found = _FOREIGN.finditer(area, header.end_offset)
    return tuple(Patch(match.start(), match.group()) for match in found)


def make_undo(header: Header, file_size: int) -> Undo:
    """Return what detach needs; it does not depend on the record, which will contain it."""
    facts = {
        "endOffset": header.end_offset,
        "backingOffset": header.backing_file_offset,
        "backingSize": len(header.backing_name),
        "headerLength": header.header_length,
    }
    return Undo(file_size, original_bytes(header), facts)


def check_attachable(header: Header, file: str) -> None:
    """Refuse headers that no extension can be added to safely.

    Raises:
        UnsupportedError: the chain of extensions has no end mark that could be replaced, or ends at a name of no bytes.
        NoRoomError: there are as many extensions as a reader accepts, or too much else stands behind them.
    """
    if len(header.extensions) >= lay.MAX_EXTENSIONS:
        raise NoRoomError(
            f"the header has {len(header.extensions)} extensions already, as many as are read",
            file=file,
            offset=header.end_offset,
            field="header_extension",
        )
    if header.backing_file_offset and not header.backing_name:
        raise UnsupportedError(
            "the header has a place for a backing file name and no name: the extensions end there for other programs",
            file=file,
            offset=lay.FIELD_OFFSET["backing_file_size"],
            field="backing_file_size",
            hint="let QEMU rewrite the header: `qemu-img rebase -u -b '' IMAGE`",
        )
    if not header.has_end:
        raise UnsupportedError(
            "the header extensions have no end mark, so none can be added in one atomic write",
            file=file,
            offset=header.end_offset,
            field="header_extension",
            hint="let QEMU rewrite the header: `qemu-img amend -f qcow2 -o compat=1.1 IMAGE`",
        )
    if len(pack_spill(original_bytes(header))) > MAX_SPILL:
        raise NoRoomError(
            "foreign bytes fill the space behind the header extensions",
            file=file,
            offset=header.end_offset,
            field="header_extension",
            hint="let QEMU rewrite the header: `qemu-img amend -f qcow2 -o compat=1.1 IMAGE`",
        )


def free_span(
    data: bytes, start: int, end: int, size: int, taken: list[Span], *, one_sector: bool = False
) -> int | None:
    """Return where ``size`` zero bytes stand within ``start`` .. ``end`` off ``taken``, a multiple of 8, or None."""
    at = align8(start)
    while at + size <= end:
        clash = next((stop for begin, stop in taken if begin < at + size and at < stop), None)
        if clash is not None:
            at = align8(clash)
        elif one_sector and at // SECTOR != (at + size - 1) // SECTOR:
            at = (at // SECTOR + 1) * SECTOR
        elif any(data[at : at + size]):
            at += 8
        else:
            return at
    return None


def make_plan(header: Header, data_size: int, *, keep: int = 0) -> Plan | None:
    """Lay out an attach, or return None if it does not fit.

    Args:
        header: The header; its extensions have an end mark.
        data_size: Bytes of extension data, a multiple of 8.
        keep: Bytes to leave free behind everything.
    """
    begin, name_at, name_size = header.end_offset, header.backing_file_offset, len(header.backing_name)
    end = begin + lay.EXT_HEADER_SIZE + data_size + lay.EXT_HEADER_SIZE
    if end + keep > min(header.cluster_size, MAX_EXTENSIONS_END):
        return None
    taken = [(begin, end)]
    name_new = 0
    if name_size:
        taken.append((name_at, name_at + name_size))
        if name_at < end:
            name_new = align8(max(end, name_at + name_size))
            if name_new + name_size > min(LIBVIRT_READS, header.cluster_size):
                return None
            taken.append((name_new, name_new + name_size))
    data, limit = header.first_cluster, window_end(header)
    note = free_span(data, end, limit, NOTE_SIZE, taken, one_sector=True)
    if note is None:
        return None
    taken.append((note, note + NOTE_SIZE))
    spill_size = len(pack_spill(original_bytes(header)))
    spill = free_span(data, end, limit, spill_size, taken) if spill_size else 0
    if spill is None or max(note + NOTE_SIZE, spill + spill_size) + keep > header.cluster_size:
        return None
    return Plan(begin, data_size, name_new, note, spill)


def room(header: Header, file: str) -> Room:
    """Return how long an inline record may be, leaving the reserve free."""
    left = reserve(header)
    if header.find(lay.EXT_GRAFT) is not None:
        return Room(0, left, "the image carries a graft already")
    try:
        check_attachable(header, file)
    except (UnsupportedError, NoRoomError) as exc:
        return Room(0, left, exc.message)
    if header.cluster_size < MIN_INLINE_CLUSTER:
        fits = make_plan(header, RECORD_AT, keep=left) is not None
        reason = "leave room for a locator only" if fits else "leave not even room for a locator"
        return Room(0, left, f"clusters of {header.cluster_size} bytes {reason}")
    low, high = 0, MAX_EXTENSIONS_END // 8
    while low < high:  # the longest data, in units of 8 bytes, that can be laid out
        middle = (low + high + 1) // 2
        if make_plan(header, middle * 8, keep=left) is None:
            high = middle - 1
        else:
            low = middle
    inline = max(0, low * 8 - RECORD_AT)
    reason = f"from the end mark at {header.end_offset} to {min(header.cluster_size, MAX_EXTENSIONS_END)}"
    return Room(inline, left, f"{reason}, minus {left} bytes kept for later growth of the header")
