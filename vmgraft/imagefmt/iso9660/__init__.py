"""ISO 9660 images: a locator in the primary volume descriptor, the record behind the end."""

from __future__ import annotations

from pathlib import Path

from vmgraft.imagefmt.contract import Format, Image, OpenOptions

__all__ = ["FORMAT"]

#: ECMA-119, 8.1.2: standard identifier, at byte 1 of the first volume descriptor in logical sector 16.
_IDENTIFIER = b"CD001"
_IDENTIFIER_OFFSET = 16 * 2048 + 1


def _probe(head: bytes, _size: int) -> bool:
    """Accept files with a volume descriptor where ECMA-119 wants the first one."""
    return head.startswith(_IDENTIFIER, _IDENTIFIER_OFFSET)


def _open(path: Path, options: OpenOptions) -> Image:
    from vmgraft.imagefmt.iso9660.image import IsoImage

    return IsoImage(path, options)


FORMAT = Format(name="iso9660", probe=_probe, open=_open)
