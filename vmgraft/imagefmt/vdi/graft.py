"""Finding the graft of a VDI image."""

from __future__ import annotations

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt import gap as gaps
from vmgraft.imagefmt.contract import Located, Placement, Room
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import LOCATOR_SIZE, MAGIC, parse_locator
from vmgraft.imagefmt.sidecar import locate_sidecar
from vmgraft.imagefmt.vdi import _layout as lay
from vmgraft.imagefmt.vdi.header import Header


def is_blank(header: Header) -> bool:
    """Return whether nothing stands in the comment, so that a locator may."""
    return not any(header.comment)


def locate(file: FlatFile, header: Header) -> Located:
    """Look at the comment, then for what is left of a graft that nothing points to; never raises for a damaged one."""
    if header.comment.startswith(MAGIC):
        try:
            locator = parse_locator(header.comment[:LOCATOR_SIZE], file=file.path, offset=lay.COMMENT_OFFSET)
        except GraftFormatError as problem:
            return gaps.locate_damaged(file, header.gap, str(problem), lay.COMMENT_OFFSET)
        if locator.placement is Placement.SIDECAR:
            return locate_sidecar(file.path, locator, lay.COMMENT_OFFSET)
        return gaps.locate_in_gap(file, header.gap, locator, lay.COMMENT_OFFSET)
    return gaps.locate_unpointed(file, header.gap, is_blank(header))


def room(file: FlatFile, header: Header) -> Room:
    """Return what fits between header and block map."""
    if not is_blank(header) and not header.comment.startswith(MAGIC):
        return Room(0, 0, "the comment is taken, so nothing in the image could point to a record: a sidecar is used")
    size = gaps.free_bytes(file, header.gap)
    if size == 0:
        return Room(0, gaps.SECTOR, "there are no unused bytes between header and block map")
    return Room(size, gaps.SECTOR, "the unused bytes between header and block map, less a sector for a note")
