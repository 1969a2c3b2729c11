"""The second central directory and end records: those of the archive, their offsets changed."""

from __future__ import annotations

from vmgraft.imagefmt.zip import _layout as layout
from vmgraft.imagefmt.zip.directory import EndRecords


def shifted_tail(original: bytes, records: EndRecords, directory: int) -> bytes:
    """Return the archive's bytes from its central directory on, as they have to be at another place.

    Args:
        original: The bytes from ``records.directory_offset`` to the archive's end.
        records: Its end records.
        directory: Where the directory is going to lie, as a file offset in bytes.
    """
    tail = bytearray(original)
    shift = directory - records.directory_offset
    end_at = records.offset - records.directory_offset + layout.END_DIRECTORY_OFFSET
    stated = int.from_bytes(tail[end_at : end_at + 4], "little")
    if records.zip64_offset is not None:
        zip64_at = records.zip64_offset - records.directory_offset
        _add(tail, zip64_at + layout.END64_DIRECTORY_OFFSET, shift)
        locator_at = records.offset - layout.LOCATOR64_SIZE - records.directory_offset
        _add(tail, locator_at + layout.LOCATOR64_OFFSET, shift)
    if stated != layout.MARK32 or records.zip64_offset is None:
        # What does not fit any more is left to the ZIP64 record; without one, attach has refused before.
        tail[end_at : end_at + 4] = min(stated + shift, layout.MARK32).to_bytes(4, "little")
    return bytes(tail)


def fits(records: EndRecords, directory: int) -> bool:
    """Return whether the end records can state a directory at file offset ``directory``."""
    return records.zip64_offset is not None or directory - records.base < layout.MARK32


def _add(data: bytearray, at: int, shift: int) -> None:
    value = (int.from_bytes(data[at : at + 8], "little") + shift) & ((1 << 64) - 1)
    data[at : at + 8] = value.to_bytes(8, "little")
