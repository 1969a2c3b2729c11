"""CRC-32C (Castagnoli), as RFC 3720, 12.1 defines it; the standard library has only the other CRC-32."""

from __future__ import annotations

from functools import cache

#: The polynomial 0x1EDC6F41, bits reversed (RFC 3720, 12.1).
_POLYNOMIAL = 0x82F63B78
_ONES = 0xFFFFFFFF


def _make_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_TABLE = _make_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of ``data``.

    Zeros at the end cost next to nothing: VHDX checksums cover 64 KiB of which some hundred bytes are in use.
    """
    body = data.rstrip(b"\0")
    crc = _ONES
    table = _TABLE
    for byte in body:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return _skip_zeros(crc, len(data) - len(body)) ^ _ONES


def checksum(data: bytes, offset: int) -> int:
    """Return the CRC-32C of a structure, its own 4 bytes of checksum at ``offset`` counted as zeros."""
    return crc32c(data[:offset] + bytes(4) + data[offset + 4 :])


def _skip_zeros(crc: int, count: int) -> int:
    """Return the register after ``count`` zero bytes. A zero byte is a linear map of its bits: square, and multiply."""
    power = 0
    while count:
        if count & 1:
            crc = _apply(_zeros(power), crc)
        count >>= 1
        power += 1
    return crc


@cache
def _zeros(power: int) -> tuple[int, ...]:
    """Return what 2^power zero bytes make of each bit of the register."""
    if power == 0:
        return tuple(_TABLE[1 << bit & 0xFF] ^ (1 << bit) >> 8 for bit in range(32))
    half = _zeros(power - 1)
    return tuple(_apply(half, column) for column in half)


def _apply(columns: tuple[int, ...], bits: int) -> int:
    result = 0
    while bits:
        low = bits & -bits
        result ^= columns[low.bit_length() - 1]
        bits ^= low
    return result
