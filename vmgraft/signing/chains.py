"""The certificate chain a signer brings along: read from PEM, put to the test, and without the root."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vmgraft.errors import BadSignatureError, ExpiredError, FileError
from vmgraft.signing.files import read_regular
from vmgraft.signing.material import MAX_CERTIFICATE, MAX_CERTIFICATES
from vmgraft.signing.times import format_time, later

if TYPE_CHECKING:
    from cryptography import x509

#: Largest PEM file of a chain accepted, in bytes: as many certificates as travel, and a root; base64 adds a third.
MAX_CHAIN_PEM: Final = (MAX_CERTIFICATES + 1) * MAX_CERTIFICATE * 3 // 2


def read_chain(path: Path, *, now: datetime | None = None) -> tuple[bytes, ...]:
    """Read a chain that is to travel with signatures, and refuse one that no verifier could use.

    Args:
        path: PEM file: the leaf, then each issuer. A root at the end is left out: verifiers have their own.
        now: The time the leaf must be valid at; None is the present.

    Returns:
        DER, leaf first, no root.

    Raises:
        FileError: not such a file, a certificate that did not issue the one before it, or a leaf that may not sign.
        ExpiredError: the leaf is not valid now.
    """
    parsed = parse_chain(path)
    for below, above in pairwise(parsed):
        if not _issued(below, above):
            raise FileError(
                f"{above.subject.rfc4514_string()[:200]!r} has not issued the certificate before it",
                file=path,
                field="certificate",
                hint="the leaf comes first, then its issuer, and so on",
            )
    if len(parsed) > 1 and _issued(parsed[-1], parsed[-1]):
        parsed.pop()
    if len(parsed) > MAX_CERTIFICATES:
        raise FileError(f"a chain has at most {MAX_CERTIFICATES} certificates", file=path, field="certificate")
    _check_leaf(parsed[0], path, datetime.now(UTC) if now is None else now)
    return tuple(_der(certificate) for certificate in parsed)


def parse_chain(path: Path) -> list[x509.Certificate]:
    """Parse a PEM file that holds nothing but certificates, and check nothing else.

    Raises:
        FileError: it holds something else, too many, or a malformed one.
    """
    from vmgraft.signing.certificates import parse_certificate
    from vmgraft.signing.truststores import pem_blocks

    data = read_regular(path, MAX_CHAIN_PEM, what="the certificate", error=FileError)
    blocks = pem_blocks(data.decode("latin-1")) if len(data) <= MAX_CHAIN_PEM else None
    if not blocks or any(label != "CERTIFICATE" for label, _ in blocks):
        hint = "DER converts with: openssl x509 -inform DER -in FILE; explaining text goes with: openssl x509 -in FILE"
        raise FileError("not PEM blocks of type CERTIFICATE", file=path, field="certificate", hint=hint)
    if len(blocks) > MAX_CERTIFICATES + 1 or any(len(der) > MAX_CERTIFICATE for _, der in blocks):
        limits = f"at most {MAX_CERTIFICATES} certificates and a root, of {MAX_CERTIFICATE} bytes each"
        raise FileError(f"a chain has {limits}", file=path, field="certificate")
    try:
        return [parse_certificate(der) for _, der in blocks]
    except BadSignatureError as exc:
        message = "a certificate is malformed" if exc.__cause__ is not None else exc.message
        raise FileError(message, file=path, field="certificate") from exc


def chain_warnings(chain: tuple[bytes, ...], *, now: datetime | None = None) -> list[str]:
    """Say which certificates of a chain end soon, or have ended, and that it is of a development CA."""
    from vmgraft.signing.certificates import SOON, parse_certificate
    from vmgraft.signing.paths import is_development

    when = datetime.now(UTC) if now is None else now
    notes = []
    parsed = [parse_certificate(der) for der in chain]
    if is_development(parsed):
        name = parsed[0].subject.rfc4514_string()
        notes.append(f"the certificate of {name!r} is of a development CA: anybody may hold its keys")
    for certificate in parsed:
        end = certificate.not_valid_after_utc
        if end < later(when, SOON):
            verb = "expired" if end < when else "expires"
            notes.append(f"the certificate of {certificate.subject.rfc4514_string()!r} {verb} {format_time(end)}")
    return notes


def _issued(below: x509.Certificate, above: x509.Certificate) -> bool:
    """Tell whether a certificate names another as its issuer and bears its signature."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        below.verify_directly_issued_by(above)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _check_leaf(leaf: x509.Certificate, path: Path, now: datetime) -> None:
    """Refuse a leaf whose signatures no policy would take (``certificates``, "the path")."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    def usable(extension: type[x509.ExtendedKeyUsage | x509.KeyUsage | x509.BasicConstraints]) -> bool | None:
        try:
            value = leaf.extensions.get_extension_for_class(extension).value
        except x509.ExtensionNotFound:
            return None
        if isinstance(value, x509.ExtendedKeyUsage):
            return ExtendedKeyUsageOID.CODE_SIGNING in value
        return not value.ca if isinstance(value, x509.BasicConstraints) else value.digital_signature

    name = leaf.subject.rfc4514_string()[:200]
    try:
        reasons = {
            "lacks the extended key usage codeSigning": not usable(x509.ExtendedKeyUsage),
            "lacks the key usage digitalSignature": usable(x509.KeyUsage) is False,
            "is a certificate authority's": usable(x509.BasicConstraints) is False,
        }
    except (ValueError, x509.DuplicateExtension) as exc:
        raise FileError("the leaf's extensions are malformed", file=path, field="certificate") from exc
    wrong = next((reason for reason, holds in reasons.items() if holds), None)
    if wrong is not None:
        hint = "the first certificate must be one for signing code"
        raise FileError(f"the certificate of {name!r} {wrong}", file=path, field="certificate", hint=hint)
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if not begin <= now <= end:
        span = f"it is valid from {format_time(begin)} to {format_time(end)}"
        raise ExpiredError(f"the certificate of {name!r} is not valid now", file=path, field="certificate", hint=span)


def _der(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.DER)
