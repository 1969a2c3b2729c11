"""A worker that was taken over and speaks for itself: every lie is a fault, and nothing waits for ever."""

import contextlib
import os
import socket
import subprocess
import threading

import pytest

from vmgraft.errors import HostError
from vmgraft.vmmhost.layer import link, protocol
from vmgraft.vmmhost.layer.faults import FaultKind, WorkerFaultError
from vmgraft.vmmhost.layer.link import LinkEvents, WorkerLink
from vmgraft.vmmhost.layer.meter import Meter
from vmgraft.vmmhost.layer.protocol import Kind, Refusal
from vmgraft.vmmhost.layer.sandbox import Mechanism
from vmgraft.vmmhost.layer.spec import ExtensionSpec, GuestWindow, LayerLimits
from vmgraft.vmmhost.layer.zygote import WorkerProcess

LOCKED = protocol.frame(Kind.LOCKED, 0, Mechanism.PROCESS)


class Rogue:
    """A link whose other end is played by the test."""

    def __init__(self, ram, **fields):
        ours, self.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(["sleep", "60"])
        worker = WorkerProcess(self.process.pid, os.pidfd_open(self.process.pid), ours, Mechanism(0))
        self.logs = []
        self.events = LinkEvents(lambda line, over: self.logs.append((line, over)), 100)
        self.spec = ExtensionSpec("org.example.rogue", "1", b"\0asm" + bytes(9000),
                                  limits=LayerLimits(call_ms=150, log_bytes=100), **fields)  # fmt: skip
        self.link = WorkerLink(self.spec, worker, None, ram, self.events)
        self.link._socket.settimeout(0.15)

    def call(self, *packets):
        """Make a call and let the rogue answer with these packets."""
        for packet in packets:
            self.socket.send(packet)
        return self.link.call(Kind.CALL_PIO_READ, 0, address=0x510, size=1)

    def exchange(self, *packets, room=8):
        """The same with a call that carries data."""
        for packet in packets:
            self.socket.send(packet)
        return self.link.exchange(Kind.CALL_SERVICE, 0, size=3, address=8, room=room)


@pytest.fixture
def rogue(bench):
    made = []

    def make(**fields):
        made.append(Rogue(bench.ram, **fields))
        return made[-1]

    yield make
    for item in made:
        assert item.link.kill()
        item.process.wait()
        item.socket.close()


def fails(kind, make):
    with pytest.raises(WorkerFaultError) as caught:
        make()
    assert caught.value.kind is kind
    assert caught.value.message


def test_an_honest_answer(rogue):
    assert rogue().call(protocol.frame(Kind.RESULT, 1, 42)) == 42


def test_fuel_is_what_the_worker_says_up_to_the_limit(rogue):
    """It is a statistic: nothing is decided by it, and nothing is gained by a lie."""
    item = rogue()
    meter = Meter()
    item.link._events.on_fuel = meter.burn
    assert item.call(protocol.frame(Kind.RESULT, 1, 42, (7).to_bytes(4, "little"))) == 42
    assert meter.fuel() == {"total": 7, "max": 7}
    assert item.call(protocol.frame(Kind.USED, 2, 1 << 63), protocol.frame(Kind.RESULT, 2, 5, b"\xff" * 4)) == 5
    limit = item.link._spec.limits.fuel_per_call
    assert meter.fuel() == {"total": 7 + 2 * limit, "max": limit}


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        bytes(5000),
        protocol.frame(Kind.RESULT, 2, 42),
        protocol.frame(Kind.RESULT, 1, 42, b"few"),
        protocol.frame(Kind.RESULT, 1, 42, b"many!"),
        protocol.frame(Kind.USED, 1, 42, b"x"),
        protocol.frame(Kind.READY, 1),
        protocol.frame(Kind.REFUSED, 1),
        protocol.frame(Kind.GUEST_DATA, 1),
        protocol.frame(Kind.LOG, 1, 0, b"not granted"),
        protocol.frame(Kind.STOP, 1),
        protocol.frame(Kind.SET_TICK, 1, 5),
        protocol.frame(Kind.GUEST_READ, 1, 0, length=5000),
        protocol.frame(Kind.DATA, 1, 0, b"x"),
        protocol.frame(Kind.ANSWER, 1, 0, b"x"),
        protocol.frame(Kind.IRQ, 1, 5 << 1),
        protocol.frame(Kind.KV_GET, 1, 0, b"key"),
        protocol.frame(Kind.KV_PUT, 1, 0, b"keyvalue", flag=3),
        protocol.frame(Kind.METRIC, 1, 7, b"name"),
        protocol.frame(Kind.KV_DATA, 1, 0, b"x", flag=1),
        b"\xff" * 16,
    ],
)
def test_lies_are_protocol_faults(rogue, packet):
    fails(FaultKind.PROTOCOL, lambda: rogue().call(packet))


def test_a_stale_answer_is_not_taken_for_a_fresh_one(rogue):
    item = rogue()
    assert item.call(protocol.frame(Kind.RESULT, 1, 1), protocol.frame(Kind.RESULT, 1, 666)) == 1
    fails(FaultKind.PROTOCOL, lambda: item.call(protocol.frame(Kind.RESULT, 2, 2)))


def test_more_log_than_the_quota_is_a_lie(rogue):
    lines = [protocol.frame(Kind.LOG, 1, 0, b"x" * 60)] * 2
    item = rogue(log=True)
    fails(FaultKind.PROTOCOL, lambda: item.call(*lines))
    assert len(item.logs) == 1


def test_guest_access_without_a_window(rogue, bench):
    before = bytes(bench.ram.bytes)
    fails(FaultKind.WINDOW, lambda: rogue().call(protocol.frame(Kind.GUEST_READ, 1, 0, length=8)))
    fails(FaultKind.WINDOW, lambda: rogue(windows=(GuestWindow(0, 64),)).call(
        protocol.frame(Kind.GUEST_WRITE, 1, 0, b"evil")))  # fmt: skip
    fails(FaultKind.WINDOW, lambda: rogue(windows=(GuestWindow(0, 64, True),)).call(
        protocol.frame(Kind.GUEST_WRITE, 1, (1 << 64) - 2, b"evil")))  # fmt: skip
    assert bytes(bench.ram.bytes) == before


def test_silence_meets_the_deadline(rogue):
    fails(FaultKind.DEADLINE, lambda: rogue().call())


def test_requests_without_end_meet_the_deadline(rogue):
    item = rogue(tick=True)
    done = threading.Event()

    def flood():
        while not done.is_set():
            try:
                item.socket.send(protocol.frame(Kind.SET_TICK, 1, 1), socket.MSG_DONTWAIT)
            except OSError:
                done.wait(0.001)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        with pytest.raises(WorkerFaultError) as caught:
            item.call()
        assert caught.value.kind in {FaultKind.DEADLINE, FaultKind.QUOTA}
    finally:
        done.set()
        thread.join()


def test_a_closed_socket_is_a_death(rogue):
    item = rogue()
    item.socket.close()
    fails(FaultKind.DIED, item.call)


def test_a_worker_that_never_reads_its_module(rogue):
    item = rogue()
    item.spec = ExtensionSpec("org.example.rogue", "1", bytes(1 << 20))
    item.link._spec = item.spec
    item.socket.send(LOCKED)
    fails(FaultKind.DEADLINE, lambda: item.link.start(bytes(32), 0.2, 1))


def test_a_result_in_place_of_ready(rogue):
    item = rogue()
    item.socket.send(LOCKED)
    item.socket.send(protocol.frame(Kind.RESULT, 0))
    fails(FaultKind.PROTOCOL, lambda: item.link.start(bytes(32), 0.5, 1))


def test_a_refusal_for_lack_of_isolation_is_the_hosts_error(rogue):
    item = rogue()
    packet = protocol.frame(Kind.REFUSED, 0, 0, b"level 1\0isolation\0hint", flag=Refusal.ISOLATION)
    item.socket.send(packet)
    with pytest.raises(HostError, match="level 1") as caught:
        item.link.start(bytes(32), 0.5, 1)
    assert (caught.value.code, caught.value.file, caught.value.hint) == ("host", "org.example.rogue", "hint")


@pytest.mark.parametrize(
    "packets",
    [
        [protocol.frame(Kind.ANSWER, 1, 9, bytes(9))],
        [protocol.frame(Kind.ANSWER, 1, 1, b"x", flag=2)],
        [protocol.frame(Kind.DATA, 1, 1, b"x")],
        [protocol.frame(Kind.DATA, 1, 0, b"1234567"), protocol.frame(Kind.DATA, 1, 7, b"89")],
        [protocol.frame(Kind.DATA, 1, 0, b"1234"), protocol.frame(Kind.DATA, 1, 0, b"1234")],
        [protocol.frame(Kind.DATA, 1, 1 << 63, b"x")],
        [protocol.frame(Kind.DATA, 1, 0, bytes(8)), protocol.frame(Kind.ANSWER, 1, 9, b"9")],
        [protocol.frame(Kind.DATA, 1)],
        [protocol.frame(Kind.RESULT, 1, 8, b"12345678")],
    ],
)
def test_lies_about_the_data_of_an_answer(rogue, packets):
    fails(FaultKind.PROTOCOL, lambda: rogue().exchange(*packets))


def test_an_answer_in_pieces(rogue):
    pieces = [protocol.frame(Kind.DATA, 1, 0, b"123"), protocol.frame(Kind.ANSWER, 1, 8, b"45678")]
    assert rogue().exchange(*pieces) == (8, b"12345678")


def test_what_is_left_of_an_answer_is_not_taken_for_the_next_one(rogue):
    item = rogue()
    assert item.exchange(protocol.frame(Kind.ANSWER, 1, 1, b"x")) == (1, b"x")
    assert item.exchange(protocol.frame(Kind.RESULT, 2, 0)) == (0, b"")
    fails(FaultKind.PROTOCOL, lambda: item.call(protocol.frame(Kind.DATA, 3, 0, b"x")))


@pytest.mark.parametrize(
    "packet",
    [
        protocol.frame(Kind.KV_PUT, 1, 0, b"key", flag=4),
        protocol.frame(Kind.KV_PUT, 1, 0, b"key", flag=0),
        protocol.frame(Kind.KV_PUT, 1, 0, bytes(5000), flag=3),
        protocol.frame(Kind.KV_GET, 1),
        protocol.frame(Kind.KV_GET, 1, 0, bytes(65)),
        protocol.frame(Kind.METRIC, 1, 1),
        protocol.frame(Kind.METRIC, 1, 1, bytes(65)),
        protocol.frame(Kind.IRQ, 1, 6 << 1),
        protocol.frame(Kind.IRQ, 1, 1 << 63 | 5 << 1),
    ],
)
def test_lies_about_what_is_granted(rogue, packet):
    item = rogue(kv=True, metric=True, irqs=(5,))
    fails(FaultKind.PROTOCOL, lambda: item.call(packet))
    assert item.events.store.items() == {}
    assert item.events.metrics.values == {}


def test_a_store_and_metrics_that_a_rogue_fills_stay_bounded(rogue):
    item = rogue(kv=True, metric=True)
    big = [protocol.frame(Kind.KV_PUT, 1, 0, bytes((n,)) * 4064, flag=64) for n in range(1, 40)]
    names = [protocol.frame(Kind.METRIC, 1, 1, f"name {n}".encode()) for n in range(100)]
    done = threading.Event()

    def talk():
        for packet in (*big, *names, protocol.frame(Kind.RESULT, 1, 5)):
            item.socket.send(packet)
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                item.socket.recv(64)

    item.socket.settimeout(0.05)
    thread = threading.Thread(target=talk)
    thread.start()
    assert item.link.call(Kind.CALL_PIO_READ, 0, address=0x510, size=1) == 5
    done.set()
    thread.join()
    assert sum(map(len, item.events.store.items().values())) == 16 * 4000
    assert len(item.events.metrics.values) == 64


def test_a_store_key_is_what_the_packet_says(rogue):
    item = rogue(kv=True)
    put = protocol.frame(Kind.KV_PUT, 1, 0, b"keyvalue", flag=3)
    assert item.call(put, protocol.frame(Kind.RESULT, 1, 1)) == 1
    assert item.events.store.items() == {b"key": b"value"}


class Clock:
    """Stands in for the module ``time`` of the link, and for the socket: each packet takes a while."""

    def __init__(self, inner):
        self.inner, self.now, self.step, self.left = inner, 0.0, 0.0, 0.15
        self.sent = 0

    def monotonic(self):
        return self.now

    def settimeout(self, seconds):
        self.left = seconds

    def _pass(self):
        if self.step > self.left:
            self.now += self.left
            raise TimeoutError
        self.now += self.step

    def send(self, packet):
        self.sent += 1
        self._pass()
        return len(packet)

    def recv(self, size):
        self._pass()
        return self.inner.recv(size)

    def close(self):
        self.inner.close()


@pytest.fixture
def timed(rogue, monkeypatch):
    """Return what makes a rogue with a clock of its own; ``call_ms`` is 150."""

    def make(step, **fields):
        item = rogue(**fields)
        clock = item.link._socket = Clock(item.link._socket)
        monkeypatch.setattr(link, "time", clock)
        clock.step = step
        return item, clock

    return make


def test_a_worker_that_asks_slowly_has_one_deadline(timed):
    item, clock = timed(0.04, tick=True)
    requests = [protocol.frame(Kind.SET_TICK, 1, 1)] * 20
    fails(FaultKind.DEADLINE, lambda: item.call(*requests, protocol.frame(Kind.RESULT, 1, 1)))
    assert clock.now == pytest.approx(0.15)


def test_the_first_answer_is_within_the_deadline_too(timed):
    """The time runs from before the call is sent, not from its first answer on."""
    item, clock = timed(0.07, tick=True)
    fails(FaultKind.DEADLINE, lambda: item.call(protocol.frame(Kind.SET_TICK, 1, 1), protocol.frame(Kind.RESULT, 1, 1)))
    assert clock.now == pytest.approx(0.15)


def test_a_slow_call_does_not_shorten_the_next_one(timed):
    item, clock = timed(0.07)
    assert item.call(protocol.frame(Kind.RESULT, 1, 1, bytes(4))) == 1
    assert clock.left == pytest.approx(0.15)
    assert item.call(protocol.frame(Kind.RESULT, 2, 2)) == 2


def test_data_that_is_taken_slowly_meets_the_deadline(timed):
    item, clock = timed(0.04)
    fails(FaultKind.DEADLINE, lambda: item.link.exchange(Kind.CALL_RESTORE, 0, size=3, data=bytes(100_000)))
    assert (clock.sent, clock.now) == (4, pytest.approx(0.15))


def test_an_answer_with_data_is_within_the_deadline_too(timed):
    item, clock = timed(0.07)
    packets = [protocol.frame(Kind.DATA, 1, 0, b"123"), protocol.frame(Kind.ANSWER, 1, 8, b"45678")]
    fails(FaultKind.DEADLINE, lambda: item.exchange(*packets))
    assert clock.now == pytest.approx(0.15)


def test_a_module_that_is_taken_slowly_meets_the_deadline_of_the_start(timed):
    item, clock = timed(0.04)
    item.link._spec = ExtensionSpec("org.example.rogue", "1", bytes(1 << 20))
    item.socket.send(LOCKED)
    fails(FaultKind.DEADLINE, lambda: item.link.start(bytes(32), 0.2, 1))
    assert clock.now == pytest.approx(0.2)
    assert clock.sent <= 5


def test_the_end_of_a_worker_makes_known_what_it_changed_last(bench, monkeypatch):
    """It shares its windows and tells of changes only with an answer, which it may not have lived to give."""
    item, refreshed = Rogue(bench.ram), []
    note = lambda gpa, size: refreshed.append((gpa, size, item.process.poll()))  # noqa: E731
    monkeypatch.setattr(bench.ram, "refresh", note, raising=False)
    item.link._changeable = ((0x20000, 4096),)
    assert item.link.kill()
    item.socket.close()
    assert refreshed == [(0x20000, 4096, -9)], "once it is gone, not before"
