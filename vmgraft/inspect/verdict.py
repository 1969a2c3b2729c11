"""``verify``: an image against a trust policy."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from vmgraft.imagefmt.contract import PROBE, Opening, Progress
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.signing.contract import Report
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
        return verify_evidence(graft, policy, image_name=path.name, now=datetime.now(UTC))
