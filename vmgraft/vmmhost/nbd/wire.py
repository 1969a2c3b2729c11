"""A socket with deadlines: whole messages in, whole messages out, and nobody can hold a thread for ever."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Sequence
from typing import Final

#: Buffers one sendmsg takes; far below IOV_MAX (1024, limits.h).
_BATCH: Final = 64
#: Bytes that are thrown away at a time.
_WASTE: Final = 65536


class GoneError(Exception):
    """The other side closed, broke off, or took too long; there is nobody left to tell."""


class Wire:
    """One connected stream socket, which becomes non-blocking and belongs to this object.

    Reading and writing are independent: one thread may do each at the same time.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._fd = connected.fileno()

    def receive(self, length: int, seconds: float) -> bytes:
        """Return exactly ``length`` bytes, within ``seconds`` in all.

        Raises:
            GoneError: they do not come.
        """
        data = bytearray(length)
        self.receive_into(memoryview(data), seconds)
        return bytes(data)

    def receive_into(self, view: memoryview, seconds: float) -> None:
        """Fill ``view``, within ``seconds`` in all.

        Raises:
            GoneError: the bytes do not come.
        """
        deadline = time.monotonic() + seconds
        while view:
            try:
                count = self._socket.recv_into(view)
            except BlockingIOError:
                self._wait(select.POLLIN, deadline)
                continue
            except OSError as error:
                raise GoneError(error.strerror) from error
            if not count:
                raise GoneError("the other side closed")
            view = view[count:]

    def skip(self, length: int, seconds: float) -> None:
        """Throw away ``length`` bytes, within ``seconds`` in all.

        Raises:
            GoneError: the bytes do not come.
        """
        deadline = time.monotonic() + seconds
        waste = memoryview(bytearray(min(length, _WASTE)))
        while length:
            part = waste[: min(length, len(waste))]
            self.receive_into(part, deadline - time.monotonic())
            length -= len(part)

    def wait_readable(self) -> None:
        """Wait, for as long as it takes, until there is something to read: bytes or the end."""
        with contextlib.suppress(OSError, ValueError):
            self._poll(select.POLLIN, None)

    def send(self, parts: Sequence[bytes | bytearray | memoryview], seconds: float) -> None:
        """Send all of ``parts``, within ``seconds`` in all.

        Raises:
            GoneError: the other side does not take them.
        """
        deadline = time.monotonic() + seconds
        views = [memoryview(part) for part in parts if len(part)]
        at = 0
        while at < len(views):
            try:
                sent = self._socket.sendmsg(views[at : at + _BATCH])
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline)
                continue
            except OSError as error:
                raise GoneError(error.strerror) from error
            while at < len(views) and sent >= len(views[at]):
                sent -= len(views[at])
                at += 1
            if sent:
                views[at] = views[at][sent:]

    def shut_down(self) -> None:
        """End both directions; whoever waits in another thread wakes up and finds it gone."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; no other thread may be using it."""
        self._socket.close()

    def _wait(self, event: int, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0 or not self._poll(event, left):
            raise GoneError("took too long")

    def _poll(self, event: int, seconds: float | None) -> bool:
        poller = select.poll()
        poller.register(self._fd, event)
        return bool(poller.poll(None if seconds is None else max(1, int(seconds * 1000))))
