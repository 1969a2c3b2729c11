"""Attach and detach; docs/vhdx.md has the order of writes and why it is safe.

A program that is stopped anywhere leaves a file that every reader takes for the one before or the one after. What
attach adds is listed nowhere until the last write, of one sector; detach undoes that write first. From the region,
listed or not, everything else can be put back, which the next open for writing does.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from vmgraft.errors import FileError, GraftFormatError, MalformedImageError, NoRoomError, UnsupportedError, UsageError
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.contract import GraftState, Locator, Placement, RecordBuilder, Room, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.sidecar import read_sidecar, remove_sidecar, write_sidecar
from vmgraft.imagefmt.vhdx import _layout as lay
from vmgraft.imagefmt.vhdx import note as notes
from vmgraft.imagefmt.vhdx.bat import Survey
from vmgraft.imagefmt.vhdx.container import Container
from vmgraft.imagefmt.vhdx.graft import Found
from vmgraft.imagefmt.vhdx.header import Headers
from vmgraft.imagefmt.vhdx.regions import Region, RegionTable

#: States of a sidecar that belongs to somebody else.
_NOT_OURS = (GraftState.SWAPPED, GraftState.STALE)
#: States in which a graft may be attached.
FREE = (GraftState.NONE, GraftState.ORPHANED)


@dataclass(frozen=True, slots=True)
class Terms:
    """How a graft was asked for: where it goes, and the digest of the content (32 bytes)."""

    placement: Placement
    tree_digest: bytes


def check_writable(flat: FlatFile, container: Container, updates: int) -> None:
    """Refuse images whose log must be replayed first, and those that cannot take ``updates`` more header updates.

    Raises:
        UnsupportedError: for both.
    """
    if container.dirty:
        raise dirty_log(flat, container.headers)
    if container.headers.current.sequence_number > lay.MAX_SEQUENCE - updates:
        offset = lay.HEADER_OFFSETS[container.headers.slot]
        message = "the header's sequence number is at its end"
        raise UnsupportedError(message, file=flat.path, offset=offset, field="header.sequence_number")


def dirty_log(flat: FlatFile, headers: Headers) -> UnsupportedError:
    """Return the error for an image whose log must be replayed."""
    return UnsupportedError(
        "the image was not closed properly: its log holds changes that are not yet made",
        file=flat.path,
        offset=headers.current.log_offset,
        field="log",
        hint="replay the log with `qemu-img check -r all`, or open and close the image in the program that wrote it",
    )


def _places(flat: FlatFile, container: Container) -> tuple[RegionTable, RegionTable] | str:
    """Return both copies of the region table if an entry can be added to them, or why not."""
    first, second = container.tables
    if flat.is_block_device:
        return "a block device has no room behind its end"
    if first is None or second is None or first.raw != second.raw:
        return "the two copies of the region table differ, or one is damaged"
    if len(first.regions) > lay.MAX_OTHER_ENTRIES:
        return f"the region table has more than {lay.MAX_OTHER_ENTRIES} entries"
    return first, second


def room(flat: FlatFile, container: Container) -> Room:
    """Return how long an inline record may be."""
    places = _places(flat, container)
    if isinstance(places, str):
        return Room(0, 0, places)
    return Room(lay.ROOM, lay.RECORD_OFFSET, "the graft has a region of its own at the end of the file, up to 64 MiB")


# --- attach --------------------------------------------------------------------------------------------------------


def attach(
    flat: FlatFile,
    container: Container,
    survey: Survey,
    build: RecordBuilder,
    terms: Terms,
) -> None:
    """Write a record into a region of its own, or a sidecar that a region of 1 MiB points to.

    Raises:
        UnsupportedError: the log must be replayed first.
        NoRoomError: the record does not fit, or not even a locator does; nothing was written.
        FileError: writing failed; the image is as before then.
    """
    check_writable(flat, container, 4)  # two now, and two for a detach
    places = _places(flat, container)
    if isinstance(places, str):
        raise NoRoomError(f"there is no room for a graft: {places}", file=flat.path, field="region table")
    start = lay.round_up(max(flat.size, survey.end))
    if start > lay.MAX_FILE_SIZE - lay.MAX_REGION:
        raise NoRoomError("the file's objects lie too far out for a region behind them", file=flat.path)
    undo = notes.make_undo(container.headers, places, flat.size)
    record = build(undo)
    region, locator = _plan(flat, record, start, terms)
    inline = locator.placement is Placement.INLINE
    writer = flat.writer()
    try:
        if not inline:
            write_sidecar(flat.path, locator, record)
        _write_region(writer, region, notes.pack_head(locator, region, undo), record if inline else None)
        guid = notes.write_guid(container.headers.current.file_write_guid, locator, "attach")
        _write_headers(writer, notes.updated_headers(container.headers, guid))
        for table in reversed(places):
            _write_table(writer, table, notes.table_with(table.raw, region))
    except FileError:
        with suppress(FileError):
            _take_back(writer, container, places, locator)
        raise


def _plan(flat: FlatFile, record: Blob, start: int, terms: Terms) -> tuple[Region, Locator]:
    """Return the graft's region and locator for a region at ``start``."""
    if terms.placement is Placement.INLINE and record.size > lay.ROOM:
        raise NoRoomError(
            f"a record of {record.size} bytes does not fit into the {lay.ROOM} bytes that a region may hold",
            file=flat.path,
            hint="use --placement sidecar",
        )
    if terms.placement is Placement.SIDECAR or record.size > lay.ROOM:
        locator = Locator(Placement.SIDECAR, 0, record.size, record.sha256, terms.tree_digest, flat.size)
        return Region(lay.GRAFT_REGION, start, lay.region_length(0), False), locator
    offset = start + lay.RECORD_OFFSET
    locator = Locator(Placement.INLINE, offset, record.size, record.sha256, terms.tree_digest, flat.size)
    return Region(lay.GRAFT_REGION, start, lay.region_length(record.size), False), locator


def _write_region(writer: Writer, region: Region, head: tuple[bytes, bytes], record: Blob | None) -> None:
    """Write the region: its first sector, by which it is known, before anything else of it."""
    first, undo = head
    writer.write(region.offset, first)
    writer.sync()
    writer.truncate(region.end)
    writer.write(region.offset + lay.UNDO_OFFSET, undo)
    if record is not None:
        writer.write_blob(region.offset + lay.RECORD_OFFSET, record)
    writer.sync()


def _write_headers(writer: Writer, headers: tuple[tuple[int, bytes], ...]) -> None:
    for slot, raw in headers:
        writer.write(lay.HEADER_OFFSETS[slot], raw)
        writer.sync()


def _write_table(writer: Writer, table: RegionTable, raw: bytes) -> None:
    """Write a copy of the region table: one sector, which a disk writes as a whole, unless others changed the rest."""
    if raw[lay.SECTOR :] == table.raw[lay.SECTOR :]:
        raw = raw[: lay.SECTOR]
    writer.write(lay.TABLE_OFFSETS[table.slot], raw)
    writer.sync()


def _take_back(writer: Writer, container: Container, places: tuple[RegionTable, ...], locator: Locator) -> None:
    """Put everything back after a write that failed."""
    for table in places:
        _write_table(writer, table, table.raw)
    headers = container.headers
    _write_headers(writer, tuple((slot, headers.raw[slot]) for slot in (headers.slot, 1 - headers.slot)))
    if locator.placement is Placement.SIDECAR and read_sidecar(writer.file, locator).state is GraftState.OK:
        remove_sidecar(writer.file)  # this one, not an older one that it did not get to replace
    writer.truncate(locator.file_size)
    writer.sync()


# --- detach --------------------------------------------------------------------------------------------------------


def detach(flat: FlatFile, container: Container, survey: Survey, found: Found, undo: Undo) -> None:
    """Take the graft out.

    The original file comes back byte for byte, unless another program allocated blocks behind the region: then the
    region's place stays in the file, unused and zero. The headers are put back unless another program wrote them.

    Raises:
        UnsupportedError: the log must be replayed first.
        GraftFormatError: the graft contradicts itself, or following it would cut off what belongs to the disk.
        FileError: writing failed.
    """
    if found.region is None:
        if found.located.state is not GraftState.ORPHANED:
            raise UsageError("the image carries no graft", file=flat.path)
        remove_sidecar(flat.path)
        return
    check_writable(flat, container, 2)
    region, head = found.region, found.head
    if head is None or undo.file_size != head.locator.file_size:
        message = "UNDO and the locator disagree about the original file, or there is no locator"
        raise GraftFormatError(message, file=flat.path, offset=region.offset, field="undo")
    linked = container.region(lay.GRAFT_REGION) is not None
    last = region.end >= flat.size
    if last and not survey.stored_end <= undo.file_size <= region.offset:
        message = f"the original file had {undo.file_size} bytes, says UNDO, and the disk needs {survey.stored_end}"
        raise GraftFormatError(message, file=flat.path, offset=region.offset, field="undo.file_size")
    writer = flat.writer()
    _take_out(writer, container, undo, head.locator)
    if head.locator.placement is Placement.SIDECAR:
        _remove_own_sidecar(flat, head.locator)
    if last:
        writer.truncate(undo.file_size)
        writer.sync()
    elif linked:
        _blank(writer, region, head.locator)


def _take_out(writer: Writer, container: Container, undo: Undo, locator: Locator) -> None:
    """Take the region out of both copies of the table, and put the headers back."""
    headers = container.headers
    restored = notes.headers_to_restore(headers, undo, locator)
    if restored is None:
        originals = notes.original_headers(undo)
        before = headers.current if originals is None else originals.current
        guid = notes.write_guid(before.file_write_guid, locator, "detach")
        if headers.current.file_write_guid != guid:
            _write_headers(writer, notes.updated_headers(headers, guid))
    for slot in (container.table.slot, 1 - container.table.slot):
        table = container.tables[slot]
        if table is not None and table.find(lay.GRAFT_REGION) is not None:
            _write_table(writer, table, notes.table_without(table, undo))
    _write_headers(writer, restored or ())


def _remove_own_sidecar(flat: FlatFile, locator: Locator) -> None:
    if read_sidecar(flat.path, locator).state not in _NOT_OURS:
        remove_sidecar(flat.path)


def _blank(writer: Writer, region: Region, locator: Locator) -> None:
    """Overwrite a region that other objects stand behind."""
    inline = locator.record_size if locator.placement is Placement.INLINE else 0
    end = region.offset + min(region.length, lay.RECORD_OFFSET + inline)
    for offset in range(region.offset, end, lay.MIB):
        writer.write(offset, bytes(min(lay.MIB, end - offset)))
    writer.sync()


def recover(flat: FlatFile, container: Container, survey: Survey, found: Found) -> bool:
    """Clear away what an interrupted attach or detach left; return whether there was anything.

    Raises:
        FileError: writing failed.
    """
    region, head = found.region, found.head
    if not found.interrupted or region is None or head is None or container.dirty:
        return False
    if head.undo is not None:
        with suppress(GraftFormatError, MalformedImageError):
            detach(flat, container, survey, found, head.undo)
            return True
        return False
    writer = flat.writer()
    if head.locator.placement is Placement.SIDECAR:
        _remove_own_sidecar(flat, head.locator)
    writer.truncate(head.locator.file_size)
    writer.sync()
    return True
