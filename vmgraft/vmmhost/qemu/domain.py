"""What a libvirt domain would give a guest as disks, from the XML that libvirt hands to its hooks.

The XML is read by expat without a document type, so there are no entities, and within bounds. Only what decides which
bytes the guest sees is looked at (formatdomain: "Hard drives, floppy disks, CDROMs").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from xml.parsers import expat

from vmgraft.errors import UnsupportedError, UsageError

#: Longest XML that is read: what libvirt itself takes at most is of this order; a domain has some ten kilobytes.
MAX_XML: Final = 4 << 20
_MAX_DEPTH: Final = 64
_MAX_DISKS: Final = 256
#: Bytes of an attribute that mean something.
_MAX_VALUE: Final = 4096
#: libvirt's names of disk formats, and ours. ``raw`` is also what libvirt calls an ISO 9660 image.
FORMATS: Final = {
    "raw": "raw", "iso": "iso9660", "qcow2": "qcow2", "vmdk": "vmdk", "vdi": "vdi", "vpc": "vhd", "vhdx": "vhdx",
}  # fmt: skip

_DISK: Final = ("domain", "devices", "disk")
#: Attributes of <source> that name the content, by the disk's type; each other type has one of its own.
_SOURCE: Final = {"file": "file", "block": "dev"}
#: Elements that stand once in their place; of two, libvirt might take the other one.
_ONCE: Final = frozenset({"source", "driver", "target", "slices", "slice", "backingStore", "format"})
#: Of elements that hand arguments to QEMU past libvirt (drvqemu, "Pass-through of arbitrary qemu commands").
_QEMU_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0 "


@dataclass(slots=True)
class DomainDisk:
    """One disk of a domain.

    Attributes:
        kind: ``file``, ``block``, ``network`` or another of libvirt's types.
        device: ``disk``, ``cdrom``, ``floppy`` or ``lun``.
        target: The name under which the guest's owner knows it, such as ``vda``.
        source: File or device; empty for a drive without medium.
        format: libvirt's name of the image format; empty where none is named.
        protocol: Of a network disk.
        socket: Unix socket of a network disk.
        slice: The part of the file that is shown, as (offset, size), or None for all of it.
        backing: The backing files that the XML names, nearest first; None where it leaves them to the image.
        backing_formats: libvirt's names of their formats, as far as it says.
        encrypted: Whether libvirt decrypts the content.
        other: Whether the content comes from a further file that the XML names.
        named: The elements below it that were met.
    """

    kind: str = "file"
    device: str = "disk"
    target: str = ""
    source: str = ""
    format: str = ""
    protocol: str = ""
    socket: str = ""
    slice: tuple[str, str] | None = None
    backing: list[str] | None = None
    backing_formats: list[str] = field(default_factory=list)
    encrypted: bool = False
    other: bool = False
    named: set[tuple[str, ...]] = field(default_factory=set)

    @property
    def label(self) -> str:
        """What to call it in a message."""
        return self.target or self.source or "a disk"

    @property
    def empty(self) -> bool:
        """Whether it is a removable drive with nothing in it."""
        return self.kind in ("file", "block") and not self.source and self.device in ("cdrom", "floppy")


@dataclass(frozen=True, slots=True)
class Domain:
    """The part of a domain that a verification is about.

    ``commandline`` says that arguments for QEMU are in the XML, which may be disks too.
    """

    name: str
    disks: tuple[DomainDisk, ...]
    commandline: bool


def parse_domain(xml: bytes) -> Domain:
    """Read a domain's disks.

    Raises:
        UsageError: it is no XML of a domain, has a document type, or is over a limit.
    """
    if len(xml) > MAX_XML:
        raise UsageError(f"the domain's XML is longer than {MAX_XML} bytes")
    reader = _Reader()
    parser = expat.ParserCreate(encoding="utf-8", namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(xml, True)
    except expat.ExpatError as error:
        raise UsageError(f"the domain's XML cannot be read: {error}", field="xml") from error
    if not reader.is_domain:
        raise UsageError("the XML is not that of a domain", field="xml")
    return Domain(reader.name.strip(), tuple(reader.disks), reader.commandline)


def _refuse_doctype(*_args: object) -> None:
    raise UsageError("the domain's XML has a document type, which no domain has", field="xml")


class _Reader:
    """Takes expat's events; keeps the disks."""

    def __init__(self) -> None:
        self.is_domain, self.commandline, self.name = False, False, ""
        self.disks: list[DomainDisk] = []
        self._path: list[str] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._path.append(tag)
        if len(self._path) > _MAX_DEPTH or len(self.disks) > _MAX_DISKS:
            raise UsageError("the domain's XML is nested too deep, or has too many disks", field="xml")
        if any(len(value) > _MAX_VALUE for value in attributes.values()):
            raise UsageError(f"an attribute is longer than {_MAX_VALUE} characters", field=tag)
        path = tuple(self._path)
        self.is_domain = self.is_domain or path == ("domain",)
        self.commandline = self.commandline or tag.startswith(_QEMU_NAMESPACE)
        if path == _DISK:
            self.disks.append(DomainDisk(attributes.get("type", "file"), attributes.get("device", "disk")))
        elif path[:3] == _DISK:
            self._inside(path[3:], attributes)

    def _inside(self, below: tuple[str, ...], attributes: dict[str, str]) -> None:
        disk = self.disks[-1]
        if below[-1] in _ONCE and below in disk.named:
            raise UsageError(f"{disk.label} has two of what it has one of", field=below[-1])
        disk.named.add(below)
        match below:
            case ("source",):
                disk.source = attributes.get(_SOURCE.get(disk.kind, "name"), "")
                disk.protocol = attributes.get("protocol", "")
            case ("source", "host"):
                # Several hosts are no socket of ours, and are refused below for having none.
                alone = attributes.get("transport") == "unix" and not disk.socket
                disk.socket = attributes.get("socket", "") if alone else "?"
            case ("source", "slices", "slice"):
                disk.slice = attributes.get("offset", ""), attributes.get("size", "")
            case ("encryption",) | ("source", "encryption"):
                disk.encrypted = True
            case ("driver",):
                disk.format = attributes.get("type", "")
            case ("target",):
                disk.target = attributes.get("dev", "")
            case ("backingStore", *more) if set(more) <= {"backingStore"}:
                disk.backing = disk.backing or []
            case ("backingStore", *more, "source") if set(more) <= {"backingStore"}:
                disk.backing = [*(disk.backing or []), attributes.get("file") or attributes.get("dev", "")]
            case ("backingStore", *more, "format") if set(more) <= {"backingStore"}:
                disk.backing_formats.append(attributes.get("type", ""))
            case (*_, "dataStore"):
                disk.other = True

    def end(self, _tag: str) -> None:
        self._path.pop()

    def text(self, data: str) -> None:
        if self._path == ["domain", "name"] and len(self.name) < _MAX_VALUE:
            self.name += data


def image_format(disk: DomainDisk, probed: str) -> str:
    """Return the format to open a disk's image with; libvirt's word stands, since QEMU goes by it too.

    Args:
        disk: The disk.
        probed: What the file looks like. ``raw`` is what libvirt calls an ISO 9660 image.

    Raises:
        UnsupportedError: libvirt names a format that is not known here.
    """
    named = disk.format or "raw"  # QEMU takes a disk without a format as raw
    if named == "raw" and probed == "iso9660":
        return probed
    if named not in FORMATS:
        raise UnsupportedError(f"{disk.label} has the format {named}, which cannot be verified", field="driver")
    return FORMATS[named]


def check_source(disk: DomainDisk, trusted_sockets: frozenset[Path]) -> Path | None:
    """Return the image to verify, or None for a disk that needs no verification here: empty, or served verified.

    Raises:
        UnsupportedError: the disk is of a kind that cannot be verified.
    """
    if disk.empty:
        return None
    if disk.kind == "network" and disk.protocol == "nbd" and Path(disk.socket) in trusted_sockets:
        _check_plain(disk)
        return None
    path = Path(disk.source)
    plain = path.is_absolute() and disk.device != "lun" and not disk.encrypted and not disk.other
    if disk.kind not in ("file", "block") or not plain:
        raise UnsupportedError(
            f"{disk.label} ({disk.device} of type {disk.kind}{', encrypted' if disk.encrypted else ''}) cannot be "
            "verified",
            field="disk",
            hint="files and block devices can be; or `vmgraft serve`, with its socket under trustedSockets",
        )
    return path


def _check_plain(disk: DomainDisk) -> None:
    """Refuse to let verified bytes be read as something else than the disk that they are."""
    if disk.format not in ("", "raw") or disk.slice or disk.backing or disk.encrypted or disk.other:
        raise UnsupportedError(
            f"{disk.label} is served verified, and would not be shown to the guest as it is",
            field="disk",
            hint="its driver is raw, without slice, backing file, data store and encryption",
        )


def check_view(disk: DomainDisk, size: int, backing: Sequence[tuple[Path, str]]) -> None:
    """Refuse a disk of which the guest would see something else than the verified content.

    Args:
        disk: The disk.
        size: Bytes of the verified content.
        backing: The files that the image itself names below it, nearest first, and their formats.

    Raises:
        UnsupportedError: the XML shows a part of the file, or puts other files below it.
    """
    if disk.slice not in (None, ("0", str(size))):
        raise UnsupportedError(f"{disk.label} shows a part of the image", field="slice", hint=f"offset 0, size {size}")
    if disk.backing is None:
        return
    named = [(Path(name).resolve(), form) for name, form in zip(disk.backing, disk.backing_formats, strict=False)]
    whole = len(disk.backing) == len(disk.backing_formats) == len(backing)
    if not whole or named != [(path.resolve(), form) for path, form in backing]:
        raise UnsupportedError(
            f"{disk.label} has other backing files than its image names, or in other formats",
            field="backingStore",
            hint="leave <backingStore> out",
        )
