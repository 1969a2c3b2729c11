"""The user's terminal as the serial console of a guest: raw while the guest runs, and as it was at any end."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Final, Self

from vmgraft.cli.sequences import SequenceFilter
from vmgraft.errors import UsageError

#: Ctrl-], the escape key of telnet and virsh.
ESCAPE_KEY: Final = 0x1D
#: Keys taken in one look.
_KEYS: Final = 256
#: Signals that would end or stop this program without its knowledge of a raw terminal.
_RESTORING: Final = (signal.SIGQUIT, signal.SIGTSTP)


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
        with suppress(OSError, ValueError):  # a terminal that is gone has no modes either
            sys.stdout.buffer.write(self._filter.undo())
            sys.stdout.buffer.flush()
        self.restore()
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
