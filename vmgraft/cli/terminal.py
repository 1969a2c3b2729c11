"""The user's terminal as the serial console of a guest: raw while the guest runs, and as it was at any end."""

from __future__ import annotations

import codecs
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, Self

from vmgraft.errors import UsageError

#: Ctrl-], the escape key of telnet and virsh.
ESCAPE_KEY: Final = 0x1D
#: Keys taken in one look.
_KEYS: Final = 256
_ESC: Final = "\x1b"
_BEL: Final = "\x07"
#: What begins, behind ESC, a string that only the terminal reads: OSC, DCS, PM, APC, SOS (ECMA-48, 5.6).
_STRINGS: Final = "]P^_X"
#: Final characters of control sequences that only move, erase, colour and set modes (ECMA-48, 8.3). Left out are those
#: that make a terminal answer (c, n, x), print (i), move its window (t), or load and reprogram it (p, q, y, ...).
_HARMLESS_FINALS: Final = "@ABCDEFGHIJKLMPSTXZ`abdefghlmrsu"
#: Single characters behind ESC that only move and store (DECSC, DECRC, DECKPAM, DECKPNM, IND, NEL, RI).
_HARMLESS_SINGLES: Final = "78=>DEM"
#: Longest control sequence passed on, in characters.
_SEQUENCE_MAX: Final = 32
#: Signals that would end or stop this program without its knowledge of a raw terminal.
_RESTORING: Final = (signal.SIGQUIT, signal.SIGTSTP)


class SequenceFilter:
    """Lets text, cursor movement and colours through, and nothing that could drive the terminal or make it answer.

    A guest's output is not trusted: a sequence can rename windows, write the clipboard, or have the terminal type.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._string = False

    def pass_on(self, data: bytes) -> bytes:
        """Return what of the guest's bytes may reach the terminal; half a sequence waits for its rest."""
        return "".join(map(self._character, self._decoder.decode(data))).encode()

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
            return held if kind in _HARMLESS_SINGLES else ""
        if kind in "()":  # which characters are shown: ASCII, line drawing
            self._held = ""
            return held if character in "B0" else ""
        if " " <= character < "@" and len(held) <= _SEQUENCE_MAX:
            return ""
        self._held = ""
        return held if character in _HARMLESS_FINALS else ""


def _is_control(character: str) -> bool:
    """Tell control characters of either half (C0, DEL, C1)."""
    return character < " " or "\x7f" <= character < "\xa0"


class Terminal:
    """Takes the keys of a terminal for a guest; a context manager that leaves the terminal as it was.

    Args:
        read: Descriptor of the terminal that keys come from.

    Raises:
        UsageError: it is no terminal.
    """

    def __init__(self, read: int | None = None) -> None:
        try:
            self._fd = sys.stdin.fileno() if read is None else read
            self._before = termios.tcgetattr(self._fd)
        except (termios.error, AttributeError, ValueError, OSError) as error:
            raise UsageError("--console needs a terminal on stdin", hint="leave --console out") from error
        self._handlers: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._filter = SequenceFilter()
        self._escaped = self._gone = False

    @property
    def escaped(self) -> bool:
        """Whether the escape key was struck, or the terminal is gone."""
        return self._escaped

    def poll(self) -> bytes:
        """Return the keys struck since the last time, up to the escape key; never waits."""
        if self._gone or not select.select([self._fd], [], [], 0)[0]:
            return b""
        try:
            keys = os.read(self._fd, _KEYS)
        except OSError:
            keys = b""
        if not keys:  # the terminal was hung up
            self._gone = self._escaped = True
            return b""
        before, escape, _after = keys.partition(bytes((ESCAPE_KEY,)))
        self._escaped = self._escaped or bool(escape)
        return before

    def show(self, data: bytes) -> None:
        """Show what the guest sent."""
        shown = self._filter.pass_on(data)
        if shown:
            sys.stdout.buffer.write(shown)
            sys.stdout.buffer.flush()

    def restore(self) -> None:
        """Give the terminal its old settings back; may be called twice."""
        try:
            termios.tcsetattr(self._fd, termios.TCSANOW, self._before)
        except (termios.error, OSError):
            self._gone = True

    def _raw(self) -> None:
        tty.setraw(self._fd, termios.TCSANOW)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Let a signal that stops or ends the program do so with the terminal in order, and go on raw after a stop."""
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        signal.signal(number, self._on_signal)
        self._raw()

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._on_signal) for number in _RESTORING}
        self._raw()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.restore()
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
