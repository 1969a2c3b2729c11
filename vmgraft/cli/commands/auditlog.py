"""``vmgraft audit-log`` and ``check-log``."""

from __future__ import annotations

from pathlib import Path

import click

from vmgraft.cli.options import NAMED_FILE, F, json_option


@click.group("audit-log", epilog="Example: vmgraft audit-log verify audit.jsonl")
def audit_log() -> None:
    """Check and read the logs that `vmgraft run --audit-log` writes."""


def _verified(function: F) -> F:
    function = click.option("--head", help="Hash of the last line, as the run reported it.")(json_option(function))
    return click.argument("log", type=NAMED_FILE)(function)


def _verify(log: Path, head: str | None, as_json: bool) -> None:
    from vmgraft.cli.output import emit_ok, printable
    from vmgraft.vmmhost.audit import check_chain

    count, last = check_chain(log, head)
    if as_json:
        emit_ok({"records": count, "head": last})
    else:
        click.echo(f"{printable(str(log))}: {count} records, the chain holds, head {last}")


@audit_log.command(epilog="Example: vmgraft audit-log verify audit.jsonl --head 3f1c…")
@_verified
def verify(log: Path, head: str | None, as_json: bool) -> None:
    """Check that no line of an audit log was changed, removed, added or moved."""
    _verify(log, head, as_json)


@click.command("check-log", epilog="Example: vmgraft check-log audit.jsonl --head 3f1c…")
@_verified
def check_log(log: Path, head: str | None, as_json: bool) -> None:
    """Check that no line of an audit log was changed, removed, added or moved (`audit-log verify`)."""
    _verify(log, head, as_json)


@audit_log.command(epilog="Example: vmgraft audit-log show audit.jsonl --event fault --event quota")
@click.argument("log", type=NAMED_FILE)
@click.option("--event", "events", multiple=True, help="Only records of this kind; repeatable.")
@click.option("--extension", metavar="ID", help="Only records about this extension.")
@json_option
def show(log: Path, events: tuple[str, ...], extension: str | None, as_json: bool) -> None:
    """Show a log for reading, also of a run that goes on. Each line is checked against the chain before it is shown."""
    from vmgraft.cli.auditview import record_line
    from vmgraft.cli.output import emit_ok
    from vmgraft.vmmhost.audit import read_records

    chosen = (
        record
        for record in read_records(log)
        if (not events or record.get("event") in events) and extension in (None, record.get("id"))
    )
    if as_json:
        emit_ok({"records": list(chosen)})
        return
    for record in chosen:
        click.echo(record_line(record))
