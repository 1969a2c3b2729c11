"""Signatures that are wrong in one way each, made from good ones: what Wycheproof collects, for our five kinds of key.

Each vector says whether it is valid. Those that differ from a valid signature only in ways that the standard allows are
valid, and that is said here too: an ECDSA signature with the other s proves as much as the first, and nothing in this
project is counted or revoked by the bytes of a signature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from vmgraft.signing.keys import PublicKey, public_from_key

MESSAGE = b"DSSEv1 28 application/vnd.in-toto+json 2 {}"
#: Orders of the groups (FIPS 186-5 by SP 800-186, 3.2.1; RFC 8032, 5.1) and the field of P-256.
N = {
    "p256": 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    "p384": int("F" * 48 + "C7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973", 16),
}
FIELD_256 = 2**256 - 2**224 + 2**192 + 2**96 - 1
FIELD_384 = 2**384 - 2**128 - 2**96 + 2**32 - 1
L = 2**252 + 27742317777372353535851937790883648493
FIELD_25519 = 2**255 - 19


@dataclass(frozen=True)
class Vector:
    name: str
    key: PublicKey
    signature: bytes
    valid: bool = False


def all_vectors() -> list[Vector]:
    """Return every vector, with fresh keys."""
    makers = (_ecdsa("p256", ec.SECP256R1()), _ecdsa("p384", ec.SECP384R1()), _ed25519(), _rsa(), _mldsa65())
    return [vector for maker in makers for vector in maker]


# --- ECDSA ---------------------------------------------------------------------------------------------------------


def _element(tag: int, content: bytes) -> bytes:
    size = len(content)
    head = bytes([size]) if size < 128 else bytes([0x81, size])
    return bytes([tag]) + head + content


def _integer(value: int) -> bytes:
    return _element(2, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _pair(r: int, s: int) -> bytes:
    return _element(0x30, _integer(r) + _integer(s))


def _ecdsa(kind: str, curve: ec.EllipticCurve) -> Iterator[Vector]:
    private = ec.generate_private_key(curve)
    key, n = public_from_key(private.public_key()), N[kind]
    digest = hashes.SHA256() if kind == "p256" else hashes.SHA384()
    field = FIELD_256 if kind == "p256" else FIELD_384
    while True:  # one whose r and s have the top bit set, so that their zero byte can be left out
        good = private.sign(MESSAGE, ec.ECDSA(digest))
        r, s = decode_dss_signature(good)
        size = curve.key_size // 8
        if r >> (curve.key_size - 1) and s >> (curve.key_size - 1):
            break

    def vector(name: str, signature: bytes, valid: bool = False) -> Vector:
        return Vector(f"{kind}: {name}", key, signature, valid)

    yield vector("good", good, True)
    yield vector("encoded here", _pair(r, s), True)
    yield vector("the other s", _pair(r, n - s), True)
    numbers = {
        "both zero": (0, 0), "r zero": (0, s), "s zero": (r, 0), "r is n": (n, s), "s is n": (r, n), "both one": (1, 1),
        "s is n + s": (r, n + s), "r is n + r": (n + r, s), "r is -r": (-r, s), "s is -s": (r, -s), "swapped": (s, r),
        "r is n - r": (n - r, s), "r is n - 1": (n - 1, s), "s is 1": (r, 1), "r is the field": (field, s),
        "both the field": (field, field), "r is huge": (r + (n << 600), s), "s is huge": (r, s + (n << 600)),
        "both -1": (-1, -1), "r is r + 1": (r + 1, s),
    }  # fmt: skip
    for name, pair in numbers.items():
        yield vector(name, _long_pair(*pair))
    yield from (vector(name, data) for name, data in _bad_der(good, r, s, size))
    for name, other in (("SHA-1", hashes.SHA1()), ("SHA-512", hashes.SHA512()), ("SHA-224", hashes.SHA224())):  # noqa: S303
        yield vector(f"signed with {name}", private.sign(MESSAGE, ec.ECDSA(other)))
    yield vector("over the digest", private.sign(hashlib.sha256(MESSAGE).digest(), ec.ECDSA(digest)))
    yield vector("over another message", private.sign(MESSAGE + b"\0", ec.ECDSA(digest)))
    yield vector("over nothing", private.sign(b"", ec.ECDSA(digest)))
    yield vector("by another key", ec.generate_private_key(curve).sign(MESSAGE, ec.ECDSA(digest)))
    stray = ec.SECP384R1() if kind == "p256" else ec.SECP256R1()
    yield vector("by a key of another curve", ec.generate_private_key(stray).sign(MESSAGE, ec.ECDSA(digest)))
    same = ec.generate_private_key(ec.SECP256K1())
    yield vector("by a key of secp256k1", same.sign(MESSAGE, ec.ECDSA(digest)))


def _long_pair(r: int, s: int) -> bytes:
    body = b""
    for value in (r, s):
        raw = value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)
        body += b"\x02" + _length(len(raw)) + raw
    return b"\x30" + _length(len(body)) + body


def _length(size: int) -> bytes:
    if size < 128:
        return bytes([size])
    raw = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(raw)]) + raw


def _bad_der(good: bytes, r: int, s: int, size: int) -> Iterator[tuple[str, bytes]]:
    """The right two numbers, not in DER."""
    one, two = _integer(r), _integer(s)
    bare_r, bare_s = (_element(2, value.to_bytes(size, "big")) for value in (r, s))
    padded = _element(2, b"\0\0" + r.to_bytes(size, "big"))
    yield "nothing", b""
    yield "one zero byte", b"\0"
    yield "no numbers", _element(0x30, b"")
    yield "one number", _element(0x30, one)
    yield "three numbers", _element(0x30, one + two + _integer(0))
    yield "a byte behind", good + b"\0"
    yield "a byte before", b"\0" + good
    yield "a NULL behind the numbers", _element(0x30, one + two + b"\x05\0")
    yield "a number behind the sequence", good + _integer(0)
    yield "twice", good + good
    yield "no zero byte before r", _element(0x30, bare_r + two)
    yield "no zero byte before s", _element(0x30, one + bare_s)
    yield "a zero byte too many", _element(0x30, padded + two)
    yield "indefinite length", b"\x30\x80" + one + two + b"\0\0"
    yield "long form of the length", b"\x30\x82" + (len(one + two)).to_bytes(2, "big") + one + two
    yield "long form of r's length", _element(0x30, b"\x02\x81" + one[1:] + two)
    yield "length too short", b"\x30" + bytes([len(one + two) - 1]) + one + two
    yield "length too long", b"\x30" + bytes([min(127, len(one + two) + 1)]) + one + two
    yield "a set", b"\x31" + good[1:]
    yield "octet strings", _element(0x30, b"\x04" + one[1:] + b"\x04" + two[1:])
    yield "r is empty", _element(0x30, b"\x02\0" + two)
    yield "an ENUMERATED", _element(0x30, b"\x0a" + one[1:] + two)
    yield "r and s side by side", r.to_bytes(size, "big") + s.to_bytes(size, "big")
    yield "in a sequence of its own", _element(0x30, good)
    yield "in hexadecimal", good.hex().encode()
    yield from ((f"cut after {cut} bytes", good[:cut]) for cut in (1, 2, 3, 4, len(good) // 2, len(good) - 1))


# --- Ed25519 -------------------------------------------------------------------------------------------------------


def _ed25519() -> Iterator[Vector]:
    private = ed25519.Ed25519PrivateKey.generate()
    key = public_from_key(private.public_key())
    good = private.sign(MESSAGE)
    point, number = good[:32], int.from_bytes(good[32:], "little")

    def put(r: bytes, s: int) -> bytes:
        return r + s.to_bytes(32, "little")

    def spot(y: int, sign: int = 0) -> bytes:
        return (y | sign << 255).to_bytes(32, "little")

    bad = {
        "S + L": put(point, number + L), "S is L": put(point, L), "S is 0": put(point, 0), "S is 1": put(point, 1),
        "S is L - 1": put(point, L - 1), "S is all ones": put(point, 2**256 - 1), "-S": put(point, L - number),
        "S with the top bit": put(point, number | 1 << 255), "S with bit 252": put(point, number | 1 << 253),
        "all zero": bytes(64), "all ones": b"\xff" * 64, "R is the neutral point, S is 0": put(spot(1), 0),
        "R is the neutral point": put(spot(1), number), "R is of order two": put(spot(FIELD_25519 - 1), number),
        "R is of order four": put(spot(0), number), "R is of order four, with its sign": put(spot(0, 1), number),
        "R is the neutral point, spelled wrongly": put(spot(FIELD_25519 + 1), 0),
        "R is the neutral point, with a sign": put(spot(1, 1), 0), "R is no point": put(spot(2), number),
        "R is zero, spelled wrongly": put(spot(FIELD_25519), 0),
        "R with the other sign": bytes([*point[:31], point[31] ^ 0x80]) + good[32:],
        "R and S swapped": good[32:] + point, "R twice": point + point, "nothing": b"", "R alone": point,
        "cut by one byte": good[:-1], "a byte behind": good + b"\0", "a byte before": b"\0" + good,
        "twice": good + good, "in hexadecimal": good.hex().encode(),
        "over another message": private.sign(MESSAGE + b"\0"),
        "over the digest": private.sign(hashlib.sha512(MESSAGE).digest()),
        "by another key": ed25519.Ed25519PrivateKey.generate().sign(MESSAGE),
    }  # fmt: skip
    yield Vector("ed25519: good", key, good, True)
    yield from (Vector(f"ed25519: {name}", key, signature) for name, signature in bad.items())


# --- RSA -----------------------------------------------------------------------------------------------------------

#: DigestInfo in front of a digest (RFC 8017, 9.2, note 1).
_INFO = {
    "sha256": bytes.fromhex("3031300d060960864801650304020105000420"),
    "sha512": bytes.fromhex("3051300d060960864801650304020305000440"),
    "sha1": bytes.fromhex("3021300906052b0e03021a05000414"),
}


def _rsa() -> Iterator[Vector]:
    private = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    key, numbers = public_from_key(private.public_key()), private.private_numbers()
    n, size = numbers.public_numbers.n, 384
    good = private.sign(MESSAGE, padding.PKCS1v15(), hashes.SHA256())
    value = int.from_bytes(good, "big")

    def sign(block: bytes) -> bytes:
        return pow(int.from_bytes(block, "big"), numbers.d, n).to_bytes(size, "big")

    def vector(name: str, signature: bytes, valid: bool = False) -> Vector:
        return Vector(f"rsa: {name}", key, signature, valid)

    yield vector("good", good, True)
    yield vector("padded here", sign(_block(_INFO["sha256"] + hashlib.sha256(MESSAGE).digest(), size)), True)
    yield from (vector(name, sign(block)) for name, block in _bad_blocks(size))
    plain: dict[str, Any] = {
        "zero": 0, "one": 1, "n": n, "n - 1": n - 1, "-s": n - value,
    }  # fmt: skip
    yield from (vector(name, number.to_bytes(size, "big")) for name, number in plain.items())
    yield vector("s + n", (value + n).to_bytes(size + 1, "big"))
    yield vector("a zero byte before", b"\0" + good)
    yield vector("a byte behind", good + b"\0")
    yield vector("cut", good[:-1])
    yield vector("nothing", b"")
    yield vector("the bytes reversed", good[::-1])
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
    yield vector("PSS", private.sign(MESSAGE, pss, hashes.SHA256()))
    yield vector("SHA-512", private.sign(MESSAGE, padding.PKCS1v15(), hashes.SHA512()))
    yield vector("over another message", private.sign(MESSAGE + b"\0", padding.PKCS1v15(), hashes.SHA256()))
    other = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    yield vector("by another key", other.sign(MESSAGE, padding.PKCS1v15(), hashes.SHA256()))


def _block(info: bytes, size: int, *, head: bytes = b"\0\1", fill: bytes = b"\xff", end: bytes = b"\0") -> bytes:
    return head + fill * (size - len(head) - len(end) - len(info)) + end + info


def _bad_blocks(size: int) -> Iterator[tuple[str, bytes]]:
    """Blocks under a signature whose padding is not that of PKCS#1 v1.5 with SHA-256 (RFC 8017, 9.2)."""
    digest = hashlib.sha256(MESSAGE).digest()
    info = _INFO["sha256"] + digest
    no_null = bytes.fromhex("302f300b0609608648016503040201") + b"\x04\x20" + digest
    long_form = bytes.fromhex("308131300d060960864801650304020105000420") + digest
    yield "no DigestInfo", _block(digest, size)
    yield "DigestInfo without NULL", _block(no_null, size)
    yield "DigestInfo in the long form", _block(long_form, size)
    yield "DigestInfo of SHA-512 around SHA-256", _block(_INFO["sha512"] + digest, size)
    yield "SHA-1", _block(_INFO["sha1"] + hashlib.sha1(MESSAGE).digest(), size)  # noqa: S324
    yield "a byte behind the digest", _block(info + b"\0", size)
    yield (
        "garbage behind the digest, padding of eight bytes",
        b"\0\1" + b"\xff" * 8 + b"\0" + info.ljust(size - 11, b"\x5a"),
    )
    yield "garbage before the DigestInfo", b"\0\1" + b"\xff" * 8 + b"\0" + b"\x5a" * (size - 11 - len(info)) + info
    yield (
        "garbage in the parameters",
        _block(bytes.fromhex("3033300f06096086480165030402010502aaaa0420") + digest, size),
    )
    yield "padding with a hole", _block(info, size)[:40] + b"\xfe" + _block(info, size)[41:]
    yield "padding of zeros", _block(info, size, fill=b"\0")
    yield "block type 0", _block(info, size, head=b"\0\0", fill=b"\0")
    yield "block type 2", _block(info, size, head=b"\0\2", fill=b"\x5a")
    yield "no zero byte before the DigestInfo", _block(info, size, end=b"\xff")
    yield "no padding", b"\0\1\0" + info.rjust(size - 3, b"\0")
    yield "the digest is another one", _block(_INFO["sha256"] + bytes(32), size)
    yield "the digest is cut", _block(info[:-1], size)
    yield "the digest is empty", _block(bytes.fromhex("3011300d060960864801650304020105000400"), size)


# --- ML-DSA-65 -----------------------------------------------------------------------------------------------------


def _mldsa65() -> Iterator[Vector]:
    """FIPS 204, table 2: 48 bytes of challenge, 5 vectors of 640 bytes, 55 + 6 bytes of hints; 3309 together."""
    private = mldsa.MLDSA65PrivateKey.generate()
    key = public_from_key(private.public_key())
    good = private.sign(MESSAGE)
    hints = len(good) - 61

    def flip(at: int) -> bytes:
        return good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]

    def hint(at: int, value: int) -> bytes:
        return good[: hints + at] + bytes([value]) + good[hints + at + 1 :]

    total = good[-1]
    bad = {
        "nothing": b"", "one byte": good[:1], "challenge alone": good[:48], "cut by one byte": good[:-1],
        "without its hints": good[:hints], "a byte behind": good + b"\0", "a byte before": b"\0" + good,
        "twice": good + good, "all zero": bytes(len(good)), "all ones": b"\xff" * len(good),
        "the length of ML-DSA-44": good[:2420], "the length of ML-DSA-87": good.ljust(4627, b"\0"),
        "challenge changed": flip(0), "end of the challenge changed": flip(47), "vector changed": flip(48),
        "end of the vectors changed": flip(hints - 1), "first hint changed": flip(hints),
        "last count changed": flip(len(good) - 1), "more hints than there may be": hint(60, 56),
        "counts that fall": hint(55, total + 1), "a hint more": hint(54, 1) if total < 55 else flip(hints),
        "all hints the same": good[:hints] + bytes([7]) * 55 + good[-6:],
        "vector out of range": good[:48] + bytes(640) + good[688:], "with a context": private.sign(MESSAGE, b"x"),
        "over another message": private.sign(MESSAGE + b"\0"),
        "over the digest": private.sign(hashlib.sha512(MESSAGE).digest()),
        "by another key": mldsa.MLDSA65PrivateKey.generate().sign(MESSAGE),
    }  # fmt: skip
    yield Vector("mldsa65: good", key, good, True)
    yield Vector("mldsa65: made again", key, private.sign(MESSAGE), True)
    yield from (Vector(f"mldsa65: {name}", key, signature) for name, signature in bad.items())


def encode_check() -> bool:
    """Tell whether the encoding here agrees with that of the library on numbers it takes."""
    pairs = [(1, 1), (127, 128), (255, 256), (N["p384"] - 1, N["p256"] - 1)]
    return all(_long_pair(*pair) == encode_dss_signature(*pair) for pair in pairs)
