"""Writing a fresh qcow2 image from bytes at hand, for machines without qemu-img."""

from __future__ import annotations

import io
from os import PathLike, fspath
from pathlib import Path
from typing import BinaryIO

from vmgraft.errors import UnsupportedError, UsageError
from vmgraft.imagefmt.commit import Writer, atomic_output
from vmgraft.imagefmt.qcow2 import _layout as lay
from vmgraft.imagefmt.write.base import SECTOR, WriteOptions, round_up
from vmgraft.imagefmt.write.qcow2 import Qcow2V2Writer, Qcow2Writer

#: Read at a time; whole clusters of any size.
_CHUNK = 1 << lay.MAX_CLUSTER_BITS


def create_qcow2(
    path: str | PathLike[str], content: BinaryIO | bytes, *, cluster_size: int = 65536, version: int = 3
) -> None:
    """Write a qcow2 image holding ``content``, rounded up to whole sectors; all-zero pages take no space.

    The file gets its name when it is complete.

    Args:
        path: The image to be made; must not exist.
        content: The guest's disk, as bytes or a seekable binary file.
        cluster_size: In bytes, a power of two from 512 to 2 MiB.
        version: 2 or 3.

    Raises:
        UsageError: a parameter is out of range, or ``path`` exists.
        FileError: the file cannot be written.
    """
    if version not in (2, 3):
        raise UsageError(f"version {version} is neither 2 nor 3")
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    size = source.seek(0, io.SEEK_END)
    source.seek(0)
    if size == 0:
        raise UsageError("an image needs at least one byte of content", file=path)
    kind = Qcow2Writer if version == 3 else Qcow2V2Writer
    with atomic_output(path) as fd:
        try:
            options = WriteOptions(cluster_size=cluster_size)
            writer = kind(Writer(fd, file=path), round_up(size, SECTOR), options, Path(fspath(path)).name)
        except UnsupportedError as problem:
            raise UsageError(problem.message, file=path, hint=problem.hint) from problem
        for position in range(0, size, _CHUNK):
            chunk = source.read(_CHUNK)
            view = memoryview(chunk.ljust(round_up(len(chunk), writer.alignment), b"\0"))
            for piece in writer.pieces(position, view):
                writer.store(piece)
        writer.finish()
