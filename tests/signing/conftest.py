"""A simulator of grafts: makes keys, statements, envelopes and policies, and hands them to the verifier as evidence."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from vmgraft.errors import PayloadMismatchError
from vmgraft.signing.contract import Report, Status
from vmgraft.signing.dsse import Envelope, Signature, pae, serialise
from vmgraft.signing.keys import PrivateKey, generate
from vmgraft.signing.manifest import canonical_manifest, parse_manifest
from vmgraft.signing.policy import Policy, parse_policy
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.signing.statement import build_statement
from vmgraft.signing.verify import verify_evidence

sys.path.insert(0, str(Path(__file__).parent))  # the helper modules of this folder

NOW = datetime(2026, 11, 22, 15, 0, 0, tzinfo=UTC)


@dataclass(frozen=True)
class Content:
    virtual_size: int = 1 << 20
    root_hash: bytes = b"\x11" * 32
    tree_digest: bytes = b"\x22" * 32
    flat: bytes | None = b"\x33" * 32


@dataclass
class FakeEvidence:
    """What an image would hand to the verifier, and a log of what was asked for."""

    stored: list[bytes]
    payloads: dict[str, bytes]
    names: Content = field(default_factory=Content)
    problem: str | None = None
    asked: list[Any] = field(default_factory=list)

    def format_problem(self) -> str | None:
        return self.problem

    def envelopes(self) -> Sequence[bytes]:
        return self.stored

    def payload(self, sha256: str) -> bytes:
        if sha256 not in self.payloads:
            raise PayloadMismatchError("nothing stored hashes to it")
        return self.payloads[sha256]

    def content(self, flat: bool) -> Content:
        self.asked.append(flat)
        return self.names


class Simulator:
    """Everything a test needs to make a graft, and to bend it."""

    def __init__(self, keys: dict[str, PrivateKey]) -> None:
        self.keys = keys
        self.now = NOW

    def manifest(self, extension: str = "com.acme.clock", **changes: Any) -> dict[str, Any]:
        document = {
            "id": extension,
            "version": "1.4.0",
            "securityVersion": 3,
            "generation": 1,
            "abi": "vmgraft/1",
            "module": "module.wasm",
            "capabilities": ["log", "pio:0x510-0x517"],
            "limits": {"memoryMiB": 8},
        }
        return {name: value for name, value in (document | changes).items() if value is not None}

    def statement(self, manifests: Sequence[dict[str, Any]], **options: Any) -> tuple[bytes, dict[str, bytes]]:
        parts = []
        for manifest in manifests:
            module = f"module of {manifest['id']}".encode() if "module" in manifest else None
            parts.append((canonical_manifest(manifest), module))
        content = options.pop("content", Content())
        options = {"created": NOW - timedelta(days=1), "expires": NOW + timedelta(days=30)} | options
        payloads = {hashlib.sha256(data).hexdigest(): data for pair in parts for data in pair if data is not None}
        return build_statement(content, parts, **options), payloads

    def envelope(self, statement: bytes, *signers: str) -> Envelope:
        message = pae("application/vnd.in-toto+json", statement)
        signatures = [Signature(self.keys[name].keyid, self.keys[name].sign(message)) for name in signers]
        return Envelope(statement, tuple(signatures))

    def graft(self, *manifests: dict[str, Any], signers: Sequence[str] = ("vendor",), **options: Any) -> FakeEvidence:
        statement, payloads = self.statement(manifests or [self.manifest()], **options)
        return FakeEvidence([serialise(self.envelope(statement, *signers))], payloads)

    def edited(self, edit: Callable[[dict[str, Any]], None], *signers: str) -> FakeEvidence:
        """A graft whose statement was edited by its signer, so that the signature is good."""
        statement, payloads = self.statement([self.manifest()])
        document = json.loads(statement)
        edit(document)
        data = json.dumps(document).encode()
        return FakeEvidence([serialise(self.envelope(data, *(signers or ("vendor",))))], payloads)

    def policy_document(self, *names: str, manifests: Sequence[dict[str, Any]] = (), **options: Any) -> dict[str, Any]:
        keys = {name: self.keys[name].public for name in names or ("vendor",)}
        grants = [parse_manifest(canonical_manifest(manifest)) for manifest in manifests or [self.manifest()]]
        return copy.deepcopy(init_policy(keys, grants, **options))

    def policy(self, *names: str, entry: dict[str, Any] | None = None, **options: Any) -> Policy:
        """A policy that trusts the named keys and grants the usual manifest; ``entry`` replaces members of it."""
        top = options.pop("top", {})
        document = self.policy_document(*names, **options) | top
        document["trustPolicies"][0] |= entry or {}
        return parse_policy(format_policy(document), file="policy.json")

    def verify(self, evidence: FakeEvidence, policy: Policy | None = None, **options: Any) -> Report:
        options = {"image_name": "disk.qcow2", "now": NOW} | options
        report = verify_evidence(evidence, policy or self.policy(), **options)
        statuses = {check.status for check in report.checks}
        assert report.ok is (report.error is None) is (Status.FAIL not in statuses), (
            "a report must not contradict itself"
        )
        return report


@pytest.fixture(scope="session")
def sim() -> Simulator:
    kinds = {
        "vendor": "p256",
        "second": "ed25519",
        "third": "p256",
        "stranger": "p256",
        "rsa": "rsa3072",
        "pq": "mldsa65",
    }
    return Simulator({name: generate(kind) for name, kind in kinds.items()})


@pytest.fixture(scope="session")
def content_type() -> type[Content]:
    return Content


@pytest.fixture(scope="session")
def evidence_type() -> type[FakeEvidence]:
    return FakeEvidence
