"""Files as short inputs: pieces with gaps between, so that a fuzzer can move a table of a 32 MiB image, or make a hole.

An input is a run of (gap, length, bytes): the gap as a 32-bit little-endian number of bytes, or of units of 4096 bytes
where its top bit is set; the length as 16 bits. A last gap without bytes sets the size.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

_PAGES = 1 << 31
#: Limits of what an input can ask for, in bytes.
MAX_SIZE = 1 << 43
MAX_DATA = 1 << 20


def unpack(data: bytes) -> tuple[list[tuple[int, bytes]], int]:
    """Return the pieces of a file and its size; any input is one."""
    pieces, position, at, total = [], 0, 0, 0
    while at + 4 <= len(data):
        gap = int.from_bytes(data[at : at + 4], "little")
        position = min(MAX_SIZE, position + (gap - _PAGES) * 4096 if gap & _PAGES else position + gap)
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        piece = data[at + 6 : at + 6 + length][: MAX_DATA - total]
        if piece:
            pieces.append((position, piece))
        position, total, at = position + len(piece), total + len(piece), at + 6 + length
    return pieces, position


def write(data: bytes, path: Path) -> None:
    """Make the file that ``data`` stands for."""
    pieces, size = unpack(data)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        for offset, piece in pieces:
            os.pwrite(fd, piece, offset)
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _gaps(distance: int) -> Iterator[bytes]:
    """Yield records without bytes that move ahead by ``distance`` but for less than 2^31 bytes."""
    while distance >= _PAGES:
        pages = min((distance - 1) // 4096, _PAGES - 1)
        yield struct.pack("<IH", _PAGES | pages, 0)
        distance -= pages * 4096
    yield struct.pack("<I", distance)


def pack(content: bytes, *, size: int | None = None, at: int = 0) -> bytes:
    """Return an input for a file of ``content`` at offset ``at``; runs of zeros become gaps."""
    return pack_pieces([(at, content)], len(content) + at if size is None else size)


def pack_pieces(pieces: list[tuple[int, bytes]], size: int) -> bytes:
    """Return an input for a file of ``size`` bytes with these pieces, in ascending order."""
    out, position = [], 0
    for offset, content in pieces:
        for start, run in _runs(content):
            out += [*_gaps(offset + start - position), struct.pack("<H", len(run)), run]
            position = offset + start + len(run)
    return b"".join([*out, *_gaps(size - position), b"\0\0"])


def _runs(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the parts of ``content`` between runs of 32 zeros or more."""
    start, end = 0, len(content)
    while start < end:
        while start < end and content[start] == 0:
            start += 1
        stop = content.find(bytes(32), start)
        stop = end if stop < 0 else stop
        for at in range(start, stop, 60000):
            yield at, content[at : min(stop, at + 60000)]
        start = stop
