"""raw and ISO 9660: the content as it is, zeros as holes."""

from __future__ import annotations

from typing import ClassVar

from vmgraft.imagefmt.write.base import DiskWriter, Piece


class RawWriter(DiskWriter):
    """A raw disk."""

    format_name: ClassVar[str] = "raw"

    def store(self, piece: Piece) -> None:
        """Write a piece where it belongs."""
        self.writer.write(piece.offset, memoryview(piece.data)[: self.size - piece.offset])

    def finish(self) -> None:
        """Give the file its size."""
        self.writer.truncate(self.size)


class IsoWriter(RawWriter):
    """An ISO 9660 image; of any length, since such images are sometimes cut or padded."""

    format_name: ClassVar[str] = "iso9660"
    unit = 1
