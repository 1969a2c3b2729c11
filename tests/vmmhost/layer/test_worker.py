"""A worker's own decisions, made in this process: what it refuses before it begins, and what it never answers."""

import socket

import pytest

from vmgraft.vmmhost.layer import protocol, worker
from vmgraft.vmmhost.layer.protocol import Call, Kind, ProtocolError, Refusal, Setup
from vmgraft.vmmhost.layer.sandbox import Mechanism

LOCKED = Mechanism.PROCESS | Mechanism.NO_NEW_PRIVS | Mechanism.NO_CAPABILITIES


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ours, worker.Channel(theirs.fileno())
    ours.close()
    theirs.close()


def setup(module, **changes):
    fields = {"grant": 0, "config": b"", "module_bytes": len(module), "memory_mib": 1, "log_bytes": 0, "fuel": 1000,
              "cpu_seconds": 1, "min_isolation": 0, "seed": bytes(32)}  # fmt: skip
    return protocol.setup(Setup(**{**fields, **changes}))


def test_isolation_is_checked_before_the_module(ends):
    ours, channel = ends
    hostile = b"not a module at all"
    ours.send(setup(hostile, min_isolation=3))
    for packet in protocol.module_packets(hostile):
        ours.send(packet)
    with pytest.raises(worker._RefusedError):
        worker._serve(channel, LOCKED, fast=True)
    early = protocol.parse_worker_frame(ours.recv(8192), 0)
    assert (early.kind, early.value) == (Kind.LOCKED, LOCKED)
    answer = protocol.parse_worker_frame(ours.recv(8192), 0)
    assert (answer.kind, answer.flag) == (Kind.REFUSED, Refusal.ISOLATION)
    assert b"below the 3" in answer.payload


def test_a_module_over_the_limit_is_not_even_received(ends):
    ours, channel = ends
    ours.send(setup(b"", module_bytes=(1 << 20) + 1))
    with pytest.raises(ProtocolError, match="over the limit"):
        worker._serve(channel, Mechanism.PROCESS, fast=True)


def test_a_call_of_a_hook_that_is_not_there(ends):
    call = Call(Kind.CALL_TICK, 0, 1, 0, 0, 0, (0, 0, 0, 0))
    with pytest.raises(ProtocolError, match="CALL_TICK"):
        worker._answer(ends[1], None, {}, call)


def test_answers_to_no_question(ends):
    ours, channel = ends
    for packet in (b"x", protocol.frame(Kind.GUEST_DONE, 0), protocol.frame(Kind.GUEST_DATA, 5, 0, bytes(8))):
        ours.send(packet)
        with pytest.raises(ProtocolError):
            channel.read_guest(0x1000, 8)
        asked = protocol.parse_worker_frame(ours.recv(8192), 0)
        assert (asked.kind, asked.value, asked.length) == (Kind.GUEST_READ, 0x1000, 8)


def test_the_host_hangs_up(ends):
    ours, channel = ends
    ours.shutdown(socket.SHUT_WR)
    with pytest.raises(worker._HostGoneError):
        channel.receive()
