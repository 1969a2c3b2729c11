"""VDI images: the guest content through the block map."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from vmgraft.imagefmt import gap as gaps
from vmgraft.imagefmt.contract import (
    Extent,
    GraftState,
    Located,
    OpenOptions,
    Placement,
    RecordBuilder,
    Room,
    Undo,
)
from vmgraft.imagefmt.flatfile import FlatFile, FlatImage
from vmgraft.imagefmt.locator import MAGIC
from vmgraft.imagefmt.mapped import MappedContent
from vmgraft.imagefmt.vdi import _layout as lay
from vmgraft.imagefmt.vdi import graft, writer
from vmgraft.imagefmt.vdi.blocks import VdiBlocks
from vmgraft.imagefmt.vdi.header import check_complete, comment_text, read_header


class VdiImage(FlatImage):
    """An open VDI image; see :class:`vmgraft.imagefmt.contract.Image`.

    Raises:
        MalformedImageError: when the header contradicts itself or the file.
        UnsupportedError: for versions and variants that are not known here.
    """

    format_name: ClassVar[str] = "vdi"

    def __init__(self, path: Path, options: OpenOptions) -> None:
        self.path = path
        self._file = FlatFile(path, writable=options.writable)
        self._lock = Lock()
        self._content: MappedContent | None = None
        try:
            self._refresh()
            if options.writable:
                self.recovered = writer.recover(self._file, self._header)
        except BaseException:
            self._file.close()
            raise

    def _refresh(self) -> None:
        self._file.size = self._file.current_size()
        self._header = read_header(self._file)
        self._located: Located | None = None
        self.virtual_size = self._header.disk_size

    # --- content ---------------------------------------------------------------------------------------------------

    def _open_content(self) -> MappedContent:
        with self._lock:
            if self._content is None:
                check_complete(self._file, self._header)
                self._content = MappedContent(self._file, VdiBlocks(self._file, self._header))
            return self._content

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with guest content and return the number of bytes.

        Raises:
            UnsupportedError: for undo and differencing images.
            MalformedImageError: when the block map points astray.
        """
        return self._open_content().readinto(offset, buffer)

    def extents(self) -> Iterator[Extent]:
        """Yield the runs of the guest content: blocks in the file, discarded ones (zero), and free ones (hole)."""
        return self._open_content().extents()

    def metadata(self) -> dict[str, Any]:
        """Return header facts, all unverified; works for images whose content cannot be read."""
        header = self._header
        grafted = header.comment.startswith(MAGIC)
        return {
            "format": self.format_name,
            "version": "1.1",
            "virtualSize": header.disk_size,
            "fileSize": self._file.size,
            "creator": header.text,
            "imageType": lay.TYPE_NAMES[header.image_type],
            "comment": "" if grafted else comment_text(header),
            "blockSize": header.block_size,
            "blocks": header.blocks,
            "blocksAllocated": header.blocks_allocated,
            "uuid": header.uuid,
            "parent": header.uuid_linkage,
            "interruptedChange": not grafted and gaps.is_interrupted(gaps.read_note(self._file, header.gap)),
        }

    # --- graft -----------------------------------------------------------------------------------------------------

    def locate(self) -> Located:
        """Return the graft as found when first asked for, or last changed through this object."""
        if self._located is None:
            self._located = graft.locate(self._file, self._header)
        return self._located

    def room(self) -> Room:
        """Return what fits between header and block map; nothing in images that QEMU made."""
        return graft.room(self._file, self._header)

    def attach(self, build: RecordBuilder, placement: Placement, tree_digest: bytes) -> Located:
        """Write a record between header and block map or beside the file, and the locator into the comment."""
        check_complete(self._file, self._header)
        writer.attach(self._file, self._header, build, placement, tree_digest, located=self.locate())
        self._refresh()
        return self.locate()

    def detach(self, undo: Undo) -> None:
        """Take the graft away; what it stood on were zeros."""
        writer.detach(self._file, self._header, undo, self.locate())
        self._refresh()

    def recovery_undo(self) -> Undo | None:
        """Return an undo where the locator is sound: it says which bytes have to become zeros again."""
        located = self.locate()
        if located.locator is None or located.state is GraftState.ORPHANED:
            return None
        return Undo(file_size=located.locator.file_size)

    def reattach(self, located: Located) -> None:
        """Point to a whole record again that lost its locator; see :func:`vmgraft.imagefmt.vdi.writer.reattach`."""
        if located.state is not GraftState.ORPHANED:
            super().reattach(located)
        writer.reattach(self._file, self._header, located)
        self._refresh()
