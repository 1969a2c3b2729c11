"""ISO 9660 descriptors as ECMA-119 lays them out, and the places of a graft; see docs/format.md, "ISO 9660"."""

from __future__ import annotations

from dataclasses import dataclass

from construct import Bytes, Const, Int8ul, Int16ub, Int16ul, Int32ub, Int32ul, Padding, Struct

from vmgraft.imagefmt._layout import LOCATOR_SIZE

#: ECMA-119, 6.1.2: logical sector size.
SECTOR_SIZE = 2048
#: ECMA-119, 6.2.1: the volume descriptor set begins behind the system area of 16 sectors.
FIRST_DESCRIPTOR = 16
#: A descriptor set longer than this is refused; real ones have fewer than ten.
MAX_DESCRIPTORS = 64

# ECMA-119, 8.1.1: volume descriptor types.
TYPE_BOOT = 0
TYPE_PRIMARY = 1
TYPE_SUPPLEMENTARY = 2
TYPE_TERMINATOR = 255

DESCRIPTOR_HEADER = Struct("type" / Int8ul, "identifier" / Const(b"CD001"), "version" / Int8ul)

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
MAX_CATALOG_ENTRIES = SECTOR_SIZE // CATALOG_ENTRY_SIZE
VALIDATION_ENTRY = Struct("header" / Int8ul, "platform" / Int8ul, Padding(28), "key" / Const(b"\x55\xaa"))
BOOT_ENTRY = Struct(
    "indicator" / Int8ul,
    "media" / Int8ul,
    "segment" / Int16ul,
    "system" / Int8ul,
    Padding(1),
    "count" / Int16ul,
    "lba" / Int32ul,
)
SECTION_HEADER = Struct("indicator" / Int8ul, "platform" / Int8ul, "count" / Int16ul)

# --- the graft -----------------------------------------------------------------------------------------------------

#: ECMA-119, 8.4.32: "application use" is bytes 883 to 1394 of the descriptor; the last quarter of it holds the locator.
LOCATOR_OFFSET = FIRST_DESCRIPTOR * SECTOR_SIZE + 883 + 384
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
