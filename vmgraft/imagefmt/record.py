"""The graft record: header, section table, sections; the same bytes in every container.

Digests are layered so that a damaged byte can be laid at one door (docs/adr/0002-record-digests.md): the header's
SHA-256 covers header and table, the table holds for every section the SHA-256 of the bytes as stored, checked before
they are decompressed, and of the raw bytes, which is what signed digests refer to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import sha256
from os import PathLike, fspath
from typing import Any

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt import _layout as layout
from vmgraft.imagefmt.blob import Blob, blob_of
from vmgraft.imagefmt.contract import Undo
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.undo import parse_undo
from vmgraft.imagefmt.zstd import decompress


class SectionKind(IntEnum):
    """What a section holds."""

    ENVELOPE = 1  #: a DSSE envelope, JSON
    MANIFEST = 2  #: an extension's manifest
    MODULE = 3  #: an extension's WebAssembly module
    FILES = 4  #: a piece of an extension's further files
    UNDO = 5  #: what detach needs
    TREE = 6  #: levels of the content tree
    HINTS = 7  #: unsigned facts


#: Kinds of which a record holds at most one.
_SINGLE = (SectionKind.UNDO, SectionKind.TREE, SectionKind.HINTS)
#: Longest header and table.
_HEAD_MAX = layout.RECORD_HEADER_MAX + layout.MAX_SECTIONS * layout.SECTION_ENTRY_SIZE
_KNOWN_FLAGS = layout.SECTION_CRITICAL | layout.SECTION_COMPRESSED


@dataclass(frozen=True, slots=True)
class Section:
    """A section to be written.

    Attributes:
        kind: What it holds.
        raw: Its bytes, at most 64 MiB; a blob is read when the record is built.
        compress: Store it with zstd where that makes it smaller.
        critical: A reader that does not know the kind must refuse the record.
    """

    kind: SectionKind
    raw: bytes | Blob
    compress: bool = False
    critical: bool = True


@dataclass(frozen=True, slots=True)
class StoredSection:
    """A section as the table of a record describes it; sizes and offsets in bytes, ``offset`` within the record."""

    index: int
    kind: int
    critical: bool
    compressed: bool
    offset: int
    stored_size: int
    raw_size: int
    stored_sha256: bytes
    raw_sha256: bytes

    @property
    def name(self) -> str:
        """The kind's name, or ``kind N`` for one of a later version."""
        known = {kind.value: kind.name for kind in SectionKind}
        return known.get(self.kind, f"kind {self.kind}")


@dataclass(frozen=True, slots=True)
class Record:
    """A record whose header and table are sound; sections are read and checked when they are asked for."""

    data: Blob
    file: str | None
    offset: int
    version: tuple[int, int]
    sections: tuple[StoredSection, ...]

    def of_kind(self, *kinds: SectionKind) -> tuple[StoredSection, ...]:
        """Return the sections of the given kinds, in order."""
        return tuple(section for section in self.sections if section.kind in kinds)

    def stored(self, section: StoredSection) -> bytes:
        """Return a section's bytes as stored, unchecked."""
        return self.data.read(section.offset, section.stored_size)

    def raw(self, section: StoredSection) -> bytes:
        """Return a section's raw bytes.

        Raises:
            GraftFormatError: when a digest does not match, or the bytes do not decompress to exactly the size stated.
        """
        stored = self.stored(section)
        digest = sha256(stored).digest()
        if digest != section.stored_sha256:
            raise self._damaged(section, "stored bytes do not match their digest", "stored_sha256")
        raw = stored
        if section.compressed:
            raw = decompress(stored, section.raw_size, file=self.file, offset=self.offset + section.offset)
            digest = sha256(raw).digest()
        if digest != section.raw_sha256:
            raise self._damaged(section, "raw bytes do not match their digest", "raw_sha256")
        return raw

    def undo(self) -> Undo:
        """Return the parsed UNDO section.

        Raises:
            GraftFormatError: when there is none, or it is damaged.
        """
        sections = self.of_kind(SectionKind.UNDO)
        if len(sections) != 1:
            raise GraftFormatError("the record has no UNDO section", file=self.file, offset=self.offset, field="undo")
        return parse_undo(self.raw(sections[0]), file=self.file, offset=self.offset + sections[0].offset)

    def _damaged(self, section: StoredSection, message: str, field: str) -> GraftFormatError:
        return GraftFormatError(
            f"{section.name} section: {message}",
            file=self.file,
            offset=self.offset + section.offset,
            field=f"section[{section.index}].{field}",
        )


def parse_record(data: Blob | bytes, *, file: str | PathLike[str] | None, offset: int) -> Record:
    """Parse the structure of a record; the sections' own digests are checked by :meth:`Record.raw`.

    Args:
        data: Exactly the record.
        file: Where it comes from, for messages.
        offset: Where in that file it begins, in bytes.

    Raises:
        GraftFormatError: when header or table are malformed, damaged, over a limit, or critical and unknown.
    """
    blob = blob_of(data)
    return _parse(blob, blob.size, file, offset)


def parse_record_head(data: Blob | bytes, *, file: str | PathLike[str] | None, offset: int) -> Record:
    """Parse a record of which only the first part is at hand: header and table must be there, sections may not.

    Raises:
        GraftFormatError: as :func:`parse_record`.
    """
    return _parse(blob_of(data), None, file, offset)


def _parse(blob: Blob, size: int | None, file: str | PathLike[str] | None, offset: int) -> Record:
    def refuse(message: str, field: str) -> GraftFormatError:
        return GraftFormatError(message, file=file, offset=offset, field=f"record.{field}")

    data = blob.read(0, _HEAD_MAX)
    header = parse_struct(layout.RECORD_HEADER, data, file=file, offset=offset, what="record", error=GraftFormatError)
    if header.major != layout.VERSION_MAJOR:
        raise refuse(f"format version {header.major}.{header.minor} is not readable by this release", "major")
    if header.record_size > layout.MAX_RECORD_SIZE or (size is not None and header.record_size != size):
        raise refuse(f"record size {header.record_size} does not match what is there", "record_size")
    if not layout.RECORD_HEADER_SIZE <= header.header_size <= layout.RECORD_HEADER_MAX:
        raise refuse(f"header size {header.header_size} is outside the limits", "header_size")
    if header.minor == layout.VERSION_MINOR and header.header_size != layout.RECORD_HEADER_SIZE:
        raise refuse(f"header size {header.header_size} does not fit version 1.0", "header_size")
    if header.flags:
        raise refuse(f"unknown record flags 0x{header.flags:x}", "flags")
    if not 1 <= header.section_count <= layout.MAX_SECTIONS:
        raise refuse(f"{header.section_count} sections, 1 to {layout.MAX_SECTIONS} allowed", "section_count")
    table_end = header.header_size + layout.SECTION_ENTRY_SIZE * header.section_count
    if table_end > min(header.record_size, blob.size, len(data)):
        raise refuse("the section table does not fit into the record", "section_count")
    digest_end = layout.RECORD_DIGEST_OFFSET + 32
    covered = data[: layout.RECORD_DIGEST_OFFSET] + bytes(32) + data[digest_end:table_end]
    if sha256(covered).digest() != header.sha256:
        raise refuse("header and section table do not match their digest", "sha256")
    sections = _parse_table(data[header.header_size : table_end], header, file, offset)
    return Record(blob, None if file is None else fspath(file), offset, (header.major, header.minor), sections)


def _parse_table(table: bytes, header: Any, file: str | PathLike[str] | None, offset: int) -> tuple[StoredSection, ...]:
    """Parse the section table; sections must follow it and each other without gap or overlap."""
    sections: list[StoredSection] = []
    position = header.header_size + len(table)
    for index in range(header.section_count):
        start = index * layout.SECTION_ENTRY_SIZE
        where = offset + header.header_size + start
        entry = parse_struct(
            layout.SECTION_ENTRY,
            table[start : start + layout.SECTION_ENTRY_SIZE],
            file=file,
            offset=where,
            what=f"section[{index}]",
            error=GraftFormatError,
        )
        problem = _entry_problem(entry, position, header.record_size)
        if problem is not None:
            raise GraftFormatError(problem[1], file=file, offset=where, field=f"section[{index}].{problem[0]}")
        sections.append(_stored_section(index, entry))
        position += entry.stored_size
    if position != header.record_size:
        raise GraftFormatError(
            f"the sections end at {position}, the record at {header.record_size}",
            file=file,
            offset=offset,
            field="record.record_size",
        )
    check_counts([section.kind for section in sections], file=file, offset=offset)
    known = [section.raw_size for section in sections if section.kind in list(SectionKind)]
    check_total(sum(known), file=file, offset=offset)
    return tuple(sections)


def _entry_problem(entry: Any, position: int, record_size: int) -> tuple[str, str] | None:
    """Return (field, message) of the first thing wrong with a table entry, or None."""
    known = entry.kind in list(SectionKind)
    if not known and entry.flags & layout.SECTION_CRITICAL:
        return "kind", f"critical section of unknown kind {entry.kind}: a newer release is needed"
    if entry.offset != position:
        return "offset", f"the section begins at {entry.offset}, not at {position} where the one before it ends"
    if entry.stored_size > record_size - position:
        return "stored_size", f"stored size {entry.stored_size} reaches beyond the record"
    # A later version may give an unknown section's flags and raw size another meaning; nobody here acts on them.
    return _known_entry_problem(entry) if known else None


def _known_entry_problem(entry: Any) -> tuple[str, str] | None:
    if entry.flags & ~_KNOWN_FLAGS:
        return "flags", f"unknown section flags 0x{entry.flags:x}"
    if entry.raw_size > layout.MAX_RAW_SIZE:
        return "raw_size", f"raw size {entry.raw_size} is over {layout.MAX_RAW_SIZE}"
    if not entry.flags & layout.SECTION_COMPRESSED and entry.raw_size != entry.stored_size:
        return "raw_size", "raw and stored size of an uncompressed section differ"
    if entry.raw_size > entry.stored_size * layout.MAX_RATIO:
        return "raw_size", f"raw size {entry.raw_size} is over {layout.MAX_RATIO} times the stored size"
    return None


def _stored_section(index: int, entry: Any) -> StoredSection:
    return StoredSection(
        index=index,
        kind=entry.kind,
        critical=bool(entry.flags & layout.SECTION_CRITICAL),
        compressed=bool(entry.flags & layout.SECTION_COMPRESSED),
        offset=entry.offset,
        stored_size=entry.stored_size,
        raw_size=entry.raw_size,
        stored_sha256=bytes(entry.stored_sha256),
        raw_sha256=bytes(entry.raw_sha256),
    )


def check_counts(kinds: Sequence[int], *, file: str | PathLike[str] | None, offset: int | None) -> None:
    """Refuse too many sections, or two of a kind of which there may be one.

    Raises:
        GraftFormatError: a count is over its limit.
    """
    counts = Counter(kinds)

    def refuse(message: str) -> GraftFormatError:
        return GraftFormatError(message, file=file, offset=offset, field="record.section_count")

    if not 1 <= len(kinds) <= layout.MAX_SECTIONS:
        raise refuse(f"{len(kinds)} sections, 1 to {layout.MAX_SECTIONS} allowed")
    if counts[SectionKind.MANIFEST] > layout.MAX_EXTENSIONS:
        raise refuse(f"{counts[SectionKind.MANIFEST]} extensions, at most {layout.MAX_EXTENSIONS} allowed")
    for kind in _SINGLE:
        if counts[kind] > 1:
            raise refuse(f"{counts[kind]} {kind.name} sections, at most 1 allowed")


def check_total(size: int, *, file: str | PathLike[str] | None, offset: int | None) -> None:
    """Refuse a record that would keep a reader busy decompressing many sections, each of them within its limit."""
    if size > layout.MAX_TOTAL_RAW:
        message = f"all sections together have {size} raw bytes, at most {layout.MAX_TOTAL_RAW} allowed"
        raise GraftFormatError(message, file=file, offset=offset, field="section.raw_size")
