"""The guest's end of the API port: framing, answers, and bytes that are neither."""

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmgraft.vmmhost.qemu.guestapi import GuestApi


class Adder:
    """Answers with the sum of number and arguments."""

    def hypercall(self, number: int, args: tuple[int, int, int, int]) -> int:
        return number + sum(args)


class Port:
    """A guest with its end of the port open."""

    def __init__(self) -> None:
        ours, self.guest = socket.socketpair()
        self.guest.setblocking(False)
        self.api = GuestApi(ours)
        self.api.claim_hypercall(16, 17, Adder(), "org.example.adder")

    def send(self, data: bytes) -> None:
        self.guest.sendall(data)
        self.api.serve()

    def answers(self) -> list[tuple[int, int, int]]:
        """Return (sequence, status, result) of every answer that is there."""
        try:
            data = self.guest.recv(1 << 20)
        except BlockingIOError:
            return []
        found = list(struct.iter_unpack("<4s3IQ", data))
        assert all(magic == b"VGRS" and zero == 0 for magic, _, _, zero, _ in found)
        return [(sequence, status, result) for _, sequence, status, _, result in found]


def request(sequence: int, number: int, *args: int, reserved: int = 0) -> bytes:
    return struct.pack("<4s7I", b"VGRQ", sequence, number, reserved, *(args or (0, 0, 0, 0)))


ONES = (1 << 64) - 1


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port()
    yield made
    made.guest.close()
    made.api.close()


def test_requests_are_answered_in_order(port: Port) -> None:
    port.send(request(7, 16, 1, 2, 3, 4) + request(8, 17, 0xFFFFFFFF, 1, 0, 0))
    assert port.answers() == [(7, 0, 26), (8, 0, 17 + 0x100000000)]
    assert port.api.calls == 2


def test_discovery_counts_extensions(port: Port) -> None:
    port.api.claim_hypercall(20, 20, Adder(), "org.example.adder")
    port.api.claim_hypercall(21, 21, Adder(), "org.example.other")
    port.send(request(1, 0))
    assert port.answers() == [(1, 0, 2 << 32 | 0x56474654)]


def test_numbers_that_nobody_claimed(port: Port) -> None:
    port.send(request(1, 15) + request(2, 18))
    assert port.answers() == [(1, 1, ONES), (2, 1, ONES)]


def test_a_request_may_come_in_pieces(port: Port) -> None:
    data = request(3, 16, 1, 1, 1, 1)
    for at in range(len(data)):
        assert port.answers() == []
        port.send(data[at : at + 1])
    assert port.answers() == [(3, 0, 20)]
    assert port.api.malformed == 0


def test_what_is_no_request_is_passed_over_and_answered_once(port: Port) -> None:
    port.send(b"login: root\n" * 20 + b"VGR")
    port.send(b"more" + request(5, 16))
    assert port.answers() == [(0, 2, ONES), (5, 0, 16)]
    port.send(request(6, 16, reserved=1) + request(7, 16))
    assert port.answers() == [(6, 2, ONES), (7, 0, 16)]
    assert port.api.malformed == 2


def test_a_guest_that_does_not_read_is_made_to_wait(port: Port) -> None:
    port.guest.setblocking(False)
    sent = 0
    for _ in range(5000):
        with contextlib.suppress(BlockingIOError):
            sent += port.guest.send(request(1, 16) * 64) // 32
        port.api.serve()
    assert not port.api.receiving
    assert port.api.sending
    assert len(port.api._out) < 70_000
    assert len(port.api._in) <= 4096 + 32
    done = 0
    for _ in range(100_000):
        done += len(port.answers())
        port.api.serve()
        if done == sent:
            break
    assert done == sent > 1000


def test_the_other_end_may_go(port: Port) -> None:
    port.guest.close()
    port.api.serve()
    assert port.api.closed
    port.guest = socket.socket()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=100) | st.just(request(9, 16)) | st.just(b"VGRQ"), max_size=10))
def test_any_bytes_leave_the_port_in_order(pieces: list[bytes]) -> None:
    port = Port()
    with port.guest:
        for piece in pieces:
            port.send(piece)
        port.answers()
        # Whatever came before: after one request's length of padding the port is in step again.
        port.send(bytes(32) + request(77, 16, 4, 0, 0, 0))
        assert port.answers()[-1] == (77, 0, 20)
        port.api.close()


def test_at_the_end_of_a_run_waiting_requests_are_not_answered() -> None:
    """An extension that asks for the end is not asked again, however much the guest has sent ahead."""
    ours, guest = socket.socketpair()
    over: list[bool] = []

    class Last:
        def hypercall(self, number: int, args: tuple[int, int, int, int]) -> int:
            over.append(True)
            return 0

    api = GuestApi(ours, lambda: bool(over))
    api.claim_hypercall(16, 16, Last(), "org.example.last")
    with guest:
        guest.sendall(request(1, 16) * 50)
        for _ in range(3):
            api.serve()
        assert (len(over), api.calls) == (1, 1)
        api.close()
