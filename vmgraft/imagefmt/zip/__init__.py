"""ZIP archives and JARs: the record and a second central directory stand behind the archive."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.contract import Format, Image, OpenOptions

if TYPE_CHECKING:
    from vmgraft.imagefmt.flatfile import FlatFile

__all__ = ["FORMAT"]

#: APPNOTE 6.3.10, 4.3.7 and 4.3.16: signatures of a local file header, and of the end record of an empty archive.
_SIGNATURES = (b"PK\3\4", b"PK\5\6")
#: A boot sector ends so; a file that has it is a disk, unless its name says archive.
_BOOT_SIGNATURE = b"\x55\xaa"
_BOOT_OFFSET = 510
#: Names under which archives with something before the first entry are looked for (launchers, self-extractors).
_SUFFIXES = (".zip", ".jar", ".war", ".ear", ".apk")


def _probe(head: bytes, _size: int) -> bool:
    """Accept files that begin with an entry, or are an empty archive."""
    return head.startswith(_SIGNATURES) and not head.startswith(_BOOT_SIGNATURE, _BOOT_OFFSET)


def _probe_end(file: FlatFile) -> bool:
    """Accept files that are named like an archive and end like one, whatever they begin with."""
    if file.path.suffix.lower() not in _SUFFIXES:
        return False
    from vmgraft.imagefmt.zip.locate import find_graft

    try:
        find_graft(file)
    except MalformedImageError:
        return False
    except UnsupportedError:
        return True  # an archive; opening it says what is wrong with it
    return True


def _open(path: Path, options: OpenOptions) -> Image:
    from vmgraft.imagefmt.zip.image import ZipImage

    return ZipImage(path, options)


FORMAT = Format(name="zip", probe=_probe, open=_open, probe_end=_probe_end)
