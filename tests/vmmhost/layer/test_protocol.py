"""Packets: what is built is read back, and anything else is a ProtocolError."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.vmmhost.layer import protocol
from vmgraft.vmmhost.layer.protocol import Call, Kind, ProtocolError, Setup


def test_call_comes_back():
    message = Call(Kind.CALL_HYPERCALL, 4, 7, 1 << 63, 0xFEDCBA9876543210, 5, (1, 2, 3, 0xFFFFFFFF))
    packet = protocol.call(message)
    assert len(packet) == protocol.CALL_BYTES == 48
    assert protocol.parse_call(packet) == message


def test_setup_comes_back():
    message = Setup(3, b"epoch=1", 1 << 20, 256, 65536, 10**9, 10, 3, bytes(range(32)))
    assert protocol.parse_setup(protocol.setup(message)) == message


def test_module_in_packets():
    module = bytes(range(256)) * 40
    packets = protocol.module_packets(module)
    joined = b""
    for packet in packets:
        assert len(packet) <= protocol.MAX_PACKET
        joined += protocol.parse_module_packet(packet, len(joined))
    assert joined == module
    with pytest.raises(ProtocolError):
        protocol.parse_module_packet(packets[1], 0)


@pytest.mark.parametrize(
    ("kind", "payload", "length"),
    [
        (Kind.RESULT, b"", None),
        (Kind.TRAP, b"unreachable", None),
        (Kind.GUEST_READ, b"", 4096),
        (Kind.GUEST_WRITE, bytes(4096), None),
        (Kind.LOG, bytes(1024), None),
    ],
)
def test_frames_a_worker_may_send(kind, payload, length):
    got = protocol.parse_worker_frame(protocol.frame(kind, 9, 5, payload, length=length), 9)
    assert (got.kind, got.value, got.payload, got.length) == (kind, 5, payload, length or len(payload))


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x40",
        protocol.frame(Kind.RESULT, 8),
        protocol.frame(Kind.RESULT, 9, 0, b"x"),
        protocol.frame(Kind.RESULT, 9, length=1),
        protocol.frame(Kind.GUEST_READ, 9),
        protocol.frame(Kind.GUEST_READ, 9, length=4097),
        protocol.frame(Kind.GUEST_READ, 9, 0, b"abc"),
        protocol.frame(Kind.GUEST_WRITE, 9),
        protocol.frame(Kind.GUEST_WRITE, 9, 0, bytes(4097)),
        protocol.frame(Kind.LOG, 9, 0, bytes(1025)),
        protocol.frame(Kind.SETUP, 9),
        protocol.frame(Kind.CALL_START, 9),
        b"\xff" * 16,
    ],
)
def test_frames_a_worker_may_not_send(packet):
    with pytest.raises(ProtocolError):
        protocol.parse_worker_frame(packet, 9)


@given(st.binary(max_size=5000))
def test_any_bytes_give_a_message_or_the_one_error(packet):
    for parse in (
        lambda: protocol.parse_worker_frame(packet, 0),
        lambda: protocol.parse_call(packet),
        lambda: protocol.parse_setup(packet),
        lambda: protocol.parse_module_packet(packet, 0),
        lambda: protocol.parse_answer(packet, Kind.GUEST_DATA, 0, 16),
    ):
        try:
            parse()
        except ProtocolError as error:
            assert error.message
