"""From a certificate chain to a key and a name: path validation, and revocation by offline CRLs.

``paths`` finds and validates the path, ``revocation`` looks it up in the CRLs. The time it is judged at is now, or a
trusted timestamp, and never one that the chain proposes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from vmgraft.errors import UntrustedSignerError
from vmgraft.signing.effort import SPENT, Effort
from vmgraft.signing.identities import alternative_names, name_pairs
from vmgraft.signing.keys import PublicKey, public_from_key
from vmgraft.signing.paths import (
    CODE_SIGNING,
    DEVELOPMENT,
    TOO_COSTLY,
    ever_valid,
    is_development,
    load_roots,
    parse_certificate,
    validate,
)
from vmgraft.signing.revocation import SOON, check_revocation
from vmgraft.signing.times import format_time, later

__all__ = [
    "DEVELOPMENT",
    "SOON",
    "Authority",
    "CertifiedKey",
    "certify",
    "leaf_key",
    "parse_certificate",
]

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes


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


def leaf_key(certificates: Sequence[bytes]) -> PublicKey:
    """Return the key of the leaf, whoever vouches for it.

    Raises:
        BadSignatureError: a certificate is malformed.
        UntrustedSignerError: the key is of a kind that is not accepted.
    """
    return _key(parse_certificate(certificates[0]))


def certify(
    certificates: Sequence[bytes],
    authorities: Sequence[Authority],
    *,
    at: datetime,
    now: datetime,
    effort: Effort | None = None,
) -> CertifiedKey:
    """Validate a chain.

    Args:
        certificates: DER, leaf first, then intermediates; at least one.
        authorities: Whom to trust; the first with a path that is good counts, else the first with any.
        at: When the signature was made, as far as is proven: a trusted timestamp, or ``now``.
        now: The time by which CRLs must be current.
        effort: What this adds to, where it is one chain of several.

    Raises:
        BadSignatureError: a certificate is malformed.
        UntrustedSignerError: no path leads to a root, at no time.
    """
    if not certificates:
        raise UntrustedSignerError("there is no certificate", field="certificate")
    effort = effort or Effort()
    if effort.spent:
        raise UntrustedSignerError(SPENT, field="certificate")
    parsed = [parse_certificate(der) for der in certificates]
    key = _key(parsed[0])
    reasons, second_best = [], None
    for authority in authorities:
        chain, expired = _path(parsed, load_roots(authority.roots), at, effort)
        if isinstance(chain, str):
            reasons.append(f"{authority.name}: {chain}")
            continue
        found = _describe(key, authority, chain, expired, now)
        if found.expired is None and found.revoked is None:
            return found
        second_best = second_best or found
    if second_best is not None:
        return second_best
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


def _path(
    parsed: Sequence[x509.Certificate], roots: Sequence[x509.Certificate], at: datetime, effort: Effort
) -> tuple[list[x509.Certificate] | str, str | None]:
    """Return the path valid at ``at``, or else one that was or will be valid, with what is wrong with it."""
    chain = validate(parsed, roots, at, CODE_SIGNING, effort)
    if not isinstance(chain, str):
        return chain, None
    other = None if TOO_COSTLY in chain else ever_valid(parsed, roots, CODE_SIGNING, effort)
    if other is None:
        return chain, None
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
    revoked, notes = check_revocation(chain, authority.crls, require=authority.require_crls, now=now)
    ends = min(certificate.not_valid_after_utc for certificate in chain)
    for certificate in chain:
        end = certificate.not_valid_after_utc
        if now <= end < later(now, SOON):
            notes.append(f"the certificate of {certificate.subject.rfc4514_string()!r} expires {format_time(end)}")
    if is_development(chain):
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
