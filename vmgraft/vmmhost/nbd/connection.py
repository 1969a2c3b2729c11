"""One client: a handshake, then a few threads that each take a request, do it, and answer it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from vmgraft.errors import VmgraftError
from vmgraft.vmmhost.core.disk import OverlayFullError
from vmgraft.vmmhost.nbd import _layout as nbd
from vmgraft.vmmhost.nbd._layout import ChunkType, Cmd, CmdFlag, Errno
from vmgraft.vmmhost.nbd.content import Part, Served
from vmgraft.vmmhost.nbd.negotiation import Agreed
from vmgraft.vmmhost.nbd.wire import GoneError, Wire

#: Threads of one connection: requests that are worked on at the same time.
HANDLERS: Final = 3
#: Flags that mean something to a command; a request with another one is refused.
_KNOWN_FLAGS: Final[dict[int, int]] = {
    Cmd.READ: int(CmdFlag.DF), Cmd.WRITE: int(CmdFlag.FUA), Cmd.FLUSH: 0, Cmd.BLOCK_STATUS: int(CmdFlag.REQ_ONE),
}  # fmt: skip


class Budget:
    """Bytes that all requests of a server may hold at a time; who wants more waits for others to finish."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._changed = threading.Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[None]:
        """Hold ``count`` bytes of it, which must not be more than the total."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= count)
            self._left -= count
        try:
            yield
        finally:
            with self._changed:
                self._left += count
                self._changed.notify_all()


@dataclass(slots=True)
class Counters:
    """What one client did."""

    requests: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One request, with the payload of a write."""

    flags: int
    kind: int
    cookie: int
    offset: int
    length: int
    payload: bytes | None = None


class RequestError(Exception):
    """A request that is answered with an error; the connection goes on."""

    def __init__(self, error: Errno, text: str) -> None:
        super().__init__(text)
        self.error = error


@dataclass(slots=True)
class Surroundings:
    """What all connections of a server share.

    Attributes:
        budget: Memory for requests.
        stall_seconds: Time for the rest of a request once it began, and for a reply to be taken.
        failed: Tells whether content was found to be wrong; then nothing is read any more.
        fail: Gets the first thing that was wrong with the content.
    """

    budget: Budget
    stall_seconds: float
    failed: Callable[[], bool]
    fail: Callable[[VmgraftError], None]


@dataclass(slots=True)
class Transmission:
    """The second phase of a connection.

    Args:
        wire: The connection.
        agreed: What the handshake came to.
        content: The content of the export.
        around: What the server's connections share.
    """

    wire: Wire
    agreed: Agreed
    content: Served
    around: Surroundings
    counters: Counters = field(default_factory=Counters)
    _ending: bool = False
    _receiving: threading.Lock = field(default_factory=threading.Lock)
    _sending: threading.Lock = field(default_factory=threading.Lock)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Serve requests until the client disconnects, goes away or breaks the protocol."""
        helpers: list[threading.Thread] = []
        try:
            for _ in range(HANDLERS - 1):
                helper = threading.Thread(target=self._serve, name="vmgraft-nbd")
                with contextlib.suppress(RuntimeError):  # no more threads to be had: fewer do as well
                    helper.start()
                    helpers.append(helper)
            self._serve()
        finally:
            for helper in helpers:
                helper.join()

    def _serve(self) -> None:
        """Do requests; however this ends, the other threads of the connection find an end too."""
        orderly = False
        try:
            while self._one():
                pass
            orderly = True
        except (GoneError, MemoryError):
            pass  # nobody is left to tell, or no room to tell it in
        finally:
            self._ending = True
            if not orderly:
                self.wire.shut_down()

    def _one(self) -> bool:
        """Take one request and answer it; False when there are no more."""
        with ExitStack() as held:
            request = self._next(held)
            if request is None:
                return False
            reply = self._reply(request)
            with self._sending:
                self.wire.send(reply, self.around.stall_seconds)
        return True

    def _next(self, held: ExitStack) -> Request | None:
        with self._receiving:
            if self._ending:
                return None
            try:
                request = self._take(held)
            except GoneError:
                self._ending = True
                raise
            self._ending = request is None
            return request

    def _take(self, held: ExitStack) -> Request | None:
        """Read a request, and hold memory for it; None when the client says that it goes."""
        self.wire.wait_readable()  # a client may be silent for as long as it likes, between requests
        header = self.wire.receive(nbd.REQUEST.size, self.around.stall_seconds)
        magic, flags, kind, cookie, offset, length = nbd.REQUEST.unpack(header)
        if magic != nbd.REQUEST_MAGIC:
            raise GoneError("what the client sends is no request")
        if kind == Cmd.DISC:
            return None
        payload = None
        holds = kind == Cmd.READ or (kind == Cmd.WRITE and not self.agreed.export.read_only)
        if holds and length <= nbd.MAX_PAYLOAD:
            held.enter_context(self.around.budget.take(length))
        if kind == Cmd.WRITE:
            payload = self._payload(length)
        return Request(flags, kind, cookie, offset, length, payload)

    def _payload(self, length: int) -> bytes | None:
        """Read what is to be written; thrown away where it will be refused anyway."""
        if length > nbd.MAX_PAYLOAD:
            raise GoneError("a write is longer than the largest that is allowed")
        if not self.agreed.export.read_only:
            return self.wire.receive(length, self.around.stall_seconds)
        self.wire.skip(length, self.around.stall_seconds)
        return None

    def _reply(self, request: Request) -> list[Part]:
        try:
            data = self._do(request)
        except RequestError as error:
            return self._refusal(request, error.error, str(error))
        except OverlayFullError as error:
            return self._refusal(request, Errno.NOSPC, error.message)
        except VmgraftError as error:
            self.around.fail(error)
            return self._refusal(request, Errno.IO, "the content is not what was verified, or cannot be read")
        self._count(request)
        return self._good(request, data)

    def _do(self, request: Request) -> list[Part]:
        """Do what is asked for; return the data that the reply carries."""
        known = _KNOWN_FLAGS.get(request.kind)
        if known is None or request.flags & ~known:
            raise RequestError(Errno.INVAL, "the command, or a flag of it, is not known")
        if request.kind == Cmd.FLUSH:
            return []
        writing = request.kind == Cmd.WRITE
        if writing and self.agreed.export.read_only:
            raise RequestError(Errno.PERM, "the export is read-only")
        if request.offset + request.length > self.content.size:
            raise RequestError(Errno.NOSPC if writing else Errno.INVAL, "the range is not inside the export")
        if self.around.failed():
            raise RequestError(Errno.IO, "content that is not what was verified was found before")
        if request.kind == Cmd.BLOCK_STATUS:
            return self._status(request)
        if request.length > nbd.MAX_PAYLOAD:
            raise RequestError(Errno.INVAL, "more than the largest payload was asked for")
        if writing:
            self.content.write(request.offset, request.payload or b"")
            return []
        return list(self.content.parts(request.offset, request.length))

    def _status(self, request: Request) -> list[Part]:
        if not self.agreed.allocation or not request.length:
            raise RequestError(Errno.INVAL, "no metadata context was agreed on, or the length is zero")
        most = 1 if request.flags & CmdFlag.REQ_ONE else nbd.MAX_EXTENTS
        found = islice(self.content.extents(request.offset, request.length), most)
        states = (nbd.EXTENT.pack(count, nbd.STATE_ZEROS if zeros else nbd.STATE_DATA) for count, zeros in found)
        return [nbd.CONTEXT.pack(nbd.ALLOCATION_ID), *states]

    def _good(self, request: Request, data: list[Part]) -> list[Part]:
        if not self.agreed.structured:
            return [nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, request.cookie), *data]
        kind = ChunkType.NONE
        if request.kind == Cmd.BLOCK_STATUS:
            kind = ChunkType.BLOCK_STATUS
        elif request.kind == Cmd.READ and request.length:
            kind, data = ChunkType.OFFSET_DATA, [nbd.OFFSET.pack(request.offset), *data]
        return [self._chunk(request, kind, sum(map(len, data))), *data]

    def _refusal(self, request: Request, error: Errno, text: str) -> list[Part]:
        with self._counting:
            self.counters.errors += 1
        if not self.agreed.structured:
            return [nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, request.cookie)]
        message = text.encode()[: nbd.MAX_NAME]
        body = nbd.ERROR_HEAD.pack(error, len(message)) + message
        return [self._chunk(request, ChunkType.ERROR, len(body)), body]

    @staticmethod
    def _chunk(request: Request, kind: ChunkType, length: int) -> bytes:
        return nbd.CHUNK.pack(nbd.CHUNK_MAGIC, nbd.CHUNK_DONE, kind, request.cookie, length)

    def _count(self, request: Request) -> None:
        with self._counting:
            self.counters.requests += 1
            if request.kind == Cmd.READ:
                self.counters.bytes_read += request.length
            elif request.kind == Cmd.WRITE:
                self.counters.bytes_written += request.length
