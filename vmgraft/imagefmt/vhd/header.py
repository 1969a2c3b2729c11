"""Reading a VHD's footer and dynamic header; everything is bounded and checked before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.vhd import _layout as layout

_RAW_HINT = "if this is a raw disk whose last sector only looks like a footer, use --image-format raw"


@dataclass(frozen=True, slots=True)
class Footer:
    """The hard disk footer. Sizes in bytes.

    Attributes:
        raw: Its bytes, 512 or 511.
        offset: Where it was read.
        data_offset: Where the dynamic header lies.
        geometry: Cylinders, heads, sectors per track.
    """

    raw: bytes
    offset: int
    features: int
    data_offset: int
    time_stamp: int
    creator_application: bytes
    creator_version: int
    creator_host: bytes
    current_size: int
    geometry: tuple[int, int, int]
    disk_type: int
    unique_id: UUID
    saved_state: bool

    @property
    def uses_geometry(self) -> bool:
        """Whether the disk is as large as its geometry and not as ``current_size`` says (QEMU's rule)."""
        cylinders, heads, sectors = self.geometry
        full = cylinders * heads * sectors == layout.MAX_GEOMETRY
        return self.creator_application in layout.GEOMETRY_CREATORS and not full

    @property
    def virtual_size(self) -> int:
        """Bytes of guest content."""
        cylinders, heads, sectors = self.geometry
        count = cylinders * heads * sectors if self.uses_geometry else self.current_size // layout.SECTOR_SIZE
        return count * layout.SECTOR_SIZE

    @property
    def identity(self) -> tuple[object, ...]:
        """What the footer and its copy have to agree about."""
        kind = (self.disk_type, self.data_offset, self.current_size, self.geometry)
        return (*kind, self.creator_application, self.unique_id)


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """The dynamic disk header. Sizes and offsets in bytes.

    Attributes:
        raw: Its 1024 bytes.
        offset: Where they lie in the file.
        table_offset: Where the block allocation table begins.
        entries: How many entries that has.
        block_size: Bytes of guest content in a block.
        parent_name: Name of the parent of a differencing disk.
        locators: Where data of parent locators lie, as (offset, length).
        checksum: The stored checksum.
    """

    raw: bytes
    offset: int
    table_offset: int
    entries: int
    block_size: int
    parent_name: str
    parent_id: UUID
    locators: tuple[tuple[int, int], ...]
    checksum: int

    @property
    def bitmap_size(self) -> int:
        """Bytes of the sector bitmap before every block."""
        bits = self.block_size // layout.SECTOR_SIZE
        return -(-bits // (8 * layout.SECTOR_SIZE)) * layout.SECTOR_SIZE

    @property
    def pointer(self) -> bytes:
        """The last parent locator entry (24 bytes)."""
        return self.raw[layout.POINTER_OFFSET :][: layout.PARENT_LOCATOR_SIZE]

    def with_pointer(self, pointer: bytes) -> bytes:
        """Return the header's bytes with another last entry and the checksum that goes with it."""
        raw = bytearray(self.raw)
        raw[layout.POINTER_OFFSET : layout.POINTER_OFFSET + layout.PARENT_LOCATOR_SIZE] = pointer
        at = layout.HEADER_CHECKSUM_OFFSET
        raw[at : at + 4] = checksum(raw, at).to_bytes(4, "big")
        return bytes(raw)


@dataclass(frozen=True, slots=True)
class Container:
    """A VHD as its footer and header describe it.

    Attributes:
        footer: The footer that counts: the copy at the beginning, or that of a fixed disk.
        header: The dynamic header; None for a fixed disk.
        end: Where the data end: offset of the footer at the end, or the file's size where there is none, in bytes.
        footer_at_end: ``sound``, ``missing`` or ``damaged``.
    """

    footer: Footer
    header: DynamicHeader | None
    end: int
    footer_at_end: str


def checksum(data: bytes | bytearray, field: int) -> int:
    """Return the one's complement of the sum of all bytes but the four of the checksum field itself."""
    return ~(sum(data) - sum(data[field : field + 4])) & 0xFFFFFFFF


def read_container(file: FlatFile) -> Container:
    """Read footer and header of an open file. The dynamic header's checksum is left to the caller.

    Raises:
        MalformedImageError: when they violate the specification.
        UnsupportedError: for versions and disk types that are not known here.
    """
    head = file.read(0, layout.FOOTER_SIZE)
    at_end, length = _find_end(file)
    if not head.startswith(layout.FOOTER_COOKIE):
        return _read_fixed(file, at_end, length)
    footer = parse_footer(head, file, 0)
    if footer.disk_type == layout.TYPE_FIXED:
        raise _bad(file, 60, "disk_type", "a fixed disk has no footer at its beginning")
    end, state = file.size, "missing"
    if length:
        end, state = at_end, _compare(file, footer, at_end, length)
    _check_size(file, footer)
    return Container(footer, _read_header(file, footer), end, state)


def _find_end(file: FlatFile) -> tuple[int, int]:
    """Return offset and length of what has the cookie of a footer at the end of the file; length 0: nothing has."""
    for length in (layout.FOOTER_SIZE, layout.LEGACY_FOOTER_SIZE):
        offset = file.size - length
        # The copy at the beginning is not the footer at the end.
        if offset > 0 and file.read(offset, len(layout.FOOTER_COOKIE)) == layout.FOOTER_COOKIE:
            return offset, length
    return file.size, 0


def _read_fixed(file: FlatFile, offset: int, length: int) -> Container:
    if not length:
        raise _bad(file, 0, "cookie", "neither the beginning nor the end of the file is a VHD footer")
    footer = parse_footer(file.read(offset, length), file, offset)
    if footer.disk_type != layout.TYPE_FIXED:
        name = layout.TYPE_NAMES[footer.disk_type]
        raise _bad(file, 0, "cookie", f"the footer says {name}, but its copy at the beginning is missing")
    _check_size(file, footer)
    if footer.virtual_size > offset:
        message = f"the disk has {footer.virtual_size} bytes, but only {offset} are stored: the file was cut"
        raise _bad(file, footer.offset + 48, "current_size", message)
    return Container(footer, None, offset, "sound")


def parse_footer(data: bytes, file: FlatFile, offset: int) -> Footer:
    """Parse and check a footer of 512 or 511 bytes.

    Raises:
        MalformedImageError: when it is short, its checksum does not match, or its type is none.
        UnsupportedError: when its version is not known.
    """
    full = data.ljust(layout.FOOTER_SIZE, b"\0") if len(data) == layout.LEGACY_FOOTER_SIZE else data
    if len(full) != layout.FOOTER_SIZE:
        raise _bad(file, offset, "footer", f"the file ends {layout.FOOTER_SIZE - len(full)} bytes into the footer")
    raw = parse_struct(layout.FOOTER, full, file=file.path, offset=offset, what="footer", hint=_RAW_HINT)
    if checksum(full, layout.FOOTER_CHECKSUM_OFFSET) != raw.checksum:
        where = offset + layout.FOOTER_CHECKSUM_OFFSET
        raise _bad(file, where, "checksum", "the footer's checksum does not match", _RAW_HINT)
    if raw.version >> 16 != layout.VERSION_MAJOR:
        message = f"VHD version {raw.version >> 16}.{raw.version & 0xFFFF} is not known"
        raise UnsupportedError(message, file=file.path, offset=offset + 12, field="footer.version")
    if raw.disk_type not in layout.TYPE_NAMES:
        message = f"disk type {raw.disk_type} is not supported; it is neither fixed, dynamic nor differencing"
        raise UnsupportedError(message, file=file.path, offset=offset + 60, field="footer.disk_type")
    return Footer(
        raw=data,
        offset=offset,
        features=raw.features,
        data_offset=raw.data_offset,
        time_stamp=raw.time_stamp,
        creator_application=bytes(raw.creator_application),
        creator_version=raw.creator_version,
        creator_host=bytes(raw.creator_host),
        current_size=raw.current_size,
        geometry=(raw.cylinders, raw.heads, raw.sectors_per_track),
        disk_type=raw.disk_type,
        unique_id=UUID(bytes=bytes(raw.unique_id)),
        saved_state=bool(raw.saved_state),
    )


def _compare(file: FlatFile, copy: Footer, offset: int, length: int) -> str:
    """Say how the footer at the end is; QEMU reads the copy and 7-Zip the footer, so they must say the same."""
    try:
        footer = parse_footer(file.read(offset, length), file, offset)
    except (MalformedImageError, UnsupportedError):
        return "damaged"
    if footer.identity != copy.identity:
        message = "the footer and its copy at the beginning disagree: programs see different disks"
        raise _bad(file, offset, "footer", message)
    return "sound"


def _check_size(file: FlatFile, footer: Footer) -> None:
    field = "geometry" if footer.uses_geometry else "current_size"
    where = footer.offset + (56 if footer.uses_geometry else 48)
    sectors = footer.virtual_size // layout.SECTOR_SIZE
    if not 0 < sectors <= layout.MAX_SECTORS:
        message = f"the disk has {sectors} sectors, 1 to {layout.MAX_SECTORS} are allowed"
        raise _bad(file, where, field, message)


def _read_header(file: FlatFile, footer: Footer) -> DynamicHeader:
    offset = footer.data_offset
    if not layout.FOOTER_SIZE <= offset <= file.size - layout.HEADER_SIZE or offset % layout.SECTOR_SIZE:
        message = f"the dynamic header at {offset} is not in the file, unaligned, or on the footer's copy"
        raise _bad(file, 16, "data_offset", message)
    data = file.read(offset, layout.HEADER_SIZE)
    raw = parse_struct(layout.DYNAMIC_HEADER, data, file=file.path, offset=offset, what="dynamic header")
    if raw.version >> 16 != layout.VERSION_MAJOR:
        message = f"dynamic header version {raw.version >> 16}.{raw.version & 0xFFFF} is not known"
        raise UnsupportedError(message, file=file.path, offset=offset + 24, field="header_version")
    header = DynamicHeader(
        raw=data,
        offset=offset,
        table_offset=raw.table_offset,
        entries=raw.max_table_entries,
        block_size=raw.block_size,
        parent_name=_name(bytes(raw.parent_name)),
        parent_id=UUID(bytes=bytes(raw.parent_unique_id)),
        locators=_locators(raw),
        checksum=raw.checksum,
    )
    _check_table(file, footer, header)
    return header


def _check_table(file: FlatFile, footer: Footer, header: DynamicHeader) -> None:
    size, at = header.block_size, header.offset
    if size < layout.MIN_BLOCK_SIZE or size & (size - 1):
        raise _bad(file, at + 32, "block_size", f"block size {size} is not a power of two from {layout.MIN_BLOCK_SIZE}")
    if header.entries > layout.MAX_ENTRIES:
        message = f"{header.entries} blocks, at most {layout.MAX_ENTRIES} are supported"
        raise UnsupportedError(message, file=file.path, offset=at + 28, field="max_table_entries")
    if header.entries * size < footer.virtual_size:
        message = f"{header.entries} blocks of {size} bytes are too few for a disk of {footer.virtual_size} bytes"
        raise _bad(file, at + 28, "max_table_entries", message)
    table, length = header.table_offset, header.entries * layout.ENTRY_SIZE
    on_header = table < at + layout.HEADER_SIZE and table + length > at
    if table < layout.FOOTER_SIZE or table > file.size - length or table % layout.SECTOR_SIZE or on_header:
        message = (
            f"the block allocation table at {table} ({length} bytes) is not in the file, unaligned, or on a header"
        )
        raise _bad(file, at + 16, "table_offset", message)


def _locators(raw: Any) -> tuple[tuple[int, int], ...]:
    """Return where the parent locators' data lie; our own pointer has none."""
    return tuple((item.data_offset, item.data_length) for item in raw.parent_locators if item.data_length)


def _name(data: bytes) -> str:
    name = data.decode("utf-16-be", "replace").split("\0", 1)[0]
    return "".join(char if char.isprintable() else "\ufffd" for char in name)


def _bad(file: FlatFile, offset: int, field: str, message: str, hint: str | None = None) -> MalformedImageError:
    return MalformedImageError(message, file=file.path, offset=offset, field=field, hint=hint)
