"""Why each check of a verification ended as it did, and what would change that: for people, and as edits of the policy.

An edit is an operation of JSON Patch (RFC 6902) on the policy file, tried before it is proposed. It is what would make
the check pass, not advice to do it: whoever may write the policy decides. What a policy cannot change (a changed byte,
a bad signature) has no edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from vmgraft.signing.contract import Check, Evidence, Report, Status
from vmgraft.signing.memory import Memory
from vmgraft.signing.once import Once
from vmgraft.signing.patches import Remedy
from vmgraft.signing.policymodel import Policy
from vmgraft.signing.remedies import remedies
from vmgraft.signing.report import report_document
from vmgraft.signing.verify import NEEDED, judge_evidence

#: Said where the tries together would have cost more than one verification may.
CUT: Final = "not every edit was tried to its end: the certificates and timestamps beside the signatures cost too much"


@dataclass(frozen=True, slots=True)
class Explained:
    """One check, and what would make it pass; no remedies for one that passed."""

    check: Check
    remedies: tuple[Remedy, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**self.check.to_dict(), "remedies": [remedy.to_dict() for remedy in self.remedies]}


@dataclass(frozen=True, slots=True)
class Explanation:
    """A report with its reasons.

    Attributes:
        notes: What goes with every edit of this policy, and that not every edit was tried.
    """

    report: Report
    checks: tuple[Explained, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: a report whose checks have ``remedies``, and ``notes``."""
        checks = [check.to_dict() for check in self.checks]
        return {**report_document(self.report), "checks": checks, "notes": list(self.notes)}


def explain_evidence(
    evidence: Evidence,
    policy: Policy,
    *,
    image_name: str,
    now: datetime,
    check_content: bool = True,
    memory: Memory | None = None,
) -> Explanation:
    """Verify a graft and say for each check that did not pass what would make it pass.

    Args:
        evidence: The graft as found.
        policy: The trust policy.
        image_name: File name of the image.
        now: The time to judge by, with its zone.
        check_content: Read and hash the whole guest content.
        memory: The highest security versions accepted before.

    Raises:
        UsageError: ``now`` has no zone.
    """
    once = None if memory is None else _OnceAsked(memory)
    judgement = judge_evidence(
        evidence, policy, image_name=image_name, now=now, check_content=check_content, memory=once
    )
    report = judgement.run.report(NEEDED)
    refused, wrong = judgement.run.signers.budget.refused, (Status.FAIL, Status.WARN)
    found = tuple(Explained(c, remedies(c, judgement) if c.status in wrong else ()) for c in report.checks)
    cut = judgement.run.signers.budget.refused > refused
    edited = any(remedy.edits for explained in found for remedy in explained.remedies)
    return Explanation(report, found, (*(_notes(policy) if edited else ()), *((CUT,) if cut else ())))


class _OnceAsked:
    """A rollback memory of which nothing is asked twice: every edit that is tried would."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._known: Once[tuple[str, str], int | None] = Once()

    def highest(self, policy: str, extension: str) -> int | None:
        return self._known.get((policy, extension), lambda: self._memory.highest(policy, extension))


def _notes(policy: Policy) -> tuple[str, ...]:
    if not policy.signed_by:
        return ()
    who, version = ", ".join(policy.signed_by), policy.policy_version
    return (
        f"this policy is signed, by {who}: edit the policy inside, raise its policyVersion above {version}, and sign "
        "it anew (vmgraft policy sign); changed otherwise it counts for nothing",
    )
