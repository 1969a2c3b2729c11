"""Hosted sparse extents as VMware's "Virtual Disk Format 5.0" lays them out, and our limits.

Everything is little-endian; all places and sizes in the header are in sectors of 512 bytes.
"""

from __future__ import annotations

from typing import Any, Final

from construct import Bytes, Const, Int8ul, Int16ul, Int32ul, Int64ul, Struct

SECTOR: Final = 512

#: "Hosted Sparse Extent Header", SparseExtentHeader; 433 bytes of padding follow.
HEADER: Final[Any] = Struct(
    "magic" / Const(b"KDMV"),
    "version" / Int32ul,
    "flags" / Int32ul,
    "capacity" / Int64ul,
    "grain_size" / Int64ul,
    "descriptor_offset" / Int64ul,
    "descriptor_size" / Int64ul,
    "gtes_per_gt" / Int32ul,
    "rgd_offset" / Int64ul,
    "gd_offset" / Int64ul,
    "overhead" / Int64ul,
    "unclean_shutdown" / Int8ul,
    "newlines" / Bytes(4),
    "compression" / Int16ul,
)
#: Where its fields begin, in bytes, for messages.
FIELD_OFFSET: Final = {
    "magic": 0,
    "version": 4,
    "flags": 8,
    "capacity": 12,
    "grain_size": 20,
    "descriptor_offset": 28,
    "descriptor_size": 36,
    "gtes_per_gt": 44,
    "rgd_offset": 48,
    "gd_offset": 56,
    "overhead": 64,
    "unclean_shutdown": 72,
    "newlines": 73,
    "compression": 77,
}
VERSIONS: Final = (1, 2, 3)

# flags
FLAG_NEWLINES: Final = 1 << 0  #: ``newlines`` is there to be checked
FLAG_REDUNDANT: Final = 1 << 1  #: there is a second grain directory with tables of its own
FLAG_ZEROED: Final = 1 << 2  #: a table entry of 1 is a grain of zeros
FLAG_COMPRESSED: Final = 1 << 16
FLAG_MARKERS: Final = 1 << 17  #: a marker stands before each compressed grain
KNOWN_FLAGS: Final = FLAG_NEWLINES | FLAG_REDUNDANT | FLAG_ZEROED | FLAG_COMPRESSED | FLAG_MARKERS

#: singleEndLineChar, nonEndLineChar, doubleEndLineChar1 and 2: changed by a transfer as text.
NEWLINES: Final = b"\n \r\n"
COMPRESSION_NONE: Final = 0
COMPRESSION_DEFLATE: Final = 1
#: GD_AT_END: the footer's header, a sector before the end-of-stream marker, has the true offset.
GD_AT_END: Final = 0xFFFF_FFFF_FFFF_FFFF

#: "Stream-Optimized Compressed Sparse Extents": a marker that is none of a grain, in a sector of its own.
MARKER: Final[Any] = Struct("value" / Int64ul, "size" / Int32ul, "type" / Int32ul)
MARKER_END: Final = 0
MARKER_FOOTER: Final = 3
#: Bytes from the footer's marker to the end of the file.
FOOTER_SIZE: Final = 3 * SECTOR
#: A grain's marker: first sector of guest content, and bytes of compressed data right behind it.
GRAIN_MARKER: Final[Any] = Struct("lba" / Int64ul, "size" / Int32ul)
GRAIN_MARKER_SIZE: Final = 12

#: "Grain Table": entries in a table, each 4 bytes, and the sectors that a table takes.
GTES_PER_GT: Final = 512
GT_SECTORS: Final = 4
#: "grainSize: must be a power of 2 and must be greater than 8 (4KB)"; tools make 8 too.
MIN_GRAIN: Final = 8
#: 16 MiB, so that an expanded grain stays small.
MAX_GRAIN: Final = 1 << 15
#: Grain directory entries: a directory of 8 MiB, 64 TiB of content with the usual grains of 64 KiB.
MAX_TABLES: Final = 1 << 21

#: The embedded descriptor, in sectors; tools make 20. QEMU rewrites exactly these (block/vmdk.c, DESC_SIZE).
MAX_DESCRIPTOR: Final = 2048
QEMU_DESCRIPTOR_SIZE: Final = 20 * SECTOR
MAX_LINES: Final = 4096
#: CID of no parent ("The Header").
NO_PARENT: Final = 0xFFFF_FFFF
#: Kinds of image, by createType, whose content lies in the file itself.
COMPLETE_TYPES: Final = ("monolithicSparse", "streamOptimized")

#: The line that holds the locator, as hexadecimal digits.
LINE_KEY: Final = b"ddb.vmgraft"
#: Bytes that stay free behind the line: QEMU writes the CID with one to eight digits, and needs a NUL at the end.
LINE_RESERVE: Final = 64
#: Note flag, and undo fact: attach put a newline before its line, as the text did not end in one.
NOTE_NEWLINE: Final = 1
FACT_NEWLINE: Final = "newline"
