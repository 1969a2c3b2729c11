"""VDI images (VirtualBox): block map, and a graft whose locator is in the header's comment; see docs/vdi.md."""

from __future__ import annotations

from pathlib import Path

from vmgraft.imagefmt.contract import Format, Image, OpenOptions

__all__ = ["FORMAT"]

#: VirtualBox VDICore.h, VDI_IMAGE_SIGNATURE, little-endian at byte 64 of the file.
_SIGNATURE = b"\x7f\x10\xda\xbe"
_SIGNATURE_OFFSET = 64


def _probe(head: bytes, _size: int) -> bool:
    """Accept files with the signature; whatever version and type they are, so that the refusal can say more."""
    return head.startswith(_SIGNATURE, _SIGNATURE_OFFSET)


def _open(path: Path, options: OpenOptions) -> Image:
    from vmgraft.imagefmt.vdi.image import VdiImage

    return VdiImage(path, options)


FORMAT = Format(name="vdi", probe=_probe, open=_open)
