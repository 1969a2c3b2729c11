"""What attach makes of an image, as pure functions, and the note in the graft's region that takes it back.

Attach changes four places outside its own region: both headers, and the first sector of both copies of the region
table. What stood there is kept in UNDO, and from that what attach wrote can be computed again. So whether somebody else
wrote there since is always known, and a place is only ever put back that still holds exactly what attach left there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from uuid import UUID

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.contract import Locator, Patch, Placement, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import LOCATOR_SIZE, MAGIC, pack_locator, parse_locator
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.undo import pack_undo, parse_undo
from vmgraft.imagefmt.vhdx import _layout as lay
from vmgraft.imagefmt.vhdx.crc32c import checksum
from vmgraft.imagefmt.vhdx.header import Header, Headers, choose_header
from vmgraft.imagefmt.vhdx.regions import Region, RegionTable, parse_table


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a graft's region, as far as it is sound.

    Attributes:
        locator: Always sound.
        offset: Where the region begins, as the note says; None when the note is damaged.
        length: How long it is, as the note says.
        undo: The copy of UNDO; None when it is damaged or was never written.
    """

    locator: Locator
    offset: int | None
    length: int
    undo: Undo | None


# --- the region's head ---------------------------------------------------------------------------------------------


def pack_head(locator: Locator, region: Region, undo: Undo) -> tuple[bytes, bytes]:
    """Return the first sector of a graft's region, and what follows from the second one on.

    Raises:
        GraftFormatError: when UNDO is longer than the place for it.
    """
    packed = pack_undo(undo)
    if len(packed) > lay.RECORD_OFFSET - lay.UNDO_OFFSET:
        raise GraftFormatError("the undo section is too long for the head of the region", field="undo")
    body = lay.NOTE.build(
        {
            "version": lay.NOTE_VERSION,
            "reserved": 0,
            "undo_size": len(packed),
            "region_offset": region.offset,
            "region_length": region.length,
            "undo_sha256": sha256(packed).digest(),
            "check": bytes(8),
        }
    )[:-8]
    note = body + sha256(body).digest()[:8]
    return (pack_locator(locator) + note).ljust(lay.SECTOR, b"\0"), packed


def read_head(flat: FlatFile, offset: int) -> Head:
    """Read the head of a graft's region at file offset ``offset``.

    Raises:
        GraftFormatError: when there is no sound locator.
    """
    sector = flat.read(offset, lay.SECTOR)
    locator = parse_locator(sector, file=flat.path, offset=offset)
    note: Any = _parse_note(sector[lay.NOTE_OFFSET : lay.NOTE_OFFSET + lay.NOTE_SIZE])
    if note is None:
        return Head(locator, None, 0, None)
    return Head(locator, note.region_offset, note.region_length, _read_undo(flat, offset, note))


def _parse_note(data: bytes) -> Any | None:
    if len(data) < lay.NOTE_SIZE or sha256(data[:-8]).digest()[:8] != data[-8:]:
        return None
    try:
        note = parse_struct(lay.NOTE, data, file=None, offset=0, what="note", error=GraftFormatError)
    except GraftFormatError:
        return None
    return note if note.version == lay.NOTE_VERSION and not note.reserved else None


def _read_undo(flat: FlatFile, offset: int, note: Any) -> Undo | None:
    if note.undo_size > lay.RECORD_OFFSET - lay.UNDO_OFFSET:
        return None
    data = flat.read(offset + lay.UNDO_OFFSET, note.undo_size)
    if sha256(data).digest() != note.undo_sha256:
        return None
    try:
        return parse_undo(data, file=flat.path, offset=offset + lay.UNDO_OFFSET)
    except GraftFormatError:
        return None


def is_head(flat: FlatFile, offset: int) -> bool:
    """Return whether a graft's region seems to begin at ``offset``; cheap."""
    data = flat.read(offset, LOCATOR_SIZE + 8)
    return data.startswith(MAGIC) and data.endswith(b"VMGVNOTE")


def fits(head: Head, region: Region) -> bool:
    """Return whether a head says of itself what the region it stands in is."""
    inline = head.locator.record_size if head.locator.placement is Placement.INLINE else 0
    return (
        (head.offset, head.length) == (region.offset, region.length)
        and region.length == lay.region_length(inline)
        and head.locator.record_offset == (region.offset + lay.RECORD_OFFSET if inline else 0)
        and head.locator.file_size <= region.offset
        and (head.undo is None or head.undo.file_size == head.locator.file_size)
    )


# --- originals, and what attach makes of them ----------------------------------------------------------------------


def make_undo(headers: Headers, tables: tuple[RegionTable, RegionTable], file_size: int) -> Undo:
    """Return the undo of an attach to an image as it is."""
    patches = [Patch(offset, raw) for offset, raw in zip(lay.HEADER_OFFSETS, headers.raw, strict=True)]
    patches += [Patch(lay.TABLE_OFFSETS[table.slot], table.raw[: lay.SECTOR]) for table in tables]
    return Undo(file_size, tuple(patches))


def original_headers(undo: Undo) -> Headers | None:
    """Return the headers that an undo holds, or None when they are not sound."""
    found = {patch.offset: patch.data for patch in undo.patches if len(patch.data) == lay.HEADER_SIZE}
    first, second = (found.get(offset) for offset in lay.HEADER_OFFSETS)
    return None if first is None or second is None else choose_header((first, second))


def original_sector(undo: Undo, slot: int) -> bytes | None:
    """Return the first sector of a copy of the region table as an undo holds it."""
    for patch in undo.patches:
        if patch.offset == lay.TABLE_OFFSETS[slot] and len(patch.data) == lay.SECTOR:
            return patch.data
    return None


def write_guid(before: bytes, locator: Locator, action: str) -> bytes:
    """Return the FileWriteGuid that an attach or detach sets: a new one (2.2.2), the same whenever it is computed.

    Args:
        before: The FileWriteGuid of the image as it was.
        locator: The graft's.
        action: ``attach`` or ``detach``.
    """
    digest = sha256(b"vmgraft " + action.encode() + before + pack_locator(locator)).digest()
    return UUID(bytes=digest[:16], version=4).bytes_le


def updated_headers(headers: Headers, guid: bytes) -> tuple[tuple[int, bytes], ...]:
    """Return slot and bytes of both headers with a new FileWriteGuid, in the order in which they must be written.

    The one that does not count is written first, then counts, and the other follows (2.2.2).
    """
    current = headers.current
    return tuple(
        (slot, _with(current, current.sequence_number + step, guid))
        for step, slot in ((1, 1 - headers.slot), (2, headers.slot))
    )


def _with(header: Header, sequence_number: int, guid: bytes) -> bytes:
    raw = bytearray(header.raw)
    struct.pack_into("<Q", raw, lay.SEQUENCE_OFFSET, sequence_number)
    raw[lay.FILE_WRITE_GUID_OFFSET : lay.FILE_WRITE_GUID_OFFSET + 16] = guid
    return _with_checksum(raw)


def _with_checksum(raw: bytearray) -> bytes:
    struct.pack_into("<I", raw, lay.CHECKSUM_OFFSET, checksum(bytes(raw), lay.CHECKSUM_OFFSET))
    return bytes(raw)


def table_with(raw: bytes, region: Region) -> bytes:
    """Return a region table with the entry of a graft behind the others."""
    table = bytearray(raw)
    (count,) = struct.unpack_from("<I", table, lay.TABLE_COUNT_OFFSET)
    struct.pack_into("<I", table, lay.TABLE_COUNT_OFFSET, count + 1)
    entry = lay.REGION_ENTRY.build(
        {"guid": region.guid, "file_offset": region.offset, "length": region.length, "flags": 0}
    )
    at = lay.TABLE_HEADER_SIZE + count * lay.ENTRY_SIZE
    table[at : at + lay.ENTRY_SIZE] = entry
    return _with_checksum(table)


def table_without(table: RegionTable, undo: Undo | None) -> bytes:
    """Return a region table without the entry of a graft: the original one if nobody else changed it since."""
    region = table.find(lay.GRAFT_REGION)
    original = None if undo is None else original_sector(undo, table.slot)
    if original is not None and region is not None:
        whole = original + table.raw[lay.SECTOR :]
        if parse_table(whole, table.slot) is not None and table_with(whole, region) == table.raw:
            return whole
    begin, end = lay.TABLE_HEADER_SIZE, lay.TABLE_HEADER_SIZE + len(table.regions) * lay.ENTRY_SIZE
    entries = [table.raw[at : at + lay.ENTRY_SIZE] for at in range(begin, end, lay.ENTRY_SIZE)]
    kept = [entry for entry in entries if not entry.startswith(lay.GRAFT_REGION)]
    raw = bytearray(table.raw)
    raw[begin:end] = b"".join(kept).ljust(end - begin, b"\0")
    struct.pack_into("<I", raw, lay.TABLE_COUNT_OFFSET, len(kept))
    return _with_checksum(raw)


def headers_to_restore(headers: Headers, undo: Undo | None, locator: Locator) -> tuple[tuple[int, bytes], ...] | None:
    """Return slot and bytes of the headers to put back, in the order in which that is safe.

    Each must still be as attach left it, or already be the original one; one with a wrong checksum was being written
    when something stopped it. The original that counts goes first, while the other of attach's headers is sound.

    Returns:
        None when another program wrote a header since, or the originals are not known.
    """
    originals = None if undo is None else original_headers(undo)
    if originals is None:
        return None
    guid = write_guid(originals.current.file_write_guid, locator, "attach")
    ours = dict(updated_headers(originals, guid))
    for slot in (0, 1):
        if headers.raw[slot] not in (ours[slot], originals.raw[slot]) and headers.parsed[slot] is not None:
            return None
    if headers.current.raw not in (ours[headers.slot], originals.raw[headers.slot]):
        return None
    order = (originals.slot, 1 - originals.slot)
    return tuple((slot, originals.raw[slot]) for slot in order if headers.raw[slot] != originals.raw[slot])


def is_interrupted(headers: Headers, head: Head) -> bool:
    """Return whether nobody but attach and detach wrote to an image whose table does not list the graft's region.

    Every program that writes to a VHDX file sets another FileWriteGuid first.
    """
    originals = None if head.undo is None else original_headers(head.undo)
    if originals is None:
        return head.undo is None  # attach stopped before it was written, and thus before any other change
    before, now = originals.current.file_write_guid, headers.current.file_write_guid
    if now in (before, write_guid(before, head.locator, "attach")):
        return True
    return now == write_guid(before, head.locator, "detach")
