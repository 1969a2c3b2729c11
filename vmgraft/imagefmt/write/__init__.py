"""Writing new disk images: what ``convert`` makes, without any other program."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmgraft.errors import UsageError

if TYPE_CHECKING:
    from vmgraft.imagefmt.write.base import DiskWriter

#: Format → module and class.
_WRITERS: Final = {
    "qcow2": ("qcow2", "Qcow2Writer"),
    "raw": ("flat", "RawWriter"),
    "iso9660": ("flat", "IsoWriter"),
    "vhdx": ("vhdx", "VhdxWriter"),
    "vmdk": ("vmdk", "VmdkWriter"),
    "vhd": ("vhd", "VhdWriter"),
    "vdi": ("vdi", "VdiWriter"),
}
_SUFFIXES: Final = {
    ".qcow2": "qcow2",
    ".raw": "raw",
    ".img": "raw",
    ".dd": "raw",
    ".iso": "iso9660",
    ".vhdx": "vhdx",
    ".vmdk": "vmdk",
    ".vhd": "vhd",
    ".vpc": "vhd",
    ".vdi": "vdi",
}


def writable_formats() -> tuple[str, ...]:
    """Return the names of the formats that can be written."""
    return tuple(_WRITERS)


def format_of_name(path: Path) -> str:
    """Return the format that a file's suffix stands for.

    Raises:
        UsageError: it stands for none.
    """
    name = _SUFFIXES.get(path.suffix.lower())
    if name is None:
        hint = f"name the format with -O: one of {', '.join(_WRITERS)}"
        raise UsageError("the suffix of the output's name says nothing about its format", file=path, hint=hint)
    return name


def get_writer(name: str) -> type[DiskWriter]:
    """Return the writer of a format.

    Raises:
        UsageError: nothing of that format can be written.
    """
    if name not in _WRITERS:
        raise UsageError(f"images of format {name!r} cannot be made", hint=f"one of {', '.join(_WRITERS)}")
    module, attribute = _WRITERS[name]
    writer: type[DiskWriter] = getattr(import_module(f"vmgraft.imagefmt.write.{module}"), attribute)
    return writer
