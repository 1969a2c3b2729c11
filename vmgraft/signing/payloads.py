"""Whether the payloads found are the ones a statement names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from vmgraft.errors import PayloadMismatchError
from vmgraft.signing.contract import Evidence
from vmgraft.signing.manifest import Manifest, parse_manifest
from vmgraft.signing.signedfiles import SignedFiles
from vmgraft.signing.statement import ExtensionEntry, Statement


@dataclass(frozen=True, slots=True)
class FoundExtension:
    """An extension whose bytes have the digests that the statement names."""

    entry: ExtensionEntry
    manifest: Manifest
    module: bytes | None
    module_sha256: str | None
    files: SignedFiles | None = None


def find_extension(evidence: Evidence, statement: Statement, entry: ExtensionEntry) -> FoundExtension:
    """Fetch one extension's manifest, module and files and compare them with statement and manifest.

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
    files = _find_files(evidence, statement, entry, manifest)
    if entry.module is None:
        return FoundExtension(entry, manifest, None, None, files)
    digests = statement.subjects[entry.module]
    return FoundExtension(entry, manifest, _fetch(evidence, entry.module, digests), digests["sha256"], files)


def _find_files(
    evidence: Evidence, statement: Statement, entry: ExtensionEntry, manifest: Manifest
) -> SignedFiles | None:
    """Return the files of an extension, every one read and compared once; None where there are none."""
    if not manifest.files and not entry.files:
        return None
    pieces = [(name, statement.subjects[name]) for name in entry.files]
    files = SignedFiles(evidence, pieces, manifest.files, name=entry.manifest)
    files.verify()
    return files


def _fetch(evidence: Evidence, name: str, digests: Mapping[str, str]) -> bytes:
    """Return a payload after hashing it here, with every algorithm the statement names."""
    data = evidence.payload(digests["sha256"])
    for algorithm, expected in digests.items():
        if hashlib.new(algorithm, data).hexdigest() != expected:
            raise PayloadMismatchError("the stored bytes are not the signed ones", file=name, field=algorithm)
    return data
