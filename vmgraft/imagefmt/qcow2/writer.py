"""Attach, detach and recovery: the order of writes that leaves a valid image after every single one of them.

All of it happens in the first cluster; nothing else of the file is touched. The commit of an attach is one aligned
8-byte write of (magic, length) over the end mark, that of a detach the same in reverse. What is left around a commit
is dead to every reader of qcow2, and the undo note (``note.py``) tells how to clean it up.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256

from vmgraft.errors import FileError, GraftFormatError, NoGraftError, NoRoomError, VmgraftError
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.contract import Locator, Patch, Placement, RecordBuilder, Undo
from vmgraft.imagefmt.locator import pack_locator
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.qcow2 import plan as planning
from vmgraft.imagefmt.qcow2.cluster import NAME_FIELD, Cluster
from vmgraft.imagefmt.qcow2.graft import extension_locator, undo_from_note
from vmgraft.imagefmt.qcow2.header import Extension, Header
from vmgraft.imagefmt.qcow2.note import (
    NOTE_SIZE,
    Note,
    Phase,
    find_note,
    pack_spill,
    parse_spill,
    with_spill,
)
from vmgraft.imagefmt.qcow2.plan import PREFIX_SIZE, Plan, free_span
from vmgraft.imagefmt.sidecar import remove_sidecar, write_sidecar

_END_MARK = bytes(lay.EXT_HEADER_SIZE)


# --- attach --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Terms:
    """What an attach is asked for: where the record goes, the hint for the locator, the file's size in bytes."""

    placement: Placement
    tree_digest: bytes
    file_size: int


def attach(writer: Writer, header: Header, build: RecordBuilder, terms: Terms) -> None:
    """Add the graft extension, last in the chain.

    Order, every step followed by a sync: undo note; spill; sidecar; copy of the backing file name; its offset in the
    header; extension data with the new end mark behind the old one; **(magic, length) over the old end mark**; note.

    Raises:
        NoRoomError: it does not fit; nothing was written.
        GraftFormatError: a graft is there already; nothing was written.
        UnsupportedError: the header is of a kind that cannot be changed safely; nothing was written.
    """
    file = str(writer.file)
    present = header.find(lay.EXT_GRAFT)
    if present is not None:
        hint = "detach it first"
        raise GraftFormatError("the image carries a graft already", file=file, offset=present.offset, hint=hint)
    planning.check_attachable(header, file)
    undo = planning.make_undo(header, terms.file_size)
    record = build(undo)
    inline = choose(header, terms.placement, record.size, file)
    where = Placement.INLINE if inline else Placement.SIDECAR
    locator = Locator(where, 0, record.size, record.sha256, terms.tree_digest, terms.file_size)
    extend(writer, header, locator, record, write_record=not inline)


def extend(writer: Writer, header: Header, locator: Locator, record: Blob, *, write_record: bool) -> None:
    """Add the extension for a record whose place is known.

    Args:
        writer: The image.
        header: Its header.
        locator: What the extension is to hold.
        record: The record; it goes into the extension where the locator says ``INLINE``.
        write_record: Write the sidecar too, and take it back if anything goes wrong. Otherwise it is there and stays.

    Raises:
        NoRoomError: it does not fit; nothing was written.
    """
    inline = locator.placement is Placement.INLINE
    data = bytes(PREFIX_SIZE) + pack_locator(locator) + (record.read_all() if inline else b"")
    data += bytes(-len(data) % 8)
    layout = planning.make_plan(header, len(data), keep=planning.reserve(header))
    if layout is None:
        raise _no_room(header, record.size, inline, str(writer.file))
    note = _note(header, layout, planning.original_bytes(header), sidecar=write_record)
    cluster = Cluster(writer, header.first_cluster)
    begun = replace(note, sidecar=False)
    try:
        cluster.put_note(note)
        if note.spill:
            cluster.put(note.spill_offset, note.spill)
        if write_record:
            write_sidecar(writer.file, locator, record)
            begun = note
        if layout.name_new:
            cluster.move_name(len(header.backing_name), layout.name_new)
        cluster.put(layout.end_offset + lay.EXT_HEADER_SIZE, data + _END_MARK)
        cluster.put(layout.end_offset, struct.pack(">II", lay.EXT_GRAFT, len(data)))
        cluster.put_note(replace(note, phase=Phase.ATTACHED, sidecar=not inline))
    except VmgraftError:  # the disk is full, or a foreign file has the sidecar's name
        with suppress(FileError):
            _take_back(writer, header, begun)
        raise


def _take_back(writer: Writer, header: Header, note: Note) -> None:
    """Undo an attach that failed after any of its steps, or in the middle of one: what is there now is read anew."""
    cluster = Cluster(writer, writer.read(0, len(header.first_cluster)))
    end = _original_end(note, parse_spill(note.spill, str(writer.file)) if note.spill else ())
    if cluster.data[note.end_offset : note.end_offset + len(end)] != end:
        cluster.put(note.end_offset, end)
    _restore(cluster, note)


def choose(header: Header, placement: Placement, size: int, file: str) -> bool:
    """Return whether the record goes inline."""
    if placement is Placement.SIDECAR:
        return False
    room = planning.room(header, file)
    fits = size <= room.inline
    if placement is Placement.INLINE and not fits:
        raise _no_room(header, size, True, file)
    return fits


def _no_room(header: Header, size: int, inline: bool, file: str) -> NoRoomError:
    room = planning.room(header, file)
    if inline:
        message = f"a record of {size} bytes does not fit inline, where {room.inline} bytes are free ({room.reason})"
        hint = "use a sidecar (`--placement sidecar`)"
    else:
        message = f"not even a locator fits behind the header extensions ({room.reason})"
        hint = "convert the image to bigger clusters: `qemu-img convert -O qcow2 -o cluster_size=64k`"
    return NoRoomError(message, file=file, offset=header.end_offset, field="header_extension", hint=hint)


def _note(header: Header, layout: Plan, patches: tuple[Patch, ...], *, sidecar: bool) -> Note:
    moved = bool(layout.name_new)
    note = Note(
        offset=layout.note_offset,
        phase=Phase.CHANGING,
        sidecar=sidecar,
        end_offset=layout.end_offset,
        area_end=planning.window_end(header),
        name_old=header.backing_file_offset if moved else 0,
        name_new=layout.name_new,
        name_size=len(header.backing_name) if moved else 0,
    )
    return with_spill(note, patches, layout.spill_offset) if patches else note


# --- detach --------------------------------------------------------------------------------------------------------


def detach(writer: Writer, header: Header, undo: Undo) -> None:
    """Take the graft away.

    If the undo note proves that nobody rewrote the header since attach, its original bytes come back. Otherwise the
    header is left as QEMU would have written it without the extension: the others in their order, the end mark, the
    backing file name right behind it, zeros.

    Raises:
        NoGraftError: there is nothing to take away.
        NoRoomError: the header is too full to be changed safely; nothing was written.
    """
    ext = header.find(lay.EXT_GRAFT)
    if ext is None:
        raise NoGraftError("the image carries no graft", file=writer.file)
    cluster = Cluster(writer, header.first_cluster)
    note = find_note(header, ext.offset)
    if note is not None:
        # A record put back by recovery has the undo of the header it was first attached to; the note knows this one.
        known = undo, undo_from_note(header, undo.file_size, str(writer.file))
        fitting = next((one for one in known if one is not None and _is_untouched(header, ext, note, one)), None)
        if fitting is not None:
            note = replace(note, sidecar=note.sidecar or _is_sidecar(header, ext))
            _detach_verbatim(cluster, note, fitting.patches)
            return
        cluster.clear(note.offset, NOTE_SIZE)  # it speaks of a header that is no more
    _remove(cluster, header, ext, sidecar=_is_sidecar(header, ext))


def _is_untouched(header: Header, ext: Extension, note: Note, undo: Undo) -> bool:
    name = (header.backing_file_offset, len(header.backing_name))
    same_name = name == (note.name_new, note.name_size) if note.name_size else True
    digest = sha256(pack_spill(undo.patches)).digest() if undo.patches else bytes(32)
    low, high = note.end_offset, note.area_end
    inside = all(low <= patch.offset and patch.offset + len(patch.data) <= high for patch in undo.patches)
    return (
        header.extensions[-1] == ext
        and undo.facts.get("endOffset") == ext.offset
        and undo.facts.get("backingSize") == len(header.backing_name)
        and same_name
        and inside
        and digest == note.spill_sha256
    )


def _is_sidecar(header: Header, ext: Extension) -> bool:
    locator = extension_locator(header, ext)
    return locator is not None and locator.placement is Placement.SIDECAR


def _detach_verbatim(cluster: Cluster, note: Note, patches: tuple[Patch, ...]) -> None:
    note = note.at(Phase.CHANGING)
    if patches:
        note = with_spill(note, patches, note.spill_offset)
        cluster.put(note.spill_offset, note.spill)
    cluster.put_note(note)
    cluster.put(note.end_offset, _original_end(note, patches))
    _restore(cluster, note)


def _original_end(note: Note, patches: tuple[Patch, ...]) -> bytes:
    """Return the end mark as it stood: magic 0, and a length that is 0 unless its writer was careless."""
    mark = bytearray(lay.EXT_HEADER_SIZE)
    for patch in patches:
        for index in range(4, len(mark)):
            inside = note.end_offset + index - patch.offset
            if 0 <= inside < len(patch.data):
                mark[index] = patch.data[inside]
    return bytes(mark)


def _restore(cluster: Cluster, note: Note) -> None:
    """Clean up behind a graft that is no longer, or not yet, in the chain. May be repeated after any interruption."""
    if note.name_size:
        cluster.move_name(note.name_size, note.name_old)
    if len(note.spill) == note.spill_size:  # else the spill is being erased already, and all else was restored before
        _put_target(cluster, note)
    if note.sidecar:
        remove_sidecar(cluster.writer.file)
    if note.spill_size:
        cluster.clear(note.spill_offset, note.spill_size)
    cluster.clear(note.offset, NOTE_SIZE)


def _put_target(cluster: Cluster, note: Note) -> None:
    """Write the original bytes of the area, around note and spill."""
    begin, end = note.end_offset, note.area_end
    patches = parse_spill(note.spill, str(cluster.writer.file)) if note.spill else ()
    target = bytearray(end - begin)
    for patch in patches:
        low, high = patch.offset - begin, patch.offset - begin + len(patch.data)
        if low >= 0 and high <= len(target):
            target[low:high] = patch.data
    target[: lay.EXT_HEADER_SIZE] = _original_end(note, patches)
    (at, size) = struct.unpack_from(">QI", cluster.data, NAME_FIELD)
    if at and at < end:
        size = min(size, end - at)
        target[at - begin : at - begin + size] = cluster.data[at : at + size]
    keep = sorted([(note.offset, NOTE_SIZE), (note.spill_offset, note.spill_size)])
    position = begin
    for start, length in [*((s, n) for s, n in keep if n), (end, 0)]:
        _put_changes(cluster, position, bytes(target[position - begin : start - begin]))
        position = start + length


def _put_changes(cluster: Cluster, offset: int, data: bytes) -> None:
    """Write ``data`` without the bytes at both ends that stand there already."""
    there = cluster.data[offset : offset + len(data)]
    if there == data:
        return
    first = next(i for i, (a, b) in enumerate(zip(there, data, strict=True)) if a != b)
    last = next(i for i in range(len(data) - 1, -1, -1) if there[i] != data[i])
    cluster.put(offset + first, data[first : last + 1])


# --- detach from a header that QEMU rewrote ------------------------------------------------------------------------


def _remove(cluster: Cluster, header: Header, ext: Extension, *, sidecar: bool) -> None:
    """Take an extension out of the chain wherever it stands, and leave the form that QEMU writes."""
    tail = _tail(header, ext)
    note, hop = _removal_note(header, ext, tail, sidecar=sidecar, file=str(cluster.writer.file))
    cluster.put_note(note)
    if hop:
        cluster.move_name(len(header.backing_name), hop)
    _close_gap(cluster, ext, tail)
    _restore(cluster, note)


def _tail(header: Header, ext: Extension) -> bytes:
    """Return the rest of the chain behind an extension, end mark included."""
    return header.first_cluster[ext.end : max(ext.end, header.end_offset)] + _END_MARK


def _close_gap(cluster: Cluster, ext: Extension, tail: bytes) -> None:
    """Move the rest of the chain down over an extension.

    With others behind it, the extension is first renamed: that is the commit, and its data may then be overwritten
    while the chain stays walkable.
    """
    if len(tail) > len(_END_MARK):
        cluster.put(ext.offset, struct.pack(">II", lay.EXT_DEAD, ext.length))
        cluster.put(ext.data_offset, tail[8:])
    cluster.put(ext.offset, tail[:8])


def _removal_note(header: Header, ext: Extension, tail: bytes, *, sidecar: bool, file: str) -> tuple[Note, int]:
    """Return the note of a removal, and where the name has to stay in between (0: nowhere)."""
    end = ext.offset + len(tail) - len(_END_MARK)
    name, size = header.backing_file_offset, len(header.backing_name)
    name_old = end + lay.EXT_HEADER_SIZE if size else 0
    limit = header.cluster_size
    taken = [(0, max(header.end_offset + 8, ext.end + len(tail), end + 8 + size)), (name, name + size)]
    hop: int | None = 0
    if size and name_old != name and name_old + size > name:  # the two places overlap
        hop = free_span(header.first_cluster, 0, limit, size, taken)
        taken.append((hop, hop + size) if hop else (0, 0))
    spot = free_span(header.first_cluster, 0, limit, NOTE_SIZE, taken, one_sector=True)
    if spot is None or hop is None or len(tail) > lay.EXT_HEADER_SIZE + (ext.end - ext.data_offset):
        raise NoRoomError(
            "the header is too full to take the extension out without risk",
            file=file,
            offset=ext.offset,
            field="header_extension",
            hint="shorten the backing file name, or let QEMU reorder the extensions (`qemu-img amend`), and try again",
        )
    note = Note(spot, Phase.CHANGING, sidecar, end, limit, name_old, hop or name, size)
    return note, hop


# --- recovery ------------------------------------------------------------------------------------------------------


def recover(writer: Writer, header: Header) -> bool:
    """Roll back an interrupted attach, or finish an interrupted detach; called when an image is opened for writing.

    Returns:
        Whether something was done, so that the header must be read again.
    """
    if header.find(lay.EXT_GRAFT) is not None:
        return False
    cluster = Cluster(writer, header.first_cluster)
    dead = header.find(lay.EXT_DEAD)
    if dead is not None:
        tail = _tail(header, dead)
        note = find_note(header, dead.offset + len(tail) - len(_END_MARK))
        if note is None:  # QEMU rewrote the header in between
            _remove(cluster, header, dead, sidecar=False)
            return True
        _close_gap(cluster, dead, tail)
        _restore(cluster, note)
        return True
    note = find_note(header, header.end_offset)
    if note is None or note.phase is not Phase.CHANGING:
        return False
    _restore(cluster, note)
    return True
