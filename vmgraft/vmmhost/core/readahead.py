"""Reading ahead beside the guest: what was hinted at is fetched, and checked as ever, by a thread of its own.

The thread is started with the first hint, so that a machine which nobody hints at has none; and only then, since a
thread has the rights that its maker had: the host gives most of its own up before the guest's first instruction.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

#: Hints that wait; of more the oldest are forgotten, since the guest has long gone on.
_WAITING_MAX: Final = 256


class ReadAhead:
    """A thread that fetches ranges of blocks, one after the other.

    Args:
        prefetch: Takes (first block, blocks) into the drive's cache; what goes wrong there must not matter.
    """

    def __init__(self, prefetch: Callable[[int, int], None]) -> None:
        self._prefetch = prefetch
        self._waiting: deque[tuple[int, int]] = deque(maxlen=_WAITING_MAX)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = self._closed = False

    def want(self, first: int, count: int) -> None:
        """Fetch these blocks soon; returns at once."""
        with self._changed:
            if self._closed:
                return
            self._waiting.append((first, count))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until nothing is left to fetch."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not (self._waiting or self._busy))

    def close(self) -> None:
        """Forget what waits, and end once the read that runs is done; may be called twice."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        # Signals are the main thread's: they interrupt the guest there.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or bool(self._waiting))
                if self._closed:
                    return
                first, count = self._waiting.popleft()
                self._busy = True
            self._prefetch(first, count)
