"""Read-only volumes: ISO 9660 with Rock Ridge and Joliet, made with pycdlib; equal input gives equal bytes."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any, Final

from vmgraft.errors import FileError, HostError, UsageError
from vmgraft.imagefmt.blob import SMALL, Blob, BytesBlob, file_blob
from vmgraft.vmmhost.supplements.media import CD_SECTOR, Bytes
from vmgraft.vmmhost.supplements.names import VolumeName, volume_names

if TYPE_CHECKING:
    from pycdlib import PyCdlib

#: A volume label here: d-characters, as many as Joliet's copy of it has room for (16 of UCS-2 in 32 bytes).
MAX_LABEL: Final = 16
#: Most entries of a volume, folders included; a bound on memory, not of the format.
MAX_ENTRIES: Final = 65536
#: Largest file: sizes in a directory record are 32 bits wide (ECMA-119, 9.1.4).
MAX_FILE: Final = (1 << 32) - 1
#: Most bytes of all files of a volume: more than the largest disc has, and what a host may be asked to write.
MAX_VOLUME: Final = 128 << 30
#: First volume descriptor, and where its modification date stands (ECMA-119, 6.7.1 and 8.4.27).
_FIRST_DESCRIPTOR: Final = 16
_MODIFIED: Final = 830
_TERMINATOR: Final = 255
#: Folders have the permissions r-x, files r-- or r-x (Rock Ridge PX).
_FILE, _PROGRAM = 0o100444, 0o100555


@dataclass(frozen=True, slots=True)
class VolumeFile:
    """A file to be put on a volume."""

    data: Bytes
    executable: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link to be put on a volume; only Rock Ridge shows it."""

    target: str


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder; those that something lies in need not be named."""


Node = VolumeFile | Link | Folder
#: What is on a volume, by path from its root, with ``/`` between names and none in front.
Tree = Mapping[str, Node]


def build_volume(label: str, tree: Tree, *, created: datetime) -> Blob:
    """Return a volume.

    Args:
        label: Volume label, 1 to 16 of ``A-Z 0-9 _``.
        tree: What is on it.
        created: The time of everything on it, with a zone.

    Raises:
        UsageError: more or larger files than a volume has room for, a path that is a file and a folder, or a label that
            is none.
        FileError: a file cannot be read, or the volume not be written.
        HostError: the package that makes volumes is missing.
        VmgraftError: what reading a file raises.
    """
    try:
        from pycdlib import PyCdlib
        from pycdlib.pycdlibexception import PyCdlibException
    except ImportError as error:
        hint = "pip install pycdlib, or run --without-supplements; `vmgraft doctor` shows what is missing"
        raise HostError(f"a volume cannot be made without the package pycdlib: {error}", hint=hint) from error

    if not 1 <= len(label) <= MAX_LABEL or any(char not in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_" for char in label):
        raise UsageError(f"{label!r} is no volume label", field="label", hint="1 to 16 of A-Z, 0-9 and _")
    nodes = _with_folders(tree)
    stamp = created.astimezone(UTC)
    size = sum(node.data.size for node in nodes.values() if isinstance(node, VolumeFile))
    if size > MAX_VOLUME:
        raise UsageError(f"the files of the volume have {size} bytes, at most {MAX_VOLUME} allowed", field="files")
    iso = PyCdlib()
    try:
        iso.new(interchange_level=3, vol_ident=label, joliet=3, rock_ridge="1.09", app_ident_str="VMGRAFT")
        with closing(iso):
            _fill(iso, nodes)
            _date(iso, stamp)
            return _write(iso, size, stamp)
    except PyCdlibException as error:
        raise UsageError(f"the volume cannot be made: {error}", field=label) from error


def _with_folders(tree: Tree) -> dict[str, Node]:
    """Return the tree with every folder named, each before what is in it."""
    nodes: dict[str, Node] = {}
    for path in sorted(tree):
        steps = path.split("/")
        for depth in range(1, len(steps)):
            folder = nodes.setdefault("/".join(steps[:depth]), Folder())
            if not isinstance(folder, Folder):
                raise UsageError(f"{'/'.join(steps[:depth])!r} is a file, and the folder of another")
        node = tree[path]
        if isinstance(node, VolumeFile) and node.data.size > MAX_FILE:
            raise UsageError(f"{path!r} has {node.data.size} bytes, more than a file of a volume", field="files")
        nodes[path] = node
    if len(nodes) > MAX_ENTRIES:
        raise UsageError(f"{len(nodes)} files and folders, at most {MAX_ENTRIES} allowed on a volume", field="files")
    return dict(sorted(nodes.items(), key=lambda item: item[0].split("/")))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where something is to be put: its full paths in ISO 9660 and in Joliet, and its name."""

    iso: str
    joliet: str
    name: str


def _places(nodes: Mapping[str, Node]) -> Iterator[tuple[_Place, Node]]:
    """Yield where everything goes, folders before what is in them."""
    inside: dict[str, list[tuple[str, bool]]] = {}
    for path, node in nodes.items():
        folder, _, name = path.rpartition("/")
        inside.setdefault(folder, []).append((name, isinstance(node, Folder)))
    names: dict[str, dict[str, VolumeName]] = {folder: volume_names(items) for folder, items in inside.items()}
    full = {"": _Place("", "", "")}
    for path, node in nodes.items():
        folder, _, name = path.rpartition("/")
        given, above = names[folder][name], full[folder]
        full[path] = _Place(f"{above.iso}/{given.iso}", f"{above.joliet}/{given.joliet}", given.rock_ridge)
        yield full[path], node


def _fill(iso: PyCdlib, nodes: Mapping[str, Node]) -> None:
    for place, node in _places(nodes):
        match node:
            case Folder():
                iso.add_directory(place.iso, rr_name=place.name, joliet_path=place.joliet, file_mode=0o040555)
            case Link(target):
                iso.add_symlink(place.iso, rr_symlink_name=place.name, rr_path=target)
            case VolumeFile(data, executable):
                mode = _PROGRAM if executable else _FILE
                source: Any = _Source(data)
                iso.add_fp(source, data.size, place.iso, rr_name=place.name, joliet_path=place.joliet, file_mode=mode)


class _Source(io.RawIOBase):
    """A file of a volume as pycdlib reads it: only while the volume is written, one after the other."""

    def __init__(self, data: Bytes) -> None:
        super().__init__()
        self._data, self._position = data, 0

    def read(self, size: int = -1, /) -> bytes:
        left = self._data.size - self._position
        wanted = left if size < 0 else min(size, left)
        part = self._data.read(self._position, wanted) if wanted > 0 else b""
        if len(part) != max(wanted, 0):
            raise FileError("a file became shorter while the volume was made")
        self._position += len(part)
        return part

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._data.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def _date(iso: PyCdlib, stamp: datetime) -> None:
    """Give everything one date: the library takes the clock's."""
    from pycdlib.dates import DirectoryRecordDate, VolumeDescriptorDate

    short, long = _short_date(stamp), _long_date(stamp)
    for volume in (iso.pvd, iso.joliet_vd):
        for name in ("volume_creation_date", "volume_effective_date"):
            date = VolumeDescriptorDate()
            date.parse(long)
            setattr(volume, name, date)
        records = [volume.root_directory_record()]
        while records:
            record = records.pop()
            record.date = DirectoryRecordDate()
            record.date.parse(short)
            if record.rock_ridge is not None:
                _date_rock_ridge(record.rock_ridge, short)
            if record.is_dir():
                records += [child for child in record.children if not child.is_dotdot() and not child.is_dot()]
                for child in record.children[:2]:
                    child.date = record.date
                    if child.rock_ridge is not None:
                        _date_rock_ridge(child.rock_ridge, short)


def _date_rock_ridge(extension: Any, short: bytes) -> None:
    from pycdlib.dates import DirectoryRecordDate

    for entries in (extension.dr_entries, extension.ce_entries):
        record = None if entries is None else entries.tf_record
        if record is None:
            continue
        for name in ("creation_time", "access_time", "modification_time", "attribute_change_time"):
            if getattr(record, name) is not None:
                date = DirectoryRecordDate()
                date.parse(short)
                setattr(record, name, date)


def _short_date(stamp: datetime) -> bytes:
    """Return a directory record's date: years since 1900, month, day, hour, minute, second, zone (ECMA-119, 9.1.5)."""
    year = min(max(stamp.year - 1900, 0), 255)
    return bytes((year, stamp.month, stamp.day, stamp.hour, stamp.minute, stamp.second, 0))


def _long_date(stamp: datetime) -> bytes:
    """Return a volume descriptor's date: digits, hundredths and a zone (ECMA-119, 8.4.26.1)."""
    return stamp.strftime("%Y%m%d%H%M%S00").rjust(16, "0").encode() + b"\0"


def _write(iso: PyCdlib, size: int, stamp: datetime) -> Blob:
    """Write the volume into memory, or a nameless file when it is large."""
    if size <= SMALL:
        memory = io.BytesIO()
        iso.write_fp(memory)
        _date_descriptors(memory, stamp)
        return BytesBlob(memory.getvalue())
    try:
        with tempfile.TemporaryFile() as file:
            iso.write_fp(file)
            _date_descriptors(file, stamp)
            file.flush()
            return file_blob(file.fileno(), 0, file.seek(0, os.SEEK_END), file=tempfile.gettempdir())
    except OSError as error:
        reason = f"a volume for the guest cannot be written: {error.strerror}"
        raise FileError(reason, file=tempfile.gettempdir(), hint="TMPDIR names a folder with more room") from error


def _date_descriptors(file: IO[bytes], stamp: datetime) -> None:
    """Set the modification date of every volume descriptor, which the library sets while it writes."""
    sector = _FIRST_DESCRIPTOR
    while True:
        file.seek(sector * CD_SECTOR)
        kind = file.read(1)
        if not kind or kind[0] == _TERMINATOR:
            return
        if kind[0] in (1, 2):
            file.seek(sector * CD_SECTOR + _MODIFIED)
            file.write(_long_date(stamp))
        sector += 1
