"""CRC-32C against published vectors and a plain loop."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vhdx_testkit import crc32c as plain

from vmgraft.imagefmt.vhdx.crc32c import checksum, crc32c


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),  # the check value of the catalogue of parametrised CRC algorithms
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_vectors(data, value):
    assert crc32c(data) == value


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 5000))
def test_zeros_at_the_end_are_skipped_rightly(data, zeros):
    assert crc32c(data + bytes(zeros)) == plain(data + bytes(zeros))


def test_a_whole_table():
    data = b"regi" + bytes(65536 - 4)
    assert crc32c(data) == plain(data)
    assert checksum(data[:4] + b"abcd" + data[8:], 4) == plain(data)
