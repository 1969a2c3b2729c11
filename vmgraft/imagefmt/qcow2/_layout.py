"""Layouts, numbers and limits of qcow2; see QEMU's ``docs/interop/qcow2.txt``, called "spec" below. Big-endian."""

from __future__ import annotations

import struct
from typing import Any, Final

from construct import Bytes, Const, Int8ub, Int32ub, Int64ub, Struct

MAGIC: Final = b"QFI\xfb"

#: The header up to and including ``snapshots_offset``: all there is in version 2 (spec, "Header").
HEADER_V2: Final[Any] = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)
#: What version 3 adds.
HEADER_V3: Final[Any] = Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
EXTENSION_HEADER: Final[Any] = Struct("magic" / Int32ub, "length" / Int32ub)
#: One entry of the feature name table (spec, "Feature name table").
FEATURE_NAME: Final[Any] = Struct("type" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))

V2_LENGTH: Final = 72
V3_LENGTH: Final = 104
#: Byte offset of each header field, for error messages and for the two fields that attach and detach rewrite.
FIELD_OFFSET: Final[dict[str, int]] = {
    "magic": 0,
    "version": 4,
    "backing_file_offset": 8,
    "backing_file_size": 16,
    "cluster_bits": 20,
    "size": 24,
    "crypt_method": 32,
    "l1_size": 36,
    "l1_table_offset": 40,
    "refcount_table_offset": 48,
    "refcount_table_clusters": 56,
    "nb_snapshots": 60,
    "snapshots_offset": 64,
    "incompatible_features": 72,
    "compatible_features": 80,
    "autoclear_features": 88,
    "refcount_order": 96,
    "header_length": 100,
    "compression_type": 104,
}

# --- header extensions (spec, "Header extensions") -----------------------------------------------------------------

EXT_END: Final = 0x00000000
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_NAMES: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_CRYPTO: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441
#: Ours: "VMGr". Chosen freely; the spec asks only that unknown magics be kept.
EXT_GRAFT: Final = 0x564D4772
#: "VMGx": a graft already detached that other extensions still stand behind; exists only during a detach.
EXT_DEAD: Final = 0x564D4778
EXT_NAMES: Final[dict[int, str]] = {
    EXT_BACKING_FORMAT: "backing-format",
    EXT_FEATURE_NAMES: "feature-names",
    EXT_BITMAPS: "bitmaps",
    EXT_CRYPTO: "crypto-header",
    EXT_DATA_FILE: "external-data-file",
    EXT_GRAFT: "vmgraft",
    EXT_DEAD: "vmgraft-detached",
}
EXT_HEADER_SIZE: Final = 8

# --- feature bits (spec, "incompatible_features", ...) -------------------------------------------------------------

DIRTY: Final = 1 << 0
CORRUPT: Final = 1 << 1
EXTERNAL_DATA: Final = 1 << 2
COMPRESSION_TYPE: Final = 1 << 3
EXTENDED_L2: Final = 1 << 4
KNOWN_INCOMPATIBLE: Final = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2
LAZY_REFCOUNTS: Final = 1 << 0
AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_RAW_EXTERNAL: Final = 1 << 1
#: Names by (type, bit); type 0 incompatible, 1 compatible, 2 autoclear, as in the feature name table.
FEATURE_NAMES: Final[dict[tuple[int, int], str]] = {
    (0, 0): "dirty bit",
    (0, 1): "corrupt bit",
    (0, 2): "external data file",
    (0, 3): "compression type",
    (0, 4): "extended L2 entries",
    (1, 0): "lazy refcounts",
    (2, 0): "bitmaps",
    (2, 1): "raw external data",
}
COMPRESSION_ZLIB: Final = 0
COMPRESSION_ZSTD: Final = 1
CRYPT_NAMES: Final = ("none", "AES", "LUKS")

# --- tables (spec, "Cluster mapping") ------------------------------------------------------------------------------

OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
FLAG_COPIED: Final = 1 << 63
FLAG_COMPRESSED: Final = 1 << 62
FLAG_ZERO: Final = 1 << 0
#: Bits 0-8 and 56-62 of an L1 entry.
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
#: Bits 1-8 and 56-61 of a standard L2 entry; bit 0 joins them in version 2 and with extended L2 entries.
L2_RESERVED: Final = 0x3F00_0000_0000_01FE
SUBCLUSTERS: Final = 32
COMPRESSED_SECTOR: Final = 512

# --- snapshots (spec, "Snapshots") ----------------------------------------------------------------------------------

#: l1_table_offset, l1_size, id_str_size, name_size, date_sec, date_nsec, vm_clock_nsec, vm_state_size,
#: extra_data_size. A plain struct: there may be 65,536 of them.
SNAPSHOT_ENTRY: Final = struct.Struct(">QIHHIIQII")
#: The known extra data: vm_state_size in 64 bits, virtual disk size.
SNAPSHOT_EXTRA: Final = struct.Struct(">QQ")

# --- limits --------------------------------------------------------------------------------------------------------

MIN_CLUSTER_BITS: Final = 9  # spec, "cluster_bits"
MAX_CLUSTER_BITS: Final = 21  # QEMU block/qcow2.h, MAX_CLUSTER_BITS
MIN_EXTENDED_L2_BITS: Final = 14  # spec, "Extended L2 Entries": a subcluster holds at least one sector
MAX_L1_BYTES: Final = 32 << 20  # QEMU block/qcow2.h, QCOW_MAX_L1_SIZE
MAX_REFTABLE_BYTES: Final = 8 << 20  # QEMU block/qcow2.h, QCOW_MAX_REFTABLE_SIZE
MAX_SNAPSHOTS: Final = 65536  # QEMU block/qcow2.h, QCOW_MAX_SNAPSHOTS
#: Bytes of the snapshot table. QEMU allows 64 MiB (block/qcow2.h, QCOW_MAX_SNAPSHOTS_SIZE); that needs names of 1 KB.
MAX_SNAPSHOT_TABLE: Final = 16 << 20
MAX_SNAPSHOT_EXTRA: Final = 1024  # QEMU block/qcow2.h, QCOW_MAX_SNAPSHOT_EXTRA_DATA
MAX_REFCOUNT_ORDER: Final = 6  # spec, "refcount_order"
MAX_BACKING_NAME: Final = 1023  # spec, "backing_file_size"
MAX_EXTENSIONS: Final = 64
MAX_SIZE: Final = (1 << 63) - 1
MAX_DEFLATE_RATIO: Final = 1032  # zlib.net, "zlib Technical Details", maximum compression factor
MIN_ZSTD_FRAME: Final = 6  # RFC 8878, 3.1.1: magic 4, frame header 2
MIN_ZSTD_BLOCK: Final = 4  # RFC 8878, 3.1.1.2: block header 3, the repeated byte of an RLE block 1
MAX_ZSTD_BLOCK: Final = 128 << 10  # RFC 8878, 3.1.1.2.4: bytes that one block yields at most
#: Deduplicated images map a cluster several times, bombs do so without end: as many bytes of guest data may be mapped
#: as this many times the file, and some more.
MAX_SHARING: Final = 16
SHARING_ALLOWANCE: Final = 256 << 20
SECTOR: Final = 512
