"""Turns a policy document that passed the schema into ``policymodel``; what contradicts itself is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from vmgraft.errors import PolicyError
from vmgraft.signing.capabilities import parse_capability
from vmgraft.signing.identities import Identity, parse_identity
from vmgraft.signing.keys import PublicKey, public_from_pem
from vmgraft.signing.manifest import limits_from
from vmgraft.signing.policymodel import Grant, NamedKey, Revocations, TrustPolicy
from vmgraft.signing.rules import Signatory, SignatureRule
from vmgraft.signing.scopes import ImageScope
from vmgraft.signing.truststores import TrustStore, read_store
from vmgraft.words import counted

#: Accepts every name that an authority certifies; must stand alone in ``trustedIdentities``.
ANY_IDENTITY = "*"

_PathOrNone = str | PathLike[str] | None


def _resolver(keys: tuple[NamedKey, ...]) -> dict[str, PublicKey]:
    """Return what ``key:NAME`` and ``key:SHA256:...`` stand for."""
    return {f"key:{named.name}": named.key for named in keys} | {f"key:{named.key.keyid}": named.key for named in keys}


@dataclass(frozen=True, slots=True)
class PolicyReader:
    """Carries the file's name through the reading.

    Every method raises ``PolicyError``.
    """

    file: _PathOrNone

    def error(self, message: str, where: str, hint: str | None = None) -> PolicyError:
        """Return an error about a field."""
        return PolicyError(message, file=self.file, field=where, hint=hint)

    def keys(self, entries: list[dict[str, Any]]) -> tuple[NamedKey, ...]:
        """Return ``keys``."""
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

    def stores(self, entries: list[dict[str, Any]]) -> dict[str, TrustStore]:
        """Return the trust stores by reference."""
        stores: dict[str, TrustStore] = {}
        for index, entry in enumerate(entries):
            where = f"trustStores[{index}]"
            store = read_store(entry, where, self.file)
            if store.reference in stores:
                raise self.error(f"{store.reference} stands twice", where)
            stores[store.reference] = store
        return stores

    def auditors(
        self, references: list[str], keys: tuple[NamedKey, ...], entries: tuple[TrustPolicy, ...]
    ) -> tuple[PublicKey, ...]:
        """Return the keys that ``auditors`` names; one that signs images would vouch for itself."""
        known = _resolver(keys)
        for index, reference in enumerate(references):
            if reference not in known:
                raise self.error(f"{reference!r} is not under 'keys'", "auditors", "add its PEM there")
            signs = [i for i, entry in enumerate(entries) if known[reference] in entry.signatures.keys]
            if signs:
                message = f"{reference!r} is an auditor, and also signs images: trustPolicies[{signs[0]}].signatures"
                hint = "an auditor's word stands for all signatures of a rule: give the auditor a key of its own"
                raise self.error(message, f"auditors[{index}]", hint)
        return tuple(dict.fromkeys(known[reference] for reference in references))

    def trust_policies(
        self, entries: list[dict[str, Any]], keys: tuple[NamedKey, ...], stores: Mapping[str, TrustStore]
    ) -> tuple[TrustPolicy, ...]:
        """Return ``trustPolicies``."""
        known = _resolver(keys)
        policies = tuple(
            self.trust_policy(entry, f"trustPolicies[{i}]", known, stores) for i, entry in enumerate(entries)
        )
        names = [policy.name for policy in policies]
        if len(set(names)) != len(names):
            raise self.error("two policies have the same name", "trustPolicies")
        return policies

    def trust_policy(
        self, entry: dict[str, Any], where: str, known: Mapping[str, PublicKey], stores: Mapping[str, TrustStore]
    ) -> TrustPolicy:
        """Return one entry of ``trustPolicies``."""
        grants = {
            extension: self.grant(grant, f"{where}.grants.{extension}")
            for extension, grant in entry.get("grants", {}).items()
        }
        references = self.references(entry, where, stores)
        identities, any_identity = self.identities(entry, where, references)
        authorities = {reference for reference in references if reference.startswith("ca:")}
        return TrustPolicy(
            name=entry["name"],
            image_scopes=tuple(ImageScope(text) for text in entry["imageScopes"]),
            extension_scopes=tuple(entry["extensionScopes"]),
            level=entry["signatureVerification"]["level"],
            override=entry["signatureVerification"].get("override", {}),
            signatures=self.rule(entry["signatures"], f"{where}.signatures", known, authorities),
            binding=entry.get("binding", "image"),
            require_extensions=tuple(entry.get("requireExtensions", ())),
            min_security_version=entry.get("minSecurityVersion", {}),
            grants=grants,
            trust_stores=references,
            identities=identities,
            any_identity=any_identity,
            max_advance=entry.get("maxAdvance", {}),
            needs_state=entry.get("rollbackState", "optional") == "required",
            read_before=entry.get("contentCheck", "first-read") == "before-start",
        )

    def references(self, entry: dict[str, Any], where: str, stores: Mapping[str, TrustStore]) -> tuple[str, ...]:
        """Return the trust stores that an entry names."""
        named = tuple(entry.get("trustStores", ()))
        for reference in named:
            if reference not in stores:
                raise self.error(
                    f"there is no trust store {reference!r}",
                    f"{where}.trustStores",
                    "add it to 'trustStores' at the top, with its certificates",
                )
        return named

    def identities(
        self, entry: dict[str, Any], where: str, references: tuple[str, ...]
    ) -> tuple[tuple[Identity, ...], bool]:
        """Return whom certificates must be for, and whether anybody will do; it goes with an authority."""
        texts, field = entry.get("trustedIdentities", []), f"{where}.trustedIdentities"
        if any(reference.startswith("ca:") for reference in references):
            if not texts:
                hint = 'say whose certificates count: "x509.subject: C=US, O=Acme, CN=Release"; "*" is everybody\'s'
                raise self.error("an authority is trusted, and for whom is not said", field, hint)
        elif texts:
            hint = "name a store of type ca under trustStores; keys are told by their fingerprint"
            raise self.error(
                "no certificate authority is trusted here, so nobody can have these identities", field, hint
            )
        if ANY_IDENTITY in texts:
            if len(texts) > 1:
                raise self.error("'*' accepts everybody, and others are named beside it", field, "leave out '*'")
            return (), True
        return tuple(parse_identity(text, field=field, file=self.file) for text in texts), False

    def rule(
        self, entry: dict[str, Any], where: str, known: Mapping[str, PublicKey], authorities: set[str]
    ) -> SignatureRule:
        """Return ``signatures``."""

        def resolve(references: list[str], part: str) -> frozenset[Signatory]:
            found: set[Signatory] = set()
            for reference in references:
                if reference in authorities:
                    found.add(reference.removeprefix("ca:"))
                elif reference.startswith("ca:"):
                    hint = "name it under this trust policy's trustStores"
                    raise self.error(f"{reference!r} is not trusted here", f"{where}.{part}", hint)
                elif reference in known:
                    found.add(known[reference])
                else:
                    raise self.error(f"{reference!r} is not under 'keys'", f"{where}.{part}", "add its PEM there")
            return frozenset(found)

        any_of = entry.get("anyOf", {"of": [], "minimumMatches": 0})
        all_places = resolve(entry.get("allOf", []), "allOf")
        any_places = resolve(any_of["of"], "anyOf.of")
        minimum = any_of["minimumMatches"]
        if minimum > len(any_places):
            message = f"{minimum} must sign, of {counted(len(any_places), 'different key')}: that can never hold"
            hint = "one key counts once, whatever its names, and one 'ca:' is one place"
            raise self.error(message, f"{where}.anyOf.minimumMatches", hint)
        return SignatureRule(all_places, any_places, minimum)

    def grant(self, entry: dict[str, Any], where: str) -> Grant:
        """Return one of ``grants``."""
        where_capabilities = f"{where}.capabilities"
        capabilities = tuple(
            parse_capability(text, file=self.file, field=where_capabilities, error=PolicyError)
            for text in entry.get("capabilities", ())
        )
        limits = limits_from(entry.get("limits", {}))
        return Grant(capabilities, limits, entry.get("minIsolation", 0), entry.get("onFault"))

    def revocations(self, entry: dict[str, Any], keys: tuple[NamedKey, ...]) -> Revocations:
        """Return ``revocations``."""
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
