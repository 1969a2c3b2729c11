"""What the verifier is handed and what it gives back; plain data, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vmgraft.signing.signedfiles import SignedFiles


class ContentNames(Protocol):
    """The digests of a guest content (``vmgraft.imagefmt.contract.ContentDigest`` has this shape)."""

    @property
    def virtual_size(self) -> int: ...  # noqa: D102
    @property
    def root_hash(self) -> bytes: ...  # noqa: D102
    @property
    def tree_digest(self) -> bytes: ...  # noqa: D102
    @property
    def flat(self) -> bytes | None: ...  # noqa: D102


class TreeNames(Protocol):
    """The names of a content tree (``vmgraft.imagefmt.tree.ContentTree`` has this shape)."""

    virtual_size: int
    root_hash: bytes
    tree_digest: bytes


class Evidence(Protocol):
    """A graft as found in an image; nothing in it is trusted."""

    def format_problem(self) -> str | None:
        """Say what is structurally wrong with the record (state not ok, bad header or table), or None."""

    def envelopes(self) -> Sequence[bytes]:
        """Return the stored DSSE envelopes, raw bytes as found (even when the record's own digest of them differs)."""

    def payload(self, sha256: str) -> bytes:
        """Return the stored manifest, module or piece of files whose SHA-256 (lowercase hex) is asked for.

        Raises:
            PayloadMismatchError: nothing stored hashes to it.
        """

    def content(self, flat: bool) -> ContentNames:
        """Read the whole guest content and return its digests; ``flat`` asks for the flat SHA-256 too."""


class Status(StrEnum):
    """How a check ended."""

    PASS = "pass"  # noqa: S105 - a verdict, not a password
    FAIL = "fail"
    WARN = "warn"  #: failed, but the policy only logs it
    SKIP = "skip"  #: not reached, or not asked for


@dataclass(frozen=True, slots=True)
class Check:
    """One verdict. ``error`` is the ``code`` of the error class that this failure amounts to, else None."""

    name: str
    status: Status
    detail: str
    error: str | None = None
    hint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "name": self.name,
            "status": self.status.value,
            "detail": self.detail,
            "error": self.error,
            "hint": self.hint,
        }


@dataclass(frozen=True, slots=True)
class Limits:
    """Quotas of one extension: manifest wish, cut down to what the policy allows."""

    memory_mib: int = 16
    fuel_per_call: int = 5_000_000
    call_ms: int = 1000
    calls_per_second: int = 100_000
    log_bytes: int = 65536


@dataclass(frozen=True, slots=True)
class VerifiedExtension:
    """An extension whose bytes were checked against a trusted statement. Built by the verifier only.

    Attributes:
        manifest: The parsed manifest (schema ``manifest``), from the very bytes that were verified.
        module: The WebAssembly module's bytes, or None where the extension has none.
        capabilities: Effective capabilities: declared and granted.
        isolation: Minimum isolation level the policy demands of the worker.
        files: The extension's further files, or None; they can be read as long as the evidence is open.
    """

    id: str
    version: str
    manifest: dict[str, Any]
    module: bytes | None
    module_sha256: str | None
    capabilities: tuple[str, ...]
    limits: Limits
    on_fault: str
    isolation: int = 0
    files: SignedFiles | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class CertifiedSigner:
    """A signer whose key a certificate names.

    Attributes:
        keyid: Of the leaf's key.
        authority: Name of the trust store at the end of the chain.
        subject: The leaf's subject (RFC 4514).
        sans: Its subject alternative names, ``kind:value``.
        not_after: When the first certificate of the chain ends, ``2026-11-22T15:00:00Z``.
        timestamp: When a trusted timestamp authority saw the signature, where that was needed, or None.
        timestamp_authority: Name of the trust store of that authority, or None.
    """

    keyid: str
    authority: str
    subject: str
    sans: tuple[str, ...]
    not_after: str
    timestamp: str | None = None
    timestamp_authority: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "keyid": self.keyid,
            "authority": self.authority,
            "subject": self.subject,
            "sans": list(self.sans),
            "notAfter": self.not_after,
            "timestamp": self.timestamp,
            "timestampAuthority": self.timestamp_authority,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The verdict over one image.

    Attributes:
        error: ``code`` of the deciding failure (integrity before authenticity, freshness, policy); None when ok.
        statement: The verified statement, or None when it is not to be believed.
        signers: keyids (``SHA256:...``) of the distinct trusted keys that signed.
        extensions: Filled only when ``ok``.
        certified: What certificates say about those signers that have one.
        named: (keyid, name) of those signers that the policy lists under ``keys``.
    """

    ok: bool
    error: str | None
    checks: tuple[Check, ...]
    policy: str | None = None
    statement: dict[str, Any] | None = None
    signers: tuple[str, ...] = ()
    extensions: tuple[VerifiedExtension, ...] = ()
    warnings: tuple[str, ...] = field(default=())
    certified: tuple[CertifiedSigner, ...] = ()
    named: tuple[tuple[str, str], ...] = ()
