"""The 80x25 text screen as people see it: character cells at 0xB8000, code page 437."""

from __future__ import annotations

import codecs
from typing import Final

from vmgraft.vmmhost.core.contract import GuestMemory

TEXT_BASE: Final = 0xB8000
COLUMNS: Final = 80
ROWS: Final = 25
#: Looked up now: a host that has given up opening files cannot load a codec later.
_CODEC: Final = codecs.lookup("cp437")
#: What the first 32 codes and 127 look like on a PC's screen (they are glyphs there, not controls).
_LOW_GLYPHS: Final = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼"
_GLYPHS: Final = str.maketrans({**{chr(code): glyph for code, glyph in enumerate(_LOW_GLYPHS)}, "\x7f": "⌂"})


class TextScreen:
    """Reads the text screen from guest memory; costs the guest nothing."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    def lines(self) -> list[str]:
        """Return 25 lines, without trailing blanks."""
        cells = self._memory.read(TEXT_BASE, COLUMNS * ROWS * 2)
        text = _CODEC.decode(cells[::2])[0].translate(_GLYPHS)
        return [text[start : start + COLUMNS].rstrip("\xa0 ") for start in range(0, len(text), COLUMNS)]

    def contains(self, text: str) -> bool:
        """Whether ``text`` stands on one line of the screen."""
        return any(text in line for line in self.lines())

    def __str__(self) -> str:
        return "\n".join(self.lines()).rstrip("\n")
