"""qcow2: header parser, cluster mapping, and the graft in a header extension; see docs/qcow2.md."""

from __future__ import annotations

from pathlib import Path

from vmgraft.imagefmt.contract import Format, Image, OpenOptions


def _probe(head: bytes, size: int) -> bool:
    return size >= 4 and head.startswith(b"QFI\xfb")


def _open(path: Path, options: OpenOptions) -> Image:
    from vmgraft.imagefmt.qcow2.image import open_image

    return open_image(path, options)


#: The registry's row.
FORMAT = Format("qcow2", _probe, _open, snapshots=True, ciphertext=True)

__all__ = ["FORMAT"]
