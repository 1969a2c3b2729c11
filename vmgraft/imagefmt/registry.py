"""The container formats, in the order in which they are asked whether a file is theirs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from vmgraft.errors import UnsupportedError
from vmgraft.imagefmt.contract import Format
from vmgraft.imagefmt.flatfile import FlatFile

#: Name → module with a ``FORMAT``. Raw stands last: it takes anything.
_MODULES = {
    "qcow2": "vmgraft.imagefmt.qcow2",
    "iso9660": "vmgraft.imagefmt.iso9660",
    "raw": "vmgraft.imagefmt.raw",
}
#: Bytes of the beginning of a file that a probe is shown.
PROBE_SIZE = 65536
_SECTOR = 512

#: Containers that are recognised and refused: name, offset, magic. A negative offset counts from the end.
_REFUSED = (
    ("VHDX", 0, b"vhdxfile"),  # MS-VHDX 2.2.1
    ("VMDK", 0, b"KDMV"),  # VMware Virtual Disk Format 1.1, sparse extent header
    ("VMDK", 0, b"COWD"),  # the same, ESX sparse extent
    ("VMDK", 0, b"# Disk DescriptorFile"),
    ("VDI", 64, b"\x7f\x10\xda\xbe"),  # VirtualBox VDICore.h, image signature
    ("VHD", 0, b"conectix"),  # Virtual Hard Disk Image Format, "Hard Disk Footer Format"
    ("VHD", -_SECTOR, b"conectix"),
    ("LUKS", 0, b"LUKS\xba\xbe"),  # LUKS1 and LUKS2 on-disk format, header magic
    ("QED", 0, b"QED\0"),  # QEMU docs/interop/qed_spec
    ("qcow version 1", 0, b"QFI\xfb\0\0\0\1"),
)


def format_names() -> tuple[str, ...]:
    """Return the names of the registered formats, in probing order."""
    return tuple(_MODULES)


def get_format(name: str) -> Format:
    """Return a registered format.

    Raises:
        UnsupportedError: when no format has that name.
    """
    if name not in _MODULES:
        raise UnsupportedError(f"unknown image format {name!r}", hint=f"one of {', '.join(_MODULES)}")
    row: Format = import_module(_MODULES[name]).FORMAT
    return row


def detect(path: Path) -> Format:
    """Return the format that recognises the file at ``path``.

    Raises:
        UnsupportedError: for containers that are known and not supported.
        FileError: when the file cannot be read.
    """
    file = FlatFile(path)
    try:
        head = file.read(0, PROBE_SIZE)
        _refuse(file, head)
        size = file.size
    finally:
        file.close()
    for name in _MODULES:
        row = get_format(name)
        if row.probe(head, size):
            return row
    raise UnsupportedError("the file is empty", file=path)


def _refuse(file: FlatFile, head: bytes) -> None:
    tail = file.read(file.size - _SECTOR, _SECTOR) if file.size >= _SECTOR else b""
    for name, offset, magic in _REFUSED:
        if head.startswith(magic, offset) if offset >= 0 else tail.startswith(magic):
            raise UnsupportedError(
                f"{name} is not supported in this release",
                file=file.path,
                offset=offset if offset >= 0 else file.size + offset,
                field="magic",
                hint="convert the image to qcow2 or raw with qemu-img convert",
            )
