"""Layouts, numbers and limits of VHDX; sections are those of [MS-VHDX], "Virtual Hard Disk v2 File Format".

Everything is little-endian; GUIDs stand with their first three fields byte-swapped (``UUID.bytes_le``).
"""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

from construct import Bytes, Const, Int16ul, Int32ul, Int64ul, Struct

from vmgraft.imagefmt._layout import LOCATOR_SIZE

KIB: Final = 1 << 10
MIB: Final = 1 << 20
SECTOR: Final = 512

# --- fixed places (2.2) --------------------------------------------------------------------------------------------

SIGNATURE: Final = b"vhdxfile"
#: Name of the program that made the file, UTF-16 (2.2.1).
CREATOR_OFFSET: Final = 8
CREATOR_SIZE: Final = 512
#: The two headers (2.2.2) and the two copies of the region table (2.2.3).
HEADER_OFFSETS: Final = (64 * KIB, 128 * KIB)
HEADER_SIZE: Final = 4 * KIB
TABLE_OFFSETS: Final = (192 * KIB, 256 * KIB)
TABLE_SIZE: Final = 64 * KIB
#: What stands before the first object: identifier, headers, region tables (2.2).
HEADER_SECTION_SIZE: Final = MIB
#: The checksum of header and region table stands behind a signature of 4 bytes.
CHECKSUM_OFFSET: Final = 4

HEADER: Final[Any] = Struct(
    "signature" / Const(b"head"),
    "checksum" / Int32ul,
    "sequence_number" / Int64ul,
    "file_write_guid" / Bytes(16),
    "data_write_guid" / Bytes(16),
    "log_guid" / Bytes(16),
    "log_version" / Int16ul,
    "version" / Int16ul,
    "log_length" / Int32ul,
    "log_offset" / Int64ul,
)
#: Where the fields that an update changes stand in the header (2.2.2).
SEQUENCE_OFFSET: Final = 8
FILE_WRITE_GUID_OFFSET: Final = 16
VERSION: Final = 1
MAX_SEQUENCE: Final = (1 << 64) - 1

# --- region table (2.2.3) ------------------------------------------------------------------------------------------

TABLE_HEADER: Final[Any] = Struct(
    "signature" / Const(b"regi"), "checksum" / Int32ul, "entry_count" / Int32ul, "reserved" / Int32ul
)
TABLE_HEADER_SIZE: Final = 16
TABLE_COUNT_OFFSET: Final = 8
REGION_ENTRY: Final[Any] = Struct("guid" / Bytes(16), "file_offset" / Int64ul, "length" / Int32ul, "flags" / Int32ul)
ENTRY_SIZE: Final = 32
MAX_ENTRIES: Final = 2047
REQUIRED: Final = 1

BAT_REGION: Final = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
METADATA_REGION: Final = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
#: Ours; chosen at random, never to change.
GRAFT_REGION: Final = UUID("441a6886-7621-4a2e-baa8-de42ff3059e7").bytes_le
KNOWN_REGIONS: Final = {BAT_REGION: "bat", METADATA_REGION: "metadata", GRAFT_REGION: "vmgraft"}
#: Stands for the log where objects are listed; the header points to it, not the region table.
LOG_MARK: Final = b"log".ljust(16)

# --- log (2.3) -----------------------------------------------------------------------------------------------------

LOG_SECTOR: Final = 4 * KIB
LOG_ENTRY: Final[Any] = Struct(
    "signature" / Const(b"loge"),
    "checksum" / Int32ul,
    "entry_length" / Int32ul,
    "tail" / Int32ul,
    "sequence_number" / Int64ul,
    "descriptor_count" / Int32ul,
    "reserved" / Int32ul,
    "log_guid" / Bytes(16),
)
LOG_ENTRY_SIGNATURE: Final = b"loge"
LOG_ENTRY_GUID_OFFSET: Final = 32
#: Longest log that is searched for entries; programs make logs of 1 MiB. A longer one that is in use counts as dirty.
MAX_LOG_SEARCH: Final = 64 * MIB
#: Most bytes of entries whose checksums are computed before the log counts as dirty without.
MAX_LOG_CHECK: Final = 4 * MIB

# --- metadata (2.6) ------------------------------------------------------------------------------------------------

METADATA_HEADER: Final[Any] = Struct(
    "signature" / Const(b"metadata"), "reserved" / Int16ul, "entry_count" / Int16ul, "reserved2" / Bytes(20)
)
METADATA_ENTRY: Final[Any] = Struct(
    "item_id" / Bytes(16), "offset" / Int32ul, "length" / Int32ul, "flags" / Int32ul, "reserved" / Int32ul
)
METADATA_TABLE_SIZE: Final = 64 * KIB
METADATA_HEADER_SIZE: Final = 32
MAX_ITEM_SIZE: Final = MIB
ITEM_USER: Final = 1
ITEM_REQUIRED: Final = 4

FILE_PARAMETERS: Final = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
VIRTUAL_DISK_SIZE: Final = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
VIRTUAL_DISK_ID: Final = UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le
LOGICAL_SECTOR_SIZE: Final = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
PHYSICAL_SECTOR_SIZE: Final = UUID("cda348c7-445d-4471-9cc9-e9885251c556").bytes_le
PARENT_LOCATOR: Final = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c").bytes_le
#: Items of a fixed size, in bytes.
ITEM_SIZES: Final = {
    FILE_PARAMETERS: 8,
    VIRTUAL_DISK_SIZE: 8,
    VIRTUAL_DISK_ID: 16,
    LOGICAL_SECTOR_SIZE: 4,
    PHYSICAL_SECTOR_SIZE: 4,
}
ITEM_NAMES: Final = {
    FILE_PARAMETERS: "file parameters",
    VIRTUAL_DISK_SIZE: "virtual disk size",
    VIRTUAL_DISK_ID: "virtual disk ID",
    LOGICAL_SECTOR_SIZE: "logical sector size",
    PHYSICAL_SECTOR_SIZE: "physical sector size",
    PARENT_LOCATOR: "parent locator",
}
#: Flags of the file parameters (2.6.2.1).
LEAVE_BLOCKS_ALLOCATED: Final = 1
HAS_PARENT: Final = 2
PARENT_HEADER: Final[Any] = Struct("locator_type" / Bytes(16), "reserved" / Int16ul, "key_value_count" / Int16ul)
PARENT_HEADER_SIZE: Final = 20
PARENT_ENTRY: Final[Any] = Struct(
    "key_offset" / Int32ul, "value_offset" / Int32ul, "key_length" / Int16ul, "value_length" / Int16ul
)
PARENT_ENTRY_SIZE: Final = 12
MAX_PARENT_KEYS: Final = 64

MIN_BLOCK_SIZE: Final = MIB
MAX_BLOCK_SIZE: Final = 256 * MIB
MAX_VIRTUAL_SIZE: Final = 64 << 40
SECTOR_SIZES: Final = (512, 4096)
#: Longest file whose blocks are looked at: the largest disk, and as much again for everything else.
MAX_FILE_SIZE: Final = 128 << 40

# --- block allocation table (2.5) ----------------------------------------------------------------------------------

#: One sector bitmap block describes 2^23 logical sectors; its entry follows those of the payload blocks it describes.
BITMAP_SECTORS: Final = 1 << 23
STATE_MASK: Final = 0x7
RESERVED_MASK: Final = 0xFFFF8
OFFSET_MASK: Final = 0xFFFF_FFFF_FFF0_0000
NOT_PRESENT: Final = 0
UNDEFINED: Final = 1
ZERO: Final = 2
UNMAPPED: Final = 3
#: "Unmapped" in version 0.95 of the specification; QEMU reads it as zeros (block/vhdx.h).
UNMAPPED_V095: Final = 5
FULLY_PRESENT: Final = 6
PARTIALLY_PRESENT: Final = 7

# --- the graft's region (docs/vhdx.md) -----------------------------------------------------------------------------

#: Behind the locator in the region's first sector.
NOTE: Final[Any] = Struct(
    "magic" / Const(b"VMGVNOTE"),
    "version" / Int16ul,
    "reserved" / Int16ul,
    "undo_size" / Int32ul,
    "region_offset" / Int64ul,
    "region_length" / Int64ul,
    "undo_sha256" / Bytes(32),
    "check" / Bytes(8),
)
NOTE_VERSION: Final = 1
NOTE_OFFSET: Final = LOCATOR_SIZE
NOTE_SIZE: Final[int] = NOTE.sizeof()
#: Where the copy of UNDO begins, and where the record does.
UNDO_OFFSET: Final = SECTOR
RECORD_OFFSET: Final = 16 * KIB
MAX_REGION: Final = 64 * MIB
#: Inline records are at most this long, in bytes.
ROOM: Final = MAX_REGION - RECORD_OFFSET
#: With so many entries our own still ends in the first sector of the region table, which a disk writes as a whole.
MAX_OTHER_ENTRIES: Final = (SECTOR - TABLE_HEADER_SIZE) // ENTRY_SIZE - 1


def round_up(value: int) -> int:
    """Return ``value`` rounded up to whole MiB, the alignment of all objects (2.1)."""
    return -(-value // MIB) * MIB


def region_length(inline_size: int) -> int:
    """Return the length of a graft's region that holds ``inline_size`` bytes of record."""
    return round_up(RECORD_OFFSET + inline_size)


def guid_text(guid: bytes) -> str:
    """Return a stored GUID as people write it."""
    return str(UUID(bytes_le=guid))
