"""``verify``: an image against a trust policy."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vmgraft.errors import BadSignatureError
from vmgraft.imagefmt.contract import PROBE, Opening, Placement, Progress
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.signing.contract import Report, Status
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.memory import Memory
from vmgraft.signing.policy import PolicyTrust, load_policy
from vmgraft.signing.policysign import PolicySigner
from vmgraft.signing.verify import verify_evidence

if TYPE_CHECKING:
    from vmgraft.signing.vsa import SummaryDemand


def verify_image(
    path: Path,
    policy_path: Path,
    *,
    opening: Opening = PROBE,
    progress: Progress | None = None,
    trust: PolicyTrust | None = None,
    memory: Memory | None = None,
    summary: SummaryDemand | None = None,
) -> Report:
    """Check an image against a policy; the policy is read first, and the image through one descriptor.

    Args:
        path: The image.
        policy_path: The policy.
        opening: How to open the image.
        progress: Called while the content is read.
        trust: What is demanded of the policy file; None takes unsigned ones only.
        memory: The rollback memory to compare with; None compares with nothing.
        summary: An auditor's summary to rely on for who signed; None looks at the signatures.

    Raises:
        PolicyError: the policy cannot be used.
        NoGraftError: the image carries no graft.
        FileError: the image is unreadable or of no known format.
    """
    policy = load_policy(policy_path, trust)
    with open_image(path, opening) as image:
        graft, now = open_graft(image, progress=progress), datetime.now(UTC)
        if summary is None:
            report = verify_evidence(graft, policy, image_name=path.name, now=now, memory=memory)
        else:
            from vmgraft.signing.relying import verify_by_summary

            report = verify_by_summary(graft, policy, summary, image_name=path.name, now=now, memory=memory)
        return _suspecting_the_sidecar(report, graft)


def audit_image(
    path: Path,
    policy_path: Path,
    *,
    signer: PolicySigner,
    verifier: str,
    opening: Opening = PROBE,
    progress: Progress | None = None,
    trust: PolicyTrust | None = None,
    memory: Memory | None = None,
) -> tuple[Report, bytes]:
    """Check an image as ``verify_image`` does, and sign a summary of how that ended, good or bad.

    Args:
        path: The image.
        policy_path: The policy.
        signer: The auditor's key.
        verifier: URI by which the auditor goes.
        opening: How to open the image.
        progress: Called while the content is read.
        trust: What is demanded of the policy file; None takes unsigned ones only.
        memory: The rollback memory to compare with; None compares with nothing.

    Returns:
        The verdict, and the summary in its envelope.

    Raises:
        UsageError: ``verifier`` is no absolute URI.
        PolicyError: the policy cannot be used.
        NoGraftError: the image carries no graft.
        FileError: the image is unreadable or of no known format.
    """
    from vmgraft.signing.vsa import build_summary, check_verifier, sign_summary

    check_verifier(verifier)
    policy = load_policy(policy_path, trust)
    with open_image(path, opening) as image:
        graft, now = open_graft(image, progress=progress), datetime.now(UTC)
        report = verify_evidence(graft, policy, image_name=path.name, now=now, memory=memory)
        content = graft.content(flat=False)
        document = build_summary(
            report, policy, content, statement=_stored_statement(graft), verifier=verifier, now=now
        )
        return _suspecting_the_sidecar(report, graft), sign_summary(document, signer)


def _stored_statement(graft: Graft) -> bytes | None:
    """Return the statement that the image holds, whatever it is worth, or None where there is not one to be told."""
    stored = graft.envelopes()
    if len(stored) != 1:
        return None
    try:
        return parse_envelope(stored[0]).payload
    except BadSignatureError:
        return None


def _suspecting_the_sidecar(report: Report, graft: Graft) -> Report:
    """Where content is not the signed one, mention that the record may be another image's.

    Other containers hold a locator that tells a foreign sidecar. A raw image has none; journals are told by size only.
    """
    located = graft.located
    aside = located.locator is not None and located.locator.placement is Placement.SIDECAR
    if located.record_file is None and not (aside and located.locator_offset in (None, 0)):
        return report
    name = located.record_file.name if located.record_file is not None else sidecar_path(graft.image.path).name
    hint = f"the content was changed, or {name} belongs to another image"
    checks = [
        replace(check, hint=hint) if check.name == "content" and check.status is Status.FAIL else check
        for check in report.checks
    ]
    return replace(report, checks=tuple(checks))
