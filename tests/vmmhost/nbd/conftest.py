"""A server of checked content, and a client that can also misbehave."""

import hashlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmgraft.imagefmt.contract import Image
from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.tree import build_tree
from vmgraft.vmmhost.nbd import _layout as nbd
from vmgraft.vmmhost.nbd.content import CheckedContent
from vmgraft.vmmhost.nbd.server import NbdExport, NbdLimits, NbdServer

BLOCK = 65536
#: Data, a hole in the middle, and an end that fills neither a block nor a large sector.
SIZE = 40 * BLOCK + 3 * 512
HOLE = range(10 * BLOCK, 30 * BLOCK)


class Client:
    """Speaks NBD over a connected socket, byte by byte."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(10)

    def take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def hello(self, flags: int = 3) -> None:
        assert self.take(18) == b"NBDMAGICIHAVEOPT\0\x03"
        self.socket.sendall(struct.pack(">I", flags))

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; return its answers up to the last."""
        self.socket.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        answers = []
        while True:
            magic, echoed, kind, length = struct.unpack(">QIII", self.take(20))
            assert (magic, echoed) == (0x3E889045565A9, number)
            answers.append((kind, self.take(length)))
            if kind == nbd.Rep.ACK or kind & 0x80000000:
                return answers

    def go(self, name: str = "", structured: bool = False) -> None:
        self.hello()
        if structured:
            assert self.option(8) == [(nbd.Rep.ACK, b"")]
            query = struct.pack(">I", len(name)) + name.encode() + struct.pack(">II", 1, 15) + b"base:allocation"
            assert self.option(10, query)[-1][0] == nbd.Rep.ACK
        answers = self.option(7, struct.pack(">I", len(name)) + name.encode() + struct.pack(">H", 0))
        assert answers[-1][0] == nbd.Rep.ACK

    def request(self, kind: int, offset: int, length: int, *, flags: int = 0, data: bytes = b"") -> None:
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, 0xC00C1E, offset, length) + data)

    def simple(self, length: int = 0) -> tuple[int, bytes]:
        """Return error and data of a simple reply."""
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert (magic, cookie) == (0x67446698, 0xC00C1E)
        return error, b"" if error else self.take(length)

    def chunk(self) -> tuple[int, int, bytes]:
        """Return flags, type and payload of a structured chunk."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.take(20))
        assert (magic, cookie) == (0x668E33EF, 0xC00C1E)
        return flags, kind, self.take(length)

    def read(self, offset: int, length: int) -> tuple[int, bytes]:
        self.request(0, offset, length)
        return self.simple(length)

    def is_closed(self, seconds: float = 5.0) -> bool:
        self.socket.settimeout(seconds)
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True


class World:
    """An image, its tree, and a server of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "disk.img"
        noise = hashlib.shake_256(b"noise").digest(SIZE)
        with self.path.open("wb") as file:
            file.write(noise[: HOLE.start])
            file.seek(HOLE.stop)
            file.write(noise[HOLE.stop :])
        self.bytes = self.path.read_bytes()
        self.image: Image = open_image(self.path)
        self.content = CheckedContent(self.image, build_tree(self.image))
        self.records: list[tuple[str, dict[str, Any]]] = []
        self.servers: list[NbdServer] = []
        self.clients: list[Client] = []

    def server(self, *, read_only: bool = True, limits: NbdLimits | None = None) -> NbdServer:
        server = NbdServer(
            [NbdExport("", self.content, read_only, "a disk"), NbdExport("second", self.content)],
            audit=lambda event, detail: self.records.append((event, detail)),
            limits=limits or NbdLimits(),
        )
        self.servers.append(server)
        return server

    def serve(self, **options: Any) -> tuple[NbdServer, str]:
        server = self.server(**options)
        uri = server.listen_unix(self.folder / f"{len(self.servers)}.sock")
        server.start()
        return server, uri

    def connect(self) -> Client:
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(str(self.folder / f"{len(self.servers)}.sock"))
        self.clients.append(Client(connected))
        return self.clients[-1]

    def close(self) -> None:
        for client in self.clients:
            client.socket.close()
        for server in self.servers:
            server.close()
        self.image.close()

    def spoil(self, block: int) -> None:
        """Change one byte of a block in the image file, behind the back of whoever has it open."""
        with self.path.open("r+b") as file:
            file.seek(block * BLOCK + 77)
            file.write(bytes([self.bytes[block * BLOCK + 77] ^ 1]))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    threads, fds = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    made = World(tmp_path)
    yield made
    made.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    assert not list(tmp_path.glob("*.sock"))


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Waits for something that another thread does."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    return wait
