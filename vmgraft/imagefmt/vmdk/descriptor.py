"""The embedded descriptor: text in a fixed number of sectors, padded with NULs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, NoReturn

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.vmdk import _layout as lay

#: First line; VirtualBox accepts it with and without the spaces.
_TITLE: Final = re.compile(rb"#\s?Disk Descriptor\s?File", re.IGNORECASE)
_ENTRY: Final = re.compile(rb'([A-Za-z][\w.:-]*)\s*=\s*(?:"(.*)"|(.*))')
_EXTENT: Final = re.compile(
    rb'(RW|RDONLY|NOACCESS)\s+(\d{1,19})\s+(\w+)(?:\s+"([^"]*)")?(?:\s+\d{1,19})?', re.IGNORECASE
)
#: Entries that may stand once: QEMU takes the first, others the last.
_SINGLE: Final = (b"version", b"CID", b"parentCID", b"createType", b"parentFileNameHint")
#: The whole line; its value is taken apart without backtracking, as others may have written it.
_OURS: Final = re.compile(rb"^ddb\.vmgraft[ \t]*=([^\n]*)(?:\n|\Z)", re.MULTILINE)
_CONVERT: Final = "convert the image with `qemu-img convert -O vmdk`"


@dataclass(frozen=True, slots=True)
class OurLine:
    """A line with our key: bytes ``start`` .. ``end`` of the text, newline included; the value without quotes."""

    start: int
    end: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What the descriptor says. Offsets and sizes in bytes.

    Attributes:
        offset: Where it begins in the file.
        size: Its room, padding included.
        text: Up to the first NUL.
        blank_tail: Whether only NULs follow.
        create_type: Kind of image.
        cid: Content identifier.
        parent_cid: That of the parent, ``NO_PARENT`` without one.
        parent_name: Name of the parent, as far as it is stated.
        extent_name: File name in the extent line; never followed.
        lines: Lines with our key.
    """

    offset: int
    size: int
    text: bytes
    blank_tail: bool
    create_type: str
    cid: int
    parent_cid: int
    parent_name: str | None
    extent_name: str
    lines: tuple[OurLine, ...]

    @property
    def end(self) -> int:
        """File offset of the first NUL."""
        return self.offset + len(self.text)


def read_descriptor(
    file: FlatFile, offset: int, size: int, capacity: int, replacement: bytes | None = None
) -> Descriptor:
    """Read and check the embedded descriptor.

    Args:
        file: The image.
        offset: Where it begins, in bytes.
        size: Its room in bytes, at most 1 MiB.
        capacity: Sectors of guest content that the header states.
        replacement: Text that counts instead of what stands there.

    Raises:
        MalformedImageError: when it is no descriptor, or contradicts itself or the header.
        UnsupportedError: when the content lies in other files or other layouts.
    """
    area = file.read(offset, size)
    text, _, tail = area.partition(b"\0")
    text = text if replacement is None else replacement
    reader = _Reader(file, offset)
    entries, extents = reader.lines(text)
    create_type = reader.create_type(entries)
    parent = entries.get(b"parentFileNameHint")
    return Descriptor(
        offset=offset,
        size=len(area),
        text=text,
        blank_tail=not any(tail),
        create_type=create_type,
        cid=reader.number(entries, b"CID"),
        parent_cid=reader.number(entries, b"parentCID"),
        parent_name=None if parent is None else _display(parent),
        extent_name=reader.extent(extents, capacity),
        lines=tuple(
            OurLine(found.start(), found.end(), found[1].strip().strip(b'"')) for found in _OURS.finditer(text)
        ),
    )


class _Reader:
    """Takes the text apart; every complaint names the file and the descriptor's place."""

    def __init__(self, file: FlatFile, offset: int) -> None:
        self._file = file
        self._offset = offset

    def lines(self, text: bytes) -> tuple[dict[bytes, bytes], list[bytes]]:
        """Return the entries, and the extent lines."""
        lines = text.split(b"\n", lay.MAX_LINES)
        if not _TITLE.match(lines[0]):
            self._bad("descriptor", "the text does not begin with `# Disk DescriptorFile`")
        if len(lines) > lay.MAX_LINES:
            self._bad("descriptor", f"more than {lay.MAX_LINES} lines")
        entries: dict[bytes, bytes] = {}
        extents = []
        for line in (raw.strip() for raw in lines):
            entry = _ENTRY.fullmatch(line)
            if not line or line.startswith(b"#"):
                continue
            if entry is None:
                extents.append(line)
                continue
            key, value = entry[1], entry[2] if entry[2] is not None else entry[3]
            if key in _SINGLE and key in entries:
                self._bad(key.decode(), "stated twice")
            entries[key] = value
        return entries, extents

    def create_type(self, entries: dict[bytes, bytes]) -> str:
        """Return the kind of image, if it is one whose content lies in this file."""
        version = entries.get(b"version", b"")
        if version not in (b"1", b"2", b"3"):
            self._unsupported("version", f"descriptor version {_display(version)!r} is not supported")
        name = _display(entries.get(b"createType", b""))
        if name not in lay.COMPLETE_TYPES:
            self._unsupported("createType", f"VMDK images of type {name!r} are not supported")
        return name

    def number(self, entries: dict[bytes, bytes], key: bytes) -> int:
        """Return an identifier of one to eight hexadecimal digits."""
        value = entries.get(key, b"")
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", value):
            self._bad(key.decode(), f"{_display(value)!r} is no number of one to eight hexadecimal digits")
        return int(value, 16)

    def extent(self, extents: list[bytes], capacity: int) -> str:
        """Return the file name in the only extent line."""
        if len(extents) != 1:
            self._bad("extent", f"{len(extents)} lines that are no entries, where one extent is expected")
        found = _EXTENT.fullmatch(extents[0])
        if found is None:
            self._bad("extent", f"{_display(extents[0])!r} is no extent")
        kind, name = found[3].upper(), found[4] or b""
        if kind != b"SPARSE":
            self._unsupported("extent", f"extents of type {_display(kind)} are not supported")
        if int(found[2]) != capacity:
            self._bad("extent", f"an extent of {int(found[2])} sectors, the header says {capacity}")
        if not name or any(mark in name for mark in b"/\\:") or name in (b".", b".."):
            self._bad("extent", f"the extent's name {_display(name)!r} leads away from this file")
        return _display(name)

    def _bad(self, field: str, message: str) -> NoReturn:
        raise MalformedImageError(
            f"descriptor: {message}", file=self._file.path, offset=self._offset, field=field, hint=_CONVERT
        )

    def _unsupported(self, field: str, message: str) -> NoReturn:
        raise UnsupportedError(message, file=self._file.path, offset=self._offset, field=field, hint=_CONVERT)


def _display(value: bytes) -> str:
    text = value[:1024].decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "?" for char in text)
