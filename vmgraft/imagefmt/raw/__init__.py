"""Raw disk images: a graft is a trailer behind the end, or a sidecar."""

from __future__ import annotations

from pathlib import Path

from vmgraft.imagefmt.contract import Format, Image, OpenOptions

__all__ = ["FORMAT"]


def _probe(_head: bytes, size: int) -> bool:
    """Accept anything; the registry asks raw last."""
    return size >= 1


def _open(path: Path, options: OpenOptions) -> Image:
    from vmgraft.imagefmt.raw.image import RawImage

    return RawImage(path, options)


FORMAT = Format(name="raw", probe=_probe, open=_open)
