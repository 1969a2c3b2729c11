"""Public keys as PKCS#11 keeps them (PKCS#11 v3.0, current mechanisms, 2.1.2 and 2.3.3 to 2.3.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vmgraft.errors import FileError
from vmgraft.signing.keys import MAX_RSA_BITS, public_from_key

if TYPE_CHECKING:
    from vmgraft.signing.keys import PublicKey

#: ``CKA_EC_PARAMS`` as DER: the curves' object identifiers (SEC 2, A.2) and Ed25519 in its two spellings (RFC 8410, 3;
#: PKCS#11 v3.0, 2.3.5: a PrintableString).
_P256: Final = bytes.fromhex("06082a8648ce3d030107")
_P384: Final = bytes.fromhex("06052b81040022")
_ED25519: Final = (bytes.fromhex("06032b6570"), b"\x13\x0cedwards25519")
#: Largest attribute looked at, in bytes.
_MAX_ATTRIBUTE: Final = 16 << 10


def from_rsa_private_key(key: Any, where: str) -> PublicKey:
    """Return the public half of an RSA private key, which carries it.

    Raises:
        FileError: it does not, or the key is of a size not accepted.
    """
    from cryptography.hazmat.primitives.asymmetric import rsa
    from pkcs11 import Attribute

    modulus, exponent = (_get(key, name, where) for name in (Attribute.MODULUS, Attribute.PUBLIC_EXPONENT))
    if len(modulus) * 8 > MAX_RSA_BITS + 8:
        raise FileError(f"an RSA key of more than {MAX_RSA_BITS} bits is not accepted", file=where, field="key")
    try:
        numbers = rsa.RSAPublicNumbers(int.from_bytes(exponent, "big"), int.from_bytes(modulus, "big"))
        return public_from_key(numbers.public_key(), file=where)
    except ValueError as exc:
        raise FileError("the token's RSA key is malformed", file=where, field="key") from exc


def from_public_key(item: Any, where: str) -> PublicKey:
    """Return an EC or Ed25519 public key object.

    Raises:
        FileError: malformed, or of a kind not accepted.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from pkcs11 import Attribute

    params, point = _get(item, Attribute.EC_PARAMS, where), _get(item, Attribute.EC_POINT, where)
    point = _unwrap(point)
    try:
        if params in _ED25519:
            return public_from_key(ed25519.Ed25519PublicKey.from_public_bytes(point), file=where)
        curve = {_P256: ec.SECP256R1(), _P384: ec.SECP384R1()}.get(params)
        if curve is None:
            hint = "use P-256, P-384, Ed25519, or RSA"
            raise FileError("the token's key lies on a curve that is not accepted", file=where, field="key", hint=hint)
        return public_from_key(ec.EllipticCurvePublicKey.from_encoded_point(curve, point), file=where)
    except ValueError as exc:
        raise FileError("the token's public key is malformed", file=where, field="key") from exc


def from_certificate(item: Any, where: str) -> PublicKey:
    """Return the key of a certificate object.

    Raises:
        VmgraftError: malformed, or a key of a kind not accepted.
    """
    from pkcs11 import Attribute

    from vmgraft.signing.certificates import leaf_key

    return leaf_key([_get(item, Attribute.VALUE, where)])


def _unwrap(point: bytes) -> bytes:
    """Take the OCTET STRING off ``CKA_EC_POINT``; some tokens leave it away. All points here are short of 128 bytes."""
    if len(point) > 2 and point[0] == 0x04 and point[1] == len(point) - 2:
        return point[2:]
    return point


def _get(item: Any, attribute: Any, where: str) -> bytes:
    import pkcs11

    try:
        value = item[attribute]
    except (pkcs11.AttributeTypeInvalid, pkcs11.AttributeSensitive) as exc:
        hint = "name the public key in the URI: &public-key=/path/to/key.pub"
        message = f"the token does not show {attribute.name} of this key"
        raise FileError(message, file=where, field="key", hint=hint) from exc
    if not isinstance(value, bytes) or not 1 <= len(value) <= _MAX_ATTRIBUTE:
        raise FileError(f"{attribute.name} in the token is malformed", file=where, field="key")
    return value
