"""``vmgraft run`` and ``check-log``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmgraft.cli.options import (
    FILE,
    cpu_option,
    image_argument,
    json_option,
    memory_option,
    opening_options,
    policy_option,
    policy_trust_options,
    quiet_option,
)

OUTPUT = click.Path(path_type=Path, allow_dash=True, dir_okay=False)

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Opening


def _finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    """Refuse ``inf`` and ``nan``, which are floats to Python."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter("not a number of seconds.")
    return value


def _not_empty(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse a text that every screen shows."""
    if value == "":
        raise click.BadParameter("the text is empty.")
    return value


@click.command(epilog='Example: vmgraft run grub.iso --policy policy.json --until "GNU GRUB" --screen -')
@image_argument
@policy_option
@policy_trust_options
@memory_option
@cpu_option
@click.option(
    "--boot", type=click.Choice(["auto", "disk", "cdrom"]), default="auto", show_default=True,
    help="Boot as a hard disk or as a CD; auto: what the content looks like.",
)  # fmt: skip
@click.option("--memory", type=click.IntRange(2, 3072), default=64, show_default=True, help="Guest RAM in MiB.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), callback=_finite,
    help="Stop the guest after so many seconds.",
)  # fmt: skip
@click.option(
    "--until", callback=_not_empty,
    help="Stop when this text appears on screen or serial port; exit 22 if it never does.",
)  # fmt: skip
@click.option("--keys", default="", help="Text typed into the guest's keyboard.")
@click.option("--screen", type=OUTPUT, help="Write the text screen as it stands at the end: a new file, or - .")
@click.option("--serial", type=OUTPUT, help="Write what the guest sends to COM1: a new file, or - (default).")
@click.option("--audit-log", type=FILE, help="Write a hash-chained log of decisions and faults to this new file.")
@click.option("--without-extensions", is_flag=True, help="Boot the verified image, but load no extension.")
@click.option("--dry-run", is_flag=True, help="Verify and print the launch plan; start nothing.")
@opening_options
@quiet_option
@json_option
def run(
    image: Path,
    policy_path: Path,
    policy_keys: tuple[Path, ...],
    signed_policy: bool,
    state: Path | None,
    cpu: str,
    boot: str,
    memory: int,
    timeout: float | None,
    until: str | None,
    keys: str,
    screen: Path | None,
    serial: Path | None,
    audit_log: Path | None,
    without_extensions: bool,
    dry_run: bool,
    opening: Opening,
    quiet: bool,
    as_json: bool,
) -> int:
    """Verify an image against a policy, then boot it with its extensions in sandboxed processes.

    Nothing is started unless every check passes. The image is never written; the guest's writes are gone at the end.
    The versions that ran are remembered, and older ones refused from then on (--state).
    """
    from vmgraft.cli.console import Outputs
    from vmgraft.cli.output import progress_bar
    from vmgraft.cli.runview import finish_run, warn_before
    from vmgraft.signing.keyfiles import load_public
    from vmgraft.vmmhost.launch import Launcher
    from vmgraft.vmmhost.plan import RunOptions

    options = RunOptions(
        cpu=cpu, boot=boot, memory_mib=memory, timeout=timeout, until=until, keys=keys,
        extensions=not without_extensions, opening=opening, audit_log=audit_log, state=state,
        policy_keys=tuple(map(load_public, policy_keys)), signed_policy=signed_policy,
    )  # fmt: skip
    with Outputs(screen=screen, serial=serial, as_json=as_json) as outputs:
        with progress_bar("verify", quiet=quiet or as_json) as bar:
            launcher = Launcher(
                image, policy_path, options, serial=outputs.serial_sink, progress=bar,
                judged=None if as_json else warn_before, confine=not dry_run,
            )  # fmt: skip
            report = launcher.plan() if dry_run else launcher.run()
        return finish_run(report, image, outputs, as_json=as_json)


@click.command("check-log", epilog="Example: vmgraft check-log audit.jsonl --head 3f1c…")
@click.argument("log", type=FILE)
@click.option("--head", help="Hash of the last line, as the run reported it.")
@json_option
def check_log(log: Path, head: str | None, as_json: bool) -> None:
    """Check that no line of an audit log was changed, removed, added or moved."""
    from vmgraft.cli.output import emit_ok, printable
    from vmgraft.vmmhost.audit import check_chain

    count, last = check_chain(log, head)
    if as_json:
        emit_ok({"records": count, "head": last})
    else:
        click.echo(f"{printable(str(log))}: {count} records, the chain holds, head {last}")
