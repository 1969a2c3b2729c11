"""The control socket against a QEMU that may have been taken over."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import pytest

from vmgraft.errors import HostError
from vmgraft.vmmhost.qemu.qmp import Qmp
from vmgraft.vmmhost.qemu.screen import BLANK, lines_of, read_cells

GREETING = b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}}, "capabilities": []}}\r\n'


class FakeQemu:
    def __init__(self) -> None:
        ours, self.end = socket.socketpair()
        self.qmp = Qmp(ours)
        self._threads: list[threading.Thread] = []

    def answer(self, *replies: bytes) -> None:
        """Send each reply after the next line from the host."""

        def run() -> None:
            for reply in replies:
                line = b""
                while not line.endswith(b"\n"):
                    line += self.end.recv(4096)
                json.loads(line)
                self.end.sendall(reply)

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        self.end.close()
        self.qmp.close()


@pytest.fixture
def qemu() -> Iterator[FakeQemu]:
    made = FakeQemu()
    yield made
    made.close()


def test_start_and_commands_with_events_between(qemu: FakeQemu) -> None:
    qemu.end.sendall(GREETING)
    qemu.answer(b'{"return": {}}\r\n', b'{"event": "STOP"}\r\n{"return": 5}\r\n')
    assert qemu.qmp.start(5) == "7.2.22"
    assert qemu.qmp.execute("cont") == 5
    assert [event["event"] for event in qemu.qmp.events] == ["STOP"]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b'{"error": {"class": "GenericError", "desc": "no\\u001b[31m"}}\n', r"no\\x1b"),
        (b'{"error": []}\n', "refuses"),
        (b"[]\n", "no message"),
        (b"{nonsense\n", "no JSON"),
        (b"[" * 100_000 + b"\n", "no JSON"),
    ],
)
def test_answers_that_are_none(qemu: FakeQemu, reply: bytes, words: str) -> None:
    qemu.answer(reply)
    with pytest.raises(HostError, match=words):
        qemu.qmp.execute("cont", seconds=5)


def test_a_line_without_end_is_bounded(qemu: FakeQemu) -> None:
    sender = threading.Thread(target=qemu.end.sendall, args=(b"x" * (2 << 20),))
    sender.start()
    with pytest.raises(HostError, match="line without end"):
        qemu.qmp.start(5)
    qemu.qmp.receive  # noqa: B018 - the socket goes on to exist
    while sender.is_alive():
        try:
            qemu.qmp._socket.recv(1 << 20)
        except BlockingIOError:
            sender.join(0.01)


def test_events_are_bounded(qemu: FakeQemu) -> None:
    for _ in range(40):
        qemu.end.sendall(b'{"event": "BLOCK_IO_ERROR", "data": 3}\n' * 100)
        qemu.qmp.receive()
    assert len(qemu.qmp.events) == 256


def test_one_that_is_silent_or_gone(qemu: FakeQemu) -> None:
    with pytest.raises(HostError, match="does not answer"):
        qemu.qmp.execute("cont", seconds=0.05)
    qemu.end.close()
    with pytest.raises(HostError, match="closed"):
        qemu.qmp.execute("cont", seconds=5)


@pytest.mark.parametrize(
    "dump", [b'""', b"5", b'"00000000000b8000: zz"', b'"b8000: 0x41 0x07"', b'"b8000: 0x141"', b'"b8000: -1"']
)
def test_a_dump_that_is_none_is_a_blank_screen(qemu: FakeQemu, dump: bytes) -> None:
    qemu.answer(b'{"return": ' + dump + b"}\n")
    assert read_cells(qemu.qmp) == BLANK
    assert lines_of(BLANK) == [""] * 25


def test_a_qemu_that_never_stops_talking_does_not_hold_the_host(qemu: FakeQemu) -> None:
    stop = threading.Event()

    def talk() -> None:
        line = b'{"event": "X", "data": {}}\n' * 1000
        with contextlib.suppress(OSError):
            while not stop.is_set():
                qemu.end.sendall(line)

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        for _ in range(3):
            qemu.qmp.receive()
        with pytest.raises(HostError, match="does not answer"):
            qemu.qmp.execute("quit", seconds=0.3)
    finally:
        stop.set()
        qemu.qmp._socket.shutdown(socket.SHUT_RDWR)
        talker.join()
