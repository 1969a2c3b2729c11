"""From a certificate to a root: path validation for one purpose at one time.

The path is found and validated by ``cryptography.x509.verification`` (RFC 5280, 6.1, in its Web PKI profile for
authorities). What that profile leaves open, or answers for TLS, is decided here:

* extended key usage: of the leaf by purpose; of an intermediate that states any, it must name the purpose too;
* name constraints: the library applies those on DNS names, addresses and mailboxes to subject alternative names; an
  ``emailAddress`` in a subject is held against those on mailboxes here. Constraints of another kind (directory names,
  URIs) it cannot apply; a path with one is refused, also where the extension is not critical;
* size: more names, name constraints or DER elements than any certificate needs are refused (``weight``);
* keys: RSA of 3072 bits or more on the whole path, root included; SHA-1 and DSA have no place in the library.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vmgraft.errors import BadSignatureError
from vmgraft.signing.effort import COMPARISONS, SPENT, Effort
from vmgraft.signing.identities import alternative_names
from vmgraft.signing.weight import Weight, weigh

if TYPE_CHECKING:
    from cryptography.x509.verification import ExtensionPolicy, Policy

#: Most intermediates between leaf and root.
MAX_DEPTH: Final = 6
#: Shortest RSA key on a path, in bits (NIST SP 800-57 part 1, table 2: 128 bits of strength).
MIN_RSA_BITS: Final = 3072
#: Longest RSA key of an authority on a path, in bits: what one signature check may cost.
MAX_RSA_BITS: Final = 8192
#: Organisation in the names of certificates made by ``vmgraft dev-ca``.
DEVELOPMENT: Final = "DEVELOPMENT ONLY (vmgraft dev-ca)"

#: What the library says when a hostile set of certificates makes it try too many paths.
TOO_COSTLY: Final = "Exceeded maximum"

#: Said without asking the library, of chains that have nothing to do with an authority.
UNRELATED: Final = "no root of it has the name of an issuer in the chain"

#: What the library raises beside ValueError for what is not well-formed.
X509_ERRORS: Final = (x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType)
_ANY: Final = verification.Criticality.AGNOSTIC
_KNOWN_CONSTRAINTS = (x509.DNSName, x509.IPAddress, x509.RFC822Name)


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a leaf must be for.

    Attributes:
        name: As OpenSSL calls the usage.
        usage: The extended key usage (RFC 5280, 4.2.1.12).
        sole: The leaf must state this usage alone, in a critical extension (RFC 3161, 2.3).
    """

    name: str
    usage: x509.ObjectIdentifier
    sole: bool = False


CODE_SIGNING: Final = Purpose("codeSigning", ExtendedKeyUsageOID.CODE_SIGNING)
TIME_STAMPING: Final = Purpose("timeStamping", ExtendedKeyUsageOID.TIME_STAMPING, sole=True)


@lru_cache(maxsize=256)  # more than travel with one envelope: each is parsed once, whatever the number of stores
def parse_certificate(der: bytes) -> x509.Certificate:
    """Parse one certificate, all of it: parts are otherwise parsed when they are first used.

    Raises:
        BadSignatureError: it is malformed, or there is too much in it (``weight``).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a future release refuses is refused now
        try:
            certificate = x509.load_der_x509_certificate(der)  # its frame alone, so far
            problem = weigh(certificate).problem
            if problem is not None:
                raise BadSignatureError(f"a certificate has {problem}", field="certificate")
            certificate.subject.rfc4514_string()
            certificate.issuer.rfc4514_string()
            alternative_names(certificate)
            _ = certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.signature_hash_algorithm
        except (ValueError, IndexError, TypeError, Warning, UnsupportedAlgorithm, *X509_ERRORS) as exc:
            raise BadSignatureError("a certificate beside the signature is malformed", field="certificate") from exc
    return certificate


def load_roots(roots: Sequence[bytes]) -> list[x509.Certificate]:
    """Return trust anchors that were checked when the policy was read."""
    return [_load(der) for der in roots]


@lru_cache(maxsize=4096)  # a policy has up to 2048
def _load(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


@lru_cache(maxsize=4096)
def _root_name(root: x509.Certificate) -> bytes:
    return weigh.__wrapped__(root).subject


def is_development(chain: Sequence[x509.Certificate]) -> bool:
    """Tell whether a certificate on a path was made by ``vmgraft dev-ca``, or issued by one that was."""
    names = (name for cert in chain for name in (cert.subject, cert.issuer))
    found = (item.value for name in names for item in name.get_attributes_for_oid(NameOID.ORGANIZATION_NAME))
    return DEVELOPMENT in found


def ever_valid(
    parsed: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    purpose: Purpose,
    effort: Effort | None = None,
) -> list[x509.Certificate] | None:
    """Return a path that is valid at some time, whenever that is, or None.

    Where there is such a path, it is valid at the moment when the last of its certificates begins.
    """
    leaf, effort = parsed[0], effort or Effort()
    if not _may_lead(parsed, roots):
        return None
    begins = {certificate.not_valid_before_utc for certificate in (*parsed, *roots)}
    for moment in sorted(begin for begin in begins if leaf.not_valid_before_utc <= begin <= leaf.not_valid_after_utc):
        chain = validate(parsed, roots, moment, purpose, effort)
        if not isinstance(chain, str):
            return chain
        if TOO_COSTLY in chain:  # and would be at every other moment
            return None
    return None


def _may_lead(parsed: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]) -> bool:
    """Tell whether a path can end at one of the roots: names say so before any signature is checked."""
    names = {weigh(certificate).issuer for certificate in parsed}
    return any(_root_name(root) in names for root in roots)


def validate(
    parsed: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    at: datetime,
    purpose: Purpose,
    effort: Effort | None = None,
) -> list[x509.Certificate] | str:
    """Return the path from leaf to root that is valid at a time, or why there is none.

    Args:
        parsed: The leaf, then intermediates in any order.
        roots: Trust anchors.
        at: The time.
        purpose: What the leaf must be for.
        effort: What this adds to; a chain that is too costly uses all of it up.
    """
    if not _may_lead(parsed, roots):
        return UNRELATED
    effort = effort or Effort()
    below = sum(weigh(certificate).names for certificate in parsed)
    if not effort.step(_cost(weigh(parsed[0]), below)):
        return SPENT
    try:
        builder = (
            verification.PolicyBuilder()
            .store(verification.Store(list(roots)))
            .time(at)
            .max_chain_depth(MAX_DEPTH)
            .extension_policies(ca_policy=_authority_rules(purpose, effort, below), ee_policy=_leaf_rules(purpose))
        )
        chain = list(builder.build_client_verifier().verify(parsed[0], list(parsed[1:])).chain)
        return _problem(chain) or chain
    except (verification.VerificationError, UnsupportedAlgorithm, ValueError, OverflowError, *X509_ERRORS) as exc:
        reason = SPENT if effort.spent else _plain(str(exc))
        effort.spent = TOO_COSTLY in reason
        return reason


def _cost(certificate: Weight, below: int) -> int:
    """Return the steps that a certificate takes: its name constraints are held against the names below it."""
    return 1 + certificate.constraints * below // COMPARISONS


def _plain(message: str) -> str:
    """Return the reason at the end of the library's chain of them, without what it prints of its own structures."""
    reason = message.partition(" (encountered processing")[0].rpartition("ValueError: ")[2]
    for prefix in ("validation failed: ", "candidates exhausted: ", "fatal error: "):
        reason = reason.removeprefix(prefix)
    return reason[:200]


# --- rules for the library -----------------------------------------------------------------------------------------


def _leaf_rules(purpose: Purpose) -> ExtensionPolicy:
    criticality = verification.Criticality.CRITICAL if purpose.sole else _ANY
    return (
        verification.ExtensionPolicy.permit_all()
        .require_present(x509.ExtendedKeyUsage, criticality, _leaf_usage(purpose))
        .may_be_present(x509.KeyUsage, _ANY, _digital_signature)
        .may_be_present(x509.BasicConstraints, _ANY, _not_an_authority)
    )


def _authority_rules(purpose: Purpose, effort: Effort, below: int) -> ExtensionPolicy:
    rules = verification.ExtensionPolicy.webpki_defaults_ca()
    return rules.may_be_present(x509.ExtendedKeyUsage, _ANY, _authority_usage(purpose, effort, below))


def _leaf_usage(purpose: Purpose) -> Callable[[Policy, x509.Certificate, x509.ExtendedKeyUsage], None]:
    def check(_policy: object, _certificate: x509.Certificate, value: x509.ExtendedKeyUsage) -> None:
        if purpose.usage not in value:
            raise ValueError(f"extended key usage lacks {purpose.name}")
        if purpose.sole and len(value) != 1:
            raise ValueError(f"extended key usage names more than {purpose.name}")

    return check


def _authority_usage(
    purpose: Purpose, effort: Effort, below: int
) -> Callable[[Policy, x509.Certificate, x509.ExtendedKeyUsage | None], None]:
    def check(_policy: object, certificate: x509.Certificate, value: x509.ExtendedKeyUsage | None) -> None:
        # Asked of every candidate, before its signature is checked and its name constraints are applied.
        if not effort.step(_cost(weigh(certificate), below)):
            raise ValueError(SPENT)
        key = certificate.public_key()
        if isinstance(key, rsa.RSAPublicKey) and key.key_size > MAX_RSA_BITS:
            raise ValueError(f"an authority on the path has an RSA key of more than {MAX_RSA_BITS} bits")
        if value is not None and purpose.usage not in value and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in value:
            raise ValueError(f"an authority on the path has an extended key usage that lacks {purpose.name}")

    return check


def _digital_signature(_policy: object, _certificate: x509.Certificate, value: x509.KeyUsage | None) -> None:
    if value is not None and not value.digital_signature:
        raise ValueError("key usage lacks digitalSignature")


def _not_an_authority(_policy: object, _certificate: x509.Certificate, value: x509.BasicConstraints | None) -> None:
    if value is not None and value.ca:
        raise ValueError("the leaf is a certificate authority")


# --- what the library does not look at -----------------------------------------------------------------------------


def _problem(chain: Sequence[x509.Certificate]) -> str | None:
    """Return what is wrong with a path that the library accepts."""
    if len(chain) < 2:
        return "the certificate is itself a trust anchor; authorities certify, they do not sign"
    for certificate in chain:
        key = certificate.public_key()
        if isinstance(key, rsa.RSAPublicKey) and key.key_size < MIN_RSA_BITS:
            name = certificate.subject.rfc4514_string()
            return f"the RSA key of {name!r} has {key.key_size} bits, {MIN_RSA_BITS} are needed"
    for position, certificate in enumerate(chain[1:], 1):
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.NameConstraints).value
        except x509.ExtensionNotFound:
            continue
        problem = _outside(constraints, chain[:position])
        if problem is not None:
            return f"{problem} (name constraints of {certificate.subject.rfc4514_string()!r})"
    return None


def _outside(constraints: x509.NameConstraints, below: Sequence[x509.Certificate]) -> str | None:
    """Hold the mailboxes in subjects against the constraints for them (RFC 5280, 4.2.1.10)."""
    permitted, excluded = constraints.permitted_subtrees or [], constraints.excluded_subtrees or []
    odd = next((name for name in (*permitted, *excluded) if not isinstance(name, _KNOWN_CONSTRAINTS)), None)
    if odd is not None:
        return f"constraints on names of the kind {type(odd).__name__} cannot be applied"
    allowed = [name.value for name in permitted if isinstance(name, x509.RFC822Name)]
    refused = [name.value for name in excluded if isinstance(name, x509.RFC822Name)]
    for certificate in below:
        for item in certificate.subject.get_attributes_for_oid(NameOID.EMAIL_ADDRESS):
            mailbox = str(item.value)
            if (allowed and not any(_within(mailbox, base) for base in allowed)) or any(
                _within(mailbox, base) for base in refused
            ):
                return f"the mailbox {mailbox!r} in a subject is not allowed"
    return None


def _within(mailbox: str, base: str) -> bool:
    """Tell whether a mailbox is the one, at the host, or below the domain that a constraint names."""
    local, at, host = mailbox.rpartition("@")
    host, wanted = host.lower(), base.lower()
    if "@" in base:
        wanted_local, _, wanted_host = base.rpartition("@")
        return (local, host) == (wanted_local, wanted_host.lower())
    if wanted.startswith("."):
        return bool(at) and host.endswith(wanted)
    return bool(at) and host == wanted
