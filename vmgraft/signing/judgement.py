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
from vmgraft.signing.memory import Memory
from vmgraft.signing.policymodel import Policy
from vmgraft.signing.rollback import rollback_problem
from vmgraft.signing.rules import SignatureRule, Vouch
from vmgraft.signing.standing import Standing, reasons, take_stand
from vmgraft.signing.statement import CONTENT_SUBJECT, Statement
from vmgraft.signing.supplements import first_clash
from vmgraft.signing.times import format_time


class Judgement:
    """Steps 7 to 16: what the policy says about a statement whose integrity was looked at.

    ``standing``, ``tree`` and ``tied`` stay for those who want to know why.
    """

    def __init__(self, run: Run, policy: Policy, image_name: str, memory: Memory | None = None) -> None:
        self.run = run
        self.policy = policy
        self.image_name = image_name
        self.memory = memory
        self.standing = Standing()
        self.rule = SignatureRule(frozenset(), frozenset(), 0)
        self.tree: bytes | None = None
        self.tied = False

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
            self.tree = None if statement.image is None else statement.image.tree_digest
            if self.tree is None and self.policy.wants_tree:
                self.tree = self.run.content(False).tree_digest
            ids = [entry.id for entry in statement.extensions]
            self.run.policy = self.policy.select(self.image_name, self.tree, ids)
        except VmgraftError as exc:
            self.tied = isinstance(exc, PolicyError)
            self.run.fail("scope", exc)
            return
        self.run.grants = dict(self.run.policy.grants)
        self.run.checks["scope"] = Check("scope", Status.PASS, f"trust policy {self.run.policy.name}")

    def _authenticity(self) -> None:  # 8
        chosen = self.run.policy
        if chosen is None:
            return
        self.rule = chosen.signatures
        standing = self.standing = take_stand(self.run.signers, self.policy, chosen, self.run.now)
        problem = self.rule.problem(standing.signed)
        hint = None
        if problem is not None:
            missing = ", ".join(self.rule.missing(standing.signed))
            hint = f"signatures by {missing}" if missing else "signatures by more different keys"
            hint += f"; or another rule under signatures of the trust policy {chosen.name}"
            problem = "; ".join([problem, *standing.unmet])
        else:
            self.run.warnings += [f"not counted: {text}" for text in standing.unmet]
        self.run.warnings += standing.notes
        if problem is not None and not standing.signed:  # not even a policy that only logs lets nobody's signature pass
            self.run.fail("authenticity", UntrustedSignerError(problem, hint=hint))
        else:
            self.run.settle("authenticity", UntrustedSignerError, problem, "signed as the policy demands", hint)
        self._believe(chosen.logs("expiry"))

    def _believe(self, expired_count: bool) -> None:
        """Name the trusted signers: those that the rule names, not revoked, and not expired where that matters."""
        standing = self.standing
        trusted = {vouch for vouch in standing.signed if self.rule.names(vouch) and vouch not in standing.revoked}
        if not expired_count:
            trusted -= standing.expired.keys()
        self.run.trusted = frozenset(vouch.key for vouch in trusted)
        known = [named for named in self.policy.keys if named.key in self.run.trusted]
        self.run.named = tuple((named.key.keyid, named.name) for named in known)
        certified = [standing.certified[vouch] for vouch in trusted if vouch in standing.certified]
        self.run.certified = tuple(sorted(certified, key=lambda item: (item.keyid, item.authority)))

    def _gone(self, check: str) -> set[Vouch]:
        """Return the signatures that are expired, or revoked, where the policy does more than log that."""
        found = self.standing.expired if check == "expiry" else self.standing.revoked
        logged = self.run.policy is not None and self.run.policy.logs(check)
        return set() if logged else self.standing.signed & found.keys()

    def _lost(self, signed: set[Vouch], gone: set[Vouch]) -> str | None:
        """Say why the rule does not hold without some signatures, where it is for their lack that it does not.

        Where it does not hold with them either, which a policy may log, somebody's signature must still count: an
        expired one does not make up for a revoked one, nor the other way round.
        """
        left = self.rule.problem(signed - gone) if gone else None
        if left is None:
            return None
        nobody = self.standing.signed == self._gone("expiry") | self._gone("revocation")
        return left if nobody or signed == gone or self.rule.problem(signed) is None else None

    def _expiry(self, statement: Statement) -> None:  # 9
        until = "never expires" if statement.expires is None else f"valid until {format_time(statement.expires)}"
        problem = expiry_problem(statement, self.run.now)
        problems, hint = [problem] if problem is not None else [], None
        # Where that is only logged, the log says what the rule owes to expired signatures, revoked ones aside.
        logged = self.run.policy is not None and self.run.policy.logs("expiry")
        signed = self.standing.signed - (self._gone("revocation") if logged else set())
        expired = signed & self.standing.expired.keys()
        left = self._lost(signed, expired)
        if left is not None:
            problems.append(f"{reasons(self.standing.expired, expired)}; without it: {left}")
            hint = "a timestamp from a time when the certificate was valid, by a tsa: store of the trust policy"
        elif expired:
            self.run.warnings.append(f"not counted: {reasons(self.standing.expired, expired)}")
        self.run.settle("expiry", ExpiredError, "; ".join(problems) or None, until, hint)

    def _revocation(self, statement: Statement) -> None:  # 10
        revocations = self.policy.revocations
        problems = []
        payload = b"" if self.run.envelope is None else self.run.envelope.payload
        if hashlib.sha256(payload).hexdigest() in revocations.statements:
            problems.append("the statement is revoked")
        problems += self._revoked_payloads(statement)
        for entry in statement.extensions:
            lowest = revocations.min_generation.get(entry.id, 0)
            if entry.generation < lowest:
                problems.append(f"generation {entry.generation} of {entry.id} is revoked, {lowest} is the lowest")
        problems += self._revoked_signers()
        self.run.settle("revocation", RevokedError, "; ".join(problems) or None, "nothing is revoked")

    def _revoked_payloads(self, statement: Statement) -> list[str]:
        """Look up every signed digest; the content goes by its flat SHA-256, where that is signed, and by its tree."""
        revoked = self.policy.revocations.payloads
        problems = [
            f"{name} is revoked" for name, digests in statement.subjects.items() if digests.get("sha256") in revoked
        ]
        tree = self.tree if statement.image is None else statement.image.tree_digest
        if tree is not None and tree.hex() in revoked:
            problems.append(f"the content with the fs-verity digest {tree.hex()} is revoked")
        if revoked and CONTENT_SUBJECT not in statement.subjects:
            self.run.warnings.append(f"a revoked SHA-256 of {CONTENT_SUBJECT} cannot be compared: none is signed")
        return problems

    def _revoked_signers(self) -> list[str]:
        """Say what is wrong for want of revoked signers; expired ones stand in only where that is what is logged."""
        signed = self.standing.signed
        logs = () if self.run.policy is None else tuple(filter(self.run.policy.logs, ("expiry", "revocation")))
        current = signed if logs == ("expiry",) else signed - self.standing.expired.keys()
        if self.rule.problem(current) is None:
            signed = current
        gone = signed & self.standing.revoked.keys()
        left = self._lost(signed, gone)
        if left is not None:
            return [f"{reasons(self.standing.revoked, gone)}; without it: {left}"]
        self.run.warnings += sorted(
            f"signed by the revoked key {vouch.key.keyid}: not counted ({self.standing.revoked[vouch]})"
            for vouch in gone
        )
        return []

    def _rollback(self, statement: Statement) -> None:  # 11
        if self.run.policy is None:
            return
        try:
            found = rollback_problem(statement, self.policy, self.run.policy, self.memory)
        except VmgraftError as exc:
            self.run.fail("rollback", exc)
            return
        self.run.warnings += found.notes
        self.run.settle("rollback", RollbackError, found.problem, "no extension is too old", found.hint)

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
        else:
            problem = first_clash([(found.entry.id, found.manifest.document) for found in self.run.found])
        self.run.settle("conflicts", CapabilityError, problem, "no two extensions claim the same range")

    def _required(self, statement: Statement) -> None:  # 16
        if self.run.policy is None:
            return
        missing = sorted(set(self.run.policy.require_extensions) - {entry.id for entry in statement.extensions})
        problem = "missing: " + ", ".join(missing) if missing else None
        self.run.settle("required", RequiredExtensionError, problem, "every required extension is there")
