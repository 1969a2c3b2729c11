"""Finding the graft of a VMDK image: the line in the descriptor, and the gap between the tables and the grains."""

from __future__ import annotations

from dataclasses import dataclass

from vmgraft.errors import GraftFormatError, MalformedImageError
from vmgraft.imagefmt import gap as gaps
from vmgraft.imagefmt.contract import Located, Locator, Placement, Room
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.gap import Gap
from vmgraft.imagefmt.locator import LOCATOR_SIZE, pack_locator, parse_locator
from vmgraft.imagefmt.sidecar import locate_sidecar
from vmgraft.imagefmt.vmdk import _layout as lay
from vmgraft.imagefmt.vmdk.descriptor import Descriptor, read_descriptor
from vmgraft.imagefmt.vmdk.header import Header, read_header
from vmgraft.imagefmt.vmdk.tables import read_directory
from vmgraft.imagefmt.vmdk.text import read_journal


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of an image that matter to a graft."""

    header: Header
    descriptor: Descriptor
    gap: Gap


def examine(file: FlatFile) -> Anatomy:
    """Read header and descriptor, and find the gap.

    Raises:
        MalformedImageError: when header or descriptor contradict themselves or the file.
        UnsupportedError: for variants that are not known here.
    """
    header = read_header(file)
    gap = _find_gap(file, header)
    offset, size = header.descriptor_offset * lay.SECTOR, header.descriptor_size * lay.SECTOR
    replacement = read_journal(file, gaps.read_note(file, gap), offset, size)
    return Anatomy(header, read_descriptor(file, offset, size, header.capacity, replacement), gap)


def _find_gap(file: FlatFile, header: Header) -> Gap:
    """Return the sectors between the last piece of metadata at the beginning of the file and the first grain.

    No grain lies there: a table entry that says so is refused when the content is read.
    """
    ends = [1, header.descriptor_offset + header.descriptor_size]
    try:
        for offset in filter(None, (header.gd_offset, header.rgd_offset)):
            tables = read_directory(file, header, offset)
            early = tables[(tables != 0) & (tables < header.overhead)]
            ends += [offset + header.gd_sectors] if offset < header.overhead else []
            ends += [int(early.max()) + lay.GT_SECTORS] if len(early) else []
    except MalformedImageError:
        ends = [header.overhead]  # no honest gap can be told; reading the content says what is wrong
    return Gap(max(ends) * lay.SECTOR, header.overhead * lay.SECTOR)


def line_for(locator: Locator) -> bytes:
    """Return the descriptor's line for a locator, newline included."""
    return lay.LINE_KEY + b' = "' + pack_locator(locator).hex().encode() + b'"\n'


#: Bytes of a line, and of the newline that may have to stand before it.
_LINE_SIZE = len(lay.LINE_KEY) + 2 * LOCATOR_SIZE + 6 + 1


def has_place(file: FlatFile, parts: Anatomy, note: gaps.Note | None = None) -> bool:
    """Return whether a line fits into the descriptor, and a note into the gap.

    Both need zeros to be there, or a ``note`` which says that what is there is a graft's.
    """
    descriptor, gap = parts.descriptor, parts.gap
    # QEMU reads and writes 20 sectors, whatever the header says.
    limit = min(descriptor.size, lay.QEMU_DESCRIPTOR_SIZE)
    fits = len(descriptor.text) + _LINE_SIZE + lay.LINE_RESERVE <= limit
    free = gap.end >= gap.record and (note is not None or not any(file.read(gap.start, gaps.SECTOR)))
    return fits and free and (note is not None or descriptor.blank_tail)


def locate(file: FlatFile, parts: Anatomy) -> Located:
    """Look at the descriptor, then for what is left of a graft that nothing points to; a damaged one is no error."""
    descriptor, gap = parts.descriptor, parts.gap
    if not descriptor.lines:
        return gaps.locate_unpointed(file, gap, has_place(file, parts))
    where = descriptor.offset + descriptor.lines[0].start
    if len(descriptor.lines) > 1:
        return gaps.locate_damaged(file, gap, f"{len(descriptor.lines)} lines hold a locator", where)
    try:
        locator = parse_locator(_unhex(descriptor.lines[0].value), file=file.path, offset=where)
    except GraftFormatError as problem:
        return gaps.locate_damaged(file, gap, str(problem), where)
    if locator.placement is Placement.SIDECAR:
        return locate_sidecar(file.path, locator, where)
    return gaps.locate_in_gap(file, gap, locator, where)


def _unhex(value: bytes) -> bytes:
    """Return the bytes of the locator; none where the value is not exactly its digits."""
    try:
        return bytes.fromhex(value.decode("ascii")) if len(value) == 2 * LOCATOR_SIZE else b""
    except ValueError:
        return b""


def room(file: FlatFile, parts: Anatomy) -> Room:
    """Return what fits between the tables and the grains."""
    if not parts.descriptor.lines and not has_place(file, parts):
        return Room(0, 0, "there is no place for a locator in the descriptor, or none for a note behind the tables")
    size = gaps.free_bytes(file, parts.gap)
    return Room(size, gaps.SECTOR, "the unused sectors between the tables and the first grain, less one for a note")
