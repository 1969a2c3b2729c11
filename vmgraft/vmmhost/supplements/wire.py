"""A launch plan's supplements on their way to an engine: built, written into the audit log, handed over."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from vmgraft.vmmhost.supplements.present import Presented, build, created_of

if TYPE_CHECKING:
    from vmgraft.vmmhost.core.drives import Disk
    from vmgraft.vmmhost.plan import LaunchPlan


class Log(Protocol):
    """Takes one record of an event."""

    def __call__(self, event: str, detail: dict[str, Any], /) -> object: ...  # noqa: D102


def present_plan(plan: LaunchPlan, statement: dict[str, Any] | None, disk: Disk, log: Log) -> Presented:
    """Build what a plan's extensions supplement, and add the union of further images; else hand the disk back.

    Args:
        plan: An accepted plan; its evidence is open.
        statement: The verified statement, which dates what is built.
        disk: The guest's boot disk.
        log: Gets one ``supplement`` record for each.

    Raises:
        VmgraftError: see :func:`~vmgraft.vmmhost.supplements.present.build`.
    """
    presented = Presented(disk)
    if plan.supplements:
        presented = build(plan.extensions, disk, created=created_of(statement))
    for record in presented.records:
        log("supplement", dict(record))
    if plan.union is None:
        return presented
    return replace(presented, drives=(*presented.drives, plan.union.drive()))
