"""Where MBR, GPT and Apple partition maps keep their numbers, and the limits of what is read."""

from __future__ import annotations

from struct import Struct as Packed

from construct import Array, Bytes, Const, Int8ul, Int16ub, Int32ub, Int32ul, Int64ul, Padding, Struct

#: Bytes of a logical block; the second one only where a GPT stands at LBA 1 of that size.
SECTOR_SIZE = 512
LARGE_SECTOR_SIZE = 4096
#: Most partitions that are listed; further ones are counted.
MAX_LISTED = 1024

#: ECMA-119, 8.1.2: what makes a disk an ISO 9660 image too.
ISO_MARK = b"CD001"
ISO_MARK_OFFSET = 16 * 2048 + 1

# --- MBR: UEFI 2.10, 5.2.1, table 5-1 ------------------------------------------------------------------------------

MBR_ENTRY = Struct(
    "status" / Int8ul,
    "first_chs" / Bytes(3),
    "type" / Int8ul,
    "last_chs" / Bytes(3),
    "start" / Int32ul,
    "count" / Int32ul,
)
MBR_ENTRIES = 4
MBR = Struct(
    Padding(440),
    "disk_id" / Int32ul,
    Padding(2),
    "entries" / Array(MBR_ENTRIES, MBR_ENTRY),
    "signature" / Bytes(2),
)
MBR_SIGNATURE = b"\x55\xaa"
#: Values of the first byte of an entry: not active, active.
MBR_STATUS = (0x00, 0x80)
MBR_ACTIVE = 0x80
#: UEFI 2.10, 5.2.2: the entry that covers a disk with a GPT. A disk of more sectors than fit has all bits set.
TYPE_PROTECTIVE = 0xEE
MAX_COUNT = 0xFFFFFFFF
#: Types of partitions that hold a chain of further boot records (Linux include/linux/msdos_partition.h).
TYPES_EXTENDED = (0x05, 0x0F, 0x85)
#: Logical partitions are numbered from 5 on.
FIRST_LOGICAL = 5
#: Longest chain that is followed, in boot records; Linux gives up after 256 partitions of any kind.
MAX_CHAIN = 256
#: Names of file systems in boot sectors that look like an MBR: FAT12/16, FAT32 (Microsoft FAT specification, 3.2, 3.3),
#: NTFS and exFAT (byte 3).
BOOT_SECTORS = ((54, b"FAT1"), (82, b"FAT32"), (3, b"NTFS    "), (3, b"EXFAT   "))

# --- GPT: UEFI 2.10, 5.3 -------------------------------------------------------------------------------------------

GPT_SIGNATURE = b"EFI PART"
GPT_REVISION = 0x00010000
GPT_HEADER_SIZE = 92
GPT_HEADER = Struct(
    "signature" / Const(GPT_SIGNATURE),
    "revision" / Int32ul,
    "header_size" / Int32ul,
    "header_crc" / Int32ul,
    "reserved" / Int32ul,
    "my_lba" / Int64ul,
    "alternate_lba" / Int64ul,
    "first_usable" / Int64ul,
    "last_usable" / Int64ul,
    "disk_guid" / Bytes(16),
    "entries_lba" / Int64ul,
    "entry_count" / Int32ul,
    "entry_size" / Int32ul,
    "entries_crc" / Int32ul,
)
#: Where the header's own CRC-32 stands; counted as zeros while it is computed.
GPT_CRC_FIELD = slice(16, 20)
#: Type, unique GUID, first and last LBA, attributes, name in UTF-16.
GPT_ENTRY = Packed("<16s16sQQQ72s")
GPT_ENTRY_SIZE = GPT_ENTRY.size
#: Longest entry and longest entry array that are read, in bytes. Usual are 128 and 16 KiB.
MAX_ENTRY_SIZE = 4096
MAX_ENTRY_ARRAY = 1 << 20

# --- Apple partition map: Inside Macintosh: Devices, chapter 3 -----------------------------------------------------

APM_BLOCK0 = Struct("signature" / Const(b"ER"), "block_size" / Int16ub, "block_count" / Int32ub)
APM_ENTRY = Struct(
    "signature" / Const(b"PM"),
    Padding(2),
    "map_blocks" / Int32ub,
    "start" / Int32ub,
    "count" / Int32ub,
    "name" / Bytes(32),
    "type" / Bytes(32),
)
APM_ENTRY_SIZE = APM_ENTRY.sizeof()
APM_MARK = b"PM"
#: Type of the map's own entry, the first one.
APM_OWN_TYPE = "Apple_partition_map"
#: Block sizes that are tried: the one that block 0 states counts only where a map stands there.
APM_BLOCK_SIZES = (512, 1024, 2048, 4096)
MAX_APM_ENTRIES = 64
