"""ISO 9660 images: the pristine content is the original file, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from vmgraft.imagefmt._layout import LOCATOR_SIZE, MAX_RECORD_SIZE
from vmgraft.imagefmt.contract import (
    Extent,
    GraftState,
    Located,
    OpenOptions,
    Patch,
    Placement,
    RecordBuilder,
    Room,
    Undo,
)
from vmgraft.imagefmt.flatfile import FlatFile, FlatImage
from vmgraft.imagefmt.iso9660 import _layout as layout
from vmgraft.imagefmt.iso9660.descriptors import read_descriptors
from vmgraft.imagefmt.iso9660.facts import volume_facts
from vmgraft.imagefmt.iso9660.locate import find_graft
from vmgraft.imagefmt.iso9660.reattach import reattach_iso
from vmgraft.imagefmt.iso9660.writer import attach_iso, detach_iso
from vmgraft.imagefmt.locator import pack_locator


class IsoImage(FlatImage):
    """An open ISO image; see :class:`vmgraft.imagefmt.contract.Image`.

    Raises:
        MalformedImageError: when the volume descriptors are malformed.
    """

    format_name: ClassVar[str] = "iso9660"
    sector_size = layout.SECTOR_SIZE

    def __init__(self, path: Path, options: OpenOptions) -> None:
        self.path = path
        self._file = FlatFile(path, writable=options.writable)
        try:
            self._refresh()
        except BaseException:
            self._file.close()
            raise

    def _refresh(self) -> None:
        """Read the descriptors and find the graft again; afterwards the content's size is known."""
        self._file.size = self._file.current_size()
        self._volume = read_descriptors(self._file)
        self._found = find_graft(self._file, self._volume.volume_space_size, self._volume.root_sector)
        self.virtual_size = self._found.content_size

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with content, the locator in the volume descriptor replaced by what stood there before."""
        length = max(0, min(len(buffer), self.virtual_size - offset))
        got = self._file.readinto(offset, buffer[:length])
        original = self._found.original_field
        start = max(offset, layout.LOCATOR_OFFSET)
        end = min(offset + got, layout.LOCATOR_OFFSET + LOCATOR_SIZE)
        if original is not None and start < end:
            buffer[start - offset : end - offset] = original[
                start - layout.LOCATOR_OFFSET : end - layout.LOCATOR_OFFSET
            ]
        return got

    def extents(self) -> Iterator[Extent]:
        """Yield data and hole runs as the file system knows them."""
        return self._file.extents(self.virtual_size)

    def metadata(self) -> dict[str, Any]:
        """Return file and volume facts."""
        return {
            "fileSize": self._file.size,
            "contentSize": self.virtual_size,
            **volume_facts(self._file, self._volume, self.virtual_size),
        }

    def locate(self) -> Located:
        """Return the graft as found when the image was opened, or last changed through it."""
        return self._found.located

    def room(self) -> Room:
        """Return the limit of the record format: a file can be appended to without end."""
        if self._file.is_block_device:
            return Room(0, 0, "a block device has no room behind its end; a sidecar is used")
        return Room(MAX_RECORD_SIZE, 0, "the record goes behind the end of the image")

    def attach(self, build: RecordBuilder, placement: Placement, tree_digest: bytes) -> Located:
        """Append a record, or write a sidecar, and put the locator into the volume descriptor."""
        size = self._volume.volume_space_size
        attach_iso(self._file, build, placement, tree_digest, found=self._found, volume_space_size=size)
        self._refresh()
        return self.locate()

    def detach(self, undo: Undo) -> None:
        """Put the original descriptor bytes back and cut the file to its original size."""
        detach_iso(self._file, undo, found=self._found, volume_space_size=self._volume.volume_space_size)
        self._refresh()

    def recovery_undo(self) -> Undo | None:
        """Return the undo that was found while looking for the graft, or the one that the content's digest proves.

        Where the record was cut off, only the 128 bytes of the descriptor are in doubt, and they were of two kinds: the
        right one gives the digest in the locator. The content is read for that.

        Raises:
            FileError: when the content cannot be read.
        """
        locator = self._found.located.locator
        if self._found.undo is not None or locator is None or self._found.located.state is not GraftState.CUT:
            return self._found.undo
        if self._file.size < locator.file_size or self._found.field != pack_locator(locator):
            return None
        from vmgraft.imagefmt.tree import digest_content

        as_found = self._found
        facts = {layout.FACT_VOLUME_SIZE: self._volume.volume_space_size}
        for blank in layout.BLANKS:
            undo = Undo(locator.file_size, (Patch(layout.LOCATOR_OFFSET, blank),), facts)
            self._found = replace(as_found, undo=undo)
            if digest_content(self, flat="never").tree_digest == locator.tree_digest:
                return undo
        self._found = as_found
        return None

    def reattach(self, located: Located) -> None:
        """Write locator and footer of a whole record again, and cut off zeros that pad the file.

        Raises:
            GraftFormatError: when the record is not whole.
            UnsupportedError: when the image is not the grafted one any more, or bytes of somebody else are in the way.
        """
        reattach_iso(self._file, found=self._found, volume_space_size=self._volume.volume_space_size)
        self._refresh()
