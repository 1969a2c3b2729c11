"""``vmgraft run``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmgraft.cli.options import (
    FILE,
    NAMED_FILE,
    HostTrust,
    cpu_option,
    host_trust_options,
    image_argument,
    json_option,
    opening_options,
    quiet_option,
)

OUTPUT = click.Path(path_type=Path, allow_dash=True, dir_okay=False)

if TYPE_CHECKING:
    from vmgraft.cli.terminal import Terminal
    from vmgraft.imagefmt.contract import Opening
    from vmgraft.signing.contract import Report


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
@host_trust_options
@cpu_option
@click.option(
    "--engine", type=click.Choice(["core", "qemu"]), default="core", show_default=True,
    help="What the machine is: this package's own, or an installed QEMU.",
)  # fmt: skip
@click.option(
    "--firmware", type=click.Choice(["trap", "seabios"]), default="trap", show_default=True,
    help="BIOS services answered by the host, or SeaBIOS as installed (core engine).",
)  # fmt: skip
@click.option("--bios", type=FILE, help="SeaBIOS as this file, for --firmware seabios (default: the installed one).")
@click.option("--kernel", type=FILE, help="Start this kernel, the operator's own, in place of what the disk boots.")
@click.option("--initrd", type=FILE, help="Initial RAM disk that goes with --kernel.")
@click.option("--append", default="", help="Command line that goes with --kernel.")
@click.option(
    "--boot", type=click.Choice(["auto", "disk", "cdrom", "floppy"]), default="auto", show_default=True,
    help="Boot as a hard disk, CD or floppy; auto: what the content looks like.",
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
@click.option(
    "--screen-format", type=click.Choice(["text", "png"]),
    help="Lines of text, or a picture. Default: a picture where the file's name ends in .png.",
)  # fmt: skip
@click.option("--serial", type=OUTPUT, help="Write what the guest sends to COM1: a new file, or - (default).")
@click.option(
    "--debug", type=OUTPUT,
    help="Write what firmware and guest sent to the debug ports (402h, E9h) at the end: a new file, or - .",
)  # fmt: skip
@click.option(
    "--console", is_flag=True, help="Make this terminal the guest's serial port: keys go to it, Ctrl-] ends the run."
)
@click.option("--control", type=NAMED_FILE, metavar="SOCKET", help="Listen on this Unix socket for `vmgraft ctl`.")
@click.option(
    "--record", type=NAMED_FILE, help="Write every call of an extension, and what came of it, to this new file."
)
@click.option("--replay", type=FILE, help="Let such a file answer in place of the extensions; no module runs.")
@click.option("--restore", type=FILE, metavar="FILE", help="Go on from what `vmgraft ctl SOCKET snapshot` kept.")
@click.option(
    "--require-isolation", type=click.IntRange(0, 3), default=0, show_default=True,
    help="Refuse where the host or a worker reaches less than this isolation level (docs/sandbox.md).",
)  # fmt: skip
@click.option("--audit-log", type=NAMED_FILE, help="Write a hash-chained log of decisions and faults to this new file.")
@click.option("--without-extensions", is_flag=True, help="Boot the verified image, but load no extension.")
@click.option("--without-supplements", is_flag=True, help="Leave out what extensions add to the disk.")
@click.option(
    "--layer", "layers", type=FILE, multiple=True,
    help="Show the files of this image too, in one read-only volume for all layers; repeatable, the lowest first.",
)  # fmt: skip
@click.option(
    "--pin", type=click.IntRange(min=0), metavar="CPU",
    help="Keep guest and extensions on this processor: calls take half the time, if nobody else needs it.",
)  # fmt: skip
@click.option("--verify-all", is_flag=True, help="Read all content first, also where the image holds its signed tree.")
@click.option("--dry-run", is_flag=True, help="Verify and print the launch plan; start nothing.")
@opening_options
@quiet_option
@json_option
def run(
    image: Path,
    trust: HostTrust,
    cpu: str,
    engine: str,
    firmware: str,
    bios: Path | None,
    kernel: Path | None,
    initrd: Path | None,
    append: str,
    boot: str,
    memory: int,
    timeout: float | None,
    until: str | None,
    keys: str,
    screen: Path | None,
    screen_format: str | None,
    serial: Path | None,
    debug: Path | None,
    console: bool,
    control: Path | None,
    record: Path | None,
    replay: Path | None,
    restore: Path | None,
    require_isolation: int,
    audit_log: Path | None,
    without_extensions: bool,
    without_supplements: bool,
    layers: tuple[Path, ...],
    pin: int | None,
    verify_all: bool,
    dry_run: bool,
    opening: Opening,
    quiet: bool,
    as_json: bool,
) -> int:
    """Verify an image against a policy, then boot it with its extensions in sandboxed processes.

    Nothing is started unless every check passes. The image is never written; the guest's writes are gone at the end.
    The versions that ran are remembered, and older ones refused from then on (--state).
    """
    from contextlib import ExitStack

    from vmgraft.cli.console import Outputs
    from vmgraft.cli.output import progress_bar
    from vmgraft.cli.runchecks import check_together
    from vmgraft.cli.runview import finish_run, warn_before
    from vmgraft.vmmhost.launch import Launcher
    from vmgraft.vmmhost.plan import RunOptions

    check_together(click.get_current_context())
    options = RunOptions(
        cpu=cpu, boot=boot, memory_mib=memory, timeout=timeout, until=until, keys=keys,
        extensions=not without_extensions, opening=opening, audit_log=audit_log, state=trust.state,
        policy_keys=trust.keys(), signed_policy=trust.signed, control=control,
        record=record, replay=replay, restore=restore, engine=engine, firmware=firmware, bios=bios,
        kernel=kernel, initrd=initrd, append=append,
        supplements=not without_supplements, layers=layers, require_isolation=require_isolation,
        pin=pin, verify_all=verify_all,
    )  # fmt: skip
    terminal = _terminal(serial, as_json=as_json) if console and not dry_run else None
    with Outputs(
        screen=screen, form=screen_format, serial=serial, debug=debug, as_json=as_json, terminal=terminal
    ) as outputs:
        with ExitStack() as stack, ExitStack() as verifying:
            bar = verifying.enter_context(progress_bar("verify", quiet=quiet or as_json or console))

            def judged(verdict: Report) -> None:
                verifying.close()  # the bar redraws lines and takes stdout over, which is the guest's from now on
                if not as_json:
                    warn_before(verdict)

            launcher = Launcher(
                image, trust.policy, options, serial=outputs.serial_sink, progress=bar, console=terminal,
                judged=judged, confine=not dry_run,
            )  # fmt: skip
            if terminal is not None:
                stack.enter_context(terminal)
            report = launcher.plan() if dry_run else launcher.run()
        return finish_run(report, image, outputs, as_json=as_json, audit_log=audit_log)


def _terminal(serial: Path | None, *, as_json: bool) -> Terminal:
    """Return the user's terminal, for a console.

    Raises:
        UsageError: it cannot be one.
    """
    import sys

    from vmgraft.cli.output import interactive
    from vmgraft.cli.terminal import Terminal
    from vmgraft.errors import UsageError

    given = [name for name, there in (("--serial", serial is not None), ("--json", as_json)) if there]
    if given or not interactive(sys.stdout):
        hint = f"leave {' and '.join(given)} out" if given else "leave --console out"
        raise UsageError("--console needs stdout for itself, a terminal", hint=hint)
    return Terminal()
