"""The trust policy: who may sign what, and what it may do. One self-contained JSON file; docs/policy.md has each field.

Everything is closed by default: a missing file, an unknown field, an empty list of signers or a rule that cannot be
met is an error, and what is not granted is denied.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

from vmgraft.errors import PolicyError, UntrustedSignerError
from vmgraft.schemas import strict_json, validate
from vmgraft.signing.capabilities import Capability, parse_capability
from vmgraft.signing.contract import Limits
from vmgraft.signing.files import read_regular
from vmgraft.signing.keys import PublicKey, public_from_pem
from vmgraft.signing.manifest import limits_from
from vmgraft.signing.scopes import ImageScope, Reach, extension_in_scope
from vmgraft.signing.times import parse_time

#: Largest policy accepted, in bytes.
MAX_POLICY = 4 * 1024 * 1024
#: Checks that a policy may turn from ``enforce`` to ``log``; all others always count.
OVERRIDABLE = ("authenticity", "expiry", "revocation", "rollback", "capabilities", "required")

#: What each level only logs, unless an override says ``enforce``.
LOGGED: Mapping[str, frozenset[str]] = {
    "strict": frozenset(),
    "permissive": frozenset({"expiry", "revocation", "rollback", "capabilities"}),
    "audit": frozenset(OVERRIDABLE),
}

_PathOrNone = str | PathLike[str] | None


@dataclass(frozen=True, slots=True)
class NamedKey:
    """A public key and the name the policy gives it."""

    name: str
    key: PublicKey


@dataclass(frozen=True, slots=True)
class SignatureRule:
    """Who must sign: each of ``all_of``, and at least ``minimum`` of ``any_of``. Keys are told apart by their SPKI."""

    all_of: frozenset[PublicKey]
    any_of: frozenset[PublicKey]
    minimum: int

    @property
    def keys(self) -> frozenset[PublicKey]:
        """Every key the rule names."""
        return self.all_of | self.any_of

    def problem(self, signers: frozenset[PublicKey]) -> str | None:
        """Say why these signers do not satisfy the rule, or None when they do."""
        if not self.keys:
            return "the rule names no key"
        missing = sorted(key.keyid for key in self.all_of - signers)
        if missing:
            return "not signed by " + ", ".join(missing)
        found = len(self.any_of & signers)
        if found < self.minimum:
            return f"signed by {found} of the {len(self.any_of)} keys of which {self.minimum} must sign"
        return None


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
    """One entry of ``trustPolicies``."""

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

    def logs(self, check: str) -> bool:
        """Tell whether a failure of this check is only logged."""
        if check not in OVERRIDABLE:
            return False
        if check in self.override:
            return self.override[check] == "log"
        return check in LOGGED[self.level]

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
    """

    file: str | None
    sha256: str
    document: dict[str, Any]
    policy_version: int
    expires: datetime | None
    keys: tuple[NamedKey, ...]
    trust_policies: tuple[TrustPolicy, ...]
    revocations: Revocations

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


def load_policy(path: str | PathLike[str]) -> Policy:
    """Load a policy; whatever is wrong with the file means deny.

    Raises:
        PolicyError: missing, a symbolic link, not a regular file, over 4 MiB, malformed, or contradicting itself.
    """
    try:
        data = read_regular(Path(path), MAX_POLICY, what="the policy", error=PolicyError, follow=False)
    except PolicyError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            exc.hint = "nothing is trusted without a policy; make one with: vmgraft policy init"
        raise
    try:
        return parse_policy(data, file=path)
    except PolicyError as exc:
        exc.hint = exc.hint or "docs/policy.md describes each field; make a first policy with: vmgraft policy init"
        raise


def parse_policy(data: bytes, *, file: _PathOrNone = None) -> Policy:
    """Parse the bytes of a policy.

    Args:
        data: UTF-8 JSON, at most 4 MiB.
        file: What to name in errors.

    Raises:
        PolicyError: malformed, or contradicting itself.
    """
    document = strict_json(data, file=file, error=PolicyError, max_bytes=MAX_POLICY)
    validate("policy", document, file=file, error=PolicyError)
    reader = _Reader(file)
    keys = reader.keys(document["keys"])
    expires = document.get("expires")
    return Policy(
        file=None if file is None else os.fspath(file),
        sha256=hashlib.sha256(data).hexdigest(),
        document=document,
        policy_version=document["policyVersion"],
        expires=None if expires is None else parse_time(expires, file=file, field="expires", error=PolicyError),
        keys=keys,
        trust_policies=reader.trust_policies(document["trustPolicies"], keys),
        revocations=reader.revocations(document.get("revocations", {}), keys),
    )


def _resolver(keys: tuple[NamedKey, ...]) -> dict[str, PublicKey]:
    """Return what ``key:NAME`` and ``key:SHA256:...`` stand for."""
    return {f"key:{named.name}": named.key for named in keys} | {f"key:{named.key.keyid}": named.key for named in keys}


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns a document that passed the schema into the classes above."""

    file: _PathOrNone

    def error(self, message: str, where: str, hint: str | None = None) -> PolicyError:
        return PolicyError(message, file=self.file, field=where, hint=hint)

    def keys(self, entries: list[dict[str, Any]]) -> tuple[NamedKey, ...]:
        found: dict[PublicKey, str] = {}
        for index, entry in enumerate(entries):
            where, name = f"keys[{index}]", entry["name"]
            try:
                pem = entry["pem"].encode("ascii")
                key = public_from_pem(pem, error=PolicyError)
            except UnicodeEncodeError as exc:
                raise self.error("not PEM", f"{where}.pem") from exc
            except PolicyError as exc:
                raise self.error(exc.message, f"{where}.pem", exc.hint) from exc
            if name in found.values():
                raise self.error(f"the name {name!r} stands twice", where)
            if key in found:
                raise self.error(f"the same key as {found[key]!r}", where, "one key counts once, whatever its names")
            found[key] = name
        return tuple(NamedKey(name, key) for key, name in found.items())

    def trust_policies(self, entries: list[dict[str, Any]], keys: tuple[NamedKey, ...]) -> tuple[TrustPolicy, ...]:
        known = _resolver(keys)
        policies = tuple(self.trust_policy(entry, f"trustPolicies[{i}]", known) for i, entry in enumerate(entries))
        names = [policy.name for policy in policies]
        if len(set(names)) != len(names):
            raise self.error("two policies have the same name", "trustPolicies")
        return policies

    def trust_policy(self, entry: dict[str, Any], where: str, known: Mapping[str, PublicKey]) -> TrustPolicy:
        grants = {
            extension: self.grant(grant, f"{where}.grants.{extension}")
            for extension, grant in entry.get("grants", {}).items()
        }
        return TrustPolicy(
            name=entry["name"],
            image_scopes=tuple(ImageScope(text) for text in entry["imageScopes"]),
            extension_scopes=tuple(entry["extensionScopes"]),
            level=entry["signatureVerification"]["level"],
            override=entry["signatureVerification"].get("override", {}),
            signatures=self.rule(entry["signatures"], f"{where}.signatures", known),
            binding=entry.get("binding", "image"),
            require_extensions=tuple(entry.get("requireExtensions", ())),
            min_security_version=entry.get("minSecurityVersion", {}),
            grants=grants,
        )

    def rule(self, entry: dict[str, Any], where: str, known: Mapping[str, PublicKey]) -> SignatureRule:
        def resolve(references: list[str], part: str) -> frozenset[PublicKey]:
            for reference in references:
                if reference not in known:
                    raise self.error(f"{reference!r} is not under 'keys'", f"{where}.{part}", "add its PEM there")
            return frozenset(known[reference] for reference in references)

        any_of = entry.get("anyOf", {"of": [], "minimumMatches": 0})
        all_keys = resolve(entry.get("allOf", []), "allOf")
        any_keys = resolve(any_of["of"], "anyOf.of")
        minimum = any_of["minimumMatches"]
        if minimum > len(any_keys):
            message = f"{minimum} of {len(any_keys)} different keys can never sign"
            raise self.error(message, f"{where}.anyOf.minimumMatches", "one key counts once, whatever its names")
        return SignatureRule(all_keys, any_keys, minimum)

    def grant(self, entry: dict[str, Any], where: str) -> Grant:
        where_capabilities = f"{where}.capabilities"
        capabilities = tuple(
            parse_capability(text, file=self.file, field=where_capabilities, error=PolicyError)
            for text in entry.get("capabilities", ())
        )
        limits = limits_from(entry.get("limits", {}))
        return Grant(capabilities, limits, entry.get("minIsolation", 0), entry.get("onFault"))

    def revocations(self, entry: dict[str, Any], keys: tuple[NamedKey, ...]) -> Revocations:
        known = _resolver(keys)
        revoked = set()
        for reference in entry.get("keys", ()):
            if reference in known:
                revoked.add(known[reference].keyid)
            elif "SHA256:" in reference:
                revoked.add(reference.removeprefix("key:"))
            else:
                raise self.error(f"{reference!r} is not under 'keys'", "revocations.keys", "or use its fingerprint")
        return Revocations(
            frozenset(revoked),
            frozenset(text.removeprefix("sha256:") for text in entry.get("statements", ())),
            frozenset(text.removeprefix("sha256:") for text in entry.get("payloads", ())),
            entry.get("minGeneration", {}),
        )
