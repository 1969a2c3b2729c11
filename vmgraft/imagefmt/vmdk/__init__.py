"""VMDK sparse images (VMware): grain tables, and a graft with a line in the embedded descriptor; see docs/vmdk.md."""

from __future__ import annotations

from pathlib import Path

from vmgraft.imagefmt.contract import Format, Image, OpenOptions

__all__ = ["FORMAT"]


def _probe(head: bytes, _size: int) -> bool:
    """Accept files that begin with the magic of a hosted sparse extent (Virtual Disk Format 5.0, "Hosted Sparse")."""
    return head.startswith(b"KDMV")


def _open(path: Path, options: OpenOptions) -> Image:
    from vmgraft.imagefmt.vmdk.image import VmdkImage

    return VmdkImage(path, options)


FORMAT = Format(name="vmdk", probe=_probe, open=_open)
