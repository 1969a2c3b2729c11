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
from vmgraft.signing.policy import parse_policy
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
    stores: Sequence[Mapping[str, Any]] = (),
    identities: Sequence[str] = (),
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
        stores: Authorities to trust, as ``truststores.store_document`` makes them; each of type ``ca`` may sign too.
        identities: Whose certificates by those authorities count.

    Raises:
        UsageError: neither key nor authority was given, the same extension twice, or the parts make no valid policy.
    """
    authorities = [f"ca:{store['name']}" for store in stores if store["type"] == "ca"]
    _check_request([*keys, *authorities], grants)
    entry: dict[str, Any] = {
        "name": name,
        "imageScopes": list(image_scopes),
        "extensionScopes": list(extension_scopes),
        "signatureVerification": {"level": "strict"},
        "signatures": {
            "anyOf": {"minimumMatches": minimum, "of": [*(f"key:{key.keyid}" for key in keys.values()), *authorities]}
        },
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
    if stores:
        document["trustStores"] = [dict(store) for store in stores]
        entry["trustStores"] = [f"{store['type']}:{store['name']}" for store in stores]
    if identities:
        entry["trustedIdentities"] = list(identities)
    if expires is not None:
        document["expires"] = format_time(expires)
    try:
        parse_policy(format_policy(document))
    except PolicyError as exc:
        raise UsageError(f"no policy: {exc.message}", field=exc.field, hint=exc.hint) from exc
    return document


def _check_request(signatories: Sequence[str], grants: Sequence[Manifest]) -> None:
    """Refuse what makes no policy; a dictionary would silently keep the last of two manifests."""
    if not signatories:
        raise UsageError("a policy needs at least one key or authority to trust")
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
