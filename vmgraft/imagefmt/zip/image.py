"""ZIP archives: the pristine content is the archive's own bytes, which attach does not touch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from vmgraft.errors import UsageError
from vmgraft.imagefmt.contract import Extent, Located, OpenOptions, Placement, RecordBuilder, Room, Undo
from vmgraft.imagefmt.flatfile import FlatFile, FlatImage
from vmgraft.imagefmt.zip import _layout as layout
from vmgraft.imagefmt.zip.locate import find_graft
from vmgraft.imagefmt.zip.writer import attach_zip, cut_off, detach_zip, room


class ZipImage(FlatImage):
    """An open archive; see :class:`vmgraft.imagefmt.contract.Image`.

    Raises:
        MalformedImageError: when its end records are malformed or can be read in two ways.
        UnsupportedError: when it consists of several files.
    """

    format_name: ClassVar[str] = "zip"
    is_disk: ClassVar[bool] = False

    def __init__(self, path: Path, options: OpenOptions) -> None:
        self.path = path
        self._file = FlatFile(path, writable=options.writable)
        try:
            self._refresh()
            if options.writable and self._found.interrupted and self._found.place is not None:
                cut_off(self._file, self._found.place)
                self._refresh()
                self.recovered = True
        except BaseException:
            self._file.close()
            raise

    def _refresh(self) -> None:
        """Find the graft again; afterwards the content's size is known."""
        self._file.size = self._file.current_size()
        self._found = find_graft(self._file)
        self.virtual_size = self._found.records.end

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with bytes of the archive; safe from several threads."""
        if offset < 0:
            raise UsageError(f"offset {offset} is negative", file=self.path)
        return self._file.readinto(offset, buffer[: max(0, min(len(buffer), self.virtual_size - offset))])

    def extents(self) -> Iterator[Extent]:
        """Yield data and hole runs as the file system knows them."""
        return self._file.extents(self.virtual_size)

    def metadata(self) -> dict[str, Any]:
        """Return facts about the archive, all unverified."""
        records = self._found.records
        comment = records.end - records.offset - layout.END_SIZE
        before = records.directory_offset - len(layout.APK_MAGIC)
        magic = self._file.read(before, len(layout.APK_MAGIC)) if before >= 0 else b""
        return {
            "format": self.format_name,
            "fileSize": self._file.size,
            "contentSize": self.virtual_size,
            "entries": records.entries,
            "directorySize": records.directory_size,
            "zip64": records.zip64_offset is not None,
            "prefixSize": records.base,
            "commentSize": comment,
            "apkSigningBlock": magic == layout.APK_MAGIC,
        }

    def locate(self) -> Located:
        """Return the graft as found when the archive was opened, or last changed through it."""
        return self._found.located

    def room(self) -> Room:
        """Return the limit of the record format, or what is left below 4 GiB."""
        size = room(self._found.records)
        return Room(size, 0, "the record goes behind the archive; without ZIP64 the directory must begin below 4 GiB")

    def attach(self, build: RecordBuilder, placement: Placement, tree_digest: bytes) -> Located:
        """Write a record, a locator and a second central directory behind the archive."""
        attach_zip(self._file, build, placement, tree_digest, found=self._found)
        self._refresh()
        return self.locate()

    def detach(self, undo: Undo) -> None:
        """Cut the file to its original size."""
        detach_zip(self._file, undo, found=self._found)
        self._refresh()

    def recovery_undo(self) -> Undo | None:
        """Return an undo from the places, which hold all that an archive needs: the original size."""
        place = self._found.place
        return None if place is None else Undo(file_size=place.file_size)
