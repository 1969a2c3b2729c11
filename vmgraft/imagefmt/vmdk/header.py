"""A strict reader of the sparse extent header, and of the footer that takes its place in streams."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

from construct import Container

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.vmdk import _layout as lay

_CONVERT = "convert the image with `qemu-img convert -O vmdk`"
#: What header and footer must agree about.
_SAME = ("version", "flags", "capacity", "grain_size", "descriptor_offset", "descriptor_size", "gtes_per_gt")


@dataclass(frozen=True, slots=True)
class Header:
    """What header or footer say, checked. Places and sizes in sectors of 512 bytes, unless a name says bytes.

    Attributes:
        offset: File offset in bytes of the header that counts.
        version: 1 to 3.
        capacity: Guest content.
        grain_size: Sectors of a grain.
        descriptor_offset: Where the embedded descriptor begins.
        descriptor_size: Its room.
        tables: Entries of the grain directory.
        gd_offset: The grain directory.
        rgd_offset: The redundant one; 0 without.
        overhead: The first sector behind the metadata at the beginning.
        zeroed: Whether a table entry of 1 is a grain of zeros.
        compressed: Whether grains are compressed, with markers.
        unclean: Whether the program that wrote last did not close the image.
    """

    offset: int
    version: int
    capacity: int
    grain_size: int
    descriptor_offset: int
    descriptor_size: int
    tables: int
    gd_offset: int
    rgd_offset: int
    overhead: int
    zeroed: bool
    compressed: bool
    unclean: bool

    @property
    def grain_bytes(self) -> int:
        """Bytes of a grain."""
        return self.grain_size * lay.SECTOR

    @property
    def gd_sectors(self) -> int:
        """Sectors that a grain directory takes."""
        return -(-self.tables * 4 // lay.SECTOR)


def read_header(file: FlatFile) -> Header:
    """Read and check the header, and the footer where the header refers to it.

    Raises:
        MalformedImageError: when they contradict themselves, each other or the file.
        UnsupportedError: for versions and variants that are not known here.
    """
    raw, offset = _parse(file, 0), 0
    check = _Checks(file, raw, offset)
    check.variant()
    check.sizes()
    if raw.gd_offset == lay.GD_AT_END:
        front = raw
        raw, offset = _parse_footer(file)
        check = _Checks(file, raw, offset)
        for name in _SAME:
            if raw[name] != front[name]:
                check.bad(name, f"the footer says {raw[name]}, the header {front[name]}")
        check.variant()
        if raw.gd_offset == lay.GD_AT_END:
            check.bad("gd_offset", "the footer has no place of the grain directory either")
    tables = -(-raw.capacity // (raw.grain_size * lay.GTES_PER_GT))
    check.places(tables)
    return Header(
        offset=offset,
        version=raw.version,
        capacity=raw.capacity,
        grain_size=raw.grain_size,
        descriptor_offset=raw.descriptor_offset,
        descriptor_size=raw.descriptor_size,
        tables=tables,
        gd_offset=raw.gd_offset,
        rgd_offset=raw.rgd_offset if raw.flags & lay.FLAG_REDUNDANT else 0,
        overhead=raw.overhead,
        zeroed=bool(raw.flags & lay.FLAG_ZEROED),
        compressed=raw.compression == lay.COMPRESSION_DEFLATE,
        unclean=raw.unclean_shutdown != 0,
    )


def _parse(file: FlatFile, offset: int) -> Container[Any]:
    data = file.read(offset, lay.SECTOR)
    raw = parse_struct(lay.HEADER, data, file=file.path, offset=offset, what="VMDK header")
    if len(data) < lay.SECTOR:
        raise MalformedImageError("the file ends inside the header", file=file.path, offset=offset, field="VMDK header")
    return raw


def _parse_footer(file: FlatFile) -> tuple[Container[Any], int]:
    """Return the header in the footer, which a marker announces and the end-of-stream marker follows."""
    start = file.size - lay.FOOTER_SIZE
    hint = "the image was cut off: get a complete copy"
    if file.size % lay.SECTOR or start < lay.SECTOR:
        message = "the header refers to a footer, but the file does not end with one"
        raise MalformedImageError(message, file=file.path, offset=max(0, start), field="footer", hint=hint)
    for offset, wanted in ((start, lay.MARKER_FOOTER), (start + 2 * lay.SECTOR, lay.MARKER_END)):
        data = file.read(offset, lay.SECTOR)
        marker = parse_struct(lay.MARKER, data, file=file.path, offset=offset, what="marker", hint=hint)
        # A footer's marker has the footer's length in sectors; the end of the stream has none.
        if (marker.size, marker.type) != (0, wanted) or (wanted == lay.MARKER_END and marker.value):
            message = "the file does not end with a footer and an end-of-stream marker"
            raise MalformedImageError(message, file=file.path, offset=offset, field="footer", hint=hint)
    return _parse(file, start + lay.SECTOR), start + lay.SECTOR


class _Checks:
    """What has to hold for one header."""

    def __init__(self, file: FlatFile, raw: Container[Any], offset: int) -> None:
        self._file = file
        self._raw = raw
        self._offset = offset
        #: Whole sectors; QEMU and others pad the last one.
        self._sectors = -(-file.size // lay.SECTOR)

    def bad(self, field: str, message: str, hint: str | None = None) -> NoReturn:
        """Complain about a field."""
        where = self._offset + lay.FIELD_OFFSET[field]
        raise MalformedImageError(message, file=self._file.path, offset=where, field=field, hint=hint)

    def unsupported(self, field: str, message: str, hint: str = _CONVERT) -> NoReturn:
        """Refuse something that is well-formed."""
        where = self._offset + lay.FIELD_OFFSET[field]
        raise UnsupportedError(message, file=self._file.path, offset=where, field=field, hint=hint)

    def variant(self) -> None:
        """Check version, flags, compression, and that no transfer changed the newlines."""
        raw = self._raw
        if raw.version not in lay.VERSIONS:
            self.unsupported("version", f"VMDK version {raw.version} is not supported")
        if raw.flags & ~lay.KNOWN_FLAGS:
            self.unsupported("flags", f"unknown flags 0x{raw.flags & ~lay.KNOWN_FLAGS:x} are not supported")
        if raw.flags & lay.FLAG_NEWLINES and raw.newlines != lay.NEWLINES:
            hint = "the file was transferred as text: transfer it again, as binary"
            self.bad("newlines", "the characters that show a damaged transfer were changed", hint)
        if raw.compression not in (lay.COMPRESSION_NONE, lay.COMPRESSION_DEFLATE):
            self.unsupported("compression", f"compression method {raw.compression} is not supported")
        compressed = raw.compression == lay.COMPRESSION_DEFLATE
        if compressed != bool(raw.flags & lay.FLAG_COMPRESSED):
            self.bad("compression", "the flag for compressed grains contradicts the compression method")
        if compressed != bool(raw.flags & lay.FLAG_MARKERS):
            self.unsupported(
                "flags", "compressed grains without markers, or markers without compression, are not supported"
            )

    def sizes(self) -> None:
        """Check the numbers that everything else is computed from."""
        raw = self._raw
        if raw.capacity == 0:
            self.unsupported("capacity", "the file holds a descriptor only; its extents are other files")
        size = raw.grain_size
        if not lay.MIN_GRAIN <= size <= lay.MAX_GRAIN or size & (size - 1):
            self.bad("grain_size", f"grains of {size} sectors: not a power of two from 8 to {lay.MAX_GRAIN}")
        if raw.gtes_per_gt != lay.GTES_PER_GT:
            self.unsupported("gtes_per_gt", f"grain tables of {raw.gtes_per_gt} entries; only 512 are supported")
        if raw.capacity > lay.MAX_TABLES * lay.GTES_PER_GT * size:
            self.bad("capacity", f"{raw.capacity} sectors with grains of {size} need over {lay.MAX_TABLES} tables")
        if raw.descriptor_offset == 0 or raw.descriptor_size == 0:
            hint = "open the whole image: convert it by the name of its descriptor file, with `qemu-img convert`"
            self.unsupported("descriptor_offset", "an extent of a split image, without a descriptor", hint)
        if raw.descriptor_size > lay.MAX_DESCRIPTOR:
            self.bad("descriptor_size", f"{raw.descriptor_size} sectors, at most {lay.MAX_DESCRIPTOR} allowed")

    def places(self, tables: int) -> None:
        """Check that descriptor and grain directories lie in the file, each in its own place."""
        raw = self._raw
        if not raw.descriptor_offset + raw.descriptor_size <= raw.overhead <= self._sectors:
            end = raw.descriptor_offset + raw.descriptor_size
            message = f"metadata of {raw.overhead} sectors, a descriptor that ends at {end}, a file of {self._sectors}"
            self.bad("overhead", message)
        size = -(-tables * 4 // lay.SECTOR)
        spans = [(0, 1, "magic"), (raw.descriptor_offset, raw.descriptor_size, "descriptor_offset")]
        spans.append((raw.gd_offset, size, "gd_offset"))
        if raw.flags & lay.FLAG_REDUNDANT:
            spans.append((raw.rgd_offset, size, "rgd_offset"))
        for start, length, name in spans:
            if start + length > self._sectors:
                self.bad(name, f"{length} sectors from {start} on end behind the file of {self._sectors} sectors")
        spans.sort(key=lambda span: span[0])  # stable: what should not be there comes second
        for (start, length, _), (later, _, name) in pairwise(spans):
            if later < start + length:
                self.bad(name, f"sector {later} is used twice")
