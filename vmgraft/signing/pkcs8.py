"""Encrypted PKCS#8 (RFC 5958, 3) under PBES2 (RFC 8018, 6.2): PBKDF2 with HMAC-SHA-256, AES-256-CBC.

``cryptography`` writes this form with 2048 rounds and no say in the matter. Here the rounds are many, so that guessing
passphrases is slow, and what is read is looked at first, so that a file cannot keep us busy for hours.
"""

from __future__ import annotations

import base64
import binascii
import os
from hashlib import pbkdf2_hmac
from typing import Final

#: PBKDF2 rounds written (OWASP Password Storage Cheat Sheet, PBKDF2-HMAC-SHA256).
ROUNDS: Final = 600_000
#: Most rounds read: some seconds.
MAX_ROUNDS: Final = 10_000_000
#: Most memory that scrypt may ask for, in bytes (128 * N * r: RFC 7914, 2); OpenSSL writes keys that ask for 16 MiB.
MAX_SCRYPT_MEMORY: Final = 64 << 20
#: Most times that scrypt may fill it (p).
MAX_SCRYPT_LANES: Final = 16
#: Fewer rounds than these are worth a warning: OpenSSL's and many others' default is 2048.
FEW_ROUNDS: Final = 100_000

_PBES2: Final = bytes.fromhex("06092a864886f70d01050d")  # RFC 8018, A.4
_PBKDF2: Final = bytes.fromhex("06092a864886f70d01050c")  # RFC 8018, A.2
_SCRYPT: Final = bytes.fromhex("06092b06010401da47040b")  # RFC 7914, 7
_HMAC_SHA256: Final = bytes.fromhex("06082a864886f70d0209")  # RFC 8018, B.1.2
_AES256_CBC: Final = bytes.fromhex("060960864801650304012a")  # NIST CSOR, aes 42; RFC 8018, B.2.5
_INTEGER, _OCTETS, _NULL, _SEQUENCE = 0x02, 0x04, b"\x05\x00", 0x30
_LABEL: Final = b"ENCRYPTED PRIVATE KEY"
_BLOCK: Final = 16  # of AES, in bytes
_SALT: Final = 16  # bytes


def encrypt_pkcs8(der: bytes, passphrase: bytes, *, rounds: int = ROUNDS) -> bytes:
    """Return a PKCS#8 key encrypted, as PEM.

    Args:
        der: PrivateKeyInfo.
        passphrase: What opens it, as bytes.
        rounds: Of PBKDF2.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    salt, vector = os.urandom(_SALT), os.urandom(_BLOCK)
    key = pbkdf2_hmac("sha256", passphrase, salt, rounds, 32)
    padding = _BLOCK - len(der) % _BLOCK  # RFC 8018, 6.1.1, step 4
    encryptor = Cipher(algorithms.AES256(key), modes.CBC(vector)).encryptor()
    sealed = encryptor.update(der + bytes([padding]) * padding) + encryptor.finalize()
    count = rounds.to_bytes(rounds.bit_length() // 8 + 1, "big")
    function = _sequence(_HMAC_SHA256 + _NULL)
    derivation = _sequence(_PBKDF2 + _sequence(_tlv(_OCTETS, salt) + _tlv(_INTEGER, count) + function))
    scheme = _sequence(_PBES2 + _sequence(derivation + _sequence(_AES256_CBC + _tlv(_OCTETS, vector))))
    text = base64.b64encode(_sequence(scheme + _tlv(_OCTETS, sealed)))
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    return b"\n".join([b"-----BEGIN %b-----" % _LABEL, *lines, b"-----END %b-----" % _LABEL, b""])


def costly(pem: bytes) -> str | None:
    """Say why a passphrase should not be tried on an encrypted PKCS#8 key: it would keep us too busy; else None."""
    if (pbkdf2_rounds(pem) or 0) > MAX_ROUNDS:
        return f"the passphrase is stretched by more than {MAX_ROUNDS} rounds of PBKDF2"
    cost, size, lanes = _derivation(pem, _SCRYPT, 3) or (0, 0, 0)
    if 128 * cost * size > MAX_SCRYPT_MEMORY or lanes > MAX_SCRYPT_LANES:
        most = f"{MAX_SCRYPT_MEMORY >> 20} MiB, {MAX_SCRYPT_LANES} times"
        return f"the passphrase is stretched by scrypt, which asks for more than {most}"
    return None


def pbkdf2_rounds(pem: bytes) -> int | None:
    """Return the PBKDF2 rounds of an encrypted PKCS#8 key, or None where it is something else or malformed."""
    numbers = _derivation(pem, _PBKDF2, 1)
    return None if numbers is None else numbers[0]


def _derivation(pem: bytes, function: bytes, count: int) -> tuple[int, ...] | None:
    """Return the first numbers behind the salt of a key derivation function; None where it is another or malformed."""
    parts = pem.split(b"-----")
    if len(parts) < 3 or parts[1] != b"BEGIN " + _LABEL:
        return None
    try:
        der = base64.b64decode(b"".join(parts[2].split()), validate=True)
        scheme = _Reader(_Reader(der).read(_SEQUENCE)).read(_SEQUENCE)
        body = _Reader(_Reader(scheme).after(_PBES2)).read(_SEQUENCE)
        reader = _Reader(_Reader(_Reader(body).read(_SEQUENCE)).after(function))
        fields = _Reader(reader.read(_SEQUENCE))
        fields.read(_OCTETS)
        return tuple(int.from_bytes(fields.read(_INTEGER), "big") for _ in range(count))
    except (binascii.Error, ValueError):
        return None


def _tlv(tag: int, content: bytes) -> bytes:
    """Encode one DER element (X.690, 8.1)."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def _sequence(content: bytes) -> bytes:
    return _tlv(_SEQUENCE, content)


class _Reader:
    """Reads DER elements one after the other; raises ValueError where something else stands."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def after(self, prefix: bytes) -> bytes:
        """Return what follows an element that must be there."""
        if not self.data.startswith(prefix):
            raise ValueError("another algorithm")
        return self.data[len(prefix) :]

    def read(self, tag: int) -> bytes:
        """Take an element off and return its content."""
        if len(self.data) < 2 or self.data[0] != tag:
            raise ValueError("another element")
        size, start = self.data[1], 2
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(self.data[2:start], "big")
        if start + size > len(self.data):
            raise ValueError("cut off")
        content, self.data = self.data[start : start + size], self.data[start + size :]
        return content
