"""Why each check of a verification ended as it did, and what would change that: for people, and as edits of the policy.

An edit is an operation of JSON Patch (RFC 6902) on the policy file. It is what would make the check pass, not advice to
do it: whoever may write the policy decides. What a policy cannot change (a changed byte, a bad signature) has no edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from vmgraft.signing.contract import Check, Evidence, Report, Status
from vmgraft.signing.memory import Memory
from vmgraft.signing.policymodel import Policy
from vmgraft.signing.remedies import Remedy, remedies
from vmgraft.signing.report import report_document
from vmgraft.signing.verify import NEEDED, judge_evidence


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
    """A report with its reasons."""

    report: Report
    checks: tuple[Explained, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: a report whose checks have ``remedies``."""
        return {**report_document(self.report), "checks": [check.to_dict() for check in self.checks]}


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
    judgement = judge_evidence(
        evidence, policy, image_name=image_name, now=now, check_content=check_content, memory=memory
    )
    report = judgement.run.report(NEEDED)
    wrong = (Status.FAIL, Status.WARN)
    found = (Explained(c, tuple(remedies(c, judgement)) if c.status in wrong else ()) for c in report.checks)
    return Explanation(report, tuple(found))
