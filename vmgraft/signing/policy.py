"""The trust policy: who may sign what, and what it may do. One self-contained JSON file; docs/policy.md has each field.

Everything is closed by default: a missing file, an unknown field, an empty list of signers or a rule that cannot be
met is an error, and what is not granted is denied.
"""

from __future__ import annotations

import hashlib
import os
from os import PathLike
from pathlib import Path
from typing import Any

from vmgraft.errors import PolicyError
from vmgraft.schemas import strict_json, validate
from vmgraft.signing.files import read_regular
from vmgraft.signing.policymodel import (
    LOGGED,
    OVERRIDABLE,
    Grant,
    NamedKey,
    Policy,
    Revocations,
    TrustPolicy,
)
from vmgraft.signing.policyreader import PolicyReader
from vmgraft.signing.policysign import PolicyTrust, is_wrapped, unwrap_policy
from vmgraft.signing.rules import SignatureRule
from vmgraft.signing.times import parse_time

__all__ = [
    "LOGGED",
    "MAX_POLICY",
    "OVERRIDABLE",
    "Grant",
    "NamedKey",
    "Policy",
    "PolicyTrust",
    "Revocations",
    "SignatureRule",
    "TrustPolicy",
    "load_policy",
    "parse_policy",
]

#: Largest policy accepted, in bytes.
MAX_POLICY = 4 * 1024 * 1024

_PathOrNone = str | PathLike[str] | None


def load_policy(path: str | PathLike[str], trust: PolicyTrust | None = None) -> Policy:
    """Load a policy; whatever is wrong with the file means deny.

    Args:
        path: The file: JSON, or JSON inside a DSSE envelope (``vmgraft policy sign``).
        trust: Who must have signed the policy, and which version was seen last; None takes unsigned ones only.

    Raises:
        PolicyError: missing, a symbolic link, not a regular file, over 4 MiB, malformed, contradicting itself, or not
            signed as ``trust`` demands.
    """
    try:
        data = read_regular(Path(path), MAX_POLICY, what="the policy", error=PolicyError, follow=False)
    except PolicyError as exc:
        if isinstance(exc.__cause__, FileNotFoundError):
            exc.hint = "nothing is trusted without a policy; make one with: vmgraft policy init"
        raise
    try:
        return _read(data, trust or PolicyTrust(), path)
    except PolicyError as exc:
        exc.hint = exc.hint or "docs/policy.md describes each field; make a first policy with: vmgraft policy init"
        raise


def _read(data: bytes, trust: PolicyTrust, file: _PathOrNone) -> Policy:
    """Take a policy out of its envelope, if it has one, and hold it to what is demanded of it."""
    document = strict_json(data, file=file, error=PolicyError, max_bytes=MAX_POLICY)
    if not is_wrapped(document):
        trust.check_unsigned(file)
        return _policy(document, data, file)
    payload, signed_by = unwrap_policy(data, trust, file)
    policy = parse_policy(payload, file=file, signed_by=signed_by)
    trust.check_version(policy.policy_version, signed_by, file)
    return policy


def parse_policy(data: bytes, *, file: _PathOrNone = None, signed_by: tuple[str, ...] = ()) -> Policy:
    """Parse the bytes of a policy.

    Args:
        data: UTF-8 JSON, at most 4 MiB.
        file: What to name in errors.
        signed_by: keyids of the keys whose signatures over these bytes were verified.

    Raises:
        PolicyError: malformed, or contradicting itself.
    """
    document = strict_json(data, file=file, error=PolicyError, max_bytes=MAX_POLICY)
    return _policy(document, data, file, signed_by)


def _policy(document: Any, data: bytes, file: _PathOrNone, signed_by: tuple[str, ...] = ()) -> Policy:
    validate("policy", document, file=file, error=PolicyError)
    reader = PolicyReader(file)
    keys = reader.keys(document["keys"])
    stores = reader.stores(document.get("trustStores", []))
    entries = reader.trust_policies(document["trustPolicies"], keys, stores)
    expires = document.get("expires")
    return Policy(
        file=None if file is None else os.fspath(file),
        sha256=hashlib.sha256(data).hexdigest(),
        document=document,
        policy_version=document["policyVersion"],
        expires=None if expires is None else parse_time(expires, file=file, field="expires", error=PolicyError),
        keys=keys,
        trust_policies=entries,
        revocations=reader.revocations(document.get("revocations", {}), keys),
        stores=stores,
        auditors=reader.auditors(document.get("auditors", []), keys, entries),
        signed_by=signed_by,
    )
