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
    message = Setup(1023, b"epoch=1", 1 << 20, 256, 65536, 10**9, 10, 3, bytes(range(32)), 1 << 15 | 1 << 5)
    assert protocol.parse_setup(protocol.setup(message)) == message


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 65536])
def test_data_comes_back(size):
    data = bytes(index % 251 for index in range(size))
    frames, rest = protocol.data_frames(7, data)
    assert len(rest) <= 4096
    before = b""
    for packet in frames:
        assert protocol.is_data(packet)
        before += protocol.parse_data(packet, len(before))
    message = Call(Kind.CALL_RESTORE, 0, 7, 1, 0, size, (0, 0, 0, 0), rest)
    assert protocol.parse_call(protocol.call(message), before).data == data


def test_data_that_may_not_be():
    frames, _rest = protocol.data_frames(7, bytes(3 * 4096))
    for packet, offset in ((frames[1], 0), (frames[0][:-1], 0), (frames[0], 65536), (frames[0] + b"x", 0)):
        with pytest.raises(ProtocolError):
            protocol.parse_data(packet, offset)
    plain = Call(Kind.CALL_PIO_READ, 4, 7, 1, 0, 0, (9, 0, 0, 0))
    assert plain.room == 0
    assert plain._replace(kind=Kind.CALL_SERVICE).room == 9
    assert plain._replace(kind=Kind.CALL_SNAPSHOT, args=(0xFFFFFFFF, 0, 0, 0)).room == 65536
    for packet, before in ((protocol.call(plain) + b"x", b""), (protocol.call(plain), b"x")):
        with pytest.raises(ProtocolError):
            protocol.parse_call(packet, before)
    restore = protocol.call(plain._replace(kind=Kind.CALL_RESTORE))
    with pytest.raises(ProtocolError):
        protocol.parse_call(restore + b"x", bytes(65536))


def test_value_comes_back():
    assert protocol.parse_value(protocol.frame(Kind.KV_DATA, 7, 0, b"value", flag=1), Kind.KV_DATA, 7) == b"value"
    assert protocol.parse_value(protocol.frame(Kind.KV_DATA, 7), Kind.KV_DATA, 7) is None
    for packet in (b"", protocol.frame(Kind.KV_DONE, 7), protocol.frame(Kind.KV_DATA, 8), bytes(5000)):
        with pytest.raises(ProtocolError):
            protocol.parse_value(packet, Kind.KV_DATA, 7)


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
        lambda: protocol.parse_value(packet, Kind.KV_DATA, 0),
        lambda: protocol.parse_data(packet, 0),
    ):
        try:
            parse()
        except ProtocolError as error:
            assert error.message


# --- the short ways, which must never say anything else than the long ones ---


_U32, _U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@given(st.sampled_from([kind for kind in Kind if kind.name.startswith("CALL_")]), _U32, _U64, _U64, _U64)
def test_a_plain_call_is_a_call(kind: Kind, seq: int, now: int, address: int, value: int) -> None:
    args = (seq, 1, 2, 3)
    packet = protocol.plain_call(kind, seq, now, address, 4, value, args)
    assert packet == protocol.call(protocol.Call(kind, 4, seq, now, address, value, args))
    parsed = protocol.parse_call(packet)
    assert protocol.parse_access(packet) == (parsed.size, parsed.seq, parsed.now, parsed.address, parsed.value)


@given(_U32, _U64, _U32, st.booleans())
def test_a_plain_result_is_a_result(seq: int, value: int, used: int, touched: bool) -> None:
    packet = protocol.result(seq, value, used, touched=touched)
    assert packet == protocol.frame(Kind.RESULT, seq, value, used.to_bytes(4, "little"), flag=touched)
    assert protocol.plain_result(packet, seq) == (touched, value, used)
    assert protocol.plain_result(packet, (seq + 1) & 0xFFFFFFFF) is None


@given(st.binary(min_size=0, max_size=24), st.sampled_from(list(Kind)), st.integers(0, 255), st.integers(0, 8), _U32)
def test_the_short_way_believes_no_more_than_the_long_one(
    noise: bytes, kind: Kind, flag: int, length: int, seq: int
) -> None:
    head = bytes([kind, flag]) + length.to_bytes(2, "little") + seq.to_bytes(4, "little")
    for packet in (noise, (head + noise)[:20], (head + noise).ljust(20, b"\0")):
        plain = protocol.plain_result(packet, seq)
        if plain is not None:
            frame = protocol.parse_worker_frame(packet, seq)
            assert (frame.kind, frame.flag, frame.value) == (Kind.RESULT, *plain[:2])
            assert int.from_bytes(frame.payload, "little") == plain[2]
