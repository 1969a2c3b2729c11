"""Steps 7 to 16 of a verification: what the trust policy says about a statement. See ``verify``."""

from __future__ import annotations

import hashlib

from vmgraft.errors import (
    CapabilityError,
    ContentMismatchError,
    ExpiredError,
    PolicyError,
    RequiredExtensionError,
    RevokedError,
    RollbackError,
    UntrustedSignerError,
    VmgraftError,
)
from vmgraft.signing.capabilities import Capability, covered, first_overlap
from vmgraft.signing.contract import Check, Status
from vmgraft.signing.integrity import Run, expiry_problem
from vmgraft.signing.policy import Policy
from vmgraft.signing.statement import Statement
from vmgraft.signing.times import format_time


class Judgement:
    """Steps 7 to 16: what the policy says about a statement whose integrity was looked at."""

    def __init__(self, run: Run, policy: Policy, image_name: str) -> None:
        self.run = run
        self.policy = policy
        self.image_name = image_name

    def steps(self) -> None:
        """Make every check there is ground for."""
        if self.run.statement is not None:
            self._scope(self.run.statement)
            self._authenticity()
            self._expiry(self.run.statement)
            self._revocation(self.run.statement)
            self._rollback(self.run.statement)
        self._policy()
        if self.run.statement is not None:
            self._binding(self.run.statement)
            self._capabilities(self.run.statement)
            self._conflicts(self.run.statement)
            self._required(self.run.statement)

    def _scope(self, statement: Statement) -> None:  # 7
        try:
            tree = None if statement.image is None else statement.image.tree_digest
            if tree is None and self.policy.wants_tree:
                tree = self.run.content(False).tree_digest
            ids = [entry.id for entry in statement.extensions]
            self.run.policy = self.policy.select(self.image_name, tree, ids)
        except VmgraftError as exc:
            self.run.fail("scope", exc)
            return
        self.run.grants = dict(self.run.policy.grants)
        self.run.checks["scope"] = Check("scope", Status.PASS, f"trust policy {self.run.policy.name}")

    def _authenticity(self) -> None:  # 8
        chosen = self.run.policy
        if chosen is None:
            return
        problem = chosen.signatures.problem(self.run.signers.valid)
        self.run.settle("authenticity", UntrustedSignerError, problem, "signed as the policy demands")
        revoked = self.policy.revocations.keys
        trusted = self.run.signers.valid & chosen.signatures.keys
        self.run.trusted = frozenset(key for key in trusted if key.keyid not in revoked)

    def _expiry(self, statement: Statement) -> None:  # 9
        until = "never expires" if statement.expires is None else f"valid until {format_time(statement.expires)}"
        self.run.settle("expiry", ExpiredError, expiry_problem(statement, self.run.now), until)

    def _revocation(self, statement: Statement) -> None:  # 10
        revocations, chosen = self.policy.revocations, self.run.policy
        problems = []
        payload = b"" if self.run.envelope is None else self.run.envelope.payload
        if hashlib.sha256(payload).hexdigest() in revocations.statements:
            problems.append("the statement is revoked")
        for name, digests in statement.subjects.items():
            if digests.get("sha256") in revocations.payloads:
                problems.append(f"{name} is revoked")
        for entry in statement.extensions:
            lowest = revocations.min_generation.get(entry.id, 0)
            if entry.generation < lowest:
                problems.append(f"generation {entry.generation} of {entry.id} is revoked, {lowest} is the lowest")
        gone = frozenset(key for key in self.run.signers.valid if key.keyid in revocations.keys)
        if chosen is not None and gone:
            signers = self.run.signers.valid
            left = chosen.signatures.problem(signers - gone)
            if left is not None and (signers == gone or chosen.signatures.problem(signers) is None):
                names = ", ".join(sorted(key.keyid for key in gone))
                problems.append(f"the key {names} is revoked; without it: {left}")
            else:
                self.run.warnings += sorted(f"signed by the revoked key {key.keyid}: not counted" for key in gone)
        self.run.settle("revocation", RevokedError, "; ".join(problems) or None, "nothing is revoked")

    def _rollback(self, statement: Statement) -> None:  # 11
        if self.run.policy is None:
            return
        lowest = self.run.policy.min_security_version
        low = [
            f"{entry.id} has security version {entry.security_version}, {lowest[entry.id]} is the lowest"
            for entry in statement.extensions
            if entry.security_version < lowest.get(entry.id, 0)
        ]
        self.run.settle("rollback", RollbackError, "; ".join(low) or None, "no extension is too old")

    def _policy(self) -> None:  # 12
        expires, problem = self.policy.expires, None
        if expires is not None and self.run.now >= expires:
            problem = f"the policy expired at {format_time(expires)}"
        self.run.settle("policy", PolicyError, problem, f"policy version {self.policy.policy_version} is in force")

    def _binding(self, statement: Statement) -> None:  # 13
        if self.run.policy is None:
            return
        loose = self.run.policy.binding == "image" and statement.image is None
        problem = "the policy demands a statement bound to the image, this one fits any" if loose else None
        self.run.settle("binding", ContentMismatchError, problem, f"bound to: {statement.binding}")

    def _claims(self, statement: Statement) -> list[tuple[str, Capability]] | None:
        """Return every claim and who makes it, or None where not every manifest could be read."""
        if len(self.run.found) != len(statement.extensions):
            return None
        return [(found.entry.id, claim) for found in self.run.found for claim in found.manifest.capabilities]

    def _capabilities(self, statement: Statement) -> None:  # 14
        claims = self._claims(statement)
        if claims is None or self.run.policy is None:
            return
        granted = {extension: grant.capabilities for extension, grant in self.run.grants.items()}
        denied = [f"{owner} claims {claim}" for owner, claim in claims if not covered(granted.get(owner, ()), claim)]
        problem = "not granted: " + ", ".join(denied) if denied else None
        hint = "grants in the policy list what each extension may do"
        self.run.settle("capabilities", CapabilityError, problem, "everything declared is granted", hint)

    def _conflicts(self, statement: Statement) -> None:  # 15
        claims = self._claims(statement)
        if claims is None:
            return
        clash = first_overlap([claim for _, claim in claims])
        problem = None
        if clash is not None:
            (one, a), (other, b) = claims[clash[0]], claims[clash[1]]
            problem = f"{one} claims {a} and {other} claims {b}"
        self.run.settle("conflicts", CapabilityError, problem, "no two extensions claim the same range")

    def _required(self, statement: Statement) -> None:  # 16
        if self.run.policy is None:
            return
        missing = sorted(set(self.run.policy.require_extensions) - {entry.id for entry in statement.extensions})
        problem = "missing: " + ", ".join(missing) if missing else None
        self.run.settle("required", RequiredExtensionError, problem, "every required extension is there")
