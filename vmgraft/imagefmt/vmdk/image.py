"""VMDK sparse images: the guest content through grain directory and grain tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from vmgraft.errors import UnsupportedError
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
from vmgraft.imagefmt.mapped import MappedContent
from vmgraft.imagefmt.vmdk import _layout as lay
from vmgraft.imagefmt.vmdk import graft, writer
from vmgraft.imagefmt.vmdk.tables import VmdkGrains


class VmdkImage(FlatImage):
    """An open monolithicSparse or streamOptimized image; see :class:`vmgraft.imagefmt.contract.Image`.

    Raises:
        MalformedImageError: when header or descriptor contradict themselves or the file.
        UnsupportedError: for variants that are not known here.
    """

    format_name: ClassVar[str] = "vmdk"

    def __init__(self, path: Path, options: OpenOptions) -> None:
        self.path = path
        self._file = FlatFile(path, writable=options.writable)
        self._lock = Lock()
        self._content: MappedContent | None = None
        try:
            self._refresh()
            if options.writable and writer.recover(self._file, self._parts):
                self.recovered = True
                self._refresh()
        except BaseException:
            self._file.close()
            raise

    def _refresh(self) -> None:
        self._file.size = self._file.current_size()
        self._parts = graft.examine(self._file)
        self._located: Located | None = None
        self.virtual_size = self._parts.header.capacity * lay.SECTOR

    # --- content ---------------------------------------------------------------------------------------------------

    def _open_content(self) -> MappedContent:
        with self._lock:
            if self._content is None:
                self._check_complete()
                self._content = MappedContent(self._file, VmdkGrains(self._file, self._parts.header))
            return self._content

    def _check_complete(self) -> None:
        header, descriptor = self._parts.header, self._parts.descriptor
        if descriptor.parent_cid != lay.NO_PARENT or descriptor.parent_name is not None:
            name = descriptor.parent_name or f"CID {descriptor.parent_cid:08x}, its name is not stated"
            raise UnsupportedError(
                f"a delta disk, which holds only the changes to its parent ({name})",
                file=self.path,
                offset=descriptor.offset,
                field="parentCID",
                hint="convert the whole chain into one image with `qemu-img convert`",
            )
        if header.unclean:
            raise UnsupportedError(
                "the image was not closed properly",
                file=self.path,
                offset=header.offset + lay.FIELD_OFFSET["unclean_shutdown"],
                field="unclean_shutdown",
                hint="let the program that uses it open and close it once more, or convert it with `qemu-img convert`",
            )

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with guest content and return the number of bytes.

        Raises:
            UnsupportedError: for delta disks, and images that were not closed.
            MalformedImageError: when the tables point astray.
        """
        return self._open_content().readinto(offset, buffer)

    def extents(self) -> Iterator[Extent]:
        """Yield the runs of the guest content: grains in the file, grains marked as zero, and missing ones (hole)."""
        return self._open_content().extents()

    def metadata(self) -> dict[str, Any]:
        """Return facts from header and descriptor, all unverified; works for images whose content cannot be read."""
        header, descriptor = self._parts.header, self._parts.descriptor
        note = gaps.read_note(self._file, self._parts.gap)
        return {
            "format": self.format_name,
            "version": header.version,
            "virtualSize": self.virtual_size,
            "fileSize": self._file.size,
            "createType": descriptor.create_type,
            "grainSize": header.grain_bytes,
            "grainTables": header.tables,
            "redundantTables": header.rgd_offset != 0,
            "zeroedGrains": header.zeroed,
            "compression": "deflate" if header.compressed else "none",
            "footer": header.offset != 0,
            "cid": f"{descriptor.cid:08x}",
            "extentName": descriptor.extent_name,
            "parent": descriptor.parent_name,
            "uncleanShutdown": header.unclean,
            "interruptedChange": gaps.is_interrupted(note) and not descriptor.lines,
        }

    # --- graft -----------------------------------------------------------------------------------------------------

    def locate(self) -> Located:
        """Return the graft as found when first asked for, or last changed through this object."""
        if self._located is None:
            self._located = graft.locate(self._file, self._parts)
        return self._located

    def room(self) -> Room:
        """Return what fits between the tables and the first grain."""
        return graft.room(self._file, self._parts)

    def attach(self, build: RecordBuilder, placement: Placement, tree_digest: bytes) -> Located:
        """Write a record behind the tables or beside the file, and its locator into the descriptor."""
        self._check_complete()
        writer.attach(self._file, self._parts, build, placement, tree_digest, located=self.locate())
        self._refresh()
        return self.locate()

    def detach(self, undo: Undo) -> None:
        """Take the line out of the descriptor, and wipe the record."""
        writer.detach(self._file, self._parts, undo, self.locate())
        self._refresh()

    def recovery_undo(self) -> Undo | None:
        """Return an undo where locator or note are sound: they say what has to become zeros again."""
        located = self.locate()
        if located.locator is None or located.state is GraftState.ORPHANED:
            return None
        note = gaps.read_note(self._file, self._parts.gap)
        newline = int(note is not None and bool(note.flags & lay.NOTE_NEWLINE))
        return Undo(file_size=located.locator.file_size, facts={lay.FACT_NEWLINE: newline})

    def reattach(self, located: Located) -> None:
        """Point to a whole record again that lost its line; see :func:`vmgraft.imagefmt.vmdk.writer.reattach`."""
        if located.state is not GraftState.ORPHANED:
            super().reattach(located)
        writer.reattach(self._file, self._parts, located)
        self._refresh()
