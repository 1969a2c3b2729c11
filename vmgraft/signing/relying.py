"""Verification that relies on an auditor's summary instead of the graft's signatures; everything else is checked here.

The steps are those of ``verify``, under the same numbers, with these differences:

* 3 ``signature``: a named auditor signed a summary which says that this very statement passed this very policy,
  recently. The signatures in the image, their certificates and their timestamps are not looked at.
* 6 ``content``: the guest content also has the digests that the auditor read, whatever the statement is bound to.
* 8 ``authenticity``: the auditor judged by the same trust policy (its entry, not only the file) that applies here.
  Where that one's level only logs who signed, so is it here: the summary does not say how it ended.
"""

from __future__ import annotations

from datetime import datetime

from vmgraft.errors import ContentMismatchError, UntrustedSignerError, VmgraftError
from vmgraft.signing.contract import Check, Evidence, Report, Status
from vmgraft.signing.integrity import CHECKS, Run
from vmgraft.signing.judgement import Judgement
from vmgraft.signing.memory import Memory
from vmgraft.signing.policymodel import LOGGED, Policy
from vmgraft.signing.times import format_time, require_zone
from vmgraft.signing.vsa import STRICT, Summary, SummaryDemand, refuse_signer


class SummaryRun(Run):
    """A verification whose signature step is an auditor's word."""

    def __init__(self, evidence: Evidence, policy: Policy, demand: SummaryDemand, now: datetime) -> None:
        super().__init__(evidence, (), now, check_content=True)
        self._demand, self._trusting = demand, policy
        self.summary: Summary | None = None

    def _signature(self) -> bool:  # 3
        if self.envelope is None:
            return False
        try:
            summary = self._demand.accept(self._trusting, self.envelope.payload, self.now)
            refuse_signer(summary.auditor, (*self._demand.auditors, *self._trusting.auditors), self.envelope)
            self.summary = summary
        except VmgraftError as exc:
            self.fail("signature", exc)
            return False
        who = f"{summary.auditor} ({summary.verifier})"
        self.checks["signature"] = Check("signature", Status.PASS, f"summary of {format_time(summary.time)} by {who}")
        self.warnings.append(f"the signatures in the image were not checked: the auditor {summary.auditor} did")
        if summary.levels != (STRICT,):
            level = ", ".join(summary.levels)
            self.warnings.append(f"the auditor says {level}: what that level only logs may have failed there")
        return True

    def _content_check(self) -> None:  # 6
        super()._content_check()
        found = self.checks["content"]
        if self.summary is None or found.status is Status.FAIL:
            return
        try:
            content = self.content(self.summary.flat is not None)
        except VmgraftError as exc:
            self.fail("content", exc)
            return
        same = content.tree_digest == self.summary.tree and self.summary.flat in (None, content.flat)
        problem = None if same else "the content is not the one that the auditor verified"
        self.settle("content", ContentMismatchError, problem, f"{content.virtual_size} bytes as the auditor read them")


class _RelyingJudgement(Judgement):
    """What the policy says, with who signed taken from the summary."""

    def __init__(self, run: SummaryRun, policy: Policy, image_name: str, memory: Memory | None) -> None:
        super().__init__(run, policy, image_name, memory)
        self._summary = run.summary

    def _authenticity(self) -> None:  # 8
        chosen = self.run.policy
        if chosen is None or self._summary is None:
            return
        self.rule = chosen.signatures
        problem = None
        if self._summary.trust_policy != chosen.name:
            problem = f"the auditor judged by the trust policy {self._summary.trust_policy}, here {chosen.name} applies"
        if problem is not None:  # never only logged: nobody vouched for these signers under this rule
            hint = "name: scopes look at the file's name; ask for a summary of the image under the name it has here"
            self.run.fail("authenticity", UntrustedSignerError(problem, hint=hint))
            return
        good, unsaid = "signed as the policy demands, says the auditor", None
        if "authenticity" in LOGGED[chosen.level] and chosen.logs("authenticity"):
            unsaid = "signed by somebody whom the policy knows, says the auditor; whether as it demands is only logged"
        self.run.settle("authenticity", UntrustedSignerError, unsaid, good)


def verify_by_summary(
    evidence: Evidence,
    policy: Policy,
    demand: SummaryDemand,
    *,
    image_name: str,
    now: datetime,
    memory: Memory | None = None,
) -> Report:
    """Verify a graft, relying on an auditor's summary for who signed it; every check is reported.

    The whole guest content is always read.

    Args:
        evidence: The graft as found.
        policy: The trust policy, the one that the auditor used.
        demand: The summary, and what is demanded of it.
        image_name: File name of the image, for ``name:`` scopes; folders in front of it are ignored.
        now: The time to judge by, with its zone.
        memory: As in ``verify_evidence``.

    Raises:
        UsageError: ``now`` has no zone.
    """
    run = SummaryRun(evidence, policy, demand, require_zone(now))
    run.integrity()
    _RelyingJudgement(run, policy, image_name.rsplit("/", 1)[-1], memory).steps()
    return run.report(CHECKS)
