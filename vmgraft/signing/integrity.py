"""The state of one verification, and its steps 1 to 6: is the graft intact, whoever signed it? See ``verify``."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime

from vmgraft.errors import (
    BadSignatureError,
    ContentMismatchError,
    GraftFormatError,
    UntrustedSignerError,
    VerificationError,
    VmgraftError,
)
from vmgraft.signing.capabilities import covered
from vmgraft.signing.contract import (
    CertifiedSigner,
    Check,
    ContentNames,
    Evidence,
    Report,
    Status,
    TreeNames,
    VerifiedExtension,
)
from vmgraft.signing.dsse import Envelope, parse_envelope
from vmgraft.signing.judge import Signers, judge_signatures
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.manifest import lower_limits, stricter_fault
from vmgraft.signing.once import Once
from vmgraft.signing.payloads import FoundExtension, find_extension
from vmgraft.signing.policymodel import Grant, TrustPolicy
from vmgraft.signing.statement import CONTENT_SUBJECT, ImageClaim, Statement, parse_statement
from vmgraft.signing.times import CLOCK_SKEW, format_time, later
from vmgraft.signing.truststores import TrustStore
from vmgraft.words import counted

#: Every check, in order; the position is the precedence.
CHECKS = (
    "format",
    "envelope",
    "signature",
    "statement",
    "payloads",
    "content",
    "scope",
    "authenticity",
    "expiry",
    "revocation",
    "rollback",
    "policy",
    "binding",
    "capabilities",
    "conflicts",
    "required",
)


#: What the ``content`` check says where the host holds every block against the signed tree.
ON_FIRST_READ = "each block checked when it is first read"


class Run:
    """The state of one verification: what has been established, and the verdicts so far."""

    def __init__(
        self,
        evidence: Evidence,
        keys: Iterable[PublicKey],
        now: datetime,
        check_content: bool,
        authorities: Sequence[TrustStore] = (),
        *,
        tree: TreeNames | None = None,
    ) -> None:
        self.evidence = evidence
        self.keys = list(keys)
        self.authorities = authorities
        self.now = now
        self.check_content = check_content
        self.tree = tree
        self.checks: dict[str, Check] = {}
        self.warnings: list[str] = []
        self.signers = Signers()
        self.envelope: Envelope | None = None
        self.statement: Statement | None = None
        self.found: list[FoundExtension] = []
        self.trusted: frozenset[PublicKey] = frozenset()
        self.certified: tuple[CertifiedSigner, ...] = ()
        self.named: tuple[tuple[str, str], ...] = ()
        self.policy: TrustPolicy | None = None
        self.grants: dict[str, Grant] = {}
        self._content: Once[bool, ContentNames] = Once()

    # --- verdicts

    def settle(
        self, name: str, error: type[VmgraftError], problem: str | None, good: str, hint: str | None = None
    ) -> None:
        """Record a check: passed when there is no problem, else failed, or a warning where the policy only logs it."""
        if problem is None:
            self.checks[name] = Check(name, Status.PASS, good)
            return
        logged = self.policy is not None and self.policy.logs(name)
        status = Status.WARN if logged else Status.FAIL
        self.checks[name] = Check(name, status, problem, error.code, hint)

    def fail(self, name: str, exc: VmgraftError) -> None:
        """Record a check that failed with an error."""
        self.checks[name] = Check(name, Status.FAIL, str(exc), exc.code, exc.hint)

    def skip(self, name: str, why: str) -> None:
        """Record a check that was not made."""
        self.checks[name] = Check(name, Status.SKIP, why)

    # --- steps 1 to 6

    def integrity(self) -> None:
        """Steps 1 to 6; each needs those before it."""
        self._format()
        if self._envelope() and self._signature() and self._statement():
            self._payloads()
            self._content_check()

    def fork(self) -> Run:
        """Return this run as it was before any trust policy was asked: nothing is read or verified again."""
        other = copy.copy(self)
        kept = CHECKS[: CHECKS.index("scope")] if self.statement is not None else tuple(self.checks)
        other.checks = {name: check for name, check in self.checks.items() if name in kept}
        other.warnings, other.trusted, other.certified, other.named = [], frozenset(), (), ()
        other.policy, other.grants = None, {}
        return other

    def _format(self) -> None:  # 1
        try:
            problem = self.evidence.format_problem()
        except VmgraftError as exc:
            self.fail("format", exc)
            return
        self.settle("format", GraftFormatError, problem, "the record is sound")

    def _envelope(self) -> bool:  # 2
        try:
            stored = self.evidence.envelopes()
            if len(stored) != 1:
                self.fail("envelope", GraftFormatError(f"the record holds {len(stored)} envelopes and must hold one"))
                return False
            self.envelope = parse_envelope(stored[0], file="envelope")
        except VmgraftError as exc:
            self.fail("envelope", exc)
            return False
        self.checks["envelope"] = Check("envelope", Status.PASS, "one well-formed envelope")
        return True

    def _signature(self) -> bool:  # 3
        if self.envelope is None:
            return False
        signers = self.signers = judge_signatures(self.envelope, self.keys, self.authorities, self.now)
        believed = signers.believed
        refuted = signers.refuted or (() if believed else signers.misnamed)
        if not believed and not refuted:
            why = "; ".join(signers.unknown)
            self.skip("signature", f"no known key to check it with: {why}")
            hint = "the policy's 'keys' lack the signer's key"
            if self.authorities:
                hint += ", or its 'trustStores' the root of the signer's certificate"
            self.fail("authenticity", UntrustedSignerError(why, hint=hint))
            return False
        good = f"{len(believed)} known of {counted(len(self.envelope.signatures), 'signature')}"
        problem = "; ".join(refuted) or None
        self.settle("signature", BadSignatureError, problem, good, "the envelope was altered")
        self.warnings += [*signers.unknown, *signers.misnamed, *signers.notes]
        self.warnings += sorted(key.warning for key in believed if key.warning)
        return bool(believed)

    def _statement(self) -> bool:  # 4: the bytes parsed are the bytes verified
        if self.envelope is None:
            return False
        try:
            self.statement = parse_statement(self.envelope.payload, file="statement")
        except VmgraftError as exc:
            self.fail("statement", exc)
            return False
        self.checks["statement"] = Check("statement", Status.PASS, counted(len(self.statement.extensions), "extension"))
        self.warnings += [f"not understood, not acted on: {path}" for path in self.statement.unknown]
        return True

    def _payloads(self) -> None:  # 5
        if self.statement is None:
            return
        problems: list[VmgraftError] = []
        for entry in self.statement.extensions:
            try:
                self.found.append(find_extension(self.evidence, self.statement, entry))
            except VmgraftError as exc:
                problems.append(exc)
        if problems:
            first = problems[0]
            detail = "; ".join(str(problem) for problem in problems)
            self.checks["payloads"] = Check("payloads", Status.FAIL, detail, first.code, first.hint)
        else:
            files = any(found.files is not None for found in self.found)
            what = "every manifest, module and file" if files else "every manifest and module"
            self.checks["payloads"] = Check("payloads", Status.PASS, f"{what} is the signed one")

    def content(self, flat: bool) -> ContentNames:
        """Return the content's digests, reading it at most once for each kind of question, also if it cannot be read.

        Raises:
            VmgraftError: it cannot be read.
        """
        flat = flat or True in self._content
        return self._content.get(flat, lambda: self.evidence.content(flat))

    def _content_check(self) -> None:  # 6
        if self.statement is None or self.statement.image is None:
            self.skip("content", "the statement is bound to no content")
            return
        if not self.check_content:
            self.skip("content", "to be checked block by block as it is read")
            return
        if self._holds_tree(self.statement.image):
            good = f"{self.statement.image.virtual_size} bytes as signed, {ON_FIRST_READ}"
            self.checks["content"] = Check("content", Status.PASS, good)
            return
        digests = self.statement.subjects.get(CONTENT_SUBJECT)
        try:
            content = self.content(digests is not None)
        except VmgraftError as exc:
            self.fail("content", exc)
            return
        image = self.statement.image
        problem = None
        if content.virtual_size != image.virtual_size:
            problem = f"the content has {content.virtual_size} bytes, signed are {image.virtual_size}"
        elif content.root_hash != image.root_hash or content.tree_digest != image.tree_digest:
            problem = "the content tree is not the signed one"
        elif digests is not None and (content.flat is None or content.flat.hex() != digests["sha256"]):
            problem = "the content's SHA-256 is not the signed one"
        self.settle("content", ContentMismatchError, problem, f"{image.virtual_size} bytes as signed")
        extra = sorted((digests or {}).keys() - {"sha256"})
        self.warnings += [f"not checked: the {name} of {CONTENT_SUBJECT}" for name in extra]

    def _holds_tree(self, signed: ImageClaim) -> bool:
        """Tell whether every block will be held against the signed tree, so that none need be read for it now."""
        tree = self.tree
        if tree is None:
            return False
        names = (tree.virtual_size, tree.root_hash, tree.tree_digest)
        if names == (signed.virtual_size, signed.root_hash, signed.tree_digest):
            return True
        self.warnings.append("the stored content tree is not the signed one: all of the content was read instead")
        return False

    # --- the end

    def report(self, needed: Collection[str]) -> Report:
        """Put the verdicts in order and decide.

        Args:
            needed: Checks that must have been made; one that was skipped is never a success.
        """
        for name in CHECKS:
            if name not in self.checks:
                self.skip(name, "not reached")
        checks = tuple(self.checks[name] for name in CHECKS)
        failed = next((check for check in checks if check.status is Status.FAIL), None)
        made = {check.name for check in checks if check.status in (Status.PASS, Status.WARN)}
        believed = made.issuperset({"signature", "statement", "authenticity"})
        ok = failed is None and believed and made.issuperset(needed)
        warned = [f"{check.name}: {check.detail}" for check in checks if check.status is Status.WARN]
        return Report(
            ok=ok,
            error=None if ok else VerificationError.code if failed is None else failed.error,
            checks=checks,
            policy=None if self.policy is None else self.policy.name,
            statement=self.statement.document if believed and self.statement is not None else None,
            signers=tuple(sorted(key.keyid for key in self.trusted)),
            extensions=self._extensions() if ok and self.policy is not None else (),
            warnings=tuple(warned + self.warnings),
            certified=self.certified,
            named=self.named,
        )

    def _extensions(self) -> tuple[VerifiedExtension, ...]:
        return tuple(_verified(found, self.grants.get(found.entry.id, Grant())) for found in self.found)


def _verified(found: FoundExtension, grant: Grant) -> VerifiedExtension:
    manifest = found.manifest
    return VerifiedExtension(
        id=manifest.id,
        version=manifest.version,
        manifest=manifest.document,
        module=found.module,
        module_sha256=found.module_sha256,
        capabilities=tuple(str(claim) for claim in manifest.capabilities if covered(grant.capabilities, claim)),
        limits=lower_limits(manifest.limits, grant.limits),
        on_fault=stricter_fault(manifest.on_fault, grant.on_fault),
        isolation=grant.min_isolation,
        files=found.files,
    )


def expiry_problem(statement: Statement, now: datetime) -> str | None:
    """Say why a statement is not valid at a time, or None when it is."""
    if statement.created > later(now, CLOCK_SKEW):
        return f"not valid before {format_time(statement.created)}"
    if statement.expires is not None and now >= statement.expires:
        return f"expired at {format_time(statement.expires)}"
    return None
