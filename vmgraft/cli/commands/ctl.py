"""``vmgraft ctl``: ask and change a guest that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmgraft.cli.options import FILE, NAMED_FILE, F, json_option, opening_options

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Opening
    from vmgraft.vmmhost.control.client import ControlClient


@click.group(epilog="Example: vmgraft ctl guest.sock status")
@click.argument("socket", type=NAMED_FILE)
@click.pass_context
def ctl(context: click.Context, socket: Path) -> None:
    """Ask and change a guest that was started with `vmgraft run --control SOCKET`.

    Only the user who started it, and root, may. Each request stands in the guest's audit log.
    """
    context.meta["vmgraft.socket"] = socket


def _guest() -> ControlClient:
    from vmgraft.vmmhost.control.client import ControlClient

    return ControlClient(click.get_current_context().meta["vmgraft.socket"])


@ctl.command(epilog="Example: vmgraft ctl guest.sock status --json")
@json_option
def status(as_json: bool) -> None:
    """Say what runs: engine, plan, extensions."""
    from vmgraft.cli.ctlview import show_status
    from vmgraft.cli.output import emit_or_show
    from vmgraft.vmmhost.control.wire import Op

    with _guest() as guest:
        emit_or_show(guest.ask(Op.STATUS), as_json, show_status)


@ctl.command(epilog="Example: vmgraft ctl guest.sock stats --watch 2")
@click.option(
    "--watch", type=click.FloatRange(min=0.1, max=60), metavar="SECONDS", help="Again and again, until the guest ends."
)
@click.option("--count", type=click.IntRange(min=1), help="With --watch: so many times.")
@json_option
def stats(watch: float | None, count: int | None, as_json: bool) -> None:
    """Count exits by reason, calls, fuel and latencies, while the guest runs. With --json, one object a look.

    A watched guest that ends in order ends this with 0.
    """
    import json
    import time

    from vmgraft.cli.ctlview import show_stats
    from vmgraft.cli.output import emit_or_show
    from vmgraft.errors import HostError, UsageError
    from vmgraft.vmmhost.control.wire import Op

    if watch is None:
        if count is not None:
            raise UsageError("--count goes with --watch")
        with _guest() as guest:
            emit_or_show(guest.ask(Op.STATS), as_json, show_stats)
        return
    before: dict[str, Any] | None = None
    with _guest() as guest:
        while count is None or count > 0:
            try:
                now = guest.ask(Op.STATS)
            except HostError:
                if before is None or not guest.ended():
                    raise
                click.echo("the guest has ended", err=as_json)
                return
            if as_json:
                click.echo(json.dumps({"ok": True, "exitCode": 0, **now}))
            else:
                show_stats(now, before)
            before, count = now, None if count is None else count - 1
            if count != 0:
                time.sleep(watch)


@ctl.command(epilog="Example: vmgraft ctl guest.sock screen -o screen.png")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, allow_dash=True, dir_okay=False), default="-", show_default=True,
    help="A new file, or - for stdout. A picture where its name ends in .png.",
)  # fmt: skip
@click.option("--format", "form", type=click.Choice(["text", "png"]), help="Default: by the name of the file.")
@json_option
def screen(output: Path, form: str | None, as_json: bool) -> None:
    """Save the text screen as it stands now. With --json, its lines are in the object, and -o names a file besides."""
    import base64
    import binascii

    from vmgraft.cli.console import screen_bytes, screen_format
    from vmgraft.cli.files import write_output
    from vmgraft.cli.output import emit_ok
    from vmgraft.errors import HostError, UsageError
    from vmgraft.vmmhost.control.wire import Op

    streamed = str(output) == "-"
    if as_json and streamed and form is not None:
        raise UsageError("--format goes with -o FILE where --json prints", hint="name a file: -o FILE")
    with _guest() as guest:
        answer = guest.ask(Op.SCREEN)
    try:
        lines, cells = [str(line) for line in answer["lines"]], base64.b64decode(answer["cells"], validate=True)
        data = screen_bytes(lines, cells, screen_format(output, form))
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise HostError("the answer holds no screen") from error
    if not (as_json and streamed):
        write_output(output, data, what="screen")
    if as_json:
        emit_ok({"file": None if streamed else str(output), "lines": lines})


def _change(function: F) -> F:
    """What `load` and `replace` take."""
    function = click.option("--extension", metavar="ID", help="Which one, where the record carries several.")(function)
    function = click.argument("source", type=FILE)(function)
    return opening_options(json_option(function))


@ctl.command(epilog="Example: vmgraft ctl guest.sock load disk-with-clock.img --extension org.example.clock")
@_change
def load(source: Path, extension: str | None, opening: Opening, as_json: bool) -> None:
    """Verify an extension of SOURCE and start it beside the guest.

    SOURCE is a grafted image, or a record that `vmgraft extract IMAGE record` wrote. It is held against the policy that
    the guest was started with, the content that runs, and the rollback memory.
    """
    _offer("load", source, extension, opening, as_json)


@ctl.command(epilog="Example: vmgraft ctl guest.sock replace disk-with-newer-clock.img")
@_change
def replace(source: Path, extension: str | None, opening: Opening, as_json: bool) -> None:
    """Verify an extension of SOURCE and put it in place of the one of the same id that runs; see `load`."""
    _offer("replace", source, extension, opening, as_json)


def _offer(op: str, source: Path, extension: str | None, opening: Opening, as_json: bool) -> None:
    from vmgraft.cli.output import emit_or_show, printable
    from vmgraft.vmmhost.control.wire import Op

    with _guest() as guest:
        done = guest.offer(Op(op), source, extension=extension, opening=opening)
    verb = {"load": "runs", "replace": "runs in place of the one before"}[op]
    emit_or_show(done, as_json, lambda d: click.echo(printable(f"{d.get('id')} {d.get('version')} {verb}")))


@ctl.command(epilog="Example: vmgraft ctl guest.sock unload org.example.clock")
@click.argument("extension", metavar="ID")
@json_option
def unload(extension: str, as_json: bool) -> None:
    """End an extension; what it claimed answers as an empty bus from then on."""
    from vmgraft.cli.output import emit_or_show, printable
    from vmgraft.vmmhost.control.wire import Op

    with _guest() as guest:
        done = guest.ask(Op.UNLOAD, extension)
    emit_or_show(done, as_json, lambda _d: click.echo(printable(f"{extension} is ended")))


@ctl.command(epilog="Example: vmgraft ctl guest.sock snapshot guest.snap")
@click.argument("file", type=NAMED_FILE)
@json_option
def snapshot(file: Path, as_json: bool) -> None:
    """Keep the guest as it is now in a new FILE, for `vmgraft run --restore`; it goes on afterwards.

    FILE holds all of the guest's memory: it is readable for its owner only.
    """
    from vmgraft.cli.output import emit_or_show, printable

    with _guest() as guest:
        done = guest.snapshot(file)
    words = f"{file}: {done.get('bytes')} bytes, sha256:{done.get('sha256')}"
    emit_or_show(done, as_json, lambda _d: click.echo(printable(words)))


@ctl.command(epilog="Example: vmgraft ctl guest.sock stop")
@json_option
def stop(as_json: bool) -> None:
    """End the guest, as its own power button does."""
    from vmgraft.cli.output import emit_or_show
    from vmgraft.vmmhost.control.wire import Op

    with _guest() as guest:
        done = guest.ask(Op.STOP)
    emit_or_show(done, as_json, lambda _d: click.echo("the guest is told to end"))
