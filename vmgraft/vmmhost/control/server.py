"""The listening end of the control socket. It is looked at between guest instructions, and never waits.

Whoever is not the host's own user or root is turned away, whatever the file's mode says. Everything a client can make
the host keep is bounded: clients, bytes of a request, descriptors, bytes that wait to be sent, and time.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vmgraft.errors import FileError, HostError, UsageError, VmgraftError
from vmgraft.vmmhost.control.wire import (
    FILLING,
    LOOKING,
    MAX_REQUEST,
    OFFERING,
    Later,
    Request,
    answer_line,
    parse_request,
    refusal,
)

#: Clients at a time; more are turned away.
MAX_CLIENTS: Final = 8
#: Connections accepted in one look.
ACCEPTS: Final = 32
#: Seconds a client may be silent, take for one request, or leave an answer unread.
IDLE_SECONDS: Final = 120.0
PROGRESS_SECONDS: Final = 5.0
#: Records about looks and about connections turned away; further ones are only counted.
MAX_RECORDS: Final = 256
#: Longest path of a Unix socket, in bytes (unix(7): 108 with its NUL).
_PATH_MAX: Final = 107
_UCRED: Final = struct.Struct("3i")
_DESCRIPTOR: Final = struct.Struct("i")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int


@dataclass(slots=True)
class _Client:
    """One connection."""

    socket: socket.socket
    peer: Peer
    heard: float
    asked: bytearray = field(default_factory=bytearray)
    asked_since: float | None = None
    answer: bytearray = field(default_factory=bytearray)
    answer_since: float | None = None
    fd: int | None = None
    closing: bool = False
    looked: set[str] = field(default_factory=set)
    waiting: tuple[Request, Later] | None = None

    def drop_descriptor(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        self.drop_descriptor()
        self.socket.close()


class ControlServer:
    """Listens on a Unix socket of mode 0600; see docs/operator.md for what is spoken there.

    Args:
        path: Where to listen. A socket that a killed run left there is replaced; anything else is left alone.
        serve: Answers a request; gets the descriptor that came with it. What it raises as a VmgraftError is the answer.
        audit: Takes (event, fields) for the audit log; what it raises ends the run.

    Raises:
        FileError: the socket cannot be made.
    """

    def __init__(
        self,
        path: Path,
        serve: Callable[[Request, int | None], dict[str, Any] | Later],
        audit: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.path = path.absolute()
        self._serve, self._audit = serve, audit
        self._clients: list[_Client] = []
        self._records = 0
        self._busy = False
        #: Requests done and refused, and connections turned away.
        self.counts = {"done": 0, "refused": 0, "turnedAway": 0}
        self._socket = _listen(self.path)
        found = self.path.lstat()
        self._identity = (found.st_dev, found.st_ino)

    def poll(self, _now: int = 0) -> None:
        """Look around: take connections, read, answer, write; called between guest instructions."""
        if self._busy:
            return
        self._busy = True
        try:
            self._accept()
            for client in list(self._clients):
                if not self._look(client, time.monotonic()):
                    self._clients.remove(client)
                    client.close()
        finally:
            self._busy = False

    def close(self) -> None:
        """Send what can be sent at once, end every connection, and take the socket's name away; may be called twice."""
        for client in self._clients:
            self._write(client, time.monotonic())
            client.close()
        self._clients.clear()
        self._socket.close()
        with suppress(OSError):
            found = self.path.lstat()
            if (found.st_dev, found.st_ino) == self._identity:
                self.path.unlink()

    # --- connections ------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            try:
                connection, _address = self._socket.accept()
            except OSError:  # nobody is there, or there are no descriptors left for them
                return
            peer = _peer(connection)
            reason = None
            if peer.uid not in (0, os.geteuid()):
                reason = "another user"
            elif len(self._clients) >= MAX_CLIENTS:
                reason = "too many clients"
            if reason is None:
                connection.setblocking(False)
                self._clients.append(_Client(connection, peer, time.monotonic()))
            else:
                self._turn_away(connection, peer, reason)

    def _turn_away(self, connection: socket.socket, peer: Peer, reason: str) -> None:
        self.counts["turnedAway"] += 1
        self._record("control-refused", {"pid": peer.pid, "uid": peer.uid, "reason": reason})
        error = HostError(f"the control socket turns you away: {reason}", hint="try again later")
        with suppress(OSError):
            connection.setblocking(False)
            connection.send(answer_line(refusal(error)))
        connection.close()

    def _record(self, event: str, detail: dict[str, Any]) -> None:
        """Write one of the records that a client can cause without changing anything; their number is bounded."""
        self._records += 1
        if self._records <= MAX_RECORDS:
            self._audit(event, detail)
        elif self._records == MAX_RECORDS + 1:
            self._audit("quota", {"quota": "controlRecords", "limit": MAX_RECORDS, "action": "count"})

    def _look(self, client: _Client, now: float) -> bool:
        """Serve one client; False when it is to be dropped."""
        if client.waiting is not None:
            return self._await(client, *client.waiting, now)
        if not client.closing and not client.answer and not self._read(client, now):
            return False
        if not self._write(client, now):
            return False
        if client.closing and not client.answer:
            return False
        stuck = [since for since in (client.asked_since, client.answer_since) if since is not None]
        return now - client.heard <= IDLE_SECONDS and all(now - since <= PROGRESS_SECONDS for since in stuck)

    # --- a request --------------------------------------------------------------------------------------------------

    def _read(self, client: _Client, now: float) -> bool:
        """Take what is there, up to one request; False when the client is gone."""
        try:
            data = self._receive(client)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        except VmgraftError as error:
            self._refuse(client, error)
            return True
        if data:
            self._take(client, data, now)
        return bool(data)

    def _take(self, client: _Client, data: bytes, now: float) -> None:
        """Add to what a client has said, and answer once it is a line."""
        client.asked += data
        client.heard = now
        client.asked_since = client.asked_since or now
        line, feed, rest = bytes(client.asked).partition(b"\n")
        if rest:
            self._refuse(client, UsageError("one request at a time: the answer comes first"))
        elif feed:
            client.asked.clear()
            client.asked_since = None
            self._answer(client, line)
        elif len(client.asked) >= MAX_REQUEST:
            self._refuse(client, UsageError(f"a request has at most {MAX_REQUEST} bytes"))

    def _receive(self, client: _Client) -> bytes:
        """Read some bytes, and the one descriptor that may come with them."""
        room = MAX_REQUEST - len(client.asked)
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        data, parts, came, _address = client.socket.recvmsg(room, socket.CMSG_LEN(_DESCRIPTOR.size), flags)
        for level, kind, content in parts:
            if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS) or len(content) < _DESCRIPTOR.size:
                continue
            (fd,) = _DESCRIPTOR.unpack_from(content)
            if client.fd is not None:
                os.close(fd)
                raise UsageError("one descriptor goes with a request", field="record")
            client.fd = fd
        if came & socket.MSG_CTRUNC:
            raise UsageError("one descriptor goes with a request", field="record")
        return data

    def _refuse(self, client: _Client, error: VmgraftError) -> None:
        """Answer a client that does not keep to the form; it is dropped once it has the answer."""
        self.counts["refused"] += 1
        who = {"pid": client.peer.pid, "uid": client.peer.uid}
        self._record("control-refused", {**who, "reason": error.message})
        client.drop_descriptor()
        client.asked.clear()
        client.asked_since = None
        client.answer += answer_line(refusal(error))
        client.closing = True

    def _answer(self, client: _Client, line: bytes) -> None:
        try:
            request = parse_request(line)
            _check_offer(request, client.fd)
        except UsageError as error:
            self._refuse(client, error)
            return
        outcome: dict[str, Any] | Later | VmgraftError
        try:
            outcome = self._serve(request, client.fd)
        except VmgraftError as error:
            outcome = error
        finally:
            client.drop_descriptor()
        if isinstance(outcome, Later):
            client.waiting = (request, outcome)
        else:
            self._finish(client, request, outcome)

    def _await(self, client: _Client, request: Request, later: Later, now: float) -> bool:
        """Answer a client whose request waited for the guest to rest, once it did, or when it never seems to."""
        if later.outcome is not None:
            client.waiting, client.heard = None, now
            self._finish(client, request, later.outcome)
        elif now - client.heard > IDLE_SECONDS:
            later.give_up()
            client.waiting, client.closing = None, True
            hint = "try again later"
            self._finish(
                client, request, HostError("the guest does not come to rest", field=request.op.value, hint=hint)
            )
        return True

    def _finish(self, client: _Client, request: Request, outcome: dict[str, Any] | VmgraftError) -> None:
        refused = isinstance(outcome, VmgraftError)
        self.counts["refused" if refused else "done"] += 1
        self._log(client, request, outcome.to_dict() if isinstance(outcome, VmgraftError) else None)
        document = refusal(outcome) if isinstance(outcome, VmgraftError) else {"ok": True, **outcome}
        client.answer += answer_line(document)

    def _log(self, client: _Client, request: Request, error: dict[str, Any] | None) -> None:
        who = {"op": request.op.value, "pid": client.peer.pid, "uid": client.peer.uid}
        fields = {**who, "id": request.id, "ok": error is None, "error": error}
        if request.op not in LOOKING:
            self._audit("control", fields)
        elif request.op.value not in client.looked:  # once a connection: --watch looks again and again
            client.looked.add(request.op.value)
            self._record("control", fields)

    def _write(self, client: _Client, now: float) -> bool:
        if not client.answer:
            return True
        try:
            sent = client.socket.send(client.answer, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            return False
        del client.answer[:sent]
        client.answer_since = (now if sent else client.answer_since or now) if client.answer else None
        return True


def _check_offer(request: Request, fd: int | None) -> None:
    if (fd is not None) != (request.op in OFFERING | FILLING):
        wants = "comes with a record" if request.op in OFFERING else "comes with a memory file to fill"
        words = wants if request.op in OFFERING | FILLING else "comes without a descriptor"
        raise UsageError(f"{request.op.value} {words}", field="record")


def _peer(connection: socket.socket) -> Peer:
    pid, uid, _gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid)


def _listen(path: Path) -> socket.socket:
    if len(os.fsencode(path)) > _PATH_MAX:
        raise FileError(f"the path of a socket has at most {_PATH_MAX} bytes", file=path, hint="choose a shorter one")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # the mode that bind gives the name, whatever the umask
        _clear_left(path)
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        listener.listen(MAX_CLIENTS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise FileError(f"cannot listen there: {error.strerror}", file=path) from error
    except FileError:
        listener.close()
        raise
    return listener


def _clear_left(path: Path) -> None:
    """Remove a socket of ours behind which nobody listens any more."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise FileError("the name is taken", file=path, hint="name a new one for the control socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        attempt.settimeout(1.0)  # where the queue of one who listens is full, connecting waits
        try:
            attempt.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise FileError("a running guest listens there", file=path, hint="name another control socket")
