"""One more signature around the same statement: who made it, and the envelope that holds it too.

A signature that comes from elsewhere is taken in only for a key that somebody named: the key itself, or a root that its
certificate leads to. It gets the keyid of that key, whatever it called itself, since other tools name keys otherwise.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from vmgraft.errors import BadSignatureError, ExpiredError, UntrustedSignerError, UsageError, VmgraftError
from vmgraft.signing.bundles import signature_material
from vmgraft.signing.dsse import MAX_SIGNATURE_BYTES, MAX_SIGNATURES, Envelope, Signature, parse_envelope, serialise
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.material import Material
from vmgraft.signing.times import CLOCK_SKEW, later

if TYPE_CHECKING:
    from cryptography import x509

#: Largest file with one signature, in bytes: base64 with line ends is longer than the signature.
MAX_SIGNATURE_FILE: Final = 2 * MAX_SIGNATURE_BYTES
#: Bytes of r, and of s, in an ECDSA signature that is not DER (FIPS 186-5, 6.4.1: as long as the group's order).
_HALVES: Final = {"p256": 32, "p384": 48}
_PathOrNone = str | PathLike[str] | None


@dataclass(frozen=True, slots=True)
class Vouchers:
    """Who may have made a signature that comes from elsewhere.

    Attributes:
        keys: These keys.
        roots: Keys with a certificate for code signing that leads to one of these roots; DER.
        tsa_roots: Authorities whose timestamps say when a signature was there; DER.
    """

    keys: tuple[PublicKey, ...] = ()
    roots: tuple[bytes, ...] = ()
    tsa_roots: tuple[bytes, ...] = ()


def made_elsewhere(public: PublicKey, envelope: Envelope, data: bytes, *, file: _PathOrNone = None) -> bytes:
    """Return the signature in a file that was made outside, in the form that envelopes hold.

    Taken are raw bytes and base64 of them, and for ECDSA, beside DER, r and s side by side as many tokens return them.

    Args:
        public: The key that is said to have signed.
        envelope: What was to be signed.
        data: The file's bytes.
        file: What to name in the error.

    Raises:
        BadSignatureError: in no form is it this key's signature over these bytes.
    """
    forms = list(_forms(public, data))
    for form in forms:
        if public.verify(envelope.pae, form):
            return form
    if any(public.verify(envelope.payload, form) for form in forms):
        raise BadSignatureError(
            f"{public.keyid} signed the statement alone",
            file=file,
            hint="what must be signed is payload.pae, which says of what type the statement is",
        )
    try:
        return public.check_made(envelope.pae, data[:MAX_SIGNATURE_BYTES], by="whoever signed elsewhere")
    except BadSignatureError as exc:
        exc.file = None if file is None else str(file)
        exc.field = "signature"
        raise


def _forms(public: PublicKey, data: bytes) -> Iterator[bytes]:
    """Yield everything that a signature file may mean; only what verifies is ever used."""
    readings = [data]
    with contextlib.suppress(binascii.Error):
        readings.append(base64.b64decode(b"".join(data.split()), validate=True))
    half = _HALVES.get(public.kind)
    for reading in readings:
        if not 0 < len(reading) <= MAX_SIGNATURE_BYTES:
            continue
        yield reading
        if half is not None and len(reading) == 2 * half:
            r, s = int.from_bytes(reading[:half], "big"), int.from_bytes(reading[half:], "big")
            yield encode_dss_signature(r, s)


def signer_of(
    envelope: Envelope, index: int, vouchers: Vouchers, *, now: datetime, file: _PathOrNone = None
) -> PublicKey:
    """Return the key that made a signature, if it is one of those that are vouched for.

    Raises:
        BadSignatureError: it is not valid, or what stands beside it is malformed.
        UntrustedSignerError: nobody named vouches for who made it.
        ExpiredError: its certificate is not valid, now or at the time of a trusted timestamp.
    """
    signature = envelope.signatures[index]
    for key in vouchers.keys:
        if key.verify(envelope.pae, signature.sig):
            return key
    named = next((key for key in vouchers.keys if key.keyid == signature.keyid), None)
    if named is not None:
        raise BadSignatureError(f"signature {index} names {named.keyid} and is not its", file=file)
    material = signature_material(signature, index, file=file)
    if vouchers.roots and material.certificates:
        return _certified(envelope, index, material, vouchers, now=now, file=file)
    what = "certificate" if material.certificates else "key"
    hint = "--public-key names who made it"
    if material.certificates:
        hint += "; --ca names the root that its certificate leads to"
    raise UntrustedSignerError(
        f"signature {index} is by a {what} that nobody named ({signature.keyid or 'no keyid'})", file=file, hint=hint
    )


def _certified(
    envelope: Envelope, index: int, material: Material, vouchers: Vouchers, *, now: datetime, file: _PathOrNone
) -> PublicKey:
    from vmgraft.signing.certificates import Authority, certify
    from vmgraft.signing.paths import load_roots, parse_certificate

    signature, problem = envelope.signatures[index], ""
    try:
        parsed = [parse_certificate(der) for der in material.certificates]
        leaf = _leaf_of(envelope, signature, material)
        for at in _moments(signature, material, vouchers, now):
            found = certify(material.certificates, [Authority("--ca", vouchers.roots)], at=at, now=now)
            if found.expired is None:
                return leaf
            problem = found.expired
    except (BadSignatureError, UntrustedSignerError) as exc:
        exc.message, exc.file = f"signature {index}: {exc.message}", None if file is None else str(file)
        if "no trusted path" in exc.message:
            exc.hint = _missing(parsed, load_roots(vouchers.roots))
        raise
    hint = "a timestamp from when it was valid helps, with --tsa-ca naming the root of its authority"
    raise ExpiredError(f"signature {index}: {problem}", file=file, field="certificate", hint=hint)


def _leaf_of(envelope: Envelope, signature: Signature, material: Material) -> PublicKey:
    """Return the key of the leaf beside a signature, which it must have made."""
    from vmgraft.signing.certificates import leaf_key

    leaf = leaf_key(material.certificates)
    if not leaf.verify(envelope.pae, signature.sig):
        raise BadSignatureError("the signature is not by the key of the certificate beside it", field="certificate")
    return leaf


def _missing(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]) -> str:
    """Say what may complete a chain that leads to none of the roots."""
    if {root.subject for root in roots}.isdisjoint(certificate.issuer for certificate in chain):
        last = chain[-1].issuer.rfc4514_string()[:200]
        return f"--intermediates completes the chain: the certificate of {last!r} is missing; or --ca names its root"
    return "--ca names the root that the certificate leads to, and it must be one for signing code"


def _moments(signature: Signature, material: Material, vouchers: Vouchers, now: datetime) -> Iterator[datetime]:
    """Yield the times at which the certificates may be judged: now, and what trusted timestamps state."""
    yield now
    if not vouchers.tsa_roots:
        return
    from vmgraft.signing.timestamps import TimestampAuthority, verify_timestamp

    for token in material.timestamps:
        try:
            stated = verify_timestamp(token, signature.sig, [TimestampAuthority("--tsa-ca", vouchers.tsa_roots)])
        except (BadSignatureError, UntrustedSignerError):
            continue
        if stated <= later(now, CLOCK_SKEW):  # what is from the future proves nothing about today
            yield stated


def has_signed(envelope: Envelope, key: PublicKey) -> bool:
    """Tell whether one of the signatures is this key's."""
    return any(key.verify(envelope.pae, signature.sig) for signature in envelope.signatures)


def with_signatures(envelope: Envelope, added: Sequence[Signature], *, file: _PathOrNone = None) -> Envelope:
    """Return the envelope with signatures behind those that are there, none of which is touched.

    Raises:
        UsageError: there would be too many, or the envelope too long.
    """
    count = len(envelope.signatures) + len(added)
    if count > MAX_SIGNATURES:
        raise UsageError(
            f"the envelope would hold {count} signatures, at most {MAX_SIGNATURES} are allowed",
            file=file,
            field="signatures",
            hint="`vmgraft resign` makes a new statement, with new signatures only",
        )
    return checked(dataclasses.replace(envelope, signatures=(*envelope.signatures, *added)), file=file)


def checked(envelope: Envelope, *, file: _PathOrNone = None) -> Envelope:
    """Return an envelope that was just put together, if a reader takes it.

    Raises:
        UsageError: it is over a limit.
    """
    try:
        parse_envelope(serialise(envelope), file=file)
    except VmgraftError as exc:
        raise UsageError(f"the envelope cannot be stored: {exc.message}", file=file, field=exc.field) from exc
    return envelope


def load_certificates(paths: Sequence[Path]) -> tuple[bytes, ...]:
    """Return the certificates of PEM files, in DER: roots to believe, or what lies between.

    Raises:
        FileError: a file holds something else.
    """
    if not paths:
        return ()
    from cryptography.hazmat.primitives.serialization import Encoding

    from vmgraft.signing.chains import parse_chain

    return tuple(certificate.public_bytes(Encoding.DER) for path in paths for certificate in parse_chain(path))
