"""The two headers of a VHDX file, of which the valid one with the greater sequence number counts (2.2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.vhdx import _layout as lay
from vmgraft.imagefmt.vhdx.crc32c import checksum


@dataclass(frozen=True, slots=True)
class Header:
    """A header whose signature and checksum are sound. Sizes and offsets in bytes, GUIDs as stored."""

    raw: bytes
    sequence_number: int
    file_write_guid: bytes
    data_write_guid: bytes
    log_guid: bytes
    log_version: int
    version: int
    log_length: int
    log_offset: int


@dataclass(frozen=True, slots=True)
class Headers:
    """Both headers as found.

    Attributes:
        raw: The bytes of both places, 4 KiB each.
        parsed: What they say; None where one is not sound.
        slot: Which of them counts, 0 or 1.
    """

    raw: tuple[bytes, bytes]
    parsed: tuple[Header | None, Header | None]
    slot: int
    current: Header


def parse_header(raw: bytes) -> Header | None:
    """Return a header, or None when signature or checksum are wrong: then it was never written, or only in part."""
    if len(raw) != lay.HEADER_SIZE or not raw.startswith(b"head"):
        return None
    fields = parse_struct(lay.HEADER, raw, file=None, offset=0, what="header")
    if fields.checksum != checksum(raw, lay.CHECKSUM_OFFSET):
        return None
    return Header(
        raw=raw,
        sequence_number=fields.sequence_number,
        file_write_guid=bytes(fields.file_write_guid),
        data_write_guid=bytes(fields.data_write_guid),
        log_guid=bytes(fields.log_guid),
        log_version=fields.log_version,
        version=fields.version,
        log_length=fields.log_length,
        log_offset=fields.log_offset,
    )


def choose_header(raw: tuple[bytes, bytes]) -> Headers | None:
    """Return both headers and which counts; None when none does, or both say that they do.

    Two identical headers are taken, as QEMU does: the specification has none, but some converters write them.
    """
    first, second = parse_header(raw[0]), parse_header(raw[1])
    if first is not None and second is not None:
        if first.sequence_number == second.sequence_number and raw[0] != raw[1]:
            return None
        slot = int(second.sequence_number > first.sequence_number)
        return Headers(raw, (first, second), slot, second if slot else first)
    if first is not None:
        return Headers(raw, (first, None), 0, first)
    return None if second is None else Headers(raw, (None, second), 1, second)


def read_headers(flat: FlatFile) -> Headers:
    """Read and check the file identifier and the headers.

    Raises:
        MalformedImageError: no header is sound, both have the same sequence number, or the log lies astray.
        UnsupportedError: the file is of a version that is not known here.
    """
    if flat.read(0, len(lay.SIGNATURE)) != lay.SIGNATURE:
        raise MalformedImageError("this is no VHDX file", file=flat.path, offset=0, field="signature")
    if flat.size < lay.HEADER_SECTION_SIZE:
        message = f"the file has {flat.size} bytes, and the header section alone takes {lay.HEADER_SECTION_SIZE}"
        raise MalformedImageError(message, file=flat.path, offset=flat.size, field="file identifier")
    first, second = (flat.read(offset, lay.HEADER_SIZE) for offset in lay.HEADER_OFFSETS)
    headers = choose_header((first, second))
    if headers is None:
        raise MalformedImageError(
            "neither of the two headers can be used: wrong checksums, or equal sequence numbers",
            file=flat.path,
            offset=lay.HEADER_OFFSETS[0],
            field="header",
            hint="restore the image from a copy",
        )
    _check(headers, flat.path, flat.size)
    return headers


def _check(headers: Headers, file: Path, size: int) -> None:
    header, offset = headers.current, lay.HEADER_OFFSETS[headers.slot]
    if header.version != lay.VERSION:
        message = f"version {header.version} of the format is not supported"
        raise UnsupportedError(message, file=file, offset=offset, field="header.version")
    if any(header.log_guid) and header.log_version:
        message = f"version {header.log_version} of the log is not supported"
        raise UnsupportedError(message, file=file, offset=offset, field="header.log_version")
    if header.log_offset % lay.MIB or header.log_length % lay.MIB or header.log_offset < lay.HEADER_SECTION_SIZE:
        message = f"the log ({header.log_length} bytes at {header.log_offset}) is not in a place of whole MiB"
        raise MalformedImageError(message, file=file, offset=offset, field="header.log_offset")
    if header.log_offset + header.log_length > size:
        message = f"the log ({header.log_length} bytes at {header.log_offset}) ends behind the end of the file ({size})"
        raise MalformedImageError(message, file=file, offset=offset, field="header.log_length")
