"""A picture of the text screen, as a monitor of a PC shows it: a PNG of 640 x 400 points in 16 colours.

The glyphs are those of the VGA's ROM, 256 of 8 x 16 points in code page 437 (data/vgafont.bin, in the public domain:
vgasrc/vgafonts.c of SeaBIOS). PNG: W3C Portable Network Graphics specification, third edition.
"""

from __future__ import annotations

import struct
import zlib
from functools import cache
from importlib import resources
from typing import Final

from vmgraft.vmmhost.core.screen import COLUMNS, ROWS

GLYPH_WIDTH: Final = 8
GLYPH_HEIGHT: Final = 16
WIDTH: Final = COLUMNS * GLYPH_WIDTH
HEIGHT: Final = ROWS * GLYPH_HEIGHT
#: The 16 colours of the text modes as the VGA's palette starts out, red, green, blue (IBM VGA technical reference).
COLOURS: Final = bytes.fromhex(
    "000000 0000aa 00aa00 00aaaa aa0000 aa00aa aa5500 aaaaaa 555555 5555ff 55ff55 55ffff ff5555 ff55ff ffff55 ffffff"
)
_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH: Final = 4
_INDEXED: Final = 3


def screen_png(cells: bytes) -> bytes:
    """Draw a text screen.

    Args:
        cells: 80 x 25 pairs of code and attribute. A blinking cell is drawn steady.

    Raises:
        ValueError: another number of bytes.
    """
    if len(cells) != COLUMNS * ROWS * 2:
        raise ValueError(f"a screen has {COLUMNS * ROWS * 2} bytes, not {len(cells)}")
    stride = COLUMNS * 2
    lines = b"".join(_text_row(cells[start : start + stride]) for start in range(0, len(cells), stride))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, _BIT_DEPTH, _INDEXED, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", COLOURS), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def _text_row(cells: bytes) -> bytes:
    """Return the 16 lines of points of one row of text, each behind its filter byte (none)."""
    font = _font()
    parts = []
    for line in range(GLYPH_HEIGHT):
        points = (
            _points(font[cells[at] * GLYPH_HEIGHT + line], cells[at + 1] & 0x7F) for at in range(0, len(cells), 2)
        )
        parts.append(b"\0" + b"".join(points))
    return b"".join(parts)


@cache
def _points(bits: int, attribute: int) -> bytes:
    """Return eight points, two a byte: foreground where a bit is set."""
    front, back = attribute & 0x0F, attribute >> 4
    colours = [front if bits >> (7 - index) & 1 else back for index in range(GLYPH_WIDTH)]
    return bytes(colours[at] << 4 | colours[at + 1] for at in range(0, GLYPH_WIDTH, 2))


@cache
def _font() -> bytes:
    return resources.files("vmgraft.vmmhost").joinpath("data/vgafont.bin").read_bytes()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
