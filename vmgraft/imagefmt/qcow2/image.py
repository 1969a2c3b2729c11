"""An open qcow2 image: the contract's ``Image``, put together from header, content and graft."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmgraft.errors import MalformedImageError, UnsupportedError, UsageError
from vmgraft.imagefmt.contract import Extent, Image, Located, OpenOptions, Placement, RecordBuilder, Room, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.qcow2 import graft, orphan, writer
from vmgraft.imagefmt.qcow2 import plan as planning
from vmgraft.imagefmt.qcow2.backing import Backing, Chain, backing_format, open_named, open_other, open_raw
from vmgraft.imagefmt.qcow2.content import Content
from vmgraft.imagefmt.qcow2.header import Header, feature_list, parse_header
from vmgraft.imagefmt.qcow2.snapshots import find_snapshot, read_snapshots, snapshot_header
from vmgraft.imagefmt.qcow2.source import Source


def read_header(flat: FlatFile) -> Header:
    """Read and check the header of an open file.

    Raises:
        MalformedImageError: it violates the specification.
        UnsupportedError: it uses features that are not known here.
    """
    data = flat.read(0, 65536)
    bits = int.from_bytes(data[20:24], "big")
    if 16 < bits <= lay.MAX_CLUSTER_BITS:
        data = flat.read(0, 1 << bits)
    return parse_header(data, flat.size, file=str(flat.path))


@dataclass(frozen=True, slots=True)
class View:
    """What of an image its content is: see :class:`vmgraft.imagefmt.contract.Opening`."""

    snapshot: str | None = None
    ciphertext: bool = False


CURRENT = View()


class Qcow2Image(Image):
    """A qcow2 image, version 2 or 3.

    Opening reads the header only. Tables, backing files and external data are opened by the first access to guest
    content, so that an image whose content is out of reach can still be inspected.

    Args:
        flat: The open file; the image closes it.
        chain: Which files it may lead to.
        view: What of it to show.

    Raises:
        UsageError: there is no such snapshot, or no ciphertext.
    """

    format_name = "qcow2"

    def __init__(self, flat: FlatFile, chain: Chain, view: View = CURRENT) -> None:
        self.path = flat.path
        self._flat = flat
        self._chain = chain.below(flat.fd, flat.path)
        self._view = view
        self._lock = threading.RLock()
        self._content: Content | None = None
        self._backing: Backing | None = None
        self._data_file: FlatFile | None = None
        self._reload()
        self._chain = self._chain.with_tables(self._header.l1_size * 8, self.path)
        if flat.writable:
            if writer.recover(flat.writer(), self._header):
                self.recovered = True
                self._reload()
            orphan.drop_copy(flat.writer(), self._header)

    # --- content ---------------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Return guest content; short only at the end of the disk."""
        buffer = bytearray(max(0, min(length, self.virtual_size - offset)))
        return bytes(buffer[: self.readinto(offset, memoryview(buffer))])

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with guest content; safe from several threads."""
        if offset < 0:
            raise UsageError(f"offset {offset} is negative", file=self.path)
        return self._open_content().readinto(offset, buffer)

    def extents(self) -> Iterator[Extent]:
        """Yield the runs of guest content, backing file included."""
        return self._open_content().extents()

    def backing_chain(self) -> tuple[Path, ...]:
        """Return the external data file, if any, and the backing files, nearest first.

        Works for images whose own content cannot be read.
        """
        self._open_data_file(Source(self._flat))
        backing = self._open_backing()
        own = () if self._data_file is None else (self._data_file.path,)
        return own if backing is None else (*own, backing.path, *backing.backing_chain())

    def _open_content(self) -> Content:
        with self._lock:
            if self._content is None:
                self._check_readable()
                source = Source(self._flat)
                data = self._open_data_file(source)
                content = Content(source, self._shown, data, self._hidden_tables())
                if not self._view.ciphertext:
                    content.backing = self._open_backing()
                if isinstance(content.backing, Qcow2Image):
                    content.backing._open_content()  # what is wrong there shows now, not in the middle of a read
                self._content = content
            return self._content

    def _hidden_tables(self) -> tuple[tuple[int, int], ...]:
        """Return (offset, length) of what is metadata, and not part of the header that content is read through."""
        header = self._header
        return () if self._shown is header else ((header.l1_table_offset, header.l1_size * 8),)

    def _check_readable(self) -> None:
        header = self._header
        if header.crypt_method and not self._view.ciphertext:
            name = lay.CRYPT_NAMES[header.crypt_method]
            hint = "decrypt it first, or take its ciphertext (`vmgraft digest --ciphertext`)"
            raise self._unsupported("crypt_method", f"the guest content is encrypted ({name})", hint)
        check = "repair it with `qemu-img check -r all`"
        if header.incompatible & lay.CORRUPT:
            raise self._unsupported("incompatible_features", "the image is marked corrupt", check)
        if header.incompatible & lay.DIRTY:
            raise self._unsupported("incompatible_features", "the image was not closed properly (dirty bit)", check)

    def _unsupported(self, field: str, message: str, hint: str) -> UnsupportedError:
        return UnsupportedError(message, file=self.path, offset=lay.FIELD_OFFSET[field], field=field, hint=hint)

    def _open_data_file(self, source: Source) -> Source:
        if not self._header.incompatible & lay.EXTERNAL_DATA:
            return source
        ext = self._header.find(lay.EXT_DATA_FILE)
        if ext is None or not ext.length:
            hint = "name it with `qemu-img amend -o data_file=NAME`"
            raise self._unsupported("incompatible_features", "the external data file is not named", hint)
        if self._data_file is None:
            name, offset = self._header.data(ext), ext.data_offset
            self._data_file = open_named(name, self.path, self._chain, field="data_file_name", offset=offset)
        return Source(self._data_file)

    def _open_backing(self) -> Backing | None:
        """Open the backing file, and those below, once; holes show them."""
        header = self._header
        with self._lock:
            if self._backing is None and header.backing_name:
                offset = header.backing_file_offset
                flat = open_named(header.backing_name, self.path, self._chain, field="backing_file_name", offset=offset)
                try:
                    self._backing = self._open_as(flat, backing_format(header, flat.read(0, 4), self.path))
                except BaseException:
                    flat.close()
                    raise
            return self._backing

    def _open_as(self, flat: FlatFile, name: str) -> Backing:
        """Make an image of format ``name`` of an open backing file; it then owns the file."""
        if name == "qcow2":
            below = Qcow2Image(flat, self._chain)
            below._open_backing()  # a loop or a missing file shows now
            return below
        self._chain.below(flat.fd, flat.path)
        return open_raw(flat, self.virtual_size) if name == "raw" else open_other(flat, name, self._chain)

    # --- facts -----------------------------------------------------------------------------------------------------

    def metadata(self) -> dict[str, Any]:
        """Return container facts, all unverified; works for images whose content cannot be read."""
        header = self._header
        backing_ext = header.find(lay.EXT_BACKING_FORMAT)
        backing = {
            "name": header.backing_name.decode("utf-8", "backslashreplace"),
            "format": header.data(backing_ext).decode("ascii", "backslashreplace") if backing_ext else None,
        }
        return {
            "format": self.format_name,
            "version": header.version,
            "virtualSize": header.size,
            "fileSize": self._flat.size,
            "clusterSize": header.cluster_size,
            "refcountBits": header.refcount_bits,
            "encryption": lay.CRYPT_NAMES[header.crypt_method],
            "compression": ("zlib", "zstd")[header.compression_type],
            "features": feature_list(header),
            **self._snapshot_facts(),
            "extensions": [{"name": e.name, "offset": e.offset, "length": e.length} for e in header.extensions],
            "backing": backing if header.backing_name else None,
            "interruptedChange": graft.interrupted(header),
        }

    def _snapshot_facts(self) -> dict[str, Any]:
        """Return the snapshots; where their table cannot be read, their number and the reason."""
        problem, found = None, list[dict[str, Any]]()
        try:
            found = [one.facts(self._header) for one in read_snapshots(Source(self._flat), self._header)]
        except MalformedImageError as exc:
            problem = str(exc)
        return {"snapshotCount": self._header.nb_snapshots, "snapshots": found, "snapshotProblem": problem}

    # --- graft -----------------------------------------------------------------------------------------------------

    def locate(self) -> Located:
        """Find the graft; see :func:`vmgraft.imagefmt.qcow2.graft.locate`."""
        return graft.locate(self._header, self.path)

    def room(self) -> Room:
        """Return how long an inline record may be."""
        return planning.room(self._header, str(self.path))

    def attach(self, build: RecordBuilder, placement: Placement, tree_digest: bytes) -> Located:
        """Write a record; see :func:`vmgraft.imagefmt.qcow2.writer.attach`."""
        self._check_readable()
        if graft.find_orphan(self._header, str(self.path)) is not None:
            orphan.wipe_orphan(self._flat.writer(), self._header)
            self._reload()
        terms = writer.Terms(placement, tree_digest, self._flat.current_size())
        writer.attach(self._flat.writer(), self._header, build, terms)
        self._reload()
        return self.locate()

    def detach(self, undo: Undo) -> None:
        """Give the original bytes back, or wipe what a foreign writer left of a graft.

        See :func:`vmgraft.imagefmt.qcow2.writer.detach` and :func:`vmgraft.imagefmt.qcow2.orphan.wipe_orphan`.
        """
        if self._header.find(lay.EXT_GRAFT) is None:
            orphan.wipe_orphan(self._flat.writer(), self._header)
        else:
            writer.detach(self._flat.writer(), self._header, undo)
        self._reload()

    def reattach(self, located: Located) -> None:
        """Put the header extension of an orphaned record back; see :mod:`vmgraft.imagefmt.qcow2.orphan`.

        The record stays as it is, byte for byte. What detach gives back afterwards is the image as the foreign writer
        left it, without our leftovers.

        Raises:
            GraftFormatError: there is no orphan, its record is not whole, or another graft's sidecar is in the way.
            NoRoomError: not even a locator fits into the header as it is now.
            UnsupportedError: the image is damaged, or its header cannot be changed safely.
        """
        self._check_readable()
        locator, record = orphan.check_whole(located, str(self.path))
        orphan.check_room(self._header, str(self.path))
        if located.locator_offset is not None and locator.placement is Placement.INLINE:
            orphan.rescue(self._flat.writer(), locator, record)
        while graft.find_orphan(self._header, str(self.path)) is not None:
            orphan.wipe_orphan(self._flat.writer(), self._header, keep_sidecar=True)
            self._reload()
        orphan.put_back(self._flat.writer(), self._header, locator, record)
        self._reload()

    def recovery_undo(self) -> Undo | None:
        """Return an undo made from the undo note in the first cluster, for when the record is lost; or None."""
        return graft.undo_from_note(self._header, self._flat.current_size(), str(self.path))

    def _reload(self) -> None:
        self._header = self._shown = read_header(self._flat)
        if self._view.ciphertext and not self._header.crypt_method:
            hint = "take its content without --ciphertext"
            raise UsageError("this qcow2 image is not encrypted", file=self.path, hint=hint)
        if self._view.snapshot is not None:
            source = Source(self._flat)
            found = find_snapshot(read_snapshots(source, self._header), self._view.snapshot, str(self.path))
            self._shown = snapshot_header(self._header, found, source)
        self.virtual_size = self._shown.size

    def close(self) -> None:
        """Close the image and everything below it; twice is harmless."""
        with self._lock:
            if self._backing is not None:
                self._backing.close()
            if self._data_file is not None:
                self._data_file.close()
            self._flat.close()


def open_image(path: Path, options: OpenOptions) -> Qcow2Image:
    """Open a qcow2 image.

    Raises:
        FileError: it cannot be opened.
        MalformedImageError: its header violates the specification.
        UnsupportedError: it uses features that are not known here.
        UsageError: a snapshot or ciphertext is wanted, and there is none.
        ImageInUseError: it is to be written and another process has it open.
    """
    flat = FlatFile(path, writable=options.writable)
    try:
        view = View(options.snapshot, options.ciphertext)
        return Qcow2Image(flat, Chain.start(path, options.root), view)
    except BaseException:
        flat.close()
        raise
