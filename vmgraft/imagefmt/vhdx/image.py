"""An open VHDX image: the contract's ``Image``, put together from container, block table and graft."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from vmgraft.errors import UnsupportedError, UsageError
from vmgraft.imagefmt.contract import Extent, Located, OpenOptions, Placement, RecordBuilder, Room, Undo
from vmgraft.imagefmt.flatfile import FlatFile, FlatImage
from vmgraft.imagefmt.mapped import MappedContent
from vmgraft.imagefmt.vhdx import writer
from vmgraft.imagefmt.vhdx.bat import BlockTable, Survey
from vmgraft.imagefmt.vhdx.container import Container, describe, read_container
from vmgraft.imagefmt.vhdx.graft import Found, find_graft


class VhdxImage(FlatImage):
    """An open VHDX image; see :class:`vmgraft.imagefmt.contract.Image`.

    Opening reads headers, region table and metadata, and looks for the graft. The block table is read by the first
    access to guest content, so that an image whose content is out of reach can still be inspected.

    Raises:
        MalformedImageError: when it violates the specification.
        UnsupportedError: when it uses what is not known here.
    """

    format_name: ClassVar[str] = "vhdx"

    def __init__(self, path: Path, options: OpenOptions) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file = FlatFile(path, writable=options.writable)
        try:
            self._refresh()
            if options.writable and self._found.interrupted:
                self.recovered = writer.recover(self._file, self._container, self._survey(), self._found)
                self._refresh()
        except BaseException:
            self._file.close()
            raise

    def _refresh(self) -> None:
        """Read everything but the block table again, and find the graft."""
        self._file.size = self._file.current_size()
        self._container: Container = read_container(self._file)
        self._surveyed: tuple[BlockTable, Survey] | None = None
        self._content: MappedContent | None = None
        self.virtual_size = self._container.facts.virtual_size
        self.sector_size = self._container.facts.logical_sector
        self._found: Found = find_graft(self._file, self._container, self._survey)

    def _survey(self) -> Survey:
        return self._open_table()[1]

    def _open_table(self) -> tuple[BlockTable, Survey]:
        """Return the block table, and what it says as a whole; read once."""
        if self._surveyed is None:
            table = self._container.block_table(self._file)
            self._surveyed = table, table.survey()
        return self._surveyed

    # --- content ---------------------------------------------------------------------------------------------------

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with guest content; safe from several threads."""
        if offset < 0:
            raise UsageError(f"offset {offset} is negative", file=self.path)
        return self._open_content().readinto(offset, buffer)

    def extents(self) -> Iterator[Extent]:
        """Yield the runs of guest content."""
        return self._open_content().extents()

    def backing_chain(self) -> tuple[Path, ...]:
        """Return nothing: images with a parent are refused."""
        self._check_readable()
        return ()

    def _open_content(self) -> MappedContent:
        with self._lock:
            if self._content is None:
                self._check_readable()
                self._content = MappedContent(self._file, self._open_table()[0])
            return self._content

    def _check_readable(self) -> None:
        container = self._container
        if container.facts.has_parent:
            names = container.facts.parent
            keys = [key for key in ("relative_path", "absolute_win32_path", "volume_path") if key in names]
            name = names[keys[0]] if keys else ""
            raise UnsupportedError(
                f"the image holds only the differences to its parent{f' {name!r}' if name else ''}",
                file=self.path,
                field="parent locator",
                hint="merge it with its parent in the program that made it",
            )
        if container.dirty:
            raise writer.dirty_log(self._file, container.headers)

    # --- facts and graft -------------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """Return container facts, all unverified; works for images whose content cannot be read."""
        return describe(self._container, self._file) | {"interruptedChange": self._found.interrupted}

    def locate(self) -> Located:
        """Return the graft as found when the image was opened, or last changed through it."""
        return self._found.located

    def room(self) -> Room:
        """Return how long an inline record may be."""
        return writer.room(self._file, self._container)

    def attach(self, build: RecordBuilder, placement: Placement, tree_digest: bytes) -> Located:
        """Write a record; see :func:`vmgraft.imagefmt.vhdx.writer.attach`."""
        self._check_readable()
        found = self._found
        if found.region is not None:
            undo = found.head.undo if found.head is not None else None
            if found.located.state not in writer.FREE or undo is None:
                raise UsageError("the image already carries a graft", file=self.path, hint="detach it first")
            writer.detach(self._file, self._container, self._survey(), found, undo)
            self._refresh()
        terms = writer.Terms(placement, tree_digest)
        writer.attach(self._file, self._container, self._survey(), build, terms)
        self._refresh()
        return self.locate()

    def detach(self, undo: Undo) -> None:
        """Take the graft out; see :func:`vmgraft.imagefmt.vhdx.writer.detach`."""
        writer.detach(self._file, self._container, self._survey(), self._found, undo)
        self._refresh()

    def recovery_undo(self) -> Undo | None:
        """Return the copy of UNDO at the beginning of the graft's region, for when the record is lost; or None."""
        return None if self._found.head is None else self._found.head.undo
