"""``policy explain``: why each check of an image ended as it did under a policy, and what would change that."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from vmgraft.imagefmt.contract import PROBE, Opening, Progress
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.signing.explain import Explanation, explain_evidence
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.policy import load_policy
from vmgraft.signing.state import RollbackState, policy_trust


def explain_image(
    path: Path,
    policy_path: Path,
    *,
    policy_keys: tuple[PublicKey, ...] = (),
    signed_policy: bool = False,
    state: Path | None = None,
    opening: Opening = PROBE,
    progress: Progress | None = None,
) -> Explanation:
    """Check an image against a policy and say what would change each verdict.

    Args:
        path: The image.
        policy_path: The trust policy.
        policy_keys: Keys of which one must have signed the policy.
        signed_policy: Refuse an unsigned policy.
        state: Rollback memory to compare with; it is only read.
        opening: How to open the image.
        progress: Told how far the reading is.

    Raises:
        PolicyError: the policy cannot be used.
        StateError: the rollback memory cannot be used.
        NoGraftError: the image carries no graft.
        FileError: the image is unreadable or of no known format.
    """
    with ExitStack() as stack:
        memory = None if state is None else stack.enter_context(RollbackState(state, writable=False))
        policy = load_policy(policy_path, policy_trust(memory, policy_keys, required=signed_policy))
        image = stack.enter_context(open_image(path, opening))
        graft = open_graft(image, progress=progress)
        return explain_evidence(graft, policy, image_name=path.name, now=datetime.now(UTC), memory=memory)
