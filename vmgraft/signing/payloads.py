"""Whether the payloads found are the ones a statement names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from vmgraft.errors import PayloadMismatchError
from vmgraft.signing.contract import Evidence
from vmgraft.signing.manifest import Manifest, parse_manifest
from vmgraft.signing.statement import ExtensionEntry, Statement


@dataclass(frozen=True, slots=True)
class FoundExtension:
    """An extension whose bytes have the digests that the statement names."""

    entry: ExtensionEntry
    manifest: Manifest
    module: bytes | None
    module_sha256: str | None


def find_extension(evidence: Evidence, statement: Statement, entry: ExtensionEntry) -> FoundExtension:
    """Fetch one extension's manifest and module and compare them with the statement.

    Raises:
        PayloadMismatchError: missing, other bytes than signed, or other facts in the manifest than in the statement.
        GraftFormatError: the manifest is not a valid one.
    """
    manifest = parse_manifest(_fetch(evidence, entry.manifest, statement.subjects[entry.manifest]), file=entry.manifest)
    facts = {
        "id": (manifest.id, entry.id),
        "version": (manifest.version, entry.version),
        "securityVersion": (manifest.security_version, entry.security_version),
        "generation": (manifest.generation, entry.generation),
        "abi": (manifest.abi, entry.abi),
    }
    for name, (here, there) in facts.items():
        if here != there:
            message = f"the manifest says {here!r}, the statement {there!r}"
            raise PayloadMismatchError(message, file=entry.manifest, field=name)
    if (manifest.module is None) != (entry.module is None):
        message = "manifest and statement disagree whether there is a module"
        raise PayloadMismatchError(message, file=entry.manifest, field="module")
    if entry.module is None:
        return FoundExtension(entry, manifest, None, None)
    digests = statement.subjects[entry.module]
    return FoundExtension(entry, manifest, _fetch(evidence, entry.module, digests), digests["sha256"])


def _fetch(evidence: Evidence, name: str, digests: Mapping[str, str]) -> bytes:
    """Return a payload after hashing it here, with every algorithm the statement names."""
    data = evidence.payload(digests["sha256"])
    for algorithm, expected in digests.items():
        if hashlib.new(algorithm, data).hexdigest() != expected:
            raise PayloadMismatchError("the stored bytes are not the signed ones", file=name, field=algorithm)
    return data
