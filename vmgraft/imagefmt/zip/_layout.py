"""Structures, numbers and limits of ZIP archives, and where the parts of a graft lie.

Source: PKWARE, ".ZIP File Format Specification" (APPNOTE.TXT) 6.3.10. Everything is little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from construct import Const, Int16ul, Int32ul, Int64ul, Struct

from vmgraft.imagefmt._layout import LOCATOR_SIZE

# --- 4.3.16: end of central directory record -----------------------------------------------------------------------

END_SIGNATURE = b"PK\5\6"
END_SIZE = 22
#: The comment's length has 16 bits.
MAX_COMMENT = 0xFFFF
#: Offset of the directory's offset in the record.
END_DIRECTORY_OFFSET = 16
END_RECORD = Struct(
    "signature" / Const(END_SIGNATURE),
    "disk" / Int16ul,
    "directory_disk" / Int16ul,
    "entries_here" / Int16ul,
    "entries" / Int16ul,
    "directory_size" / Int32ul,
    "directory_offset" / Int32ul,
    "comment_size" / Int16ul,
)
#: 4.4.1.4: values that say "look into the ZIP64 record".
MARK16 = 0xFFFF
MARK32 = 0xFFFFFFFF

# --- 4.3.14 and 4.3.15: ZIP64 end of central directory record and its locator ---------------------------------------

END64_SIGNATURE = b"PK\6\6"
END64_SIZE = 56
#: What the record's own size field does not count.
END64_UNCOUNTED = 12
#: The record may end in an "extensible data sector"; longer records than this are refused.
MAX_END64 = 1 << 16
END64_DIRECTORY_OFFSET = 48
END64_RECORD = Struct(
    "signature" / Const(END64_SIGNATURE),
    "record_size" / Int64ul,
    "version_made_by" / Int16ul,
    "version_needed" / Int16ul,
    "disk" / Int32ul,
    "directory_disk" / Int32ul,
    "entries_here" / Int64ul,
    "entries" / Int64ul,
    "directory_size" / Int64ul,
    "directory_offset" / Int64ul,
)
LOCATOR64_SIGNATURE = b"PK\6\7"
LOCATOR64_SIZE = 20
LOCATOR64_OFFSET = 8
LOCATOR64 = Struct("signature" / Const(LOCATOR64_SIGNATURE), "disk" / Int32ul, "offset" / Int64ul, "disks" / Int32ul)

# --- 4.3.12: central directory header; struct and not Construct, as there may be hundreds of thousands ---------------

ENTRY_SIGNATURE = b"PK\1\2"
ENTRY_SIZE = 46
#: Compressed size, uncompressed size, lengths of name, extra field and comment, disk number, local header's offset.
ENTRY = struct.Struct("<4s16xIIHHHH6xI")
LOCAL_SIZE = 30
#: 4.5.3: identifier of the ZIP64 extra field.
EXTRA_ZIP64 = 1
#: An archive whose central directory is longer is not grafted: it is held in memory once.
MAX_DIRECTORY = 32 << 20

# --- the graft -----------------------------------------------------------------------------------------------------

#: APK Signature Scheme v2, "APK Signing Block": the 16 bytes before the central directory.
APK_MAGIC = b"APK Sig Block 42"
SECTOR = 512
PAGE = 4096
#: How far before the central directory a locator is looked for that another program moved away from it, in bytes.
ORPHAN_SCAN = 1 << 20
#: How far before the end of a file without sound end records a locator is looked for, in bytes, and how many are tried.
RESCUE_SCAN = MAX_DIRECTORY + (1 << 20)
MAX_TRACES = 16


def round_up(value: int, multiple: int) -> int:
    """Return ``value`` rounded up to ``multiple``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Appendix:
    """Places behind the archive as file offsets in bytes, implied by three sizes.

    Attributes:
        file_size: Size of the archive before attach.
        record_size: Length of an inline record; 0 when it is in a sidecar.
        tail_size: Bytes of the archive from its central directory to its end.
    """

    file_size: int
    record_size: int
    tail_size: int

    @property
    def record(self) -> int:
        """Offset of the record."""
        return round_up(self.file_size, SECTOR)

    @property
    def locator(self) -> int:
        """Offset of the locator, which the directory follows; both within one page if they fit into one."""
        offset = round_up(self.record + self.record_size, SECTOR)
        length = LOCATOR_SIZE + self.tail_size
        if length <= PAGE < offset % PAGE + length:
            offset = round_up(offset, PAGE)
        return offset

    @property
    def directory(self) -> int:
        """Offset of the second central directory."""
        return self.locator + LOCATOR_SIZE

    @property
    def end(self) -> int:
        """Offset behind the second end record, the size of the grafted file."""
        return self.directory + self.tail_size
