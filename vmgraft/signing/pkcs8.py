"""Encrypted PKCS#8 (RFC 5958, 3) under PBES2 (RFC 8018, 6.2): PBKDF2 with HMAC-SHA-256, AES-256-CBC.

``cryptography`` writes this form with 2048 rounds and no say in the matter. Here the rounds are many, so that guessing
passphrases is slow, and what is read is looked at first, so that a file cannot keep us busy for hours.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from hashlib import pbkdf2_hmac
from typing import Final

#: PBKDF2 rounds written (OWASP Password Storage Cheat Sheet, PBKDF2-HMAC-SHA256).
ROUNDS: Final = 600_000
#: Most rounds read: some seconds.
MAX_ROUNDS: Final = 10_000_000
#: Most rounds read of the older schemes, whose rounds are slower here: some seconds too.
MAX_OLD_ROUNDS: Final = 1_000_000
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
_INTEGER, _OCTETS, _NULL, _OBJECT, _SEQUENCE = 0x02, 0x04, b"\x05\x00", 0x06, 0x30
_LABEL: Final = b"ENCRYPTED PRIVATE KEY"
_BLOCKS: Final = re.compile(b"-----BEGIN " + _LABEL + b"-----([^-]*)-----END " + _LABEL + b"-----")
_UNREADABLE: Final = "how the key is encrypted cannot be read: the file is damaged, or another program must open it"
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
    """Say why a passphrase should not be tried on an encrypted PKCS#8 key: it would keep us too busy; else None.

    What cannot be read is not tried either: another reader might understand it. Keys in the older forms of OpenSSL are
    not stretched at all (one round of MD5), and pass.
    """
    blocks = _BLOCKS.findall(pem)
    if len(blocks) != pem.count(b"-----BEGIN " + _LABEL):
        return _UNREADABLE
    return next(filter(None, map(_costly_block, blocks)), None)


def _costly_block(text: bytes) -> str | None:
    found = _derivation(text)
    if found is None:
        return _UNREADABLE
    function, numbers = found
    if function == _SCRYPT:
        cost, size, lanes = numbers
        if 128 * cost * size > MAX_SCRYPT_MEMORY or lanes > MAX_SCRYPT_LANES:
            most = f"{MAX_SCRYPT_MEMORY >> 20} MiB, {MAX_SCRYPT_LANES} times"
            return f"the passphrase is stretched by scrypt, which asks for more than {most}"
        return None
    most_rounds, name = (MAX_ROUNDS, "PBKDF2") if function == _PBKDF2 else (MAX_OLD_ROUNDS, "PBES1 or PKCS#12")
    return (
        f"the passphrase is stretched by more than {most_rounds} rounds of {name}" if numbers[0] > most_rounds else None
    )


def pbkdf2_rounds(pem: bytes) -> int | None:
    """Return the PBKDF2 rounds of an encrypted PKCS#8 key, or None where it is something else or malformed."""
    blocks = _BLOCKS.findall(pem)
    found = _derivation(blocks[0]) if len(blocks) == 1 else None
    return found[1][0] if found is not None and found[0] == _PBKDF2 else None


def _derivation(text: bytes) -> tuple[bytes, tuple[int, ...]] | None:
    """Return how a passphrase is stretched, and the numbers behind the salt; None where it cannot be read."""
    try:
        der = base64.b64decode(b"".join(text.split()), validate=True)
        scheme = _Reader(_Reader(der).read(_SEQUENCE)).read(_SEQUENCE)
        function, fields = _algorithm(scheme)
        if function == _PBES2:
            function, fields = _algorithm(fields.read(_SEQUENCE))
            if function not in (_PBKDF2, _SCRYPT):
                return None
        fields.read(_OCTETS)
        count = 3 if function == _SCRYPT else 1  # PBES1 and PKCS#12 (RFC 8018, A.3; RFC 7292, C): salt, rounds
        numbers = tuple(int.from_bytes(fields.read(_INTEGER), "big", signed=True) for _ in range(count))
        return (function, numbers) if min(numbers) > 0 else None
    except (binascii.Error, ValueError):
        return None


def _algorithm(content: bytes) -> tuple[bytes, _Reader]:
    """Return the encoded identifier of an algorithm, and its parameters."""
    reader = _Reader(content)
    identifier = _tlv(_OBJECT, reader.read(_OBJECT))
    return identifier, _Reader(reader.read(_SEQUENCE))


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
