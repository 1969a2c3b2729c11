"""The serial port of a guest in QEMU, and the text that a run waits for."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

#: Bytes of serial output that are kept for the report; the sink gets all of them.
KEPT: Final = 4 << 20
_CHUNK: Final = 65536
#: Keys that wait for the guest to take them.
_TYPED_MAX: Final = 4096


class SerialPort:
    """Takes what the guest sends to its first serial port, and looks for a text in it.

    Args:
        connected: The socket behind the port; belongs to this object.
        sink: Gets every byte.
        until: Text to look for.
    """

    def __init__(self, connected: socket.socket, sink: Callable[[bytes], None] | None, until: str | None) -> None:
        connected.setblocking(False)
        self._socket, self._sink = connected, sink
        self._until = b"" if until is None else until.encode()
        self._tail, self._typed = b"", b""
        self.kept = bytearray()
        self.seen = self.closed = False

    def fileno(self) -> int:
        """Return the descriptor, for polling."""
        return self._socket.fileno()

    def receive(self) -> None:
        """Take in one piece of what is there."""
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return
        self.kept += data[: KEPT - len(self.kept)]
        if self._until and not self.seen:
            looked = self._tail + data
            self.seen = self._until in looked
            self._tail = looked[-len(self._until) :]
        if self._sink is not None:
            self._sink(data)

    def drain(self) -> None:
        """Take in what is left once QEMU has ended; at most what a socket holds."""
        for _ in range(64):
            if self.closed:
                return
            before = len(self._tail), len(self.kept)
            self.receive()
            if before == (len(self._tail), len(self.kept)):
                return

    def type(self, keys: bytes) -> None:
        """Send keys to the guest, as far as it takes them; those of a guest that does not listen are dropped."""
        self._typed = (self._typed + keys)[:_TYPED_MAX]
        if not self._typed:
            return
        try:
            self._typed = self._typed[self._socket.send(self._typed) :]
        except BlockingIOError:
            return
        except OSError:
            self._typed = b""

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
