"""A strict reader of the VDI header."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn
from uuid import UUID

from construct import Container

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.gap import Gap
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.vdi import _layout as lay

_CONVERT = "convert the image with `qemu-img convert` or `VBoxManage clonemedium`"


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says, checked. Sizes and offsets in bytes.

    Attributes:
        text: First line of the file.
        image_type: Key of ``TYPE_NAMES``.
        comment: The 256 bytes of the comment.
        offset_blocks: Where the block map begins.
        offset_data: Where block 0 begins.
        disk_size: Bytes of guest content, rounded up to 512.
        block_size: Bytes of a block.
        blocks: Entries of the block map.
        blocks_allocated: Blocks in the file.
        uuid: The image's own identifier.
        uuid_linkage: That of the image it builds on; None where it builds on none.
        gap: Unused bytes between header and block map.
    """

    text: str
    image_type: int
    comment: bytes
    offset_blocks: int
    offset_data: int
    disk_size: int
    block_size: int
    blocks: int
    blocks_allocated: int
    uuid: str
    uuid_linkage: str | None
    gap: Gap


def read_header(file: FlatFile) -> Header:
    """Read and check the header.

    Raises:
        MalformedImageError: when it contradicts itself or the file.
        UnsupportedError: for versions and variants that are not known here.
    """
    data = file.read(0, lay.SECTOR)
    raw = parse_struct(lay.HEADER, data, file=file.path, offset=0, what="VDI header")
    if len(data) < lay.SECTOR:
        raise MalformedImageError("the file ends inside the header", file=file.path, offset=0, field="VDI header")
    _check_variant(file, raw)
    _check_sizes(file, raw)
    _check_places(file, raw)
    header_end = lay.PRE_HEADER_SIZE + raw.header_size
    linkage = UUID(bytes_le=bytes(raw.uuid_linkage))
    return Header(
        text=_printable(raw.text),
        image_type=raw.image_type,
        comment=bytes(raw.comment),
        offset_blocks=raw.offset_blocks,
        offset_data=raw.offset_data,
        disk_size=-(-raw.disk_size // lay.SECTOR) * lay.SECTOR,
        block_size=raw.block_size,
        blocks=raw.blocks,
        blocks_allocated=raw.blocks_allocated,
        uuid=str(UUID(bytes_le=bytes(raw.uuid_create))),
        uuid_linkage=str(linkage) if linkage.int else None,
        gap=Gap(-(-header_end // lay.SECTOR) * lay.SECTOR, raw.offset_blocks),
    )


def _check_variant(file: FlatFile, raw: Container[Any]) -> None:
    if raw.version != lay.VERSION_1_1:
        version = f"{raw.version >> 16}.{raw.version & 0xFFFF}"
        _unsupported(file, "version", f"VDI version {version}; only 1.1 is supported")
    if raw.image_type not in lay.TYPE_NAMES:
        _malformed(file, "image_type", f"unknown image type {raw.image_type}")
    if raw.sector_size != lay.SECTOR:
        _unsupported(file, "sector_size", f"sectors of {raw.sector_size} bytes; only {lay.SECTOR} are supported")
    if raw.block_extra:
        _unsupported(
            file, "block_extra", f"blocks with {raw.block_extra} extra bytes before their data are not supported"
        )
    parent = UUID(bytes_le=bytes(raw.uuid_parent_modify))
    if parent.int and not any(raw.uuid_linkage):
        _malformed(file, "uuid_parent_modify", f"a modification of a parent ({parent}), but no parent, is named")


def _check_sizes(file: FlatFile, raw: Container[Any]) -> None:
    if raw.header_size not in lay.HEADER_SIZES:
        _malformed(file, "header_size", f"a header of {raw.header_size} bytes")
    size = raw.block_size
    if not lay.MIN_BLOCK_SIZE <= size <= lay.MAX_BLOCK_SIZE or size & (size - 1):
        _malformed(file, "block_size", f"blocks of {size} bytes: not a power of two between 4 KiB and 64 MiB")
    if raw.blocks > lay.MAX_BLOCKS:
        _malformed(file, "blocks", f"{raw.blocks} blocks, at most {lay.MAX_BLOCKS} allowed")
    if not 0 < raw.disk_size <= raw.blocks * size:
        message = f"a disk of {raw.disk_size} bytes and a map of {raw.blocks} blocks of {size}"
        _malformed(file, "disk_size", message)
    if raw.blocks_allocated > raw.blocks:
        message = f"{raw.blocks_allocated} blocks are allocated, more than the {raw.blocks} there are"
        _malformed(file, "blocks_allocated", message)


def _check_places(file: FlatFile, raw: Container[Any]) -> None:
    for name in ("offset_blocks", "offset_data"):
        if raw[name] % lay.SECTOR:
            _malformed(file, name, f"{raw[name]} is not a multiple of {lay.SECTOR}")
    if raw.offset_blocks < lay.PRE_HEADER_SIZE + raw.header_size:
        _malformed(file, "offset_blocks", "the block map begins inside the header")
    map_end = raw.offset_blocks + 4 * raw.blocks
    if raw.offset_data < map_end:
        _malformed(file, "offset_data", f"the data begins at {raw.offset_data}, before the block map ends at {map_end}")
    if map_end > file.size:
        _malformed(file, "offset_blocks", f"the block map ends at {map_end}, behind the end of the file")


def _malformed(file: FlatFile, field: str, message: str) -> NoReturn:
    hint = "`qemu-img check` shows the damage"
    raise MalformedImageError(message, file=file.path, offset=lay.FIELD_OFFSET[field], field=field, hint=hint)


def _unsupported(file: FlatFile, field: str, message: str) -> NoReturn:
    raise UnsupportedError(message, file=file.path, offset=lay.FIELD_OFFSET[field], field=field, hint=_CONVERT)


def _printable(raw: bytes) -> str:
    text = raw.split(b"\0")[0].decode("utf-8", "replace").strip()
    return "".join(char if char.isprintable() else "?" for char in text)


def check_complete(file: FlatFile, header: Header) -> None:
    """Refuse images whose content lies partly in another file.

    Raises:
        UnsupportedError: for undo and differencing images, and images that name another one.
    """
    name = lay.TYPE_NAMES[header.image_type]
    hint = "merge it into its base first, or convert the whole chain with `VBoxManage clonemedium`"
    if header.image_type not in lay.COMPLETE_TYPES:
        message = f"{name} images hold only the changes to another image ({header.uuid_linkage or 'not named'})"
        field = "image_type"
    elif header.uuid_linkage is not None:
        message, field = f"the image builds on another one ({header.uuid_linkage})", "uuid_linkage"
    else:
        return
    raise UnsupportedError(message, file=file.path, offset=lay.FIELD_OFFSET[field], field=field, hint=hint)


def comment_text(header: Header) -> str:
    """Return the comment for people: up to its first NUL, unprintable characters replaced."""
    return _printable(header.comment)
