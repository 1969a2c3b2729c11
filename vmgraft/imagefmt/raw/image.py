"""Raw images: the pristine content is the file up to its original size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.contract import (
    Extent,
    GraftState,
    Kind,
    Located,
    OpenOptions,
    Placement,
    RecordBuilder,
    Room,
    Undo,
)
from vmgraft.imagefmt.flatfile import FlatFile, FlatImage
from vmgraft.imagefmt.raw import _layout as layout
from vmgraft.imagefmt.raw.recipes import recipes
from vmgraft.imagefmt.raw.trailer import find_trailer
from vmgraft.imagefmt.raw.writer import attach_raw, detach_raw, reattach_raw
from vmgraft.imagefmt.sidecar import read_sidecar

#: UEFI PI 1.8, volume 3, 3.2.1.1 EFI_FIRMWARE_VOLUME_HEADER: signature at byte 40.
_FIRMWARE_SIGNATURE = b"_FVH"
_FIRMWARE_OFFSET = 40


class RawImage(FlatImage):
    """An open raw image; see :class:`vmgraft.imagefmt.contract.Image`.

    Raises:
        UnsupportedError: for firmware images.
        MalformedImageError: for an empty file.
    """

    format_name: ClassVar[str] = "raw"

    def __init__(self, path: Path, options: OpenOptions) -> None:
        self.path = path
        self._file = FlatFile(path, writable=options.writable)
        try:
            self._refuse_unsuitable()
            self._refresh()
        except BaseException:
            self._file.close()
            raise

    def _refuse_unsuitable(self) -> None:
        if self._file.size == 0:
            raise MalformedImageError("the image is empty", file=self.path, offset=0)
        head = self._file.read(0, _FIRMWARE_OFFSET + len(_FIRMWARE_SIGNATURE))
        if self.path.suffix.lower() == ".fd" or head[_FIRMWARE_OFFSET:] == _FIRMWARE_SIGNATURE:
            raise UnsupportedError(
                "this is a firmware image, not a disk: firmware is mapped from its end, a trailer would move it",
                file=self.path,
                hint="graft the disk image of the machine instead",
            )

    def _refresh(self) -> None:
        """Find the graft again; afterwards the content's size is known."""
        self._file.size = self._file.current_size()
        self._located = self._find()
        #: Bytes of the file that are content.
        self.content_size = self._file.size
        locator = self._located.locator
        if locator is not None and locator.placement is Placement.INLINE:
            self.content_size = locator.file_size
        self.virtual_size = layout.round_up(self.content_size, layout.SECTOR_SIZE)

    def _find(self) -> Located:
        found = find_trailer(self._file)
        if found is not None:
            return found
        sidecar = read_sidecar(self.path)
        locator = sidecar.locator
        if locator is None:
            return Located(sidecar.state, sidecar.detail, record=sidecar.record)
        state, detail = sidecar.state, sidecar.detail
        if locator.placement is not Placement.SIDECAR:
            detail = "the locator in the sidecar is not one of a sidecar"
            return Located(GraftState.DAMAGED, detail, record=sidecar.record)
        other = f", or {sidecar.path.name} belongs to another image"  # a raw image has no locator that could tell
        if state is GraftState.OK and self._file.size > locator.file_size:
            state, detail = GraftState.GROWN, f"the image grew from {locator.file_size} bytes since attach{other}"
        elif state is GraftState.OK and self._file.size < locator.file_size:
            state, detail = GraftState.DAMAGED, f"the image shrank from {locator.file_size} bytes since attach{other}"
        return Located(state, detail, locator, 0, sidecar.record)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with content; bytes between the end of the file and of the last sector read as zero."""
        length = max(0, min(len(buffer), self.virtual_size - offset))
        stored = max(0, min(length, self.content_size - offset))
        got = self._file.readinto(offset, buffer[:stored])
        if got < stored:
            return got
        buffer[stored:length] = bytes(length - stored)
        return length

    def extents(self) -> Iterator[Extent]:
        """Yield data and hole runs as the file system knows them."""
        for extent in self._file.extents(self.content_size):
            if extent.start + extent.length == self.content_size:
                yield Extent(extent.start, self.virtual_size - extent.start, extent.kind)
            else:
                yield extent

    def metadata(self) -> dict[str, Any]:
        """Return file facts, the partition table's kind, and how to hide a trailer from other programs."""
        from vmgraft.imagefmt.partitions import describe

        facts: dict[str, Any] = {
            "fileSize": self._file.size,
            "contentSize": self.content_size,
            "blockDevice": self._file.is_block_device,
            "partitionTable": describe(self)["scheme"],
            "allocated": sum(extent.length for extent in self.extents() if extent.kind is Kind.DATA),
        }
        if self._located.locator is not None and self._located.locator.placement is Placement.INLINE:
            facts["recipes"] = recipes(self.path, self.virtual_size)
        return facts

    def locate(self) -> Located:
        """Return the graft as found when the image was opened, or last changed through it."""
        return self._located

    def room(self) -> Room:
        """Return what fits into a trailer that stays below 1 MiB."""
        if self._file.is_block_device:
            return Room(0, 0, "a block device has no room behind its end; a sidecar is used")
        size = layout.room(self.content_size)
        return Room(size, layout.TRAILER_LIMIT - size, "a trailer stays below 1 MiB, so that growpart ignores it")

    def attach(self, build: RecordBuilder, placement: Placement, tree_digest: bytes) -> Located:
        """Write a record as a trailer or a sidecar."""
        attach_raw(self._file, build, placement, tree_digest, located=self._located, room=self.room().inline)
        self._refresh()
        return self._located

    def detach(self, undo: Undo) -> None:
        """Cut the trailer off, or remove the sidecar."""
        detach_raw(self._file, undo, self._located)
        self._refresh()

    def recovery_undo(self) -> Undo | None:
        """Return an undo from the locator, which holds all that a raw image needs: the original size."""
        locator = self._located.locator
        return None if locator is None else Undo(file_size=locator.file_size)

    def reattach(self, located: Located) -> None:
        """Write again what a whole record has lost of its trailer: either locator, or the end of the file.

        Raises:
            UnsupportedError: when bytes of somebody else stand where the trailer should be, or a sidecar is concerned.
            GraftFormatError: when the record is not whole.
        """
        reattach_raw(self._file, located)
        self._refresh()
