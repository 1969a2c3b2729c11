"""What of a guest's output may reach the user's terminal, and what brings the terminal back afterwards.

Control sequences by ECMA-48 (5.4 and 8.3); private modes as xterm documents them (XTerm Control Sequences).
"""

from __future__ import annotations

import codecs
import re
from typing import Final

_ESC: Final = "\x1b"
_BEL: Final = "\x07"
#: What begins, behind ESC, a string that only the terminal reads: OSC, DCS, PM, APC, SOS (ECMA-48, 5.6).
_STRINGS: Final = "]P^_X"
#: Single characters behind ESC that only move and store (DECSC, DECRC, DECKPAM, DECKPNM, IND, NEL, RI).
_HARMLESS_SINGLES: Final = "78=>DEM"
#: Longest control sequence passed on, in characters.
_SEQUENCE_MAX: Final = 32
#: Control sequences that only move, erase, colour, and insert. Left out are those that make a terminal answer (c, n,
#: x), print (i), move its window (t), lock its keyboard (2 h), or load and reprogram it (p, q, y, ...); and those with
#: a private prefix or an intermediate byte: queries and key maps of various terminals (? m, ? u, > m, > u).
_PLAIN: Final = re.compile(r"\x1b\[(?:[0-9;:]*[@A-HIJKLMPSTXZ`abdefgmrsu]|4[hl])\Z")
#: Erasing that spares protected cells.
_SELECTIVE: Final = re.compile(r"\x1b\[\?[0-9]*[JK]\Z")
#: Setting and resetting private modes (DECSET, DECRST).
_MODES: Final = re.compile(r"\x1b\[\?([0-9]{1,4}(?:;[0-9]{1,4})*)([hl])\Z")
#: Private modes that are on in a terminal that nobody changed: wrapping, and a cursor that is seen.
_ON: Final = frozenset({7, 25})
#: Private modes that may be set: cursor keys, reverse screen, origin, wrapping, blinking and visible cursor, the other
#: screen, mouse and focus reports, bracketed paste, batches of output. Not among them: VT52 mode (2), whose way back is
#: another, the mouse mode that waits for an answer (1001), and what maps keys.
_KNOWN: Final = frozenset(
    {1, 5, 6, *_ON, 12, 47, 1000, 1002, 1003, 1004, 1005, 1006, 1015, 1047, 1048, 1049, 2004, 2026}
)


class SequenceFilter:
    """Lets text, cursor movement and colours through, and nothing that could drive the terminal or make it answer.

    A guest's output is not trusted: a sequence can rename windows, write the clipboard, or have the terminal type. What
    it may set, such as the reports of a mouse, must not stay when it is gone: :meth:`undo`.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._string = self._used = self._region = False
        self._modes: dict[int, bool] = {}

    def pass_on(self, data: bytes) -> bytes:
        """Return what of the guest's bytes may reach the terminal; half a sequence waits for its rest."""
        return "".join(map(self._character, self._decoder.decode(data))).encode()

    def undo(self) -> bytes:
        """Return what takes back the modes that were passed on; nothing where there were none."""
        if not self._used:
            return b""
        changed = [mode for mode, state in self._modes.items() if state != (mode in _ON)]
        back = "".join(f"\x1b[?{mode}{'h' if mode in _ON else 'l'}" for mode in changed)
        self._modes.clear()
        # Insert mode off, colours and characters as usual, keypad numeric; the scrolling region, which moves the
        # cursor, only where it was set.
        return (back + "\x1b[4l\x1b[0m\x1b(B\x1b>" + ("\x1b7\x1b[r\x1b8" if self._region else "")).encode()

    def _character(self, character: str) -> str:
        if character == _ESC:  # also within a sequence or string: it ends there
            self._held, self._string = _ESC, False
            return ""
        if self._string:
            self._string = character != _BEL
            return ""
        if self._held:
            return self._sequence(character)
        return character if character in "\a\b\t\n\v\f\r" or not _is_control(character) else ""

    def _sequence(self, character: str) -> str:
        """Take the next character of a sequence; return the sequence once it is whole and harmless."""
        held = self._held = self._held + character
        kind = held[1]
        if len(held) == 2:
            self._string = kind in _STRINGS
            if kind in "[()":
                return ""
            self._held = ""
            return self._use(held) if kind in _HARMLESS_SINGLES else ""
        if kind in "()":  # which characters are shown: ASCII, line drawing
            self._held = ""
            return self._use(held) if character in "B0" else ""
        if " " <= character < "@" and len(held) <= _SEQUENCE_MAX:
            return ""
        self._held = ""
        return self._use(held) if self._harmless(held) else ""

    def _use(self, sequence: str) -> str:
        self._used = True
        return sequence

    def _harmless(self, sequence: str) -> bool:
        modes = _MODES.match(sequence)
        if modes is None:
            self._region = self._region or sequence.endswith("r")
            return _PLAIN.match(sequence) is not None or _SELECTIVE.match(sequence) is not None
        named = [int(text) for text in modes[1].split(";")]
        if not _KNOWN.issuperset(named):
            return False
        self._modes |= dict.fromkeys(named, modes[2] == "h")
        return True


def _is_control(character: str) -> bool:
    """Tell control characters of either half (C0, DEL, C1)."""
    return character < " " or "\x7f" <= character < "\xa0"
