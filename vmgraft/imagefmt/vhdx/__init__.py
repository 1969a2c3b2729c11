"""VHDX: headers, regions and block table, and the graft in a region of its own; see docs/vhdx.md."""

from __future__ import annotations

from pathlib import Path

from vmgraft.imagefmt.contract import Format, Image, OpenOptions


def _probe(head: bytes, size: int) -> bool:
    return size >= 8 and head.startswith(b"vhdxfile")


def _open(path: Path, options: OpenOptions) -> Image:
    from vmgraft.imagefmt.vhdx.image import VhdxImage

    return VhdxImage(path, options)


#: The registry's row.
FORMAT = Format("vhdx", _probe, _open)

__all__ = ["FORMAT"]
