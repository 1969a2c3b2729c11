"""Who a certificate says that it is for, and which of that a policy accepts.

``x509.subject: C=US, O=Acme, CN=Release``  every attribute named must stand in the subject, once, with exactly that
value; the subject may have others, and order does not matter (attribute names and escapes as in RFC 4514)

``x509.san: email:release@acme.example``    one subject alternative name (RFC 5280, 4.2.1.6), compared as a whole;
``uri:`` and ``dns:`` likewise
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Final

from vmgraft.errors import PolicyError

if TYPE_CHECKING:
    from cryptography import x509

_SUBJECT: Final = "x509.subject:"
_SAN: Final = "x509.san:"
_SAN_KINDS: Final = ("email", "uri", "dns")
_HINT: Final = "x509.subject: C=US, O=Acme, CN=Release; or x509.san: email:release@acme.example"
_SPACES: Final = re.compile(r"(\\.)|, +")  # an escaped comma is no comma
#: Longest identity accepted in a policy, in characters.
MAX_IDENTITY: Final = 1024


@dataclass(frozen=True, slots=True)
class Identity:
    """One accepted identity.

    Attributes:
        text: As written in the policy.
        subject: (attribute OID, value) pairs that the subject must hold; empty for a SAN.
        san: ``kind:value``, or None for a subject.
    """

    text: str
    subject: frozenset[tuple[str, str]] = frozenset()
    san: str | None = None

    def matches(self, subject: Sequence[tuple[str, str]], sans: Sequence[str]) -> bool:
        """Tell whether a certificate with this subject and these names is meant."""
        if self.san is not None:
            return self.san in sans
        named = {oid for oid, _ in self.subject}
        found = [pair for pair in subject if pair[0] in named]
        return bool(self.subject) and len(found) == len(self.subject) and set(found) == self.subject


def parse_identity(text: str, *, field: str, file: str | PathLike[str] | None = None) -> Identity:
    """Parse one entry of ``trustedIdentities``.

    Raises:
        PolicyError: it is not of a known form, names nothing, or one attribute twice.
    """

    def refuse(message: str) -> PolicyError:
        return PolicyError(f"{text[:80]!r}: {message}", file=file, field=field, hint=_HINT)

    if len(text) > MAX_IDENTITY or not text.isprintable():
        raise refuse("too long, or not printable")
    if text.startswith(_SAN):
        kind, _, value = text.removeprefix(_SAN).strip().partition(":")
        if kind not in _SAN_KINDS or not value or value != value.strip():
            raise refuse("names no email, uri or dns name")
        return Identity(text, san=f"{kind}:{value}")
    if not text.startswith(_SUBJECT):
        raise refuse("neither a subject nor a subject alternative name")
    from cryptography import x509

    try:
        # RFC 4514 has no spaces behind commas; everybody writes them.
        parsed = x509.Name.from_rfc4514_string(
            _SPACES.sub(lambda found: found[1] or ",", text.removeprefix(_SUBJECT).strip())
        )
    except ValueError as exc:
        raise refuse("not a name as in RFC 4514") from exc
    pairs = name_pairs(parsed)
    if not pairs or len({oid for oid, _ in pairs}) != len(pairs):
        raise refuse("names nothing, or one attribute twice")
    return Identity(text, subject=frozenset(pairs))


def name_pairs(name: x509.Name) -> tuple[tuple[str, str], ...]:
    """Return the attributes of a name as (OID, value) pairs; values that are no text are left out."""
    return tuple((item.oid.dotted_string, item.value) for item in name if isinstance(item.value, str))


def alternative_names(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the subject alternative names of the kinds a policy can name, as ``kind:value``."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    kinds = ((x509.RFC822Name, "email"), (x509.UniformResourceIdentifier, "uri"), (x509.DNSName, "dns"))
    return tuple(f"{kind}:{value}" for cls, kind in kinds for value in names.get_values_for_type(cls))
