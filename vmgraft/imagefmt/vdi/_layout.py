"""VDI as VirtualBox's VDICore.h lays it out (VDIPREHEADER, VDIHEADER1, VDIHEADER1PLUS), and our limits.

Everything is little-endian. The first 512 bytes hold both headers, so they are written as a whole.
"""

from __future__ import annotations

from typing import Any, Final

from construct import Bytes, Const, Int32ul, Int64ul, Struct

#: Bytes of a sector: the unit of atomic writes, and the only one that the legacy geometry may state.
SECTOR: Final = 512
#: VDI_IMAGE_VERSION: major in the upper, minor in the lower 16 bits.
VERSION_1_1: Final = 0x0001_0001
#: Size of VDIPREHEADER; ``header_size`` counts from here.
PRE_HEADER_SIZE: Final = 72
#: VDIHEADER1 up to the parent's UUID is 384 bytes, VDIHEADER1PLUS with the second geometry 400.
HEADER_SIZES: Final = range(384, 4097)

#: VDIIMAGETYPE.
TYPE_NAMES: Final = {1: "dynamic", 2: "fixed", 3: "undo", 4: "differencing"}
#: Types whose blocks are all there is to the content.
COMPLETE_TYPES: Final = (1, 2)

#: VDI_IMAGE_BLOCK_FREE and VDI_IMAGE_BLOCK_ZERO: entries of the block map that name no block.
BLOCK_FREE: Final = 0xFFFF_FFFF
BLOCK_ZERO: Final = 0xFFFF_FFFE

#: Block sizes in bytes; VirtualBox makes images with 1 MiB.
MIN_BLOCK_SIZE: Final = 4096
MAX_BLOCK_SIZE: Final = 64 << 20
#: Entries of the block map: 64 TiB with blocks of 1 MiB, a map of 256 MiB.
MAX_BLOCKS: Final = 1 << 26

#: Offset and size of the comment (VDIHEADER1 szComment): text for people, padded with zeros.
COMMENT_OFFSET: Final = 84
COMMENT_SIZE: Final = 256

HEADER: Final[Any] = Struct(
    "text" / Bytes(64),
    "signature" / Const(b"\x7f\x10\xda\xbe"),
    "version" / Int32ul,
    "header_size" / Int32ul,
    "image_type" / Int32ul,
    "image_flags" / Int32ul,
    "comment" / Bytes(COMMENT_SIZE),
    "offset_blocks" / Int32ul,
    "offset_data" / Int32ul,
    "cylinders" / Int32ul,
    "heads" / Int32ul,
    "sectors" / Int32ul,
    "sector_size" / Int32ul,
    "unused" / Int32ul,
    "disk_size" / Int64ul,
    "block_size" / Int32ul,
    "block_extra" / Int32ul,
    "blocks" / Int32ul,
    "blocks_allocated" / Int32ul,
    "uuid_create" / Bytes(16),
    "uuid_modify" / Bytes(16),
    "uuid_linkage" / Bytes(16),
    "uuid_parent_modify" / Bytes(16),
)
#: Where its fields begin, in bytes, for messages.
FIELD_OFFSET: Final = {
    "signature": 64,
    "version": 68,
    "header_size": 72,
    "image_type": 76,
    "offset_blocks": 340,
    "offset_data": 344,
    "sector_size": 360,
    "disk_size": 368,
    "block_size": 376,
    "block_extra": 380,
    "blocks": 384,
    "blocks_allocated": 388,
    "uuid_linkage": 424,
    "uuid_parent_modify": 440,
}
