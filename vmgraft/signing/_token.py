"""Inside a timestamp: steps 1 to 4 of ``timestamps``, from bytes to a signed statement of time and its signer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from vmgraft.errors import BadSignatureError
from vmgraft.signing import _tsp as tsp
from vmgraft.signing.material import MAX_CERTIFICATE, MAX_CERTIFICATES, MAX_TIMESTAMP
from vmgraft.signing.paths import parse_certificate

#: Digests accepted, by OID (RFC 5754, 2.2 to 2.4).
HASHES: Final = {
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}
#: Longest time that a stamp may be vague by (``accuracy``).
MAX_ACCURACY: Final = timedelta(hours=1)

_KINDS: Final[dict[str, Callable[[], hashes.HashAlgorithm]]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
#: rsaEncryption, which leaves the digest to ``digestAlgorithm``, and shaNNNWithRSAEncryption (RFC 8017, appendix C).
_RSA: Final = {
    name: ("1.2.840.113549.1.1.1", f"1.2.840.113549.1.1.{last}")
    for name, last in (("sha256", 11), ("sha384", 12), ("sha512", 13))
}
#: ecdsa-with-SHAnnn (RFC 5758, 3.2).
_ECDSA: Final = {name: f"1.2.840.10045.4.3.{last}" for name, last in (("sha256", 2), ("sha384", 3), ("sha512", 4))}
#: id-Ed25519 (RFC 8410, 3).
_ED25519: Final = "1.3.101.112"


def bad(message: str, hint: str | None = None) -> BadSignatureError:
    """Return the error that a timestamp is of no use."""
    return BadSignatureError(f"the timestamp cannot be used: {message}", field="timestamp", hint=hint)


def open_token(data: bytes, signature: bytes) -> tuple[tsp.TstInfo, list[x509.Certificate]]:
    """Take steps 1 to 4.

    Args:
        data: DER, a TimeStampResp or the TimeStampToken in it.
        signature: The bytes that it must be over.

    Returns:
        What is stated, and the certificates of the token, the signer's first.

    Raises:
        BadSignatureError: malformed, not over these bytes, or not signed by the certificate it names.
    """
    token = _parse(data)
    signer, content = token.content.signers.as_list()[0], token.content.content.content
    certificates = _certificates(token)
    leaf = _signer_certificate(signer, content, certificates)
    _check_signature(signer, leaf)
    try:
        info = asn1.decode_der(tsp.TstInfo, content)  # 4
    except ValueError as exc:
        raise bad("its statement of time is malformed") from exc
    _check_statement(info, signature, leaf)
    return info, [leaf, *(other for other in certificates if other != leaf)]


def is_token(data: bytes) -> bool:
    """Tell whether this is a TimeStampToken without the TimeStampResp around it."""
    try:
        asn1.decode_der(tsp.Token, data)
    except ValueError:
        return False
    return True


def _parse(data: bytes) -> tsp.Token:  # 1
    if not 0 < len(data) <= MAX_TIMESTAMP:
        raise bad(f"not 1 to {MAX_TIMESTAMP} bytes")
    try:
        try:
            token: tsp.Token | None = asn1.decode_der(tsp.Token, data)
        except ValueError:
            response = asn1.decode_der(tsp.Response, data)
            _check_status(response.status)
            token = response.token
    except ValueError as exc:
        raise bad("malformed", "DER is needed: a TimeStampResp, or the TimeStampToken in it") from exc
    if token is None or token.type != tsp.SIGNED_DATA or token.content.content.type != tsp.TST_INFO:
        raise bad("it holds no statement of time")
    if token.content.version != 3 or len(token.content.signers.as_list()) != 1:
        raise bad("not signed data of version 3 with one signer")
    return token


def _check_status(status: tsp.StatusInfo) -> None:
    if status.status not in {0, 1}:  # granted, grantedWithMods (RFC 3161, 2.4.2)
        said = "; ".join(line[:200] for line in (status.text or [])[:4])
        code = status.status if 0 <= status.status <= 5 else "unknown"
        raise bad(f"the authority refused, status {code}" + (f": {said!r}" if said else ""))


def _certificates(token: tsp.Token) -> list[x509.Certificate]:
    stored = token.content.certificates or []
    if not 1 <= len(stored) <= MAX_CERTIFICATES:
        raise bad(f"it carries {len(stored)} certificates, 1 to {MAX_CERTIFICATES} are needed")
    whole = [tsp.whole(element) for element in stored]
    if any(len(der) > MAX_CERTIFICATE for der in whole):
        raise bad(f"a certificate in it is longer than {MAX_CERTIFICATE} bytes")
    return [parse_certificate(der) for der in dict.fromkeys(whole)]


def _attributes(signer: tsp.SignerInfo) -> dict[str, bytes]:
    """Return the value of each signed attribute, in DER; each stands once and has one value (RFC 5652, 11)."""
    found: dict[str, bytes] = {}
    for element in signer.attributes:
        try:
            attribute = asn1.decode_der(tsp.Attribute, tsp.whole(element))
        except ValueError as exc:
            raise bad("a signed attribute is malformed") from exc
        name, values = attribute.type.dotted_string, attribute.values.as_list()
        if name in found or len(values) != 1:
            raise bad("a signed attribute stands twice or has no single value")
        found[name] = tsp.whole(values[0])
    return found


def _signer_certificate(  # 2
    signer: tsp.SignerInfo, content: bytes, certificates: list[x509.Certificate]
) -> x509.Certificate:
    """Return the one certificate that the signed attributes name, after checking what else they say."""
    digest = HASHES.get(signer.digest.algorithm.dotted_string)
    if digest is None:
        raise bad("it is hashed with something other than SHA-256, SHA-384 or SHA-512")
    found = _attributes(signer)
    if found.get(tsp.CONTENT_TYPE.dotted_string) != asn1.encode_der(tsp.TST_INFO):
        raise bad("its signed attributes name another type of content")
    if found.get(tsp.MESSAGE_DIGEST.dotted_string) != asn1.encode_der(hashlib.new(digest, content).digest()):
        raise bad("its statement of time was altered")
    wanted = _named_certificates(found)
    serial, issuer = signer.signer.serial, tsp.whole(signer.signer.issuer)
    for certificate in certificates:
        der = certificate.public_bytes(Encoding.DER)
        if certificate.serial_number != serial or certificate.issuer.public_bytes() != issuer:
            continue
        if all(hashlib.new(algorithm, der).digest() == value for algorithm, value in wanted):
            return certificate
    raise bad("it does not carry the certificate that signed it", "ask the authority with certReq (openssl ts: -cert)")


def _named_certificates(found: dict[str, bytes]) -> list[tuple[str, bytes]]:
    """Return (algorithm, digest) of the signer's certificate, from signingCertificate in either version."""
    named: list[tuple[str, bytes]] = []
    try:
        if (old := found.get(tsp.SIGNING_CERTIFICATE.dotted_string)) is not None:
            named.append(("sha1", asn1.decode_der(tsp.SigningCertificate, old).certificates[0].digest))
        if (new := found.get(tsp.SIGNING_CERTIFICATE_V2.dotted_string)) is not None:
            first = asn1.decode_der(tsp.SigningCertificateV2, new).certificates[0]
            algorithm = "sha256" if first.algorithm is None else HASHES[first.algorithm.algorithm.dotted_string]
            named.append((algorithm, first.digest))
    except (ValueError, IndexError, KeyError) as exc:
        raise bad("its signed attributes name the certificate in a form that is malformed or not supported") from exc
    if not named:
        raise bad("its signed attributes do not name the certificate (RFC 3161, 2.4.2)")
    return named


def _check_signature(signer: tsp.SignerInfo, leaf: x509.Certificate) -> None:  # 3
    digest = HASHES[signer.digest.algorithm.dotted_string]
    kind, message = _KINDS[digest](), tsp.signed_bytes(signer)
    scheme = signer.algorithm.algorithm.dotted_string
    try:
        key = leaf.public_key()
        if isinstance(key, rsa.RSAPublicKey) and scheme in _RSA[digest]:
            key.verify(signer.signature, message, padding.PKCS1v15(), kind)
        elif isinstance(key, ec.EllipticCurvePublicKey) and scheme == _ECDSA[digest]:
            key.verify(signer.signature, message, ec.ECDSA(kind))
        elif isinstance(key, ed25519.Ed25519PublicKey) and scheme == _ED25519:
            key.verify(signer.signature, message)
        else:
            raise bad(f"the signature algorithm {scheme} with {digest} is not supported, or not its key's")
    except InvalidSignature as exc:
        raise bad("its own signature is not valid") from exc
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise bad("the key of its certificate cannot be used") from exc


def _check_statement(info: tsp.TstInfo, signature: bytes, leaf: x509.Certificate) -> None:  # 4
    algorithm = HASHES.get(info.imprint.algorithm.algorithm.dotted_string)
    if info.version != 1 or algorithm is None:
        raise bad("its statement of time has another version or digest than RFC 3161 and SHA-2")
    if hashlib.new(algorithm, signature).digest() != info.imprint.digest:
        raise bad("it is over other bytes than this signature", "was it made for another signature?")
    if any(extension.critical for extension in info.extensions or []):
        raise bad("its statement of time has a critical extension")
    if info.tsa is not None and [tsp.whole(name) for name in info.tsa] != [
        tsp.encode(tsp.DIRECTORY_NAME, leaf.subject.public_bytes())
    ]:
        raise bad("its statement of time names another authority than the one that signed it")


def latest(info: tsp.TstInfo) -> datetime:
    """Return when the stamped bytes were there at the latest: the time stated, plus how vague it is (RFC 3161, 2.4.2).

    Raises:
        BadSignatureError: vague by more than ``MAX_ACCURACY``, or no such time.
    """
    stated, vague = info.time.as_datetime(), info.accuracy
    if vague is None:
        return stated
    parts = (vague.seconds or 0, vague.millis or 0, vague.micros or 0)
    if min(parts) < 0 or parts[0] > MAX_ACCURACY.total_seconds() or max(parts[1:]) > 999:
        raise bad(f"it is vaguer than {MAX_ACCURACY}")
    try:
        return stated + timedelta(seconds=parts[0], milliseconds=parts[1], microseconds=parts[2])
    except OverflowError as exc:
        raise bad("the time stated is too late for a calendar") from exc
