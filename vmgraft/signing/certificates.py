"""From a certificate chain to a key and a name: path validation, and revocation by offline CRLs.

The path is validated by ``cryptography.x509.verification`` (RFC 5280, 6.1, in its Web PKI profile for authorities),
with a rule of our own for the leaf: extended key usage ``codeSigning`` must be there, ``digitalSignature`` too where
key usage is stated. The time it is judged at is now, or a trusted timestamp, and never one that the chain proposes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmgraft.errors import BadSignatureError, UntrustedSignerError
from vmgraft.signing.identities import alternative_names, name_pairs
from vmgraft.signing.keys import PublicKey, public_from_key
from vmgraft.signing.times import format_time

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

#: Most intermediates between leaf and root.
MAX_DEPTH: Final = 6
#: A certificate or CRL that ends within this time is worth a warning.
SOON: Final = timedelta(days=30)
#: Organisation in the names of certificates made by ``vmgraft dev-ca``.
DEVELOPMENT: Final = "DEVELOPMENT ONLY (vmgraft dev-ca)"


_X509_ERRORS = (x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType)


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority that a policy trusts. Certificates and CRLs in DER.

    Attributes:
        name: Its name in the policy.
        roots: Trust anchors.
        crls: What the authority, or one below it, has revoked.
        require_crls: A chain counts only when there is a current CRL for each of its certificates below the root.
    """

    name: str
    roots: tuple[bytes, ...]
    crls: tuple[bytes, ...] = ()
    require_crls: bool = False


@dataclass(frozen=True, slots=True)
class CertifiedKey:
    """A key, and what a chain to a trusted root says about it.

    Attributes:
        authority: Name of the authority at the end of the chain.
        subject: The leaf's subject as (OID, value) pairs.
        name: The leaf's subject as text (RFC 4514).
        sans: Its subject alternative names, ``kind:value``.
        not_after: When the chain ends, i.e. the first of its certificates.
        expired: Why the chain is not valid at the time asked for, or None.
        revoked: Why the chain is not to be believed although it is valid, or None.
        warnings: What will go wrong soon, and that it is a development CA.
    """

    key: PublicKey
    authority: str
    subject: tuple[tuple[str, str], ...]
    name: str
    sans: tuple[str, ...]
    not_after: datetime
    expired: str | None
    revoked: str | None
    warnings: tuple[str, ...]


def parse_certificate(der: bytes) -> x509.Certificate:
    """Parse one certificate, all of it: parts are otherwise parsed when they are first used.

    Raises:
        BadSignatureError: it is malformed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a future release refuses is refused now
        try:
            certificate = x509.load_der_x509_certificate(der)
            certificate.subject.rfc4514_string()
            certificate.issuer.rfc4514_string()
            alternative_names(certificate)
            _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.signature_hash_algorithm
        except (ValueError, TypeError, Warning, UnsupportedAlgorithm, *_X509_ERRORS) as exc:
            raise BadSignatureError("a certificate beside the signature is malformed", field="certificate") from exc
    return certificate


def leaf_key(certificates: Sequence[bytes]) -> PublicKey:
    """Return the key of the leaf, whoever vouches for it.

    Raises:
        BadSignatureError: a certificate is malformed.
        UntrustedSignerError: the key is of a kind that is not accepted.
    """
    return _key(parse_certificate(certificates[0]))


def certify(
    certificates: Sequence[bytes], authorities: Sequence[Authority], *, at: datetime, now: datetime
) -> CertifiedKey:
    """Validate a chain.

    Args:
        certificates: DER, leaf first, then intermediates; at least one.
        authorities: Whom to trust; the first with a path counts.
        at: When the signature was made, as far as is proven: a trusted timestamp, or ``now``.
        now: The time by which CRLs must be current.

    Raises:
        BadSignatureError: a certificate is malformed.
        UntrustedSignerError: no path leads to a root, at no time.
    """
    parsed = [parse_certificate(der) for der in certificates]
    key = _key(parsed[0])
    reasons = []
    for authority in authorities:
        roots = [x509.load_der_x509_certificate(der) for der in authority.roots]
        chain, expired = _path(parsed, roots, at)
        if isinstance(chain, str):
            reasons.append(f"{authority.name}: {chain}")
            continue
        return _describe(key, authority, chain, expired, now)
    why = "; ".join(reasons) or "the policy trusts no certificate authority here"
    name = parsed[0].subject.rfc4514_string()
    raise UntrustedSignerError(
        f"no trusted path for the certificate of {name!r}: {why}",
        field="certificate",
        hint="add the authority's root to the policy's trustStores, or the intermediates to the signature",
    )


def _key(leaf: x509.Certificate) -> PublicKey:
    try:
        public: CertificatePublicKeyTypes = leaf.public_key()
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise UntrustedSignerError("the certificate's key cannot be read", field="certificate") from exc
    return public_from_key(public, error=UntrustedSignerError)


# --- the path ------------------------------------------------------------------------------------------------------


def _code_signing(_policy: object, _certificate: x509.Certificate, value: x509.ExtendedKeyUsage) -> None:
    if ExtendedKeyUsageOID.CODE_SIGNING not in value:
        raise ValueError("extended key usage lacks codeSigning")


def _digital_signature(_policy: object, _certificate: x509.Certificate, value: x509.KeyUsage | None) -> None:
    if value is not None and not value.digital_signature:
        raise ValueError("key usage lacks digitalSignature")


def _not_an_authority(_policy: object, _certificate: x509.Certificate, value: x509.BasicConstraints | None) -> None:
    if value is not None and value.ca:
        raise ValueError("the leaf is a certificate authority")


def _leaf_rules() -> verification.ExtensionPolicy:
    any_criticality = verification.Criticality.AGNOSTIC
    return (
        verification.ExtensionPolicy.permit_all()
        .require_present(x509.ExtendedKeyUsage, any_criticality, _code_signing)
        .may_be_present(x509.KeyUsage, any_criticality, _digital_signature)
        .may_be_present(x509.BasicConstraints, any_criticality, _not_an_authority)
    )


def _validate(
    parsed: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], at: datetime
) -> list[x509.Certificate] | str:
    """Return the path from leaf to root that is valid at a time, or why there is none."""
    builder = (
        verification.PolicyBuilder()
        .store(verification.Store(list(roots)))
        .time(at)
        .max_chain_depth(MAX_DEPTH)
        .extension_policies(ca_policy=verification.ExtensionPolicy.webpki_defaults_ca(), ee_policy=_leaf_rules())
    )
    try:
        return list(builder.build_client_verifier().verify(parsed[0], list(parsed[1:])).chain)
    except (verification.VerificationError, ValueError) as exc:
        return str(exc)


def _path(
    parsed: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], at: datetime
) -> tuple[list[x509.Certificate] | str, str | None]:
    """Return the path valid at ``at``, or else one that was or will be valid, with what is wrong with it."""
    chain = _validate(parsed, roots, at)
    if not isinstance(chain, str):
        return chain, None
    moments = sorted({cert.not_valid_after_utc for cert in parsed} | {cert.not_valid_before_utc for cert in parsed})
    for moment in moments:
        other = _validate(parsed, roots, moment)
        if isinstance(other, str):
            continue
        for certificate in other:
            name = certificate.subject.rfc4514_string()
            if at > certificate.not_valid_after_utc:
                return other, f"the certificate of {name!r} expired at {format_time(certificate.not_valid_after_utc)}"
            if at < certificate.not_valid_before_utc:
                begin = format_time(certificate.not_valid_before_utc)
                return other, f"the certificate of {name!r} is not valid before {begin}"
    return chain, None


def _describe(
    key: PublicKey, authority: Authority, chain: Sequence[x509.Certificate], expired: str | None, now: datetime
) -> CertifiedKey:
    revoked, notes = _revocation(authority, chain, now)
    ends = min(certificate.not_valid_after_utc for certificate in chain)
    for certificate in chain:
        end = certificate.not_valid_after_utc
        if now <= end < now + SOON:
            notes.append(f"the certificate of {certificate.subject.rfc4514_string()!r} expires {format_time(end)}")
    names = chain[-1].subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if any(name.value == DEVELOPMENT for name in names):
        notes.append(f"the authority {authority.name} is a development CA: anybody may hold its keys")
    leaf = chain[0]
    return CertifiedKey(
        key=key,
        authority=authority.name,
        subject=name_pairs(leaf.subject),
        name=leaf.subject.rfc4514_string(),
        sans=alternative_names(leaf),
        not_after=ends,
        expired=expired,
        revoked=revoked,
        warnings=tuple(notes),
    )


# --- revocation ----------------------------------------------------------------------------------------------------


def _revocation(authority: Authority, chain: Sequence[x509.Certificate], now: datetime) -> tuple[str | None, list[str]]:
    """Look every certificate below the root up in the CRLs; return what is wrong, and warnings."""
    crls = [x509.load_der_x509_crl(der) for der in authority.crls]
    notes: list[str] = []
    for certificate, issuer in pairwise(chain):
        name = certificate.subject.rfc4514_string()
        mine = [crl for crl in crls if _is_by(crl, issuer)]
        if not mine and (authority.require_crls or _speaks_of(crls, certificate)):
            return f"there is no usable CRL for the certificate of {name!r}", notes
        for crl in mine:
            problem = _stale(crl, now, issuer) or _listed(crl, certificate)
            if problem is not None:
                return problem, notes
            end = crl.next_update_utc
            if end is not None and end < now + SOON:
                notes.append(f"the CRL of {issuer.subject.rfc4514_string()!r} ends {format_time(end)}")
    return None, notes


def _is_by(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    """Tell whether a CRL is a full, direct one that this issuer signed (RFC 5280, 5.2 and 6.3)."""
    if crl.issuer != issuer.subject:
        return False
    if any(extension.critical for extension in crl.extensions):  # delta, indirect, or partial
        return False
    try:
        usage = issuer.extensions.get_extension_for_class(x509.KeyUsage).value
        if not usage.crl_sign:
            return False
    except x509.ExtensionNotFound:
        pass
    try:
        return crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # other kinds raise TypeError
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _speaks_of(crls: Sequence[x509.CertificateRevocationList], certificate: x509.Certificate) -> bool:
    """Tell whether some CRL claims to be by the certificate's issuer; then one that cannot be used is a problem."""
    return any(crl.issuer == certificate.issuer for crl in crls)


def _stale(crl: x509.CertificateRevocationList, now: datetime, issuer: x509.Certificate) -> str | None:
    name, end = issuer.subject.rfc4514_string(), crl.next_update_utc
    if crl.last_update_utc > now:
        return f"the CRL of {name!r} is from the future: {format_time(crl.last_update_utc)}"
    if end is None:
        return f"the CRL of {name!r} does not say how long it is good"
    if now >= end:
        return f"the CRL of {name!r} expired at {format_time(end)}"
    return None


def _listed(crl: x509.CertificateRevocationList, certificate: x509.Certificate) -> str | None:
    entry = crl.get_revoked_certificate_by_serial_number(certificate.serial_number)
    if entry is None:
        return None
    name = certificate.subject.rfc4514_string()
    return f"the certificate of {name!r} was revoked at {format_time(entry.revocation_date_utc)}"
