"""Verification by a host: of which the content may be left to the moment when each block is first read."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Final

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.graft import Graft
from vmgraft.imagefmt.treesection import stored_tree
from vmgraft.signing.contract import Report, Status
from vmgraft.signing.memory import Memory
from vmgraft.signing.policy import Policy
from vmgraft.signing.verify import verify_evidence

#: When the content is checked, as the launch plan spells it.
FIRST_READ: Final = "first-read"
BEFORE: Final = "before-start"


def verify_for_use(
    graft: Graft,
    policy: Policy,
    *,
    image_name: str,
    now: datetime,
    memory: Memory | None = None,
    verify_all: bool = False,
) -> Report:
    """Verify a graft for a host that takes content through ``graft.tree`` only, block by block.

    Where the record holds the very tree that is signed, nothing of the content is read now; else all of it is. After a
    good verdict ``graft.tree`` is there in any case.

    Args:
        graft: The graft; its image is open.
        policy: The trust policy; its ``contentCheck`` may demand that all is read.
        image_name: File name of the image, for ``name:`` scopes.
        now: The time to judge by, with its zone.
        memory: The highest security versions that were accepted before. It is only read.
        verify_all: Read all of the content first, whatever the record holds.

    Raises:
        FileError: the content cannot be read.
    """
    problem, tree = None, None
    try:
        tree = None if verify_all else stored_tree(graft)
    except GraftFormatError as error:
        problem = f"the stored content tree is of no use: {error.message}"
    report = verify_evidence(graft, policy, image_name=image_name, now=now, memory=memory, tree=tree)
    chosen = next((entry for entry in policy.trust_policies if entry.name == report.policy), None)
    if tree is not None and chosen is not None and chosen.read_before:  # only now is it known which one applies
        report, tree = verify_evidence(graft, policy, image_name=image_name, now=now, memory=memory), None
    if report.ok and graft.tree is None:
        content = next(check for check in report.checks if check.name == "content")
        if content.status is Status.PASS:  # without having been read: by the tree
            graft.tree = tree
        else:  # a statement that is bound to no content: what is there now is what shall be used
            graft.content(flat=False)
    return report if problem is None else replace(report, warnings=(*report.warnings, problem))


def content_checked(graft: Graft) -> str:
    """Say when the content of a graft that was verified for use is checked."""
    return BEFORE if graft.was_read else FIRST_READ
