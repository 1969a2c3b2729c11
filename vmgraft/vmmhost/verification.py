"""Verification by a host: of which the content may be left to the moment when each block is first read."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Final

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.graft import Graft
from vmgraft.imagefmt.record import SectionKind
from vmgraft.imagefmt.treesection import stored_tree
from vmgraft.signing.contract import Report, Status
from vmgraft.signing.judgement import Judgement
from vmgraft.signing.memory import Memory
from vmgraft.signing.policy import Policy
from vmgraft.signing.verify import NEEDED, judge_evidence, verify_evidence

#: When the content is checked, as the launch plan spells it.
FIRST_READ: Final = "first-read"
BEFORE: Final = "before-start"
#: Checks that must have passed, not merely warned, before a byte of the unsigned TREE section is looked at.
_TRUSTED: Final = ("format", "envelope", "signature", "statement", "payloads", "scope", "authenticity")


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
    good verdict ``graft.tree`` is there in any case. The stored tree is unsigned: it is not parsed before all else has
    been judged, and of an image that is refused anyway neither it nor the content is read.

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
    if not verify_all and graft.record is not None and graft.record.of_kind(SectionKind.TREE):
        early = judge_evidence(graft, policy, image_name=image_name, now=now, memory=memory, check_content=False)
        report = early.run.report(NEEDED)
        if not report.ok:
            return _unread(report)
        if _may_parse(early, report, graft):
            try:
                tree = stored_tree(graft)
            except GraftFormatError as error:
                problem = f"the stored content tree is of no use: {error.message}"
    report = verify_evidence(graft, policy, image_name=image_name, now=now, memory=memory, tree=tree)
    if report.ok and graft.tree is None:
        content = next(check for check in report.checks if check.name == "content")
        if content.status is Status.PASS:  # without having been read: by the tree
            graft.tree = tree
        else:  # a statement that is bound to no content: what is there now is what shall be used
            graft.content(flat=False)
    return report if problem is None else replace(report, warnings=(*report.warnings, problem))


def _may_parse(early: Judgement, report: Report, graft: Graft) -> bool:
    """Tell whether the stored tree may be used, so far as that is known without it."""
    statement, chosen = early.run.statement, early.run.policy
    if statement is None or statement.image is None or chosen is None or chosen.read_before:
        return False
    passed = {check.name for check in report.checks if check.status is Status.PASS}
    return passed.issuperset(_TRUSTED) and statement.image.virtual_size == graft.image.virtual_size


def _unread(report: Report) -> Report:
    """Return the report on a refused image, saying that its content was not looked at."""
    checks = [
        replace(check, detail="not read: the image is refused without it")
        if check.name == "content" and check.status is Status.SKIP
        else check
        for check in report.checks
    ]
    return replace(report, checks=tuple(checks))


def content_checked(graft: Graft) -> str:
    """Say when the content of a graft that was verified for use is checked."""
    return BEFORE if graft.was_read else FIRST_READ
