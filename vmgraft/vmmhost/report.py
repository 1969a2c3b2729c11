"""What a run leaves behind: the report of it, and the words of its audit log."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final

from vmgraft.errors import VmgraftError
from vmgraft.signing.contract import Report
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.machine import MachineResult
from vmgraft.vmmhost.plan import LaunchPlan

#: Ends of a guest that are failures, as error codes (docs/exit-codes.md).
_FAILURES: Final = {
    EndReason.FAULT: "extension-fault",
    EndReason.DISK: "content-mismatch",
    EndReason.ERROR: "host",
    EndReason.INTERRUPTED: "interrupted",
}


@dataclass(slots=True)
class RunReport:
    """What happened, as far as it went. ``plan`` and ``result`` stay None when verification refused the image.

    Attributes:
        cells: The text screen at the end as it lies in guest memory: 80 x 25 pairs of code and attribute.
        control: What came in through the control socket: requests done, refused, and connections turned away.
    """

    verification: Report
    plan: LaunchPlan | None = None
    result: MachineResult | None = None
    extensions: list[dict[str, Any]] = field(default_factory=list)
    confinement: list[str] = field(default_factory=list)
    audit_head: str | None = None
    until: str | None = None
    memory: dict[str, Any] | None = None
    cells: bytes | None = None
    control: dict[str, int] | None = None

    @property
    def error(self) -> str | None:
        """The error code this run amounts to, or None."""
        if not self.verification.ok:
            return self.verification.error
        if self.result is None:
            return None
        if self.result.reason in _FAILURES:
            return _FAILURES[self.result.reason]
        return "expectation" if self.until is not None and not self.result.until_seen else None


def presented(report: RunReport) -> list[dict[str, Any]]:
    """Return what each extension showed the guest beside its image: id, version and supplements as planned."""
    if report.plan is None or not report.plan.supplements:
        return []
    shown = report.plan.to_dict()["extensions"]
    return [{name: item[name] for name in ("id", "version", "supplements")} for item in shown if item["supplements"]]


def verdict_fields(report: Report) -> dict[str, Any]:
    """Return what the audit log says of a verification."""
    checks = [check.to_dict() for check in report.checks]
    return {"ok": report.ok, "error": report.error, "checks": checks, "warnings": list(report.warnings)}


def failure_fields(error: BaseException) -> dict[str, Any]:
    """Return what the audit log says of a run that an exception ended."""
    if isinstance(error, VmgraftError):
        return error.to_dict()
    codes = {KeyboardInterrupt: "interrupted", OSError: "file"}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), "internal")
    return {"code": code, "message": f"{type(error).__name__}: {error}"}


def ending_fields(report: RunReport) -> dict[str, Any]:
    """Return what the audit log says of a run's end."""
    result = report.result
    if result is None:
        return {"code": report.error, "message": "the verification refused the image; nothing was started"}
    return {
        "reason": result.reason.value,
        "detail": result.detail,
        "wallSeconds": round(result.wall_seconds, 3),
        "exits": result.exits,
        "blocksChecked": result.blocks_checked,
        "blocksWritten": result.blocks_written,
    }


def core_digest() -> str:
    """Return the SHA-256 over names and contents of the privileged core's own files, its ROM among them."""
    root = resources.files("vmgraft.vmmhost")
    digest = hashlib.sha256()
    for folder in ("core", "data"):
        base = Path(str(root / folder))
        for path in sorted(item for item in base.rglob("*") if item.suffix in (".py", ".bin")):
            digest.update(json.dumps([str(path.relative_to(base.parent)), path.stat().st_size]).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
