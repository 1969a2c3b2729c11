"""What is handed from the launcher, which decides, to a session, which carries it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from vmgraft.imagefmt.contract import Image
from vmgraft.imagefmt.graft import Graft
from vmgraft.imagefmt.tree import ContentTree
from vmgraft.signing.policy import Policy
from vmgraft.vmmhost.audit import AuditLog
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.seabios import FirmwareImage
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.plan import LaunchPlan, RunOptions
from vmgraft.vmmhost.remember import RunMemory
from vmgraft.vmmhost.report import RunReport
from vmgraft.vmmhost.snapshots.container import SnapshotFile


class Console(Protocol):
    """Where keys for the guest's serial port come from (the program's terminal)."""

    def poll(self) -> bytes:
        """Return what was typed since the last time; never waits."""

    @property
    def escaped(self) -> bool:
        """Whether the escape key was struck: the run shall end."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a session is handed: an accepted plan, and everything it may use to carry it out.

    Attributes:
        report: The report so far; its ``plan`` is there.
        specs: What the layer is told of the extensions, with every claim tried.
        serial: Gets what the guest sends to its first serial port.
        console: Gives what it receives there.
        bios: Stock firmware as the plan names it; None for the trap BIOS, and for engines with a firmware of their own.
        snapshot: What the guest is to go on from; None for a boot.
        confine: Give up the rights of this process before the guest's first instruction.
    """

    options: RunOptions
    report: RunReport
    plan: LaunchPlan
    image: Image
    graft: Graft
    tree: ContentTree
    policy: Policy
    memory: RunMemory
    specs: list[ExtensionSpec]
    log: AuditLog
    serial: Callable[[bytes], None] | None = None
    console: Console | None = None
    confine: bool = False
    bios: FirmwareImage | None = None
    snapshot: SnapshotFile | None = None

    def remember(self, ready: set[str]) -> None:
        """Remember what got ready: before the guest's first instruction, and before this process gives up its rights.

        Args:
            ready: Ids of the extensions whose module is running.

        Raises:
            RollbackError: a newer version got ready in the meantime.
            StateError: the memory cannot be written.
        """
        plan = self.plan
        shown = () if plan.union is None else plan.union.shown
        self.memory.remember(self.report.verification, plan.extensions, ready, plan.statement_sha256, shown)
        if self.memory.path is not None:
            self.log.write("remember", self.memory.to_dict() or {})


class LayerLog:
    """Writes what the layer tells to the audit log, and knows why it wants the guest stopped.

    Args:
        write: Writes an event.
    """

    def __init__(self, write: Callable[[str, dict[str, Any]], None]) -> None:
        self._write = write
        self._asked = False

    def write(self, event: str, detail: dict[str, Any]) -> None:
        """Write an event of the layer; remember whether a stop was asked for or is a penalty."""
        self._asked = event == "stop-request"
        self._write(event, detail)

    def stop_reason(self) -> EndReason:
        """Return what a stop is called that follows upon the last event."""
        return EndReason.SHUTDOWN if self._asked else EndReason.FAULT
