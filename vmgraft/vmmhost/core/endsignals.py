"""Signals that ask a program to end, turned into the orderly end of a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from vmgraft.vmmhost.core.contract import EndReason

#: Signals that ask a program to end.
END_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def end_signals(stop: Callable[[EndReason, str], None]) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP end the run in order, not in the midst of it; the old handlers come back.

    A second signal raises KeyboardInterrupt: something, such as a full pipe behind the serial port, holds up the run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    seen: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt(signal.Signals(number).name)
        seen.append(number)
        stop(EndReason.INTERRUPTED, "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    old = {number: signal.getsignal(number) for number in END_SIGNALS}
    taken = {number: handler for number, handler in old.items() if handler not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
