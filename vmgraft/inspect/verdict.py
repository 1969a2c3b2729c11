"""``verify``: an image against a trust policy."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from vmgraft.imagefmt.contract import PROBE, Opening, Placement, Progress
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.signing.contract import Report, Status
from vmgraft.signing.policy import load_policy
from vmgraft.signing.verify import verify_evidence


def verify_image(
    path: Path, policy_path: Path, *, opening: Opening = PROBE, progress: Progress | None = None
) -> Report:
    """Check an image against a policy; the policy is read first, and the image through one descriptor.

    Raises:
        PolicyError: the policy cannot be used.
        NoGraftError: the image carries no graft.
        FileError: the image is unreadable or of no known format.
    """
    policy = load_policy(policy_path)
    with open_image(path, opening) as image:
        graft = open_graft(image, progress=progress)
        report = verify_evidence(graft, policy, image_name=path.name, now=datetime.now(UTC))
        return _suspecting_the_sidecar(report, graft)


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
