"""Clients that break the protocol, stall, vanish or come in crowds: bounded, and no harm to the others."""

import socket
import struct
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmgraft.errors import FileError, HostError
from vmgraft.vmmhost.nbd._layout import Errno
from vmgraft.vmmhost.nbd.connection import Budget
from vmgraft.vmmhost.nbd.negotiation import Negotiation
from vmgraft.vmmhost.nbd.server import NbdLimits
from vmgraft.vmmhost.nbd.wire import GoneError, Wire

from .conftest import BLOCK

QUICK = NbdLimits(connections=4, handshake_seconds=0.3, stall_seconds=0.3)


def ends(world, client, sent: bytes) -> None:
    """This ends the connection, and nobody else's."""
    client.socket.sendall(sent)
    assert client.is_closed()
    serves_on(world)


def serves_on(world) -> None:
    """Another client still gets what it asks for."""
    client = world.connect()
    client.go()
    assert client.read(0, BLOCK) == (0, world.bytes[:BLOCK])
    client.request(2, 0, 0)
    assert client.is_closed()


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff" * 4,  # flags that nobody knows
        b"\0\0\0\3" + b"GET / HTTP/1.1\r\n",
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 3, 0xFFFFFFFF),
        b"\0\0\0\3" + b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"none",
        b"\0\0\0\3" + (b"IHAVEOPT" + struct.pack(">II", 77, 0)) * 65,
    ],
    ids=["flags", "http", "giant-option", "unknown-old-style", "endless-options"],
)
def test_a_broken_handshake_ends_the_connection(world, sent: bytes) -> None:
    world.serve()
    client = world.connect()
    ends(world, client, sent)


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\3IHAVEOPT\0\0"], ids=["nothing", "half flags", "half option"])
def test_a_handshake_that_stalls_is_let_go(world, sent: bytes) -> None:
    world.serve(limits=QUICK)
    client = world.connect()
    ends(world, client, sent)


def test_a_handshake_byte_by_byte_does_not_stretch_the_limit(world) -> None:
    world.serve(limits=QUICK)
    client = world.connect()
    began = time.monotonic()
    with pytest.raises(OSError):
        for byte in b"\0\0\0\3" + b"IHAVEOPT" * 100:
            client.socket.sendall(bytes([byte]))
            time.sleep(0.02)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "sent",
    [
        b"x" * 28,
        struct.pack(">IHHQQI", 0x25609513, 0, 1, 0, 0, 0xFFFFFFFF),  # a write of 4 GiB
        struct.pack(">IHHQQI", 0x25609513, 0, 1, 0, 0, 4096) + b"half",
        b"\x25\x60\x95",
    ],
    ids=["garbage", "giant-write", "half-write", "half-request"],
)
def test_a_broken_request_ends_the_connection(world, sent: bytes) -> None:
    world.serve(limits=QUICK)
    client = world.connect()
    client.go()
    ends(world, client, sent)


def test_silence_between_requests_is_fine(world) -> None:
    world.serve(limits=QUICK)
    client = world.connect()
    client.go()
    time.sleep(0.6)
    assert client.read(0, 10) == (0, world.bytes[:10])


def test_a_client_that_does_not_read_is_let_go(world, until) -> None:
    server, _ = world.serve(limits=QUICK)
    client = world.connect()
    client.go()
    for _ in range(8):
        client.request(0, 0, 2_000_000)
    until(lambda: server._seen == 1)
    serves_on(world)


def test_one_that_vanishes_leaves_nothing(world, until) -> None:
    server, _ = world.serve()
    for _ in range(20):
        client = world.connect()
        client.go()
        client.request(0, 0, 2_000_000)
        client.socket.close()
    until(lambda: not server._running)
    serves_on(world)


def test_a_crowd_is_turned_away_and_the_first_are_served(world) -> None:
    world.serve(limits=NbdLimits(connections=3))
    first = [world.connect() for _ in range(3)]
    for client in first:
        client.go()
    late = world.connect()
    assert late.is_closed()
    for client in first:
        assert client.read(0, 10) == (0, world.bytes[:10])


def test_memory_is_bounded_and_shared(world) -> None:
    """Eight requests of 2 MB within a budget of one largest payload: each waits, none is refused."""
    world.serve(limits=NbdLimits(memory=1))
    clients = [world.connect() for _ in range(4)]
    for client in clients:
        client.go()
        client.request(0, 0, 2_000_000)
        client.request(0, 1, 2_000_000)
    for client in clients:
        assert sorted(client.simple(2_000_000)[1][:2] for _ in range(2)) == sorted((world.bytes[:2], world.bytes[1:3]))


def test_the_budget_lets_in_what_fits() -> None:
    budget, order = Budget(10), []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with budget.take(6):
            order.append("second")

    with budget.take(5):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        with budget.take(5):
            order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_log_that_cannot_be_written_stops_the_serving(world) -> None:
    server = world.server()

    def broken(_event: str, _detail: dict[str, object]) -> None:
        raise FileError("the audit log is incomplete")

    server._audit = broken
    server.listen_unix(world.folder / "1.sock")
    server.start()
    client = world.connect()
    client.go()
    assert client.read(0, 10) == (Errno.IO, b"")
    assert server.failure is not None


def test_connections_do_not_fill_the_log(world, monkeypatch: pytest.MonkeyPatch, until) -> None:
    monkeypatch.setattr("vmgraft.vmmhost.nbd.server._LOGGED_CONNECTIONS", 3)
    server, _ = world.serve()
    for number in range(6):
        client = world.connect()
        client.go()
        client.request(2, 0, 0)
        until(lambda number=number: server._seen == number + 1)
    assert len(world.records) == 6  # three that opened, three that closed
    assert server.summary()["clients"] == 6


def _talk(world, sent: bytes) -> None:
    """Let a handshake run against bytes that are there already; it ends, and only in ways that are foreseen."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        wire = Wire(ours)
        try:
            Negotiation(wire, world.servers[0].exports, 1.0).run()
        except GoneError:
            pass
        finally:
            wire.close()


OPTIONS = st.lists(
    st.tuples(st.integers(0, 12) | st.integers(0, 2**32 - 1), st.binary(max_size=60)).map(
        lambda pair: b"IHAVEOPT" + struct.pack(">II", pair[0], len(pair[1])) + pair[1]
    ),
    max_size=8,
).map(b"".join)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | OPTIONS.map(lambda options: b"\0\0\0\3" + options))
def test_no_handshake_is_unforeseen(world, sent: bytes) -> None:
    if not world.servers:
        world.server()
    _talk(world, sent)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=120), st.booleans())
def test_no_request_is_unforeseen(world, sent: bytes, structured: bool) -> None:
    if not world.servers:
        world.serve(limits=QUICK)
    client = world.connect()
    client.go(structured=structured)
    client.request(0, 0, 5)
    client.socket.sendall(struct.pack(">I", 0x25609513) + sent)
    client.socket.shutdown(socket.SHUT_WR)
    assert client.is_closed()
    client.socket.close()


def test_a_write_that_is_refused_anyway_cannot_stretch_its_time(world) -> None:
    """Every byte in time, the whole far too late: the bound is on the request, not on its pieces."""
    world.serve(limits=QUICK)
    client = world.connect()
    client.go()
    client.request(1, 0, 32 << 20)
    began = time.monotonic()
    with pytest.raises(OSError):
        while time.monotonic() - began < 5:
            client.socket.sendall(b"x" * 1000)
            time.sleep(0.02)
    assert time.monotonic() - began < 3


def test_writes_that_are_thrown_away_hold_no_memory(world) -> None:
    """Clients of a read-only export that begin large writes do not keep others from reading."""
    world.serve(limits=NbdLimits(memory=1, stall_seconds=5))
    for _ in range(3):
        slow = world.connect()
        slow.go()
        slow.request(1, 0, 32 << 20)
    client = world.connect()
    client.go()
    client.socket.settimeout(2)
    assert client.read(0, 10) == (0, world.bytes[:10])


@pytest.mark.parametrize("served", [0, 1, 2])
def test_without_threads_the_others_go_on(world, monkeypatch: pytest.MonkeyPatch, served: int) -> None:
    """A connection for which there is no thread is closed; one that gets fewer than it should works with these."""
    world.serve()
    start, left = threading.Thread.start, [served]

    def scarce(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", scarce)
        client = world.connect()
        if served:
            client.go()
            for _ in range(10):
                assert client.read(0, 10) == (0, world.bytes[:10])
        else:
            assert client.is_closed()
    serves_on(world)


def test_a_request_without_memory_ends_its_connection_alone(world, monkeypatch: pytest.MonkeyPatch) -> None:
    world.serve()
    client, parts = world.connect(), world.content.parts
    client.go()

    def scarce(offset: int, length: int) -> object:
        if length == 4096:
            raise MemoryError
        return parts(offset, length)

    monkeypatch.setattr(world.content, "parts", scarce)
    client.request(0, 0, 4096)
    assert client.is_closed(3)
    serves_on(world)


@pytest.mark.parametrize("host", ["a" * 70, "..", "é" * 64, "\udcff"])
def test_names_that_no_computer_has(world, host: str) -> None:
    with pytest.raises(HostError, match="no name of a computer"):
        world.server().listen_tcp(host, 0)
