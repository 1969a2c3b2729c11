"""Laying out a record: one section at a time in memory, large ones written to a nameless file."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt import _layout as layout
from vmgraft.imagefmt.blob import SMALL, Blob, BytesBlob, Spool, blob_of
from vmgraft.imagefmt.record import Section, SectionKind, check_counts, check_total
from vmgraft.imagefmt.zstd import compress


def build_record(sections: Sequence[Section]) -> bytes:
    """Lay out a small record in memory; see :func:`assemble_record`."""
    return assemble_record(sections, None).read_all()


def assemble_record(sections: Sequence[Section], folder: Path | None) -> Blob:
    """Lay out a record. Equal sections give equal bytes; manifests, modules and files are stored once per digest.

    The UNDO section is put first: if the record's end is ever lost, the way back is what survives. One section at a
    time is in memory.

    Args:
        sections: What the record holds.
        folder: Where a record of more than 4 MiB is laid out, in a nameless file; None: always in memory.

    Raises:
        GraftFormatError: when the sections are over a limit of the format.
        FileError: when the nameless file cannot be written.
    """
    ordered = sorted(_unique(sections), key=lambda section: section.kind is not SectionKind.UNDO)
    check_counts([section.kind for section in ordered], file=None, offset=None)
    total = sum(blob_of(section.raw).size for section in ordered)
    check_total(total, file=None, offset=None)
    sink = Spool(folder) if folder is not None and total > SMALL else _Memory()
    try:
        return _lay_out(ordered, sink)
    except BaseException:
        sink.close()
        raise


class _Memory:
    """What a :class:`Spool` is, for small records."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, offset: int, data: bytes) -> None:
        self._data.extend(bytes(max(0, offset - len(self._data))))
        self._data[offset : offset + len(data)] = data

    def finish(self, size: int) -> Blob:
        return BytesBlob(bytes(self._data[:size]))

    def close(self) -> None:
        self._data.clear()


def _lay_out(sections: Sequence[Section], sink: Spool | _Memory) -> Blob:
    """Write the sections, then header and table before them; their place is known from their count."""
    position = layout.RECORD_HEADER_SIZE + layout.SECTION_ENTRY_SIZE * len(sections)
    table = b""
    for section in sections:
        raw = _checked_raw(section)
        stored, flags = _store(section, raw)
        table += _entry(section.kind, flags, position, stored, raw)
        sink.write(position, stored)
        position += len(stored)
    if position > layout.MAX_RECORD_SIZE:
        raise GraftFormatError(f"the record would be {position} bytes long, at most {layout.MAX_RECORD_SIZE} allowed")
    header = _header(position, len(sections), bytes(32))
    sink.write(0, _header(position, len(sections), sha256(header + table).digest()) + table)
    return sink.finish(position)


def _unique(sections: Sequence[Section]) -> list[Section]:
    """Drop repeated payloads, keeping the first of each."""
    shared = (SectionKind.MANIFEST, SectionKind.MODULE, SectionKind.FILES)
    seen: set[tuple[int, bytes]] = set()
    kept = []
    for section in sections:
        name = (section.kind, blob_of(section.raw).sha256)
        if section.kind in shared and name in seen:
            continue
        seen.add(name)
        kept.append(section)
    return kept


def _checked_raw(section: Section) -> bytes:
    """Return a section's bytes, once they are known to be few enough."""
    raw = blob_of(section.raw)
    if raw.size > layout.MAX_RAW_SIZE:
        raise GraftFormatError(
            f"{section.kind.name} section of {raw.size} bytes, at most {layout.MAX_RAW_SIZE} allowed",
            field="section.raw_size",
        )
    data = raw.read_all()
    if len(data) != raw.size:
        raise GraftFormatError(f"{section.kind.name} section: the file became shorter while it was read")
    return data


def _store(section: Section, raw: bytes) -> tuple[bytes, int]:
    """Return a section's stored bytes and flags."""
    flags = layout.SECTION_CRITICAL if section.critical else 0
    if section.compress:
        packed = compress(raw)
        # A reader refuses higher ratios, so such a section is stored as it is.
        if len(packed) < len(raw) <= len(packed) * layout.MAX_RATIO:
            return packed, flags | layout.SECTION_COMPRESSED
    return raw, flags


def _entry(kind: SectionKind, flags: int, position: int, stored: bytes, raw: bytes) -> bytes:
    return bytes(
        layout.SECTION_ENTRY.build(
            {
                "kind": kind.value,
                "flags": flags,
                "offset": position,
                "stored_size": len(stored),
                "raw_size": len(raw),
                "stored_sha256": sha256(stored).digest(),
                "raw_sha256": sha256(raw).digest(),
            }
        )
    )


def _header(record_size: int, section_count: int, digest: bytes) -> bytes:
    return bytes(
        layout.RECORD_HEADER.build(
            {
                "major": layout.VERSION_MAJOR,
                "minor": layout.VERSION_MINOR,
                "header_size": layout.RECORD_HEADER_SIZE,
                "record_size": record_size,
                "flags": 0,
                "section_count": section_count,
                "sha256": digest,
            }
        )
    )
