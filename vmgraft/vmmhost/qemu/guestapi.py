"""Calls of a guest to extensions over a byte stream: the virtio-serial port ``org.vmgraft.0``.

A request is 32 bytes, an answer 24, all integers little-endian (docs/qemu.md):

========  ==========================================  ========  ===========================================
request                                               answer
========  ==========================================  ========  ===========================================
0         ``VGRQ``                                    0         ``VGRS``
4         sequence number, chosen by the guest        4         the same number
8         call number                                 8         status: 0 answered, 1 nobody does, 2 malformed
12        zero                                        12        zero
16        four arguments of 32 bits                   16        result of 64 bits; all ones unless answered
========  ==========================================  ========  ===========================================

The guest's bytes are hostile. Whatever does not begin a request is passed over up to the next magic, and answered once.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import Final

from vmgraft.vmmhost.core.contract import HypercallHandler

REQUEST: Final = struct.Struct("<4s7I")
ANSWER: Final = struct.Struct("<4s3IQ")
REQUEST_MAGIC: Final = b"VGRQ"
ANSWER_MAGIC: Final = b"VGRS"
ANSWERED, NOBODY, MALFORMED = 0, 1, 2
#: Call number 0 (docs/host.md, "Doorbell"): low half ``TFGV`` as text, high half how many extensions claim something.
DISCOVERY_MAGIC: Final = 0x56474654
_ALL_ONES: Final = (1 << 64) - 1
#: Answers the guest has not taken yet, in bytes; beyond, its requests wait.
_BACKLOG: Final = 65536
#: Requests done before the host looks at its other work.
_BATCH: Final = 64


class GuestApi:
    """Serves the port; never waits, and never fails because of what the guest sends.

    Args:
        connected: The socket behind the port; belongs to this object.
        ended: Says that the run is over: requests that wait are not answered any more.
    """

    def __init__(self, connected: socket.socket, ended: Callable[[], bool] = lambda: False) -> None:
        connected.setblocking(False)
        self._socket, self._ended = connected, ended
        self._ranges: list[tuple[int, int, HypercallHandler]] = []
        self._owners: set[str] = set()
        self._in, self._out = bytearray(), bytearray()
        self._lost = False
        self.closed = False
        #: Requests that were whole, and pieces that were none.
        self.calls = self.malformed = 0

    def claim_hypercall(self, first: int, last: int, handler: HypercallHandler, owner: str) -> None:
        """Let ``handler`` answer the numbers; ranges were tried against each other before."""
        self._ranges.append((first, last, handler))
        self._owners.add(owner)

    def fileno(self) -> int:
        """Return the descriptor, for polling."""
        return self._socket.fileno()

    @property
    def sending(self) -> bool:
        """Whether answers wait for the guest to take them."""
        return bool(self._out)

    @property
    def receiving(self) -> bool:
        """Whether more requests are taken; not while the guest does not read its answers."""
        return len(self._out) < _BACKLOG

    @property
    def busy(self) -> bool:
        """Whether whole requests are left over from the last :meth:`serve`."""
        return self.receiving and len(self._in) >= REQUEST.size

    def serve(self) -> None:
        """Read, answer and write what can be, without waiting."""
        self._flush()
        if self.receiving and len(self._in) < REQUEST.size * _BATCH:
            self._read()
        for _ in range(_BATCH):
            if not self.receiving or self._ended() or not self._align():
                break
            fields = REQUEST.unpack(self._in[: REQUEST.size])
            del self._in[: REQUEST.size]
            self._answer(fields)
        self._flush()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _read(self) -> None:
        try:
            data = self._socket.recv(REQUEST.size * _BATCH)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.closed = self.closed or not data
        self._in += data

    def _align(self) -> bool:
        """Drop what does not begin a request; say whether a whole one is there."""
        at = self._in.find(REQUEST_MAGIC)
        if at < 0:  # keep what may be the beginning of a magic
            tail = next((n for n in (3, 2, 1) if self._in.endswith(REQUEST_MAGIC[:n])), 0)
            at = len(self._in) - tail
        if at:
            del self._in[:at]
            if not self._lost:
                self._lost = True
                self.malformed += 1
                self._put(0, MALFORMED, _ALL_ONES)
        return len(self._in) >= REQUEST.size

    def _answer(self, fields: tuple[bytes, int, int, int, int, int, int, int]) -> None:
        _, sequence, number, reserved, *args = fields
        self._lost = False
        if reserved:
            self.malformed += 1
            self._put(sequence, MALFORMED, _ALL_ONES)
            return
        self.calls += 1
        if number == 0:
            self._put(sequence, ANSWERED, len(self._owners) << 32 | DISCOVERY_MAGIC)
            return
        for first, last, handler in self._ranges:
            if first <= number <= last:
                result = handler.hypercall(number, (args[0], args[1], args[2], args[3]))
                self._put(sequence, ANSWERED, result & _ALL_ONES)
                return
        self._put(sequence, NOBODY, _ALL_ONES)

    def _put(self, sequence: int, status: int, result: int) -> None:
        self._out += ANSWER.pack(ANSWER_MAGIC, sequence, status, 0, result)

    def _flush(self) -> None:
        while self._out:
            try:
                sent = self._socket.send(self._out)
            except BlockingIOError:
                return
            except OSError:
                self.closed = True
                self._out.clear()
                return
            del self._out[:sent]
