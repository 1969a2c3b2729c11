"""The files of an ISO 9660 volume, by path: Rock Ridge names where there are any, else Joliet's, else plain ones.

Read from verified content, and bounded all the same: who signed an image did not thereby write a sound file system.
Sources: ECMA-119 (volume descriptors 8.4, directory records 9.1), IEEE P1281 (SUSP: SP, CE, ST), IEEE P1282 (Rock
Ridge: PX, SL, NM, CL, RE), the Joliet specification (escape sequences, UCS-2 names).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.vmmhost.core.disk import require_inside
from vmgraft.vmmhost.supplements.iso import MAX_ENTRIES, Folder, Link, Node, VolumeFile
from vmgraft.vmmhost.supplements.media import CD_SECTOR
from vmgraft.vmmhost.supplements.rockridge import Attributes, skip_of, system_use

if TYPE_CHECKING:
    from vmgraft.vmmhost.core.drives import Disk

_FIRST_DESCRIPTOR: Final = 16
_MAX_DESCRIPTORS: Final = 64
#: Most bytes of one folder, and of all, in a volume that is read.
_MAX_FOLDER: Final = 16 << 20
_MAX_FOLDERS: Final = 64 << 20
_MAX_DEPTH: Final = 64
#: Characters of all paths together, parts of one file, and continuation areas of all records.
_MAX_PATHS: Final = 32 << 20
_MAX_PARTS: Final = 1024
_MAX_AREAS: Final = 2 * MAX_ENTRIES
#: How often the bytes of a disk may be shown: writers let equal files share their place.
_MAX_SHARING: Final = 16
_ROOT_AT: Final = 156
_RECORD: Final = 33
#: Flags of a directory record (ECMA-119, 9.1.6).
_IS_FOLDER, _ASSOCIATED, _MORE = 0x02, 0x04, 0x80
#: Escape sequences that mark a supplementary descriptor as Joliet's, at byte 88.
_JOLIET: Final = (b"%/@", b"%/C", b"%/E")


def has_volume(disk: Disk) -> bool:
    """Say whether there is an ISO 9660 volume; raises what reading raises."""
    end = (_FIRST_DESCRIPTOR + 1) * CD_SECTOR
    return disk.size >= end and disk.read(_FIRST_DESCRIPTOR * CD_SECTOR, 6)[1:] == b"CD001"


def read_tree(disk: Disk, *, name: str) -> dict[str, Node]:
    """Return everything on a volume; files are read from the disk when they are asked for.

    Args:
        disk: Verified content.
        name: What to call it in errors.

    Raises:
        MalformedImageError: it is no sound ISO 9660 volume.
        UnsupportedError: it holds devices, compressed or interleaved files, more than 65536 entries, or paths of more
            than 32 MiB together.
        ContentMismatchError, FileError: what reading raises.
    """
    return _Reader(disk, name).read()


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A file's bytes: where its parts lie, offset and length in bytes."""

    disk: Disk
    parts: tuple[tuple[int, int], ...]
    size: int

    def read(self, offset: int, length: int) -> bytes:
        require_inside(self.size, offset, length)
        found = []
        for start, size in self.parts:
            if offset < size and length:
                count = min(size - offset, length)
                found.append(self.disk.read(start + offset, count))
                length, offset = length - count, 0
            else:
                offset -= size
        return b"".join(found)


@dataclass(frozen=True, slots=True)
class _Record:
    """A directory record; ``start`` and ``size`` in bytes."""

    start: int
    size: int
    flags: int
    name: bytes
    attributes: Attributes


class _Reader:
    def __init__(self, disk: Disk, name: str) -> None:
        self._disk, self._name = disk, name
        self._joliet, self._skip = False, -1
        self._nodes: dict[str, Node] = {}
        self._seen: set[int] = set()
        self._folder_bytes = self._file_bytes = self._path_chars = self._areas = 0

    def read(self) -> dict[str, Node]:
        primary, joliet = self._descriptors()
        start, size = _root(primary)
        first = self._bytes(start, min(max(size, 1), CD_SECTOR))
        self._skip = skip_of(first)
        if self._skip < 0 and joliet is not None:
            self._joliet = True
            start, size = _root(joliet)
        self._folder("", start, size, 0)
        return self._nodes

    def _refuse(self, message: str, offset: int | None = None) -> MalformedImageError:
        return MalformedImageError(message, file=self._name, offset=offset, field="ISO 9660")

    def _bytes(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self._disk.size:
            raise self._refuse(f"{length} bytes that are not inside the disk of {self._disk.size}", offset)
        return self._disk.read(offset, length)

    def _descriptors(self) -> tuple[bytes, bytes | None]:
        """Return the primary descriptor, and Joliet's where there is one."""
        primary = joliet = None
        for number in range(_MAX_DESCRIPTORS):
            offset = (_FIRST_DESCRIPTOR + number) * CD_SECTOR
            data = self._bytes(offset, CD_SECTOR)
            if data[1:6] != b"CD001":
                raise self._refuse("no volume descriptor", offset)
            if data[0] == 1 and primary is None:
                primary = data
            elif data[0] == 2 and data[88:91] in _JOLIET and joliet is None:
                joliet = data
            elif data[0] == 255:
                break
        if primary is None or int.from_bytes(primary[128:130], "little") != CD_SECTOR:
            raise self._refuse("no primary volume descriptor with blocks of 2048 bytes")
        return primary, joliet

    def _folder(self, path: str, start: int, size: int, depth: int) -> None:
        """Read a folder and what is below it."""
        self._folder_bytes += size
        if depth > _MAX_DEPTH or start in self._seen or size > _MAX_FOLDER or self._folder_bytes > _MAX_FOLDERS:
            raise self._refuse(f"the folder {path!r} is too large, too deep, or inside itself", start)
        self._seen.add(start)
        relocated = False
        parts: list[tuple[int, int]] = []
        for record in self._records(start, size):
            if record.attributes.relocated:
                relocated = True
                continue
            if record.flags & _ASSOCIATED:
                continue
            child = f"{path}/{self._decode(record, start)}".lstrip("/")
            if record.flags & _IS_FOLDER or record.attributes.child is not None:
                self._descend(child, record, depth)
                continue
            parts.append((record.start, record.size))
            if len(parts) > _MAX_PARTS:
                raise self._refuse(f"{child!r} has more than {_MAX_PARTS} parts", start)
            if not record.flags & _MORE:
                self._add(child, self._leaf(child, record, tuple(parts)))
                parts = []
        if parts:
            raise self._refuse(f"a file in {path!r} has no last part", start)
        if relocated and depth == 1 and not any(other.startswith(path + "/") for other in self._nodes):
            del self._nodes[path]  # what was moved out of the way of a depth limit stands at its own place

    def _descend(self, path: str, record: _Record, depth: int) -> None:
        self._add(path, Folder())
        start, size = record.start, record.size
        if record.attributes.child is not None:  # the folder's own first record has its size
            start = record.attributes.child * CD_SECTOR
            size = int.from_bytes(self._bytes(start, _RECORD)[10:14], "little")
        self._folder(path, start, size, depth + 1)

    def _leaf(self, path: str, record: _Record, parts: tuple[tuple[int, int], ...]) -> Node:
        found = record.attributes
        if found.link is not None:
            return Link(found.link)
        mode = stat.S_IFREG if found.mode is None else found.mode
        if not stat.S_ISREG(mode) or found.compressed:
            what = "compressed" if found.compressed else "no regular file"
            raise UnsupportedError(f"{path!r} is {what}", file=self._name, field="ISO 9660")
        for start, size in parts:
            if start + size > self._disk.size:
                raise self._refuse(f"{path!r} is not inside the disk", start)
        size = sum(length for _, length in parts)
        self._file_bytes += size
        if self._file_bytes > _MAX_SHARING * self._disk.size:
            raise self._refuse(f"its files have more than {_MAX_SHARING} times as many bytes as the disk")
        return VolumeFile(_Stretch(self._disk, parts, size), bool(mode & stat.S_IXUSR))

    def _add(self, path: str, node: Node) -> None:
        if path in self._nodes:
            raise self._refuse(f"{path!r} stands twice in its folder")
        self._path_chars += len(path)
        if len(self._nodes) >= MAX_ENTRIES or self._path_chars > _MAX_PATHS:
            message = f"more than {MAX_ENTRIES} files and folders, or {_MAX_PATHS} characters of paths"
            raise UnsupportedError(message, file=self._name, field="ISO 9660")
        self._nodes[path] = node

    def _records(self, start: int, size: int) -> Iterator[_Record]:
        """Yield the records of a folder but for itself and its parent."""
        data, position, number = self._bytes(start, size), 0, 0
        while position < len(data):
            length = data[position]
            if length == 0:  # records do not cross sectors
                position = (position // CD_SECTOR + 1) * CD_SECTOR
                continue
            raw = data[position : position + length]
            if len(raw) < length or length <= _RECORD or _RECORD + raw[32] > length:
                raise self._refuse("a directory record that is too short", start + position)
            if number >= 2:
                yield self._record(raw, start + position)
            position, number = position + length, number + 1

    def _record(self, raw: bytes, offset: int) -> _Record:
        name = raw[_RECORD : _RECORD + raw[32]]
        if raw[26] or raw[27]:
            raise UnsupportedError("an interleaved file", file=self._name, offset=offset, field="ISO 9660")
        attributes = Attributes()
        if self._skip >= 0:
            used = raw[_RECORD + raw[32] + (raw[32] + 1) % 2 + self._skip :]
            try:
                attributes = system_use(used, self._area)
            except ValueError as error:
                raise self._refuse(f"Rock Ridge: {error}", offset) from error
        extent = int.from_bytes(raw[2:6], "little") + raw[1]
        return _Record(extent * CD_SECTOR, int.from_bytes(raw[10:14], "little"), raw[25], name, attributes)

    def _area(self, block: int, at: int, size: int) -> bytes:
        """Return a continuation area; each may cost a block's hash."""
        self._areas += 1
        if self._areas > _MAX_AREAS:
            raise ValueError(f"more than {_MAX_AREAS} continuation areas")
        return self._bytes(block * CD_SECTOR + at, size)

    def _decode(self, record: _Record, offset: int) -> str:
        """Return a record's name, which must be one that a path can hold."""
        if record.attributes.name is not None:
            name = _text(record.attributes.name)
        elif self._joliet:
            name = record.name.decode("utf-16-be", "replace").partition(";")[0]
        else:
            name = record.name.decode("latin-1").partition(";")[0].removesuffix(".")
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise self._refuse(f"{name[:64]!r} is no name of a file", offset)
        return name


def _root(descriptor: bytes) -> tuple[int, int]:
    """Return place and size of the root folder, in bytes."""
    record = descriptor[_ROOT_AT : _ROOT_AT + _RECORD]
    return int.from_bytes(record[2:6], "little") * CD_SECTOR, int.from_bytes(record[10:14], "little")


def _text(name: bytes) -> str:
    """Return a Rock Ridge name; what is not UTF-8 is taken for Latin-1, as old writers used it."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        return name.decode("latin-1")
