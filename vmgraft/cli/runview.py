"""How a run is reported to people and programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click

from vmgraft.cli.console import Outputs
from vmgraft.cli.ctlview import show_extension
from vmgraft.cli.exitcodes import exit_code
from vmgraft.cli.output import emit_json, printable, report_error, show_warnings
from vmgraft.cli.views import show_report, verdict_document
from vmgraft.errors import ExpectationError, VmgraftError
from vmgraft.signing.contract import Report
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.machine import MachineResult
from vmgraft.vmmhost.launch import RunReport
from vmgraft.vmmhost.report import presented

#: Bytes of debug output in the JSON object, its last; ``--debug`` writes all that was kept.
_DEBUG_SHOWN: Final = 64 << 10
#: What to do about a guest that asks too much of an engine.
_OTHER_ENGINE: Final = "try --engine qemu, or --cpu kvm where it is native (`vmgraft doctor`)"


def warn_before(verdict: Report) -> None:
    """Print on stderr what speaks against an image that is about to boot; of a refused one ``finish_run`` tells all."""
    if verdict.ok:
        show_warnings(list(verdict.warnings))


def finish_run(
    report: RunReport, image: Path, outputs: Outputs, *, as_json: bool, audit_log: Path | None = None
) -> int:
    """Print what happened and return the exit code.

    Args:
        report: How the run went.
        image: What was run.
        outputs: Where the guest's screen goes.
        as_json: Print one JSON object.
        audit_log: The log that was written, to tell people the hash that it ends with.
    """
    code = exit_code(report.error)
    if report.result is not None:
        outputs.started = True
        outputs.write_screen(report.result.screen, report.cells)
        outputs.write_debug(report.result.debug)
    if as_json:
        emit_json(run_document(report, image, code))
        return code
    if report.plan is None:
        show_report(report.verification, image)
    elif report.result is None:
        click.echo(json.dumps({**report.plan.to_dict(), "planSha256": report.plan.digest}, indent=2))
    else:
        _show_end(report, report.result, image)
    if audit_log is not None and report.audit_head is not None:
        click.echo(f"audit log {printable(str(audit_log))}: head {report.audit_head}", err=True)
    return code


def run_document(report: RunReport, image: Path, code: int) -> dict[str, Any]:
    """Return the JSON object of ``run``."""
    document = verdict_document(report.verification, image)
    document.update(ok=code == 0, exitCode=code, started=report.result is not None, auditHead=report.audit_head)
    document["memory"] = report.memory
    if report.plan is not None:
        document["plan"] = {**report.plan.to_dict(), "planSha256": report.plan.digest}
    if report.result is None:
        return document
    result = report.result
    document["confinement"] = report.confinement
    document["layer"] = report.extensions
    document["supplements"] = presented(report)
    document["control"] = report.control
    document["end"] = {
        "reason": result.reason.value,
        "detail": result.detail,
        "engine": result.engine,
        "emulated": result.emulated,
        "why": result.why,
        "wallSeconds": round(result.wall_seconds, 3),
        "exits": result.exits,
        "blocksChecked": result.blocks_checked,
        "blocksWritten": result.blocks_written,
        "screen": list(result.screen),
        "serial": result.serial.decode("latin-1"),
        "debug": result.debug[-_DEBUG_SHOWN:].decode("latin-1"),
    }
    if report.error is not None:
        document["error"] = {**_failure(report, result, image).to_dict(), "code": report.error}
    return document


def _show_end(report: RunReport, result: MachineResult, image: Path) -> None:
    """Print the closing lines of a run on stderr, so that stdout is the guest's."""
    if report.memory is not None:
        _show_memory(report.memory)
    for item in report.extensions:
        show_extension(item, err=True)
    for item in presented(report):
        what = ", ".join(each["kind"] for each in item["supplements"])
        click.echo(printable(f"supplements of {item['id']} {item['version']}: {what}"), err=True)
    engine = f"{result.engine}{' (emulated)' if result.emulated else ''}"
    click.echo(f"ended: {_why(result)} after {result.wall_seconds:.2f} s on {engine}", err=True)
    if report.error is not None:
        report_error(_failure(report, result, image), as_json=False)


def _show_memory(memory: dict[str, Any]) -> None:
    """Print what this host remembers from now on."""
    if memory["created"]:
        click.echo(f"a new rollback memory was begun: {printable(memory['file'])}", err=True)
    for seen in memory["raised"]:
        click.echo(
            f"remembered: {seen['extension']} security version {seen['securityVersion']}, "
            f"generation {seen['generation']} (policy {seen['policy']})",
            err=True,
        )


def _failure(report: RunReport, result: MachineResult, image: Path) -> VmgraftError:
    """Return what to say about a guest that did not end well."""
    if report.error == ExpectationError.code:
        hint = "--screen and --serial keep what the guest showed; a longer --timeout may help"
        if result.engine == "soft" and report.plan is not None and report.plan.direct is not None:
            hint += f", and {_OTHER_ENGINE}"
        return ExpectationError(
            f"{report.until!r} never appeared; the guest ended: {_why(result)}", file=image, hint=hint
        )
    hint = "--audit-log keeps what the extensions did"
    if result.reason is EndReason.ERROR:
        hint = f"not every guest runs on this engine: {_OTHER_ENGINE}"
    return VmgraftError(f"{report.error}: the guest ended: {_why(result)}", file=image, hint=hint)


def _why(result: MachineResult) -> str:
    """Return the reason of an end in words."""
    return printable(result.reason.value + (f" ({result.detail})" if result.detail else ""))
