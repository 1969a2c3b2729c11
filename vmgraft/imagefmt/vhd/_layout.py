"""Structures, numbers and limits of the VHD format.

Source: Microsoft, "Virtual Hard Disk Image Format Specification", version 1.0 (2006). Everything is big-endian. Where
the specification leaves the disk's size open, QEMU's ``block/vpc.c`` is followed.
"""

from __future__ import annotations

from construct import Array, Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct

SECTOR_SIZE = 512

# --- "Hard Disk Footer Format" -------------------------------------------------------------------------------------

FOOTER_SIZE = 512
#: Versions before Virtual PC 2004 wrote 511 bytes; the byte that lacks is reserved and zero.
LEGACY_FOOTER_SIZE = 511
FOOTER_COOKIE = b"conectix"
FOOTER_CHECKSUM_OFFSET = 64
#: "File Format Version": major in the upper half.
VERSION_MAJOR = 1

FOOTER = Struct(
    "cookie" / Const(FOOTER_COOKIE),
    "features" / Int32ub,
    "version" / Int32ub,
    "data_offset" / Int64ub,
    "time_stamp" / Int32ub,
    "creator_application" / Bytes(4),
    "creator_version" / Int32ub,
    "creator_host" / Bytes(4),
    "original_size" / Int64ub,
    "current_size" / Int64ub,
    "cylinders" / Int16ub,
    "heads" / Int8ub,
    "sectors_per_track" / Int8ub,
    "disk_type" / Int32ub,
    "checksum" / Int32ub,
    "unique_id" / Bytes(16),
    "saved_state" / Int8ub,
)
#: "Time Stamp" counts seconds from 2000-01-01 00:00 UTC: this many after the Unix epoch.
EPOCH = 946684800

# "Disk Type"
TYPE_FIXED = 2
TYPE_DYNAMIC = 3
TYPE_DIFFERENCING = 4
TYPE_NAMES = {TYPE_FIXED: "fixed", TYPE_DYNAMIC: "dynamic", TYPE_DIFFERENCING: "differencing"}

#: Creator applications whose disks are as large as their geometry; for all others ``current_size`` counts (QEMU 10.1
#: block/vpc.c, vpc_ignore_current_size; older QEMUs take the geometry of creators they do not know, too).
GEOMETRY_CREATORS = (b"vpc ", b"qemu")
#: The geometry of this many sectors says "or more": ``current_size`` counts then ("CHS Calculation"; VHD_MAX_GEOMETRY).
MAX_GEOMETRY = 65535 * 16 * 255
#: Largest disk, in sectors: 2040 GiB (QEMU block/vpc.c, VHD_MAX_SECTORS).
MAX_SECTORS = 0xFF000000

# --- "Dynamic Disk Header Format" ----------------------------------------------------------------------------------

HEADER_SIZE = 1024
HEADER_COOKIE = b"cxsparse"
HEADER_CHECKSUM_OFFSET = 36
PARENT_NAME_OFFSET = 64
LOCATOR_COUNT = 8

PARENT_LOCATOR = Struct(
    "platform_code" / Bytes(4),
    "data_space" / Int32ub,
    "data_length" / Int32ub,
    "reserved" / Int32ub,
    "data_offset" / Int64ub,
)
PARENT_LOCATOR_SIZE = 24

DYNAMIC_HEADER = Struct(
    "cookie" / Const(HEADER_COOKIE),
    "data_offset" / Int64ub,
    "table_offset" / Int64ub,
    "version" / Int32ub,
    "max_table_entries" / Int32ub,
    "block_size" / Int32ub,
    "checksum" / Int32ub,
    "parent_unique_id" / Bytes(16),
    "parent_time_stamp" / Int32ub,
    Padding(4),
    "parent_name" / Bytes(512),
    "parent_locators" / Array(LOCATOR_COUNT, PARENT_LOCATOR),
    Padding(256),
)

#: "Block Allocation Table": an entry of a block that is not stored.
UNUSED = 0xFFFFFFFF
ENTRY_SIZE = 4
#: A sector bitmap has one bit a sector and fills whole sectors; smaller blocks would have less than one byte of it.
MIN_BLOCK_SIZE = 8 * SECTOR_SIZE
#: More blocks than this are refused: 2040 GiB in blocks of 512 KiB. The usual block size is 2 MiB.
MAX_ENTRIES = 1 << 22

# --- the graft -----------------------------------------------------------------------------------------------------

#: The last parent locator entry of the dynamic header, unused by every known writer, holds the pointer.
POINTER_OFFSET = 576 + (LOCATOR_COUNT - 1) * PARENT_LOCATOR_SIZE
#: Platform code of the pointer; the specification's own codes are Wi2r, Wi2k, W2ru, W2ku, "Mac " and MacX.
POINTER_CODE = b"VGft"
#: Bytes of the tree digest, and of the SHA-256 over the sidecar's locator, in the entry's offset field.
POINTER_TREE_SIZE = 4
POINTER_LOCATOR_SIZE = 4
