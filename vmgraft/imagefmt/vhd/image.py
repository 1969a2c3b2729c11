"""An open VHD image: the contract's ``Image``, put together from header, blocks and graft."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vmgraft.errors import UnsupportedError, UsageError
from vmgraft.imagefmt.contract import Extent, Located, OpenOptions, Placement, RecordBuilder, Room, Undo
from vmgraft.imagefmt.flatfile import FlatFile, FlatImage
from vmgraft.imagefmt.vhd import _layout as layout
from vmgraft.imagefmt.vhd import graft
from vmgraft.imagefmt.vhd.header import read_container

if TYPE_CHECKING:
    from vmgraft.imagefmt.mapped import MappedContent
    from vmgraft.imagefmt.vhd.blocks import VhdBlocks


class VhdImage(FlatImage):
    """A VHD, fixed or dynamic; see :class:`vmgraft.imagefmt.contract.Image`.

    Opening reads footer and header; the block allocation table is read by the first access to guest content. A
    differencing disk can be opened and inspected, but has no content of its own.

    Raises:
        MalformedImageError: when footer or header violate the specification.
        UnsupportedError: for versions and disk types that are not known here.
    """

    format_name: ClassVar[str] = "vhd"

    def __init__(self, path: Path, options: OpenOptions) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._mapped: tuple[MappedContent, VhdBlocks] | None = None
        self._file = FlatFile(path, writable=options.writable)
        try:
            self._refresh()
            if self._torn and options.writable and self._header is not None:
                graft.roll_back(self._file, self._header)
                self._refresh()
                self.recovered = True
        except BaseException:
            self._file.close()
            raise

    def _refresh(self) -> None:
        self._file.size = self._file.current_size()
        self._container = read_container(self._file)
        self._header = self._container.header
        self._torn = self._header is not None and graft.is_torn(self._file, self._header)
        self.virtual_size = self._container.footer.virtual_size
        if self._header is None:
            self._located = graft.locate_fixed(self._file)
        else:
            self._located = graft.locate_dynamic(self._file, self._header, self._torn)

    # --- content ---------------------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with guest content; safe from several threads."""
        if offset < 0:
            raise UsageError(f"offset {offset} is negative", file=self.path)
        self._refuse_differencing()
        length = max(0, min(len(buffer), self.virtual_size - offset))
        if self._header is None:
            return self._file.readinto(offset, buffer[:length])
        content, blocks = self._content()
        got = content.readinto(offset, buffer[:length])
        blocks.check_bitmaps(offset, buffer[:got])
        return got

    def extents(self) -> Iterator[Extent]:
        """Yield stored blocks as data and others as holes; of a fixed disk, what the file system knows."""
        self._refuse_differencing()
        if self._header is None:
            return self._file.extents(self.virtual_size)
        return self._content()[0].extents()

    def _refuse_differencing(self) -> None:
        footer, header = self._container.footer, self._header
        if footer.disk_type == layout.TYPE_DIFFERENCING and header is not None:
            raise UnsupportedError(
                f"a differencing disk holds only what differs from its parent {header.parent_name!r} "
                f"({header.parent_id}), and parents are not followed",
                file=self.path,
                offset=60,
                field="footer.disk_type",
                hint="merge it into its parent, or convert the chain to one image",
            )

    def _content(self) -> tuple[MappedContent, VhdBlocks]:
        from vmgraft.imagefmt.mapped import MappedContent
        from vmgraft.imagefmt.vhd.blocks import VhdBlocks

        with self._lock:
            if self._mapped is None:
                if self._header is None:
                    raise UsageError("a fixed disk has no blocks", file=self.path)
                blocks = VhdBlocks(self._file, self._container, self._header)
                self._mapped = MappedContent(self._file, blocks), blocks
            return self._mapped

    # --- facts -----------------------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """Return container facts, all unverified; works for differencing disks too."""
        footer, header = self._container.footer, self._header
        created = datetime.fromtimestamp(layout.EPOCH + footer.time_stamp, UTC)
        facts: dict[str, Any] = {
            "format": self.format_name,
            "subformat": layout.TYPE_NAMES[footer.disk_type],
            "virtualSize": self.virtual_size,
            "fileSize": self._file.size,
            "currentSize": footer.current_size,
            "geometry": dict(zip(("cylinders", "heads", "sectors"), footer.geometry, strict=True)),
            "sizeFrom": "geometry" if footer.uses_geometry else "currentSize",
            "creator": _text(footer.creator_application),
            "creatorVersion": f"{footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}",
            "creatorHost": _text(footer.creator_host),
            "created": created.isoformat(),
            "uniqueId": str(footer.unique_id),
            "savedState": footer.saved_state,
            "footer": self._container.footer_at_end,
        }
        if header is not None:
            facts |= {"blockSize": header.block_size, "tableEntries": header.entries, "interruptedChange": self._torn}
        if header is not None and footer.disk_type == layout.TYPE_DIFFERENCING:
            facts["parent"] = {"name": header.parent_name, "uniqueId": str(header.parent_id)}
        return facts

    # --- graft -----------------------------------------------------------------------------------------------------

    def locate(self) -> Located:
        """Return the graft as found when the image was opened, or last changed through it."""
        return self._located

    def room(self) -> Room:
        """Return 0: the record always lies in the sidecar."""
        if self._header is None:
            return Room(0, 0, "a fixed VHD has no room of its own; a sidecar is used and the image is not touched")
        return Room(0, 0, "a dynamic VHD has room for a pointer of 24 bytes only; the record goes to a sidecar")

    def attach(self, build: RecordBuilder, placement: Placement, tree_digest: bytes) -> Located:
        """Write the record to a sidecar, and a pointer to it into the dynamic header."""
        self._refuse_differencing()
        if self._header is not None:
            self._content()  # an image whose table points astray is not written to
        graft.attach_vhd(self._file, build, placement, tree_digest, header=self._header, located=self._located)
        self._refresh()
        return self._located

    def detach(self, undo: Undo) -> None:
        """Clear the pointer and remove the sidecar."""
        graft.detach_vhd(self._file, undo, header=self._header, located=self._located)
        self._refresh()

    def recovery_undo(self) -> Undo | None:
        """Return an undo without the record: what the pointer replaced is known, and a fixed disk was not changed."""
        if self._header is not None:
            return Undo(file_size=self._file.current_size())
        locator = self._located.locator
        return None if locator is None else Undo(file_size=locator.file_size)


def _text(data: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data.rstrip(b"\0 "))
