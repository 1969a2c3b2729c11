"""Construct layouts, sizes and hard limits that all containers share; see docs/format.md.

Everything is little-endian. The structs here say where bytes lie; what they must hold is checked by the readers
(``locator``, ``record``, ``undo``), which also turn them into the public dataclasses.
"""

from __future__ import annotations

from construct import Array, Bytes, Const, Int8ul, Int16ul, Int32ul, Int64sl, Int64ul, PascalString, Struct, this

#: Opens every locator and every record (docs/format.md, "Locator" and "Record").
MAGIC = b"VMGRAFT\0"
#: Format version. A minor version adds, a major version breaks.
VERSION_MAJOR = 1
VERSION_MINOR = 0

# --- locator -------------------------------------------------------------------------------------------------------

#: Bytes a locator takes; it fits the 128 free bytes at the end of the ISO 9660 application-use field.
LOCATOR_SIZE = 128
#: Bytes at the end of a locator: the head of the SHA-256 over everything before them.
LOCATOR_CHECK_SIZE = 8
#: Values of the low byte of a locator's flags.
PLACEMENT_INLINE = 1
PLACEMENT_SIDECAR = 2

LOCATOR = Struct(
    "magic" / Const(MAGIC),
    "major" / Int16ul,
    "minor" / Int16ul,
    "flags" / Int32ul,
    "record_offset" / Int64ul,
    "record_size" / Int64ul,
    "record_sha256" / Bytes(32),
    "tree_digest" / Bytes(32),
    "file_size" / Int64ul,
    "reserved" / Bytes(16),
    "check" / Bytes(LOCATOR_CHECK_SIZE),
)

# --- record --------------------------------------------------------------------------------------------------------

#: Bytes of the record header that this version knows; a later minor version may lengthen it.
RECORD_HEADER_SIZE = 64
#: Longest header a reader accepts.
RECORD_HEADER_MAX = 4096
#: Where the digest of header and table stands in the header; counted as zeros while it is computed.
RECORD_DIGEST_OFFSET = 32
SECTION_ENTRY_SIZE = 96

RECORD_HEADER = Struct(
    "magic" / Const(MAGIC),
    "major" / Int16ul,
    "minor" / Int16ul,
    "header_size" / Int32ul,
    "record_size" / Int64ul,
    "flags" / Int32ul,
    "section_count" / Int32ul,
    "sha256" / Bytes(32),
)

SECTION_ENTRY = Struct(
    "kind" / Int32ul,
    "flags" / Int32ul,
    "offset" / Int64ul,
    "stored_size" / Int64ul,
    "raw_size" / Int64ul,
    "stored_sha256" / Bytes(32),
    "raw_sha256" / Bytes(32),
)

SECTION_CRITICAL = 1
SECTION_COMPRESSED = 2

#: Longest record, in bytes.
MAX_RECORD_SIZE = 1 << 30
MAX_SECTIONS = 256
MAX_EXTENSIONS = 64
#: Longest section once decompressed, in bytes.
MAX_RAW_SIZE = 64 << 20
#: Longest all known sections of a record together may be once decompressed, in bytes.
MAX_TOTAL_RAW = 1 << 30
#: A section may not grow more than this when decompressed.
MAX_RATIO = 1000

# --- undo ----------------------------------------------------------------------------------------------------------

UNDO_VERSION = 1
MAX_PATCHES = 4096
MAX_FACTS = 64
MAX_FACT_NAME = 64

UNDO_HEADER = Struct(
    "version" / Int16ul,
    "reserved" / Int16ul,
    "fact_count" / Int32ul,
    "patch_count" / Int32ul,
    "reserved2" / Int32ul,
    "file_size" / Int64ul,
)
UNDO_HEADER_SIZE = UNDO_HEADER.sizeof()

UNDO_FACT = Struct("name" / PascalString(Int8ul, "ascii"), "value" / Int64sl)
UNDO_PATCH = Struct("offset" / Int64ul, "length" / Int32ul, "data" / Bytes(this.length))

#: The body behind the header; only parsed once both counts are within the limits.
UNDO_BODY = Struct(
    "facts" / Array(this._params.fact_count, UNDO_FACT),
    "patches" / Array(this._params.patch_count, UNDO_PATCH),
)
