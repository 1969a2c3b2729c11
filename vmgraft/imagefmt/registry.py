"""The container formats, in the order in which they are asked whether a file is theirs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from vmgraft.errors import UnsupportedError, UsageError
from vmgraft.imagefmt.contract import Format, Opening
from vmgraft.imagefmt.flatfile import FlatFile

#: Name → module with a ``FORMAT``. Raw stands last: it takes anything.
_MODULES = {
    "qcow2": "vmgraft.imagefmt.qcow2",
    "iso9660": "vmgraft.imagefmt.iso9660",
    "vhd": "vmgraft.imagefmt.vhd",
    "vmdk": "vmgraft.imagefmt.vmdk",
    "vdi": "vmgraft.imagefmt.vdi",
    "vhdx": "vmgraft.imagefmt.vhdx",
    "zip": "vmgraft.imagefmt.zip",
    "raw": "vmgraft.imagefmt.raw",
}
#: Bytes of the beginning of a file that a probe is shown.
PROBE_SIZE = 65536
_SECTOR = 512
_LUKS = b"LUKS\xba\xbe"
_HINT = "convert the image to qcow2 or raw with qemu-img convert"
_LUKS_HINT = "decrypt it with qemu-img convert, or take its ciphertext (`vmgraft digest --ciphertext`)"

#: Containers that are recognised and refused: name, offset, magic. A negative offset counts from the end.
_REFUSED = (
    ("VMDK with its content in other files", 0, b"# Disk DescriptorFile"),  # VMware Virtual Disk Format 5.0
    ("VMDK of ESX (COWD)", 0, b"COWD"),  # the same, "ESX Server Sparse Extents"
    ("VMDK of ESX (seSparse)", 0, b"\xbe\xba\xfe\xca\0\0\0\0"),  # QEMU block/vmdk.c, constant header
    ("LUKS", 0, _LUKS),  # LUKS1 and LUKS2 on-disk format, header magic
    ("QED", 0, b"QED\0"),  # QEMU docs/interop/qed_spec
    ("qcow version 1", 0, b"QFI\xfb\0\0\0\1"),  # QEMU block/qcow.c, QCOW_MAGIC and QCOW_VERSION
    ("Parallels", 0, b"WithoutFreeSpace"),  # QEMU docs/interop/parallels, "Header": magic of the old form
    ("Parallels", 0, b"WithouFreSpacExt"),  # the same, of the extended form
    ("Bochs", 0, b"Bochs Virtual HD Image\0"),  # Bochs iodev/hdimage/hdimage.h, STANDARD_HEADER_MAGIC
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\n"),  # cloop's compressed_loop.h, CLOOP_PREAMBLE; QEMU block/cloop.c
    ("DMG", -_SECTOR, b"koly"),  # Apple UDIF resource file trailer; QEMU block/dmg.c
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
        rows = [get_format(name) for name in _MODULES]
        by_head = [row for row in rows if row.probe(head, file.size)]
        by_end = [row for row in rows if row not in by_head and row.probe_end is not None and row.probe_end(file)]
    finally:
        file.close()
    if not by_head:
        raise UnsupportedError("the file is empty", file=path)
    # Raw, which stands last, takes anything; what a guest wrote must not decide between two others.
    if by_end and by_head[0] is not rows[-1]:
        names = [by_head[0].name, *(row.name for row in by_end)]
        raise UnsupportedError(
            f"the file begins like one container and ends like another: {' and '.join(names)}",
            file=path,
            offset=0,
            field="magic",
            hint=f"say which it is with --image-format {' or '.join(names)}",
        )
    return by_end[0] if by_end else by_head[0]


def choose(path: Path, opening: Opening) -> Format:
    """Return the format in which a user's wish to open ``path`` is to be met.

    Raises:
        UnsupportedError: for containers that are known and not supported.
        UsageError: when the format has no snapshots, or the file no ciphertext, and the user wants them.
        FileError: when the file cannot be read.
    """
    if opening.ciphertext and _is_luks_file(path, opening.format):
        row = get_format("raw")
    else:
        row = detect(path) if opening.format is None else get_format(opening.format)
        if opening.ciphertext and not row.ciphertext:
            raise UsageError(
                f"this {row.name} image is not encrypted", file=path, hint="take its content without --ciphertext"
            )
    if opening.snapshot is not None and not row.snapshots:
        raise UsageError(f"{row.name} images have no internal snapshots", file=path)
    return row


def _is_luks_file(path: Path, named: str | None) -> bool:
    """Return whether the whole file is a LUKS container (LUKS1 and LUKS2 on-disk formats, header magic)."""
    if named not in (None, "raw"):
        return False
    file = FlatFile(path)
    try:
        return file.read(0, len(_LUKS)) == _LUKS
    finally:
        file.close()


def _refuse(file: FlatFile, head: bytes) -> None:
    tail = file.read(file.size - _SECTOR, _SECTOR) if file.size >= _SECTOR else b""
    for name, offset, magic in _REFUSED:
        if head.startswith(magic, offset) if offset >= 0 else tail.startswith(magic):
            raise UnsupportedError(
                f"{name} is not supported in this release",
                file=file.path,
                offset=offset if offset >= 0 else file.size + offset,
                field="magic",
                hint=_LUKS_HINT if magic == _LUKS else _HINT,
            )
