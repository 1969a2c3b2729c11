"""The machine protocol of QEMU over a socket that is there already (docs/interop/qmp-spec of QEMU).

QEMU may have been taken over by its guest: whatever comes from it is bounded and checked, and trusted with nothing.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections import deque
from typing import Any, Final

from vmgraft.errors import HostError

#: Longest line that is taken: a text screen in a monitor's dump is about 40 KiB.
MAX_LINE: Final = 1 << 20
#: Events kept until somebody asks for them; a guest could cause any number.
MAX_EVENTS: Final = 256
#: Pieces taken in at a time: a QEMU that never stops talking does not keep the host from its other work.
_READS: Final = 16


class Qmp:
    """Speaks QMP; every wait is bounded.

    Args:
        connected: The socket; belongs to this object.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket, self._buffer = connected, bytearray()
        self._replies: deque[dict[str, Any]] = deque()
        self._greeting: dict[str, Any] | None = None
        #: Events in the order they came, the oldest first.
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        #: Whether QEMU closed its end.
        self.closed = False

    def fileno(self) -> int:
        """Return the descriptor, for polling."""
        return self._socket.fileno()

    def start(self, seconds: float) -> str:
        """Wait for the greeting and leave capabilities negotiation; return QEMU's version.

        Raises:
            HostError: QEMU does not greet, or breaks the protocol.
        """
        deadline = time.monotonic() + seconds
        while self._greeting is None:
            self._wait(deadline)
        self.execute("qmp_capabilities", seconds=max(0.1, deadline - time.monotonic()))
        version = self._greeting.get("version")
        number = version.get("qemu") if isinstance(version, dict) else None
        parts = [number.get(part) for part in ("major", "minor", "micro")] if isinstance(number, dict) else []
        return ".".join(str(part) for part in parts if isinstance(part, int))

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, seconds: float = 10.0) -> Any:
        """Run a command and return its result.

        Raises:
            HostError: it fails, QEMU is gone or does not answer in time.
        """
        self._replies.clear()
        request = {"execute": command} | ({} if arguments is None else {"arguments": arguments})
        deadline = time.monotonic() + seconds
        self._send(json.dumps(request).encode() + b"\n", deadline)
        while not self._replies:
            self._wait(deadline)
        reply = self._replies.popleft()
        if "return" not in reply:
            error = reply.get("error")
            text = error.get("desc") if isinstance(error, dict) else None
            raise HostError(f"QEMU refuses {command}: {str(text)[:500]!r}")
        return reply["return"]

    def receive(self) -> None:
        """Take in what is there, without waiting, or a bounded part of it.

        Raises:
            HostError: QEMU breaks the protocol.
        """
        for _ in range(_READS):
            if self.closed:
                return
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self.closed = not data
            self._buffer += data
            self._parse()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _parse(self) -> None:
        while (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            if line.strip():
                self._sort(line)
        if len(self._buffer) > MAX_LINE:
            raise HostError("QEMU sends a line without end on its control socket")

    def _sort(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise HostError("QEMU sends something on its control socket that is no JSON") from error
        if not isinstance(message, dict):
            raise HostError("QEMU sends something on its control socket that is no message")
        if isinstance(message.get("QMP"), dict):
            self._greeting = message["QMP"]
        elif isinstance(message.get("event"), str):
            self.events.append(message)
        elif not self._replies:  # at most one is awaited
            self._replies.append(message)

    def _wait(self, deadline: float) -> None:
        self._poll(select.POLLIN, deadline)
        self.receive()
        if self.closed and not self._replies:
            raise HostError("QEMU closed its control socket")

    def _send(self, data: bytes, deadline: float) -> None:
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                self._poll(select.POLLOUT, deadline)
            except OSError as error:
                raise HostError("QEMU closed its control socket") from error

    def _poll(self, event: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(self._socket, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(max(1, int(left * 1000))):
            raise HostError("QEMU does not answer on its control socket")
