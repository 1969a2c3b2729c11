"""Reading the end records and the central directory of a ZIP archive.

Whatever programs could read in two ways is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.zip import _layout as layout


@dataclass(frozen=True, slots=True)
class EndRecords:
    """What the end of an archive says. Offsets are file offsets in bytes.

    Attributes:
        end: Where the archive ends.
        offset: Where its end of central directory record begins.
        zip64_offset: Where its ZIP64 end record begins, or None.
        directory_offset: Where its central directory really begins.
        directory_size: Length of the directory in bytes.
        entries: How many entries it has.
        base: What has to be added to the offsets that the archive states: bytes that were put before it.
    """

    end: int
    offset: int
    zip64_offset: int | None
    directory_offset: int
    directory_size: int
    entries: int
    base: int

    @property
    def tail_size(self) -> int:
        """Bytes from the central directory to the end."""
        return self.end - self.directory_offset


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Sizes and places as the end record or the ZIP64 end record states them."""

    entries: int
    directory_size: int
    directory_offset: int


def read_end(file: FlatFile, end: int) -> EndRecords:
    """Read the end records of the archive that ends at ``end``.

    Raises:
        MalformedImageError: when there are none, or they contradict each other or the file.
        UnsupportedError: when the archive consists of several files.
    """
    offset = _find_end_record(file, end)
    raw = _parse(file, layout.END_RECORD, offset, layout.END_SIZE, "end record")
    numbers, zip64, end64 = _Numbers(raw.entries, raw.directory_size, raw.directory_offset), None, None
    locator_offset = offset - layout.LOCATOR64_SIZE
    if locator_offset >= 0 and file.read(locator_offset, 4) == layout.LOCATOR64_SIGNATURE:
        zip64 = _parse(file, layout.LOCATOR64, locator_offset, layout.LOCATOR64_SIZE, "ZIP64 locator")
        end64 = _find_end64(file, locator_offset, zip64.offset)
        numbers = _read_end64(file, end64, raw)
        if zip64.disk or zip64.disks > 1:
            raise _split(file, locator_offset)
    elif layout.MARK32 in (raw.directory_size, raw.directory_offset):
        raise _bad(file, offset, "directory_offset", "the end record refers to a ZIP64 record that is not there")
    _check_disks(file, raw, offset, zip64 is not None)
    found = _place(file, numbers, end64, offset, end)
    if zip64 is not None and end64 is not None and zip64.offset + found.base != end64:
        message = f"the ZIP64 end record is at {end64 - found.base}, and its locator says {zip64.offset}"
        raise _bad(file, locator_offset, "zip64_locator.offset", message)
    return found


def _find_end_record(file: FlatFile, end: int) -> int:
    """Return where the end record begins: the only one that ends with the file, and the last of which there is a trace.

    Programs differ in which of several they take.
    """
    start = max(0, end - layout.END_SIZE - layout.MAX_COMMENT)
    window = file.read(start, end - start)
    last = at = window.rfind(layout.END_SIGNATURE)
    found = []
    while at >= 0:
        comment = int.from_bytes(window[at + 20 : at + 22], "little")
        if at + layout.END_SIZE + comment == end - start:
            found.append(at)
        at = window.rfind(layout.END_SIGNATURE, 0, at + len(layout.END_SIGNATURE) - 1)
    if not found:
        message = "no end of central directory record ends with the file: it was cut, or something was appended"
        hint = "if this is a raw disk that only begins like an archive, use --image-format raw"
        raise _bad(file, max(0, end - layout.END_SIZE), "end record", message, hint)
    if found != [last]:
        message = "the comment holds a second end of central directory record: programs see different archives"
        raise _bad(file, start + last, "comment", message)
    return start + last


def _find_end64(file: FlatFile, end: int, stated: int) -> int:
    """Return where the ZIP64 end record begins that ends at ``end``, where its locator begins."""
    usual = end - layout.END64_SIZE
    for offset in (usual, stated):
        if not max(0, end - layout.MAX_END64) <= offset <= usual:
            continue
        head = file.read(offset, layout.END64_UNCOUNTED)
        length = int.from_bytes(head[4:], "little") + layout.END64_UNCOUNTED
        if head.startswith(layout.END64_SIGNATURE) and offset + length == end:
            return offset
    message = "no ZIP64 end of central directory record ends where its locator begins"
    raise _bad(file, end, "zip64_locator.offset", message)


def _read_end64(file: FlatFile, offset: int, short: Any) -> _Numbers:
    raw = _parse(file, layout.END64_RECORD, offset, layout.END64_SIZE, "ZIP64 end record")
    if raw.disk or raw.directory_disk or raw.entries_here != raw.entries:
        raise _split(file, offset)
    pairs = (
        ("entries", short.entries, raw.entries, layout.MARK16),
        ("directory_size", short.directory_size, raw.directory_size, layout.MARK32),
        ("directory_offset", short.directory_offset, raw.directory_offset, layout.MARK32),
    )
    for name, narrow, wide, mark in pairs:
        if narrow not in (wide, mark):
            message = f"the end record says {narrow}, the ZIP64 end record {wide}: programs see different archives"
            raise _bad(file, offset, name, message)
    return _Numbers(raw.entries, raw.directory_size, raw.directory_offset)


def _check_disks(file: FlatFile, raw: Any, offset: int, zip64: bool) -> None:
    allowed = (0, layout.MARK16) if zip64 else (0,)
    if raw.disk not in allowed or raw.directory_disk not in allowed or raw.entries_here != raw.entries:
        raise _split(file, offset)


def _place(file: FlatFile, numbers: _Numbers, end64: int | None, offset: int, end: int) -> EndRecords:
    """Put the directory where it must be, right before the end records, and compare."""
    size = numbers.directory_size
    start = (offset if end64 is None else end64) - size
    if start < 0:
        raise _bad(file, offset, "directory_size", f"a central directory of {size} bytes is longer than the file")
    if numbers.entries * layout.ENTRY_SIZE > size or (size and not numbers.entries):
        message = f"a central directory of {size} bytes does not hold {numbers.entries} entries"
        raise _bad(file, offset, "entries", message)
    base = start - numbers.directory_offset
    if base < 0:
        message = f"the central directory is at {start}, and the end record says {numbers.directory_offset}"
        raise _bad(file, offset, "directory_offset", message)
    if size and file.read(start, 4) != layout.ENTRY_SIGNATURE:
        raise _bad(file, start, "central directory", "no central directory ends where the end records begin")
    if base and file.read(numbers.directory_offset, 4) == layout.ENTRY_SIGNATURE:
        message = "there are two central directories, and programs see different archives"
        raise _bad(file, numbers.directory_offset, "central directory", message)
    return EndRecords(
        end=end,
        offset=offset,
        zip64_offset=end64,
        directory_offset=start,
        directory_size=size,
        entries=numbers.entries,
        base=base,
    )


def check_directory(file: FlatFile, records: EndRecords) -> None:
    """Walk the central directory: whole entries, as many as stated, and none that lies behind it.

    Such an entry is a dead one now, and would be a part of the record after attach.

    Raises:
        MalformedImageError: when it is not so.
        UnsupportedError: when it is too long, or an entry lies in another file.
    """
    start = records.directory_offset
    if records.directory_size > layout.MAX_DIRECTORY:
        message = f"a central directory of {records.directory_size} bytes, at most {layout.MAX_DIRECTORY} are supported"
        raise UnsupportedError(message, file=file.path, offset=start, field="central directory")
    data, at, count = file.read(start, records.directory_size), 0, 0
    limit = start - records.base - layout.LOCAL_SIZE
    while at < len(data):
        if len(data) - at < layout.ENTRY_SIZE or not data.startswith(layout.ENTRY_SIGNATURE, at):
            raise _bad(file, start + at, "central directory", f"entry {count} is none")
        _, packed, raw, name, extra, comment, disk, local = layout.ENTRY.unpack_from(data, at)
        extra_at = at + layout.ENTRY_SIZE + name
        if layout.MARK32 in (packed, raw, local) or disk == layout.MARK16:
            local, disk = _read_extra(data[extra_at : extra_at + extra], (raw, packed, local, disk))
        if disk:
            raise _split(file, start + at)
        if local > limit:
            raise _bad(file, start + at, "local_header_offset", f"entry {count} lies at {local}, behind all entries")
        at, count = extra_at + extra + comment, count + 1
    if at != len(data) or count != records.entries:
        message = (
            f"the central directory holds {count} entries in {at} bytes; {records.entries} and {len(data)} are stated"
        )
        raise _bad(file, start, "entries", message)


def _read_extra(extra: bytes, fields: tuple[int, int, int, int]) -> tuple[int, int]:
    """Return offset of the local header and disk number, from the ZIP64 extra field where they are only marked."""
    _, _, local, disk = fields
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        at += 4
        if kind == layout.EXTRA_ZIP64:
            wide = extra[at : at + length]
            skip = 8 * sum(value == layout.MARK32 for value in fields[:2])
            if local == layout.MARK32:
                local = int.from_bytes(wide[skip : skip + 8], "little")
                skip += 8
            if disk == layout.MARK16:
                disk = int.from_bytes(wide[skip : skip + 4], "little")
            break
        at += length
    return local, disk


def _parse(file: FlatFile, what: Any, offset: int, size: int, name: str) -> Any:
    return parse_struct(what, file.read(offset, size), file=file.path, offset=offset, what=name)


def _split(file: FlatFile, offset: int) -> UnsupportedError:
    return UnsupportedError(
        "the archive consists of several files",
        file=file.path,
        offset=offset,
        field="disk number",
        hint="join them: zip -s 0 ARCHIVE --out WHOLE",
    )


def _bad(file: FlatFile, offset: int, field: str, message: str, hint: str | None = None) -> MalformedImageError:
    return MalformedImageError(message, file=file.path, offset=offset, field=field, hint=hint)
