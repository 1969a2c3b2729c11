"""The first cluster of an image that is being changed."""

from __future__ import annotations

import struct

from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.qcow2.note import Note, pack_note

#: Where the header keeps the offset and the length of the backing file name.
NAME_FIELD = lay.FIELD_OFFSET["backing_file_offset"]


class Cluster:
    """The first cluster on disk and its copy in memory; every change is one write and one sync."""

    def __init__(self, writer: Writer, data: bytes) -> None:
        self.writer = writer
        self.data = bytearray(data)

    def put(self, offset: int, data: bytes) -> None:
        """Write ``data``, if it is not there already, and flush it."""
        if self.data[offset : offset + len(data)] == data:
            return
        self.writer.write(offset, data)
        self.data[offset : offset + len(data)] = data
        self.writer.sync()

    def move_name(self, size: int, target: int) -> None:
        """Copy the backing file name, then point the header to the copy."""
        (source,) = struct.unpack_from(">Q", self.data, NAME_FIELD)
        if source != target:
            self.put(target, bytes(self.data[source : source + size]))
            self.put(NAME_FIELD, struct.pack(">Q", target))

    def put_note(self, note: Note) -> None:
        """Write the undo note."""
        self.put(note.offset, pack_note(note))

    def clear(self, offset: int, size: int) -> None:
        """Write zeros."""
        self.put(offset, bytes(size))
