"""Bringing back what an ISO image's graft has lost: a locator, the footer, or its place at the end of the file."""

from __future__ import annotations

from vmgraft.errors import GraftFormatError, UnsupportedError
from vmgraft.imagefmt._layout import MAGIC
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.contract import GraftState, Locator, Placement, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.iso9660 import _layout as layout
from vmgraft.imagefmt.iso9660._layout import Appendix
from vmgraft.imagefmt.iso9660.assess import Appended, Found, appended, padding
from vmgraft.imagefmt.locator import pack_locator
from vmgraft.imagefmt.record import parse_record


def reattach_iso(file: FlatFile, *, found: Found, volume_space_size: int) -> None:
    """Write locator and footer of a whole record again, and cut zeros off that something padded the file with.

    The footer goes first, then the locator, then the cut: after each the graft is found as before, or better.

    Raises:
        GraftFormatError: when the record is not whole.
        UnsupportedError: when the image is not the grafted one any more, or bytes of somebody else are in the way.
    """
    locator, undo = _whole_graft(file, found, volume_space_size)
    inline = locator.placement is Placement.INLINE
    place = Appendix(locator.file_size, locator.record_size if inline else 0)
    packed = pack_locator(locator)
    has_footer = inline or not undo.patches
    end = place.end if has_footer else locator.file_size
    sector = packed.ljust(layout.SECTOR_SIZE, b"\0")
    footer = file.read(place.footer, layout.SECTOR_SIZE) if has_footer else sector
    _check_ways(file, found, locator, place, footer)
    if undo.patches and found.field != packed and not (found.field in layout.BLANKS or found.field.startswith(MAGIC)):
        raise _beyond(file, found, "another program uses the field in the volume descriptor now")
    tail = appended(file, end)
    if tail is not Appended.NOTHING and (tail is not Appended.ZEROS or file.is_block_device):
        what = f"the file grew by {file.size - end} bytes behind the graft: {tail.value}"
        raise _beyond(file, found, what, f"copy the first {end} bytes to a file of their own")
    if footer == sector and tail is Appended.NOTHING and not undo.patches:
        raise UnsupportedError(f"nothing is lost: {found.located.detail}", file=file.path, hint="leave it as it is")
    writer = file.writer()
    if footer != sector:
        writer.write(place.footer, sector)
        writer.sync()
    if undo.patches and found.field != packed:
        writer.write(layout.LOCATOR_OFFSET, packed)
        writer.sync()
    if tail is Appended.ZEROS:
        writer.truncate(end)
        writer.sync()


def _whole_graft(file: FlatFile, found: Found, volume_space_size: int) -> tuple[Locator, Undo]:
    """Return locator and UNDO of a record that is whole and belongs to the volume as it is now."""
    located = found.located
    locator, record, undo = located.locator, located.record, found.undo
    stray = located.state is GraftState.ORPHANED and locator is not None and locator.placement is Placement.SIDECAR
    if found.rewritten or locator is None or record is None or (located.state is GraftState.ORPHANED and not stray):
        raise _beyond(file, found, located.detail or "no record was found")
    if stray and locator.file_size != file.size:
        raise _beyond(file, found, "the sidecar belongs to another image, or to this one before it changed")
    if undo is None or not _is_sound(file, record, locator):
        raise GraftFormatError(
            "the record is damaged, and nothing can bring it back",
            file=file.path,
            offset=locator.record_offset,
            hint="detach if the way back is still known, and attach again",
        )
    changed = undo.facts.get(layout.FACT_VOLUME_SIZE) != volume_space_size
    too_large = volume_space_size * layout.SECTOR_SIZE > locator.file_size
    if undo.file_size != locator.file_size or changed or too_large or file.size < locator.file_size:
        raise _beyond(file, found, "the image is not the one that was grafted: sizes of file or volume differ")
    return locator, undo


def _check_ways(file: FlatFile, found: Found, locator: Locator, place: Appendix, footer: bytes) -> None:
    """Refuse to write over bytes that are not ours."""
    if padding(file, locator, place):
        raise _beyond(file, found, "bytes of another program stand before or behind the record")
    if any(footer) and not footer.startswith(MAGIC):
        raise _beyond(file, found, "bytes of another program stand where the footer goes")


def _is_sound(file: FlatFile, record: Blob, locator: Locator) -> bool:
    """Return whether the record is what the locator says, and its sections what its own table says."""
    if record.size != locator.record_size or record.sha256 != locator.record_sha256:
        return False
    try:
        parsed = parse_record(record, file=file.path, offset=locator.record_offset)
        for section in parsed.sections:
            parsed.raw(section)
    except GraftFormatError:
        return False
    return True


def _beyond(file: FlatFile, found: Found, reason: str, hint: str | None = None) -> UnsupportedError:
    return UnsupportedError(
        f"the graft ({found.located.state.value}) cannot be brought back: {reason}",
        file=file.path,
        offset=found.located.locator_offset,
        hint=hint or "go back to a copy from before, or attach to the image as it is now",
    )
