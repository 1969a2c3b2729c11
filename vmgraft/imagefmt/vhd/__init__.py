"""Virtual Hard Disk (VHD) images, dynamic and fixed: the record lies in a sidecar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vmgraft.imagefmt.contract import Format, Image, OpenOptions

if TYPE_CHECKING:
    from vmgraft.imagefmt.flatfile import FlatFile

__all__ = ["FORMAT"]

#: Virtual Hard Disk Image Format Specification 1.0, "Hard Disk Footer Format": cookie.
_COOKIE = b"conectix"
#: The footer's length; versions before Virtual PC 2004 wrote one byte less.
_FOOTER_SIZE = 512


def _probe(head: bytes, _size: int) -> bool:
    """Accept files that begin with the copy of the footer: dynamic and differencing disks."""
    return head.startswith(_COOKIE)


def _probe_end(file: FlatFile) -> bool:
    """Accept files that end with a footer: fixed disks, which begin with the guest's own bytes."""
    tail = file.read(max(0, file.size - _FOOTER_SIZE), _FOOTER_SIZE)
    return len(tail) == _FOOTER_SIZE and (tail.startswith(_COOKIE) or tail.startswith(_COOKIE, 1))


def _open(path: Path, options: OpenOptions) -> Image:
    from vmgraft.imagefmt.vhd.image import VhdImage

    return VhdImage(path, options)


FORMAT = Format(name="vhd", probe=_probe, open=_open, probe_end=_probe_end)
