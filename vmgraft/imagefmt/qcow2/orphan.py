"""What a foreign writer left of a graft when it dropped the header extension: wiping it, or putting it back.

The record must survive a crash at any point, and its old place is in the way of the new extension. So an inline record
is first copied to a sidecar, whose locator says where it belongs; then the leftovers are wiped, the extension is added
as in an attach, and the sidecar is removed. Whatever remains of an interruption is either the old leftovers, or the
sidecar, or the finished graft.
"""

from __future__ import annotations

from dataclasses import replace

from vmgraft.errors import GraftFormatError, NoGraftError, NoRoomError
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement
from vmgraft.imagefmt.locator import LOCATOR_SIZE, parse_locator
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.qcow2 import plan as planning
from vmgraft.imagefmt.qcow2.cluster import Cluster
from vmgraft.imagefmt.qcow2.graft import extension_locator, find_orphan
from vmgraft.imagefmt.qcow2.header import Header
from vmgraft.imagefmt.qcow2.note import NOTE_SIZE, find_note
from vmgraft.imagefmt.qcow2.plan import Span
from vmgraft.imagefmt.qcow2.writer import choose, extend
from vmgraft.imagefmt.sidecar import (
    RECORD_OFFSET,
    read_sidecar,
    remove_sidecar,
    sidecar_path,
    stray_sidecar,
    write_sidecar,
)


def wipe_orphan(writer: Writer, header: Header, *, keep_sidecar: bool = False) -> None:
    """Zero what a foreign writer left of a graft, the locator last, so that an interruption can be repeated.

    Args:
        writer: The image.
        header: Its header.
        keep_sidecar: Leave the sidecar alone; otherwise it goes with the locator that names it.

    Raises:
        NoGraftError: nothing was left.
        GraftFormatError: the backing file name stands in the middle of it.
    """
    cluster = Cluster(writer, header.first_cluster)
    file = str(writer.file)
    at = find_orphan(header, file)
    if at is None:
        if keep_sidecar or stray_sidecar(writer.file) is None:
            raise NoGraftError("the image carries no graft", file=file)
        remove_sidecar(writer.file)
        return
    inline, spans = _leftovers(header, at, file)
    for offset, size in spans[:-1]:
        cluster.clear(offset, size)
    if not inline and not keep_sidecar:
        remove_sidecar(cluster.writer.file)
    cluster.clear(*spans[-1])


def _leftovers(header: Header, at: int, file: str) -> tuple[bool, list[Span]]:
    """Return whether the orphan at ``at`` is inline, and (offset, size) of what is to be wiped, in that order."""
    locator = parse_locator(header.first_cluster[at : at + LOCATOR_SIZE], file=file, offset=at)
    inline = locator.placement is Placement.INLINE
    end = min(header.cluster_size, at + LOCATOR_SIZE + (locator.record_size if inline else 0))
    name = range(header.backing_file_offset, header.backing_file_offset + len(header.backing_name))
    if name and name.start < end and name.stop > at:
        end = max(at + LOCATOR_SIZE, name.start)  # the live name stands in the record's place
    if name and name.start < at + LOCATOR_SIZE and name.stop > at:
        raise GraftFormatError("the backing file name overlaps the leftovers", file=file, offset=at)
    note = find_note(header)
    spans = [(at + LOCATOR_SIZE, end - at - LOCATOR_SIZE), (at, LOCATOR_SIZE)]
    if note is not None and note.offset >= max(end, header.end_offset):
        spans.insert(0, (note.offset, NOTE_SIZE))
    return inline, spans


def check_room(header: Header, file: str) -> None:
    """Check, before anything is written, that a locator will fit once all leftovers are wiped.

    Raises:
        NoRoomError: it will not.
        UnsupportedError: the header is of a kind that cannot be changed safely.
        GraftFormatError: the backing file name stands in the middle of the leftovers.
    """
    at = find_orphan(header, file)
    while at is not None:
        data = bytearray(header.first_cluster)
        for offset, size in _leftovers(header, at, file)[1]:
            data[offset : offset + size] = bytes(size)
        header = replace(header, first_cluster=bytes(data))
        at = find_orphan(header, file)
    planning.check_attachable(header, file)
    if planning.make_plan(header, planning.RECORD_AT, keep=planning.reserve(header)) is None:
        raise NoRoomError(
            "not even a locator fits behind the header extensions",
            file=file,
            offset=header.end_offset,
            field="header_extension",
            hint="extract the record (`vmgraft extract IMAGE record`) and attach it to an image with bigger clusters",
        )


def check_whole(located: Located, file: str) -> tuple[Locator, Blob]:
    """Return locator and record of an orphan.

    Raises:
        GraftFormatError: it is no orphan, or its record is not whole.
    """
    locator, record = located.locator, located.record
    if located.state is not GraftState.ORPHANED or locator is None:
        raise GraftFormatError(f"there is no orphaned record (state {located.state.value})", file=file)
    if record is None or record.size != locator.record_size or record.sha256 != locator.record_sha256:
        raise GraftFormatError(
            f"the record cannot be brought back: {located.detail}",
            file=file,
            offset=located.locator_offset,
            field="record",
            hint="attach again",
        )
    return locator, record


def rescue(writer: Writer, locator: Locator, record: Blob) -> None:
    """Copy an inline orphan to the sidecar, where it is safe.

    Raises:
        GraftFormatError: the sidecar of another graft is there; nothing was written.
        FileError: the sidecar cannot be written; nothing was.
    """
    there = read_sidecar(writer.file)
    if there.state is GraftState.OK and there.locator == locator:
        return
    if there.state is not GraftState.NONE:
        raise GraftFormatError(
            "the sidecar of another graft is in the way",
            file=there.path,
            hint="move it away if the record in the image is the one to be brought back",
        )
    write_sidecar(writer.file, locator, record)


def put_back(writer: Writer, header: Header, locator: Locator, record: Blob) -> None:
    """Add the extension for a record that lies in the sidecar; the sidecar goes if the record is inline again.

    Raises:
        NoRoomError: not even a locator fits; nothing was written.
    """
    file = str(writer.file)
    wanted = Placement.AUTO if locator.placement is Placement.INLINE else Placement.SIDECAR
    if choose(header, wanted, record.size, file):
        extend(writer, header, locator, record, write_record=False)
        remove_sidecar(writer.file)
        return
    outside = replace(locator, placement=Placement.SIDECAR)
    if outside != locator:
        write_sidecar(writer.file, outside, record)
    extend(writer, header, outside, record, write_record=False)


def drop_copy(writer: Writer, header: Header) -> bool:
    """Remove the sidecar copy of an inline record that an interruption of :func:`put_back` left behind.

    Returns:
        Whether there was one.
    """
    ext = header.find(lay.EXT_GRAFT)
    locator = None if ext is None else extension_locator(header, ext)
    if locator is None or locator.placement is not Placement.INLINE:
        return False
    path = sidecar_path(writer.file)
    try:
        if path.stat().st_size != RECORD_OFFSET + locator.record_size:
            return False
    except OSError:
        return False
    if read_sidecar(writer.file).locator != locator:
        return False
    remove_sidecar(writer.file)
    return True
