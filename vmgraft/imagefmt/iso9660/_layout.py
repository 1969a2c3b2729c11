"""ISO 9660 descriptors as ECMA-119 lays them out, and the places of a graft; see docs/format.md, "ISO 9660"."""

from __future__ import annotations

from dataclasses import dataclass

from construct import Bytes, Const, Int8ul, Int16ub, Int16ul, Int32ub, Int32ul, Int64ul, Padding, Struct

from vmgraft.imagefmt._layout import LOCATOR_SIZE

#: ECMA-119, 6.1.2: logical sector size.
SECTOR_SIZE = 2048
#: ECMA-119, 6.2.1: the volume descriptor set begins behind the system area of 16 sectors.
FIRST_DESCRIPTOR = 16
#: A descriptor set longer than this is refused; real ones have fewer than ten.
MAX_DESCRIPTORS = 64

#: A volume is longer than its system area and the shortest descriptor set, in bytes.
MIN_VOLUME = (FIRST_DESCRIPTOR + 2) * SECTOR_SIZE

# ECMA-119, 8.1.1: volume descriptor types.
TYPE_BOOT = 0
TYPE_PRIMARY = 1
TYPE_SUPPLEMENTARY = 2
TYPE_PARTITION = 3
TYPE_TERMINATOR = 255

DESCRIPTOR_HEADER = Struct("type" / Int8ul, "identifier" / Const(b"CD001"), "version" / Int8ul)

#: How a primary volume descriptor begins; it is what a session has in its 16th sector.
DESCRIPTOR_MARK = b"\x01CD001\x01"

#: ECMA-119, 8.4: primary volume descriptor, up to the fields we use. "lm" numbers are recorded in both byte orders.
PRIMARY_DESCRIPTOR = Struct(
    "type" / Int8ul,
    "identifier" / Const(b"CD001"),
    "version" / Int8ul,
    Padding(1),
    "system_id" / Bytes(32),
    "volume_id" / Bytes(32),
    Padding(8),
    "volume_space_size" / Int32ul,
    "volume_space_size_be" / Int32ub,
    Padding(32),
    "volume_set_size" / Int16ul,
    "volume_set_size_be" / Int16ub,
    "volume_sequence_number" / Int16ul,
    "volume_sequence_number_be" / Int16ub,
    "logical_block_size" / Int16ul,
    "logical_block_size_be" / Int16ub,
    "path_table_size" / Int32ul,
    "path_table_size_be" / Int32ub,
    "path_table_l" / Int32ul,
    Padding(4),
    "path_table_m" / Int32ub,
    Padding(4),
    "root_record" / Bytes(34),
    "volume_set_id" / Bytes(128),
    "publisher_id" / Bytes(128),
    "preparer_id" / Bytes(128),
    "application_id" / Bytes(128),
    Padding(111),
    "creation_date" / Bytes(17),
)

#: Numbers that ECMA-119, 7.2.3 and 7.3.3 record in both byte orders.
BOTH_ENDIAN = (
    "volume_space_size",
    "volume_set_size",
    "volume_sequence_number",
    "logical_block_size",
    "path_table_size",
)

#: El Torito 1.0, figure 7: boot record volume descriptor.
EL_TORITO_ID = b"EL TORITO SPECIFICATION"
EL_TORITO_ID_OFFSET = 7
EL_TORITO_CATALOG_OFFSET = 71

#: El Torito 1.0, figures 2 to 5.
CATALOG_ENTRY_SIZE = 32
VALIDATION_ENTRY = Struct(
    "header" / Int8ul, "platform" / Int8ul, Padding(2), "id" / Bytes(24), Padding(2), "key" / Const(b"\x55\xaa")
)
BOOT_ENTRY = Struct(
    "indicator" / Int8ul,
    "media" / Int8ul,
    "segment" / Int16ul,
    "system" / Int8ul,
    Padding(1),
    "count" / Int16ul,
    "lba" / Int32ul,
)
SECTION_HEADER = Struct("indicator" / Int8ul, "platform" / Int8ul, "count" / Int16ul, "id" / Bytes(28))

#: mkisofs(8), -boot-info-table: at byte 8 of a boot image, the sector of the primary descriptor and that of the image.
BOOT_INFO_OFFSET = 8
BOOT_INFO = Struct("descriptor" / Int32ul, "image" / Int32ul)
#: GRUB 2, "grub-mkrescue": at byte 2548 of its boot image, where it goes on, in sectors of 512 bytes.
GRUB_INFO_OFFSET = 2548
GRUB_INFO = Struct("sector" / Int64ul)

#: IEEE P1281 (SUSP), 5.3: the SP entry that opens the system use area of the root's first record.
SUSP_MARK = b"SP\x07\x01\xbe\xef"
#: ECMA-119, 9.1: bytes of a directory record before its identifier.
DIRECTORY_RECORD = 33
#: SUSP, 5.1: a continuation area's block, offset and length, in both byte orders; we read the little-endian ones.
SUSP_CONTINUATION = Struct(
    Padding(4), "block" / Int32ul, Padding(4), "offset" / Int32ul, Padding(4), "length" / Int32ul, Padding(4)
)
#: How many continuation areas are followed, and how many bytes of each are read.
MAX_CONTINUATIONS = 4

#: Sessions begin on such boundaries: 16 blocks is what libburnia and mkisofs align to on files, 32 on DVD and BD.
SESSION_ALIGNMENTS = (16, 32)
#: Where xorriso keeps a copy of the first session's descriptors on overwritable media, in sectors.
FIRST_SESSION_COPY = 32
MAX_SESSIONS = 100

# --- the graft -----------------------------------------------------------------------------------------------------

#: ECMA-119, 8.4.32: "application use" is bytes 883 to 1394 of the descriptor; the last quarter of it holds the locator.
APPLICATION_USE_OFFSET = FIRST_DESCRIPTOR * SECTOR_SIZE + 883
LOCATOR_OFFSET = APPLICATION_USE_OFFSET + 384
#: Fillings of the field that count as unused.
BLANKS = (bytes(LOCATOR_SIZE), b" " * LOCATOR_SIZE)
#: Name of the undo fact that holds the PVD's volume space size, in logical blocks.
FACT_VOLUME_SIZE = "volume_space_size"
#: How far behind the volume's end a record without footer is searched, in bytes.
SCAN_LIMIT = 64 << 20
#: How much of it is looked at to recognise it, in bytes, and how many places are tried.
TRACE_SIZE = 1 << 20
MAX_TRACES = 16


def round_up(value: int) -> int:
    """Return ``value`` rounded up to whole sectors."""
    return -(-value // SECTOR_SIZE) * SECTOR_SIZE


@dataclass(frozen=True, slots=True)
class Appendix:
    """Places behind the content as file offsets in bytes; ``record_size`` is 0 when the record is in a sidecar."""

    file_size: int
    record_size: int

    @property
    def record(self) -> int:
        """Offset of the record."""
        return round_up(self.file_size)

    @property
    def footer(self) -> int:
        """Offset of the footer, a sector that begins with a copy of the locator."""
        return self.record + round_up(self.record_size)

    @property
    def end(self) -> int:
        """Offset behind the footer, the size of the grafted file."""
        return self.footer + SECTOR_SIZE
