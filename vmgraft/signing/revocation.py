"""Revocation by CRLs that a trust store holds: offline, for the leaf and every intermediate (RFC 5280, 5 and 6.3).

Only full, direct CRLs count: signed by the very key that issued the certificate, by an issuer that may sign CRLs. A
certificate listed in any of them is revoked, for every reason, at every date, and also where a timestamp shows that the
signature is older: the date in a CRL is what the authority believes, and the thief of a key may know better. Where an
issuer has CRLs and none of them is current, nobody knows, and that is a failure too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

from vmgraft.errors import BadSignatureError
from vmgraft.signing.paths import X509_ERRORS
from vmgraft.signing.times import format_time, later

#: A certificate or CRL that ends within this time is worth a warning.
SOON: Final = timedelta(days=30)

_STRONG = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_PARTIAL = (x509.DeltaCRLIndicator, x509.IssuingDistributionPoint)


def parse_crl(der: bytes) -> x509.CertificateRevocationList:
    """Parse one CRL, all of it but its entries: parts are otherwise parsed when they are first used.

    Raises:
        BadSignatureError: it is malformed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a future release refuses is refused now
        try:
            crl = x509.load_der_x509_crl(der)
            _ = crl.issuer.rfc4514_string(), crl.last_update_utc, crl.next_update_utc, crl.signature_hash_algorithm
            _ = list(crl.extensions), len(crl)
        except (ValueError, TypeError, Warning, UnsupportedAlgorithm, *X509_ERRORS) as exc:
            raise BadSignatureError("a CRL is malformed", field="crl") from exc
    return crl


def check_revocation(
    chain: Sequence[x509.Certificate], crls: Sequence[bytes], *, require: bool, now: datetime
) -> tuple[str | None, list[str]]:
    """Look every certificate below the root up in the CRLs.

    Args:
        chain: From leaf to root.
        crls: CRLs in DER that ``parse_crl`` took.
        require: There must be a current one for each issuer on the path.
        now: The time by which they must be current.

    Returns:
        What is wrong, or None; and warnings.
    """
    known = [_load(der) for der in crls]
    notes: list[str] = []
    for certificate, issuer in pairwise(chain):
        problem, note = _look_up(certificate, issuer, known, require=require, now=now)
        if problem is not None:
            return problem, notes
        if note is not None:
            notes.append(note)
    return None, notes


def _look_up(
    certificate: x509.Certificate,
    issuer: x509.Certificate,
    known: Sequence[x509.CertificateRevocationList],
    *,
    require: bool,
    now: datetime,
) -> tuple[str | None, str | None]:
    name, above = certificate.subject.rfc4514_string(), issuer.subject.rfc4514_string()
    claimed = [crl for crl in known if crl.issuer == certificate.issuer]
    mine = [crl for crl in claimed if _is_by(crl, issuer)]
    for crl in mine:
        entry = crl.get_revoked_certificate_by_serial_number(certificate.serial_number)
        if entry is not None:
            return f"the certificate of {name!r} was revoked at {format_time(entry.revocation_date_utc)}", None
    if not mine:
        if require or claimed:  # one that cannot be used is a problem where it claims to be the one
            return f"there is no usable CRL for the certificate of {name!r}", None
        return None, None
    newest = max(mine, key=lambda crl: crl.last_update_utc)
    stale = [_stale(crl, now, above) for crl in mine]
    if all(stale):
        return _stale(newest, now, above), None
    end = max(crl.next_update_utc for crl, problem in zip(mine, stale, strict=True) if not problem)  # type: ignore[type-var]  # one without an end is stale
    soon = f"the CRL of {above!r} ends {format_time(end)}" if end is not None and end < later(now, SOON) else None
    return None, soon


@lru_cache(maxsize=64)
def _load(der: bytes) -> x509.CertificateRevocationList:
    return x509.load_der_x509_crl(der)


def _is_by(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    """Tell whether a CRL is a full, direct one that this issuer signed, and was allowed to."""
    if crl.issuer != issuer.subject:
        return False
    if any(extension.critical or isinstance(extension.value, _PARTIAL) for extension in crl.extensions):
        return False
    try:
        if not issuer.extensions.get_extension_for_class(x509.KeyUsage).value.crl_sign:
            return False
    except x509.ExtensionNotFound:
        pass
    try:
        digest = crl.signature_hash_algorithm
        if digest is not None and not isinstance(digest, _STRONG):  # None: Ed25519 and its like have their own
            return False
        return crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # other kinds raise TypeError
    except (TypeError, ValueError, UnsupportedAlgorithm):
        return False


def _stale(crl: x509.CertificateRevocationList, now: datetime, issuer: str) -> str | None:
    end = crl.next_update_utc
    if crl.last_update_utc > now:
        return f"the CRL of {issuer!r} is from the future: {format_time(crl.last_update_utc)}"
    if end is None:
        return f"the CRL of {issuer!r} does not say how long it is good"
    if now >= end:
        return f"the CRL of {issuer!r} expired at {format_time(end)}"
    return None
