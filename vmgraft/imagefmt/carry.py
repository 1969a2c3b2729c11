"""Taking sections over from one record to the next, one at a time in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmgraft.imagefmt.blob import CHUNK, Blob
from vmgraft.imagefmt.record import Record, Section, SectionKind, StoredSection


class SectionBlob(Blob):
    """The raw bytes of a stored section, decompressed and checked against the table whenever they are read.

    Args:
        record: The record; what its bytes are read from must outlive this object.
        section: One of its sections, of a known kind.
    """

    def __init__(self, record: Record, section: StoredSection) -> None:
        self.size = section.raw_size
        self.sha256 = section.raw_sha256  # what raw() compares with
        self._record, self._section = record, section

    def read(self, offset: int, length: int) -> bytes:
        """Return a part of the section.

        Raises:
            GraftFormatError: when the section is damaged.
        """
        return self._record.raw(self._section)[offset : offset + length] if offset >= 0 and length > 0 else b""

    def chunks(self) -> Iterator[bytes]:
        """Yield everything in order, decompressed once."""
        raw = self._record.raw(self._section)
        for offset in range(0, len(raw), CHUNK):
            yield raw[offset : offset + CHUNK]


def take_sections(record: Record, kinds: Sequence[SectionKind]) -> list[Section]:
    """Return the sections of the given kinds for another record: same bytes, same flags, same order."""
    return [
        Section(SectionKind(stored.kind), SectionBlob(record, stored), stored.compressed, stored.critical)
        for stored in record.of_kind(*kinds)
    ]
