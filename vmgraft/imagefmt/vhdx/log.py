"""The log: whether it holds changes that must be replayed before anything else in the file can be believed (2.3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vmgraft.imagefmt.contract import Kind
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.vhdx import _layout as lay
from vmgraft.imagefmt.vhdx.crc32c import checksum
from vmgraft.imagefmt.vhdx.header import Header


def is_dirty(flat: FlatFile, header: Header) -> bool:
    """Return whether the log holds an entry that counts.

    A log GUID of zeros says that there is none. Otherwise any sound entry with that GUID is taken for one to replay:
    a log that is merely left over is refused by mistake sooner than one in use is overlooked. The same holds for logs
    that would take long to look through.
    """
    if not any(header.log_guid) or not header.log_length:
        return False
    if header.log_length > lay.MAX_LOG_SEARCH:
        return True
    checked = 0
    for offset, length in _candidates(flat, header):
        checked += length
        if checked > lay.MAX_LOG_CHECK or _is_sound(flat, header, offset, length):
            return True
    return False


def _candidates(flat: FlatFile, header: Header) -> Iterator[tuple[int, int]]:
    """Yield place and length of what begins like an entry of this log."""
    end = min(header.log_offset + header.log_length, flat.size)
    for extent in flat.extents_from(header.log_offset, end):
        if extent.kind is not Kind.DATA:
            continue
        first = extent.start // lay.LOG_SECTOR * lay.LOG_SECTOR
        for base in range(first, extent.start + extent.length, lay.MIB):
            window = flat.read(base, min(lay.MIB, extent.start + extent.length - base))
            for position in range(0, len(window) - lay.LOG_SECTOR + 1, lay.LOG_SECTOR):
                if window.startswith(lay.LOG_ENTRY_SIGNATURE, position) and window.startswith(
                    header.log_guid, position + lay.LOG_ENTRY_GUID_OFFSET
                ):
                    offset, head = base + position, window[position : position + lay.LOG_SECTOR]
                    entry: Any = parse_struct(lay.LOG_ENTRY, head, file=flat.path, offset=offset, what="log")
                    length = entry.entry_length
                    if length % lay.LOG_SECTOR == 0 and 0 < length <= header.log_length:
                        yield offset, length


def _is_sound(flat: FlatFile, header: Header, offset: int, length: int) -> bool:
    """Compare the checksum of an entry, which may go on at the beginning of the log."""
    end = header.log_offset + header.log_length
    data = flat.read(offset, min(length, end - offset))
    data += flat.read(header.log_offset, length - len(data))
    stored = int.from_bytes(data[lay.CHECKSUM_OFFSET : lay.CHECKSUM_OFFSET + 4], "little")
    return len(data) == length and checksum(data, lay.CHECKSUM_OFFSET) == stored
