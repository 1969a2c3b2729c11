"""What looks wrong in a valid policy: what can never match, is never used, is wider than needed, or ends soon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from typing import Final

from vmgraft.signing.capabilities import covers
from vmgraft.signing.contract import Limits
from vmgraft.signing.manifest import LIMIT_NAMES, Manifest
from vmgraft.signing.policymodel import Grant, Policy, TrustPolicy
from vmgraft.signing.rules import SignatureRule, Vouch
from vmgraft.signing.times import format_time, later
from vmgraft.signing.truststores import TrustStore

#: What ends within this time is worth a warning.
SOON: Final = timedelta(days=30)


def check_policy(policy: Policy, *, now: datetime | None = None, against: Sequence[Manifest] = ()) -> list[str]:
    """Return what looks wrong in a valid policy, one sentence each.

    Args:
        policy: The policy.
        now: The time to judge by what ends: the policy, certificates, CRLs. None leaves that out.
        against: Manifests of the extensions the policy is for; grants are compared with them.
    """
    found: list[str] = []
    if now is not None:
        found += _endings(policy, now)
    found += [*development_stores(policy), *_unused(policy)]
    found += [named.key.warning for named in policy.keys if named.key.warning is not None]
    for entry in policy.trust_policies:
        problems = [*_entry_problems(entry, policy), *_certificate_problems(entry, policy)]
        problems += _against(entry, against) if against else ()
        found += [f"{entry.name}: {problem}" for problem in problems]
    return found + _twins(policy)


# --- time


def _endings(policy: Policy, now: datetime) -> Iterator[str]:
    """Say what has ended, or ends soon."""
    if policy.expires is not None and now >= policy.expires:
        yield f"the policy expired at {format_time(policy.expires)}: everything is refused"
    elif policy.expires is not None and later(now, SOON) > policy.expires:
        yield f"the policy expires at {format_time(policy.expires)}"
    for store in policy.stores.values():
        yield from _store_endings(store, now)


def _store_endings(store: TrustStore, now: datetime) -> Iterator[str]:
    from cryptography import x509

    for der in store.roots:
        certificate = x509.load_der_x509_certificate(der)
        name, end = certificate.subject.rfc4514_string(), certificate.not_valid_after_utc
        if now > end:
            yield f"{store.reference}: the certificate of {name!r} expired at {format_time(end)}"
        elif now < certificate.not_valid_before_utc:
            begin = format_time(certificate.not_valid_before_utc)
            yield f"{store.reference}: the certificate of {name!r} is not valid before {begin}"
        elif later(now, SOON) > end:
            yield f"{store.reference}: the certificate of {name!r} expires at {format_time(end)}"
    for der in store.crls:
        crl = x509.load_der_x509_crl(der)
        name, update = crl.issuer.rfc4514_string(), crl.next_update_utc
        if update is None:
            yield f"{store.reference}: the CRL of {name!r} does not say how long it is good: it counts as expired"
        elif now >= update:
            yield f"{store.reference}: the CRL of {name!r} expired at {format_time(update)}: its chains are refused"
        elif later(now, SOON) > update:
            yield f"{store.reference}: the CRL of {name!r} ends at {format_time(update)}"


# --- whom nobody should trust


def development_stores(policy: Policy) -> list[str]:
    """Say which trust stores hold a development authority (``vmgraft dev-ca``)."""
    if not policy.stores:
        return []
    from vmgraft.signing.paths import is_development, load_roots

    stores = [store.reference for store in policy.stores.values() if is_development(load_roots(store.roots))]
    return [f"{reference} holds a development authority: anybody may hold its keys" for reference in stores]


# --- what nothing refers to


def _unused(policy: Policy) -> Iterator[str]:
    entries = policy.trust_policies
    used = {key for entry in entries for key in entry.signatures.keys} | set(policy.auditors)
    yield from (f"the key {named.name} is used by no trust policy" for named in policy.keys if named.key not in used)
    named = {reference for entry in entries for reference in entry.trust_stores}
    yield from (f"the trust store {name} is used by no trust policy" for name in policy.stores if name not in named)


# --- one trust policy


def _entry_problems(entry: TrustPolicy, policy: Policy) -> Iterator[str]:
    revoked = frozenset(key for key in entry.signatures.keys if key.keyid in policy.revocations.keys)
    problem = _never(entry.signatures, policy)
    if problem is not None:
        yield f"can never be satisfied, since keys it needs are revoked: {problem}"
    elif revoked:
        yield "names revoked keys: " + ", ".join(sorted(key.keyid for key in revoked))
    lists = {
        "requireExtensions": entry.require_extensions,
        "minSecurityVersion": entry.min_security_version,
        "maxAdvance": entry.max_advance,
        "grants": entry.grants,
    }
    for name, extensions in lists.items():
        outside = sorted(extension for extension in extensions if not entry.in_scope(extension))
        if outside:
            effect = "can never be satisfied" if name == "requireExtensions" else "has no effect"
            yield f"{name} {effect} for {', '.join(outside)}: outside extensionScopes"
    if entry.level != "strict":
        yield f"the level {entry.level} turns failures into warnings"
    relaxed = sorted(check for check, action in entry.override.items() if action == "log")
    if relaxed:
        yield "only logs: " + ", ".join(relaxed)
    if entry.max_advance and not entry.needs_state:
        yield 'maxAdvance is checked only where there is rollback memory; "rollbackState": "required" demands it'
    if not entry.grants:
        yield "grants nothing: extensions that claim anything are refused"


def _never(rule: SignatureRule, policy: Policy) -> str | None:
    """Say why a rule can never hold, even when every key that is not revoked signs and every authority certifies."""
    certified = len(rule.any_of) - len([place for place in rule.any_of if not isinstance(place, str)])
    bare = SignatureRule(
        frozenset(place for place in rule.all_of if not isinstance(place, str)),
        frozenset(place for place in rule.any_of if not isinstance(place, str)),
        max(0, rule.minimum - certified),
    )
    if not bare.signatories:
        return None
    return bare.problem([Vouch(key) for key in bare.keys if key.keyid not in policy.revocations.keys])


def _certificate_problems(entry: TrustPolicy, policy: Policy) -> Iterator[str]:
    stores = [policy.stores[reference] for reference in entry.trust_stores]
    authorities = [store for store in stores if store.type == "ca"]
    for store in authorities:
        if store.name not in entry.signatures.authorities:
            yield f"trusts {store.reference}, which its signatures do not name: it has no effect"
        elif store.require_crls and not store.crls:
            yield f"{store.reference} can never certify anybody: requireCrls is set, and it has no CRL"
    if any(store.type == "tsa" for store in stores) and not authorities:
        yield "names timestamp authorities and no certificate authority: they have no effect"
    if entry.any_identity:
        yield 'trustedIdentities is "*": whoever gets a certificate of these authorities is trusted'


# --- grants against the manifests they are for


def _against(entry: TrustPolicy, manifests: Sequence[Manifest]) -> Iterator[str]:
    for extension, grant in sorted(entry.grants.items()):
        mine = [manifest for manifest in manifests if manifest.id == extension]
        if not mine:
            yield f"grants something to {extension}, of which no manifest was given"
            continue
        claims = [claim for manifest in mine for claim in manifest.capabilities]
        for capability in grant.capabilities:
            if capability not in claims:
                part = [str(claim) for claim in claims if covers(capability, claim)]
                much = f"only {', '.join(part)} of it is claimed" if part else "no manifest claims it"
                yield f"grants {extension} more than it needs: {capability}; {much}"
        yield from _wide_limits(extension, grant, mine)
    for manifest in manifests:
        if entry.in_scope(manifest.id):
            yield from _narrow(manifest, entry)


def _wide_limits(extension: str, grant: Grant, manifests: Sequence[Manifest]) -> Iterator[str]:
    for limit in fields(Limits):
        given = getattr(grant.limits, limit.name)
        most = max(getattr(manifest.limits, limit.name) for manifest in manifests)
        if given > most:
            yield f"grants {extension} more than it asks for: {LIMIT_NAMES[limit.name]} {given}, asked are {most}"


def _narrow(manifest: Manifest, entry: TrustPolicy) -> Iterator[str]:
    """Say for what an extension will be refused."""
    granted = entry.grants.get(manifest.id, Grant()).capabilities
    denied = [str(claim) for claim in manifest.capabilities if not any(covers(grant, claim) for grant in granted)]
    name = f"{manifest.id} {manifest.version}"
    if denied:
        yield f"{name} is refused: it claims {', '.join(denied)}, which is not granted"
    lowest = entry.min_security_version.get(manifest.id, 0)
    if manifest.security_version < lowest:
        yield f"{name} is refused: its security version {manifest.security_version} is below {lowest}"


# --- policies that tie


def _twins(policy: Policy) -> list[str]:
    """Find policies that tie for the same images and extensions, and so refuse them."""
    found = []
    for index, one in enumerate(policy.trust_policies):
        for other in policy.trust_policies[index + 1 :]:
            images = sorted({s.text for s in one.image_scopes} & {s.text for s in other.image_scopes})
            extensions = set(one.extension_scopes) & set(other.extension_scopes)
            if images and (extensions or "*" in {*one.extension_scopes, *other.extension_scopes}):
                found.append(f"{one.name} and {other.name} tie for {', '.join(images)}: such images are refused")
    return found
