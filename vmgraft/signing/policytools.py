"""Makes a first trust policy, and says what looks wrong in one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from vmgraft.errors import PolicyError, UsageError
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.manifest import Manifest
from vmgraft.signing.policy import Policy, TrustPolicy, parse_policy
from vmgraft.signing.report import limits_document
from vmgraft.signing.times import format_time


def key_name(text: str) -> str:
    """Return a name for a key that the policy schema accepts, made from a file name or any other text."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")
    return name[:128] or "key"


def name_keys(labelled: Iterable[tuple[str, PublicKey]]) -> dict[str, PublicKey]:
    """Return keys by distinct names: a name already taken gets a number, a key given twice keeps its first name."""
    found: dict[str, PublicKey] = {}
    for label, key in labelled:
        if key in found.values():
            continue
        name, number = key_name(label), 2
        while name in found:
            name, number = f"{key_name(label)[:120]}-{number}", number + 1
        found[name] = key
    return found


def init_policy(
    keys: Mapping[str, PublicKey],
    grants: Sequence[Manifest] = (),
    *,
    name: str = "default",
    minimum: int = 1,
    image_scopes: Sequence[str] = ("*",),
    extension_scopes: Sequence[str] = ("*",),
    binding: str = "image",
    require: bool = False,
    expires: datetime | None = None,
) -> dict[str, Any]:
    """Return a strict policy with one entry; ``format_policy`` gives the bytes of the file.

    Args:
        keys: Trusted keys by name.
        grants: Manifests whose every claim and limit is granted; everything else stays denied.
        name: Name of the entry.
        minimum: How many of the keys must sign.
        image_scopes: Images it speaks about.
        extension_scopes: Extensions it speaks about.
        binding: ``image``, or ``any`` to accept portable statements too.
        require: Demand that each extension in ``grants`` is present.
        expires: When the policy file ends.

    Raises:
        UsageError: no key was given, the same extension twice, or the parts do not make a valid policy.
    """
    _check_request(keys, grants)
    entry: dict[str, Any] = {
        "name": name,
        "imageScopes": list(image_scopes),
        "extensionScopes": list(extension_scopes),
        "signatureVerification": {"level": "strict"},
        "signatures": {"anyOf": {"minimumMatches": minimum, "of": [f"key:{key.keyid}" for key in keys.values()]}},
        "binding": binding,
        "requireExtensions": [manifest.id for manifest in grants] if require else [],
        "minSecurityVersion": {manifest.id: manifest.security_version for manifest in grants},
        "grants": {manifest.id: _grant(manifest) for manifest in grants},
    }
    document: dict[str, Any] = {
        "version": "1.0",
        "policyVersion": 1,
        "keys": [{"name": label, "pem": key.pem.decode("ascii")} for label, key in keys.items()],
        "trustPolicies": [entry],
        "revocations": {"keys": [], "statements": [], "payloads": [], "minGeneration": {}},
    }
    if expires is not None:
        document["expires"] = format_time(expires)
    try:
        parse_policy(format_policy(document))
    except PolicyError as exc:
        raise UsageError(f"no policy: {exc.message}", field=exc.field, hint=exc.hint) from exc
    return document


def _check_request(keys: Mapping[str, PublicKey], grants: Sequence[Manifest]) -> None:
    """Refuse what makes no policy; a dictionary would silently keep the last of two manifests."""
    if not keys:
        raise UsageError("a policy needs at least one key to trust")
    ids = [manifest.id for manifest in grants]
    twice = next((item for item in ids if ids.count(item) > 1), None)
    if twice is not None:
        raise UsageError(f"two manifests of {twice}: which of them is granted?", field="grants", hint="name one folder")


def _grant(manifest: Manifest) -> dict[str, Any]:
    return {
        "capabilities": [str(capability) for capability in manifest.capabilities],
        "limits": limits_document(manifest.limits),
        "minIsolation": 0,
    }


def format_policy(document: Mapping[str, Any]) -> bytes:
    """Return the bytes of a policy file: indented, in the order given, one newline at the end."""
    return json.dumps(document, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"


def check_policy(policy: Policy, *, now: datetime | None = None) -> list[str]:
    """Return what looks wrong in a valid policy, one sentence each.

    Args:
        policy: The policy.
        now: The time to judge its expiry by; None leaves that out.
    """
    found = []
    if now is not None and policy.expires is not None and now >= policy.expires:
        found.append(f"the policy expired at {format_time(policy.expires)}: everything is refused")
    used = {key for entry in policy.trust_policies for key in entry.signatures.keys}
    found += [f"the key {named.name} is used by no trust policy" for named in policy.keys if named.key not in used]
    found += [named.key.warning for named in policy.keys if named.key.warning is not None]
    for entry in policy.trust_policies:
        found += [f"{entry.name}: {problem}" for problem in _entry_problems(entry, policy)]
    return found + _twins(policy)


def _entry_problems(entry: TrustPolicy, policy: Policy) -> list[str]:
    found = []
    revoked = frozenset(key for key in entry.signatures.keys if key.keyid in policy.revocations.keys)
    problem = entry.signatures.problem(entry.signatures.keys - revoked)
    if problem is not None:
        found.append(f"can never be satisfied, since keys it needs are revoked: {problem}")
    elif revoked:
        found.append("names revoked keys: " + ", ".join(sorted(key.keyid for key in revoked)))
    lists = {
        "requireExtensions": entry.require_extensions,
        "minSecurityVersion": entry.min_security_version,
        "grants": entry.grants,
    }
    for name, extensions in lists.items():
        outside = sorted(extension for extension in extensions if not entry.in_scope(extension))
        if outside:
            effect = "can never be satisfied" if name == "requireExtensions" else "has no effect"
            found.append(f"{name} {effect} for {', '.join(outside)}: outside extensionScopes")
    if entry.level != "strict":
        found.append(f"the level {entry.level} turns failures into warnings")
    relaxed = sorted(check for check, action in entry.override.items() if action == "log")
    if relaxed:
        found.append("only logs: " + ", ".join(relaxed))
    if not entry.grants:
        found.append("grants nothing: extensions that claim anything are refused")
    return found


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
