"""What a trust policy says, once it was read; ``policy`` reads one, docs/policy.md has each field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from vmgraft.errors import PolicyError, UntrustedSignerError
from vmgraft.signing.capabilities import Capability
from vmgraft.signing.contract import Limits
from vmgraft.signing.identities import Identity
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.rules import SignatureRule
from vmgraft.signing.scopes import ImageScope, Reach, extension_in_scope
from vmgraft.signing.truststores import TrustStore

#: Checks that a policy may turn from ``enforce`` to ``log``; all others always count.
OVERRIDABLE = ("authenticity", "expiry", "revocation", "rollback", "capabilities", "required")

#: What each level only logs, unless an override says ``enforce``.
LOGGED: Mapping[str, frozenset[str]] = {
    "strict": frozenset(),
    "permissive": frozenset({"expiry", "revocation", "rollback", "capabilities"}),
    "audit": frozenset(OVERRIDABLE),
}


@dataclass(frozen=True, slots=True)
class NamedKey:
    """A public key and the name the policy gives it."""

    name: str
    key: PublicKey


@dataclass(frozen=True, slots=True)
class Grant:
    """What one extension may do. Limits left out of the policy are the defaults."""

    capabilities: tuple[Capability, ...] = ()
    limits: Limits = field(default_factory=Limits)
    min_isolation: int = 0
    #: The mildest answer to a fault that is accepted; None leaves it to the manifest.
    on_fault: str | None = None


@dataclass(frozen=True, slots=True)
class TrustPolicy:
    """One entry of ``trustPolicies``.

    Attributes:
        trust_stores: References (``ca:NAME``, ``tsa:NAME``) of the stores that apply here.
        identities: Whom certificates must be for; empty where ``any_identity``, or without a store of type ``ca``.
        any_identity: Every name that an authority certifies is accepted.
        max_advance: How far a security version may be above the highest seen, by extension id.
        needs_state: Refuse when there is no rollback memory to compare with.
        read_before: A host reads all of the content before it starts a guest, also where each block could wait.
    """

    name: str
    image_scopes: tuple[ImageScope, ...]
    extension_scopes: tuple[str, ...]
    level: str
    override: Mapping[str, str]
    signatures: SignatureRule
    binding: str
    require_extensions: tuple[str, ...]
    min_security_version: Mapping[str, int]
    grants: Mapping[str, Grant]
    trust_stores: tuple[str, ...] = ()
    identities: tuple[Identity, ...] = ()
    any_identity: bool = False
    max_advance: Mapping[str, int] = field(default_factory=dict)
    needs_state: bool = False
    read_before: bool = False

    def logs(self, check: str) -> bool:
        """Tell whether a failure of this check is only logged."""
        if check not in OVERRIDABLE:
            return False
        if check in self.override:
            return self.override[check] == "log"
        return check in LOGGED[self.level]

    def accepts(self, subject: Sequence[tuple[str, str]], sans: Sequence[str]) -> bool:
        """Tell whether a certificate for this subject and these alternative names is one this policy means."""
        return self.any_identity or any(identity.matches(subject, sans) for identity in self.identities)

    def in_scope(self, extension: str) -> bool:
        """Tell whether an extension is one this policy speaks about."""
        return any(extension_in_scope(scope, extension) for scope in self.extension_scopes)


@dataclass(frozen=True, slots=True)
class Revocations:
    """What is no longer to be believed; keys by keyid, statements and payloads by SHA-256 in hex."""

    keys: frozenset[str] = frozenset()
    statements: frozenset[str] = frozenset()
    payloads: frozenset[str] = frozenset()
    min_generation: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that passed the schema and makes sense.

    Attributes:
        file: Where it came from, for messages.
        sha256: SHA-256 of the file's bytes, in hex.
        document: The whole document.
        stores: Trust stores by reference: ``ca:NAME`` or ``tsa:NAME``.
        auditors: Keys whose verification summaries are accepted.
        signed_by: keyids of the policy keys that signed the file; empty where it was not signed, or not asked.
    """

    file: str | None
    sha256: str
    document: dict[str, Any]
    policy_version: int
    expires: datetime | None
    keys: tuple[NamedKey, ...]
    trust_policies: tuple[TrustPolicy, ...]
    revocations: Revocations
    stores: Mapping[str, TrustStore] = field(default_factory=dict)
    auditors: tuple[PublicKey, ...] = ()
    signed_by: tuple[str, ...] = ()

    @property
    def authorities(self) -> tuple[TrustStore, ...]:
        """Every store of type ``ca``."""
        return tuple(store for store in self.stores.values() if store.type == "ca")

    def timestampers(self, entry: TrustPolicy) -> tuple[TrustStore, ...]:
        """Return the stores of type ``tsa`` that one trust policy names."""
        stores = (self.stores[reference] for reference in entry.trust_stores)
        return tuple(store for store in stores if store.type == "tsa")

    @property
    def wants_tree(self) -> bool:
        """Whether any scope names a content by its digest."""
        return any(scope.wants_tree for policy in self.trust_policies for scope in policy.image_scopes)

    def select(self, image_name: str, tree_digest: bytes | None, extensions: Sequence[str]) -> TrustPolicy:
        """Return the one trust policy that applies.

        The closest image scope decides first: where any policy names the content, only such policies are looked at,
        then those with a glob, then the global ones. Among these, one must cover every extension. There is no way from
        a closer policy to a wider one.

        Args:
            image_name: File name of the image, without folders.
            tree_digest: fs-verity digest of the guest content, or None where it is not known.
            extensions: Ids of the extensions in the statement.

        Raises:
            UntrustedSignerError: none applies.
            PolicyError: several apply equally.
        """
        reaches = [max(s.reach(image_name, tree_digest) for s in p.image_scopes) for p in self.trust_policies]
        best = max(reaches)
        near = [p for p, reach in zip(self.trust_policies, reaches, strict=True) if reach == best != Reach.NONE]
        if not near:
            raise UntrustedSignerError(f"no trust policy speaks about the image {image_name!r}", file=self.file)
        fit = [policy for policy in near if all(policy.in_scope(extension) for extension in extensions)]
        names = ", ".join(policy.name for policy in (fit or near))
        if not fit:
            outside = next(e for e in extensions if not all(p.in_scope(e) for p in near))
            raise UntrustedSignerError(f"{outside} is outside the extension scopes of {names}", file=self.file)
        if len(fit) > 1:
            raise PolicyError(f"several trust policies apply equally: {names}", file=self.file, field="trustPolicies")
        return fit[0]
