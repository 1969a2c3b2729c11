"""The locator: layout, round trip, and that nothing but a VmgraftError ever comes out of the parser."""

import struct
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.contract import Locator, Placement
from vmgraft.imagefmt.locator import LOCATOR_SIZE, pack_locator, parse_locator

SAMPLE = Locator(Placement.INLINE, 4224, 1000, b"r" * 32, b"t" * 32, 4000)


def sealed(head):
    return head + sha256(head).digest()[:8]


def test_layout_is_the_documented_one():
    fields = struct.unpack("<8sHHIQQ32s32sQ16s8s", pack_locator(SAMPLE))
    assert fields[:6] == (b"VMGRAFT\0", 1, 0, 1, 4224, 1000)
    assert fields[6:10] == (b"r" * 32, b"t" * 32, 4000, bytes(16))
    assert len(pack_locator(SAMPLE)) == LOCATOR_SIZE == 128


digests = st.binary(min_size=32, max_size=32)
locators = st.builds(
    Locator,
    placement=st.sampled_from([Placement.INLINE, Placement.SIDECAR]),
    record_offset=st.integers(0, 1 << 62),
    record_size=st.integers(64, 1 << 30),
    record_sha256=digests,
    tree_digest=digests,
    file_size=st.integers(0, 1 << 62),
)


@given(locators)
def test_round_trip(locator):
    assert parse_locator(pack_locator(locator), file="x", offset=0) == locator


@pytest.mark.parametrize("position", range(LOCATOR_SIZE))
def test_every_changed_byte_is_noticed(position):
    data = bytearray(pack_locator(SAMPLE))
    data[position] ^= 0x10
    with pytest.raises(GraftFormatError) as caught:
        parse_locator(bytes(data), file="x.img", offset=77)
    assert caught.value.file == "x.img"
    assert caught.value.offset == 77
    assert caught.value.field.startswith("locator.")


@pytest.mark.parametrize(
    ("position", "value", "field"),
    [
        (8, b"\2\0", "locator.major"),
        (12, b"\3\0\0\0", "locator.flags"),
        (12, b"\1\1\0\0", "locator.flags"),
        (16, b"\xff" * 8, "locator.record_offset"),
        (24, struct.pack("<Q", 63), "locator.record_size"),
        (24, struct.pack("<Q", (1 << 30) + 1), "locator.record_size"),
        (96, b"\xff" * 8, "locator.file_size"),
        (104, b"\1", "locator.reserved"),
        (119, b"\1", "locator.reserved"),
    ],
)
def test_sealed_but_out_of_bounds(position, value, field):
    head = bytearray(pack_locator(SAMPLE)[:120])
    head[position : position + len(value)] = value
    with pytest.raises(GraftFormatError) as caught:
        parse_locator(sealed(bytes(head)), file="x", offset=0)
    assert caught.value.field == field


def test_newer_minor_version_is_read():
    head = bytearray(pack_locator(SAMPLE)[:120])
    head[10] = 7
    head[104] = 1
    assert parse_locator(sealed(bytes(head)), file="x", offset=0) == SAMPLE


@pytest.mark.parametrize(
    "change",
    [
        {"placement": Placement.AUTO},
        {"record_size": 0},
        {"record_offset": -1},
        {"file_size": 1 << 63},
        {"tree_digest": b"short"},
    ],
)
def test_pack_refuses_what_parse_would(change):
    with pytest.raises(GraftFormatError):
        pack_locator(replace(SAMPLE, **change))


@given(st.binary(max_size=200))
def test_any_bytes(data):
    try:
        parse_locator(data, file="x", offset=0)
    except GraftFormatError:
        return
    raise AssertionError("random bytes passed for a locator")


@given(st.binary(min_size=112, max_size=112))
def test_any_sealed_bytes(body):
    try:
        locator = parse_locator(sealed(b"VMGRAFT\0" + body), file="x", offset=0)
    except GraftFormatError:
        return
    assert locator.record_size <= 1 << 30
