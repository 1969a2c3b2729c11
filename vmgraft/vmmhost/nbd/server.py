"""The server: listens or is handed connections, bounds how many there are, and ends when content turns out wrong."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

from vmgraft.errors import FileError, HostError, UsageError, VmgraftError
from vmgraft.vmmhost.nbd._layout import MAX_NAME, MAX_PAYLOAD
from vmgraft.vmmhost.nbd.connection import Budget, Counters, Surroundings, Transmission
from vmgraft.vmmhost.nbd.content import served
from vmgraft.vmmhost.nbd.negotiation import NbdExport, Negotiation
from vmgraft.vmmhost.nbd.wire import GoneError, Wire

#: sun_path holds 108 bytes with the zero at its end (unix(7)).
_MAX_SOCKET_PATH: Final = 107
#: Connections that the audit log tells of one by one; a client could fill it otherwise.
_LOGGED_CONNECTIONS: Final = 1000
_CLOSE_SECONDS: Final = 5.0

Audit = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class NbdLimits:
    """What clients are held to.

    Attributes:
        connections: At a time; further ones are closed at once.
        handshake_seconds: For a whole handshake.
        stall_seconds: For the rest of a request once it began, and for a reply to be taken. Between requests a client
            may be silent for ever.
        memory: Bytes that all requests hold together; at least one of the largest (32 MiB).
    """

    connections: int = 16
    handshake_seconds: float = 10.0
    stall_seconds: float = 60.0
    memory: int = 4 * MAX_PAYLOAD


class NbdServer:
    """Serves exports; a context manager.

    Args:
        exports: What is served; names must differ. The first is the default.
        audit: Takes (event, fields): ``nbd-open``, ``nbd-close``, ``nbd-failure``. Called from several threads, one at
            a time.
        limits: Bounds.

    Raises:
        UsageError: there is no export, or names are too long or not unique.
    """

    def __init__(
        self,
        exports: Sequence[NbdExport],
        *,
        audit: Audit = lambda _event, _detail: None,
        limits: NbdLimits = NbdLimits(),
    ) -> None:
        names = [export.name for export in exports]
        if not names or len(set(names)) != len(names) or any(len(name.encode()) > MAX_NAME for name in names):
            raise UsageError("exports need names that differ, of at most 4096 bytes", field="name")
        self.exports = tuple(exports)
        self._contents = {export.name: served(export.disk) for export in exports}
        self._audit, self._limits = audit, limits
        self._listeners: list[tuple[socket.socket, Path | None, tuple[int, int]]] = []
        self._handed: list[socket.socket] = []
        self._running: dict[threading.Thread, Wire] = {}
        self._lock, self._logging, self._seen = threading.Lock(), threading.Lock(), 0
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._around = Surroundings(
            Budget(max(limits.memory, MAX_PAYLOAD)), limits.stall_seconds, lambda: self.failure is not None, self._fail
        )
        #: The first thing that was wrong with the content.
        self.failure: VmgraftError | None = None
        #: What clients that have gone did, all together, and how many of them chose an export.
        self.counters = Counters()
        self.clients = 0
        self._quiet = threading.Condition()

    # --- where clients come from ---

    def listen_unix(self, path: Path) -> str:
        """Listen on a new Unix socket that only its owner may use; return the URI.

        Raises:
            UsageError: the path is too long for a socket.
            FileError: it exists already, or cannot be made.
        """
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            raise UsageError(f"a socket's path has at most {_MAX_SOCKET_PATH} bytes", field="socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(listener.fileno(), 0o600)  # before bind: there is no moment at which others could connect
            listener.bind(os.fspath(path))
            made = os.lstat(path)
            listener.listen(self._limits.connections)
        except OSError as error:
            listener.close()
            raise FileError(
                f"cannot listen: {error.strerror}", file=path, hint="name a socket that does not exist yet"
            ) from error
        self._listeners.append((listener, path, (made.st_dev, made.st_ino)))
        return f"nbd+unix:///{quote(self.exports[0].name)}?socket={quote(os.fspath(path))}"

    def listen_tcp(self, host: str, port: int) -> str:
        """Listen on a TCP address; return the URI. There is no encryption and no authentication.

        Args:
            host: An address or name.
            port: 0 for any that is free.

        Raises:
            HostError: the address cannot be used.
        """
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(address[:2], family=family, backlog=self._limits.connections)
        except OSError as error:
            raise HostError(f"cannot listen on {host} port {port}: {error.strerror}", field="listen") from error
        except UnicodeError as error:  # no name that the domain name system could hold
            raise HostError(f"cannot listen on {host[:64]!r}: this is no name of a computer", field="listen") from error
        self._listeners.append((listener, None, (0, 0)))
        name = f"[{host}]" if ":" in host else host
        return f"nbd://{name}:{listener.getsockname()[1]}/{quote(self.exports[0].name)}"

    def attach(self, connected: socket.socket) -> None:
        """Serve a connection that exists already; to be called before :meth:`start`."""
        self._handed.append(connected)

    # --- life ---

    def start(self) -> None:
        """Begin to serve, in threads of the server's own; what the calling thread gave up, they do not have either."""
        self._thread = threading.Thread(target=self._accept, name="vmgraft-nbd-accept")
        self._thread.start()

    def wait(self, *, once: bool = False) -> None:
        """Return when content was found to be wrong or, if asked for, when the last client has gone after the first.

        Signals interrupt it, in the main thread.
        """
        with self._quiet:
            while self.failure is None and not (once and self.clients and not self._running):
                self._quiet.wait(1.0)  # bounded, so that a signal's handler runs also on old systems

    def drain(self, seconds: float) -> None:
        """Wait a moment for clients to read their last answers and go."""
        deadline = time.monotonic() + seconds
        with self._quiet:
            while self._running and (left := deadline - time.monotonic()) > 0:
                self._quiet.wait(left)

    def close(self) -> None:
        """End every connection, wait for the threads, remove the sockets; may be called twice."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._wake_writer.send(b"\0")
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            running = dict(self._running)
        for wire in running.values():
            wire.shut_down()
        for thread in running:
            thread.join(_CLOSE_SECONDS)
        for listener, path, made in self._listeners:
            listener.close()
            if path is not None:
                _unlink(path, made)
        self._listeners.clear()
        for connected in (*self._handed, self._wake_reader, self._wake_writer):
            connected.close()
        self._handed.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- threads ---

    def _accept(self) -> None:
        handed, self._handed = self._handed, []
        for connected in handed:
            self._admit(connected, "handed over")
        poller = select.poll()
        poller.register(self._wake_reader, select.POLLIN)
        listeners = {listener.fileno(): listener for listener, _, _ in self._listeners}
        for fd, listener in listeners.items():
            listener.setblocking(False)
            poller.register(fd, select.POLLIN)
        while not self._closing:
            for fd, _event in poller.poll():
                if fd in listeners:
                    self._take(listeners[fd])

    def _take(self, listener: socket.socket) -> None:
        try:
            connected, address = listener.accept()
        except OSError:  # gone again, or no descriptor left: others are still served
            time.sleep(0.01)
            return
        if len(self._running) >= self._limits.connections:
            connected.close()
            return
        self._admit(connected, f"{address[0]} port {address[1]}" if isinstance(address, tuple) else "local")

    def _admit(self, connected: socket.socket, peer: str) -> None:
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = Wire(connected)
        thread = threading.Thread(target=self._serve, args=(wire, peer), name="vmgraft-nbd")
        with self._lock:
            self._running[thread] = wire
        try:
            thread.start()
        except RuntimeError:  # no more threads to be had: the others are still served
            with self._lock:
                del self._running[thread]
            wire.close()

    def _serve(self, wire: Wire, peer: str) -> None:
        try:
            agreed = Negotiation(wire, self.exports, self._limits.handshake_seconds).run()
            if agreed is not None:
                export = agreed.export
                transmission = Transmission(wire, agreed, self._contents[export.name], self._around)
                self._opened(export, peer)
                transmission.run()
                self._closed(export, transmission.counters)
        except GoneError:
            pass  # nobody is left to tell; a client that breaks the protocol is no event of this host
        finally:
            wire.shut_down()
            wire.close()
            with self._lock:
                del self._running[threading.current_thread()]
            with self._quiet:
                self._quiet.notify_all()

    def _opened(self, export: NbdExport, peer: str) -> None:
        with self._logging:
            self.clients += 1
            if self.clients <= _LOGGED_CONNECTIONS:
                self._record("nbd-open", export=export.name, readOnly=export.read_only, peer=peer)

    def _closed(self, export: NbdExport, done: Counters) -> None:
        total = self.counters
        with self._logging:
            total.requests += done.requests
            total.bytes_read += done.bytes_read
            total.bytes_written += done.bytes_written
            total.errors += done.errors
            self._seen += 1
            if self._seen <= _LOGGED_CONNECTIONS:
                self._record("nbd-close", export=export.name, **_numbers(done))

    def summary(self) -> dict[str, Any]:
        """Return what clients did, all together."""
        return {"clients": self.clients, **_numbers(self.counters)}

    def _fail(self, error: VmgraftError) -> None:
        with self._logging:
            first = self.failure is None
            if first:
                self.failure = error
                self._record("nbd-failure", **error.to_dict())
        with self._quiet:
            self._quiet.notify_all()

    def _record(self, event: str, **detail: Any) -> None:
        try:
            self._audit(event, detail)
        except VmgraftError as error:  # nothing goes on that cannot be logged
            self.failure = self.failure or error


def _numbers(done: Counters) -> dict[str, int]:
    return {
        "requests": done.requests,
        "bytesRead": done.bytes_read,
        "bytesWritten": done.bytes_written,
        "refused": done.errors,
    }


def _unlink(path: Path, made: tuple[int, int]) -> None:
    """Remove a socket, if it still is the one that was made."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK((now := os.lstat(path)).st_mode) and (now.st_dev, now.st_ino) == made:
            path.unlink()
