"""``vmgraft serve``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmgraft.cli.options import (
    NAMED_FILE,
    HostTrust,
    host_trust_options,
    image_argument,
    json_option,
    opening_options,
    quiet_option,
)

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Opening
    from vmgraft.vmmhost.nbd.serve import ServeReport


@click.command(
    epilog="Example: vmgraft serve disk.qcow2 --policy policy.json --socket /run/user/1000/disk.sock\n\n"
    "Example: vmgraft serve disk.qcow2 --policy policy.json --listen 127.0.0.1:10809 --once"
)
@image_argument
@host_trust_options
@click.option("--socket", type=NAMED_FILE, help="Listen on this new Unix socket, which only its owner may use.")
@click.option(
    "--listen", metavar="[ADDRESS:]PORT",
    help="Listen on TCP, on 127.0.0.1 unless an address is named; 0 takes a free port. Nothing is encrypted.",
)  # fmt: skip
@click.option("--overlay", is_flag=True, help="Let clients write; what they wrote is gone at the end.")
@click.option(
    "--overlay-size", type=click.IntRange(1, 65536), show_default="256",
    help="With --overlay: MiB that may be changed; they are held in memory.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="End when the last client has gone.")
@click.option("--verify-all", is_flag=True, help="Read all content first, also where the image holds its signed tree.")
@click.option(
    "--audit-log", type=NAMED_FILE, help="Write a hash-chained log of decisions and clients to this new file."
)
@opening_options
@quiet_option
@json_option
def serve(
    image: Path,
    trust: HostTrust,
    socket: Path | None,
    listen: str | None,
    overlay: bool,
    overlay_size: int | None,
    once: bool,
    verify_all: bool,
    audit_log: Path | None,
    opening: Opening,
    quiet: bool,
    as_json: bool,
) -> int:
    """Verify an image against a policy, then export its content over NBD.

    Every block is checked again when it is read. A block that changed since the verification gives clients an I/O error
    and ends the server with 12. Ctrl-C, SIGTERM and SIGHUP end it with 0.
    """
    from vmgraft.cli.output import orderly_end, progress_bar, show_warnings
    from vmgraft.vmmhost.nbd.serve import ServeOptions, Serving, parse_listen

    if (socket is None) == (listen is None):
        raise click.UsageError("one of --socket and --listen says where clients connect.")
    if overlay_size is not None and not overlay:
        raise click.UsageError("--overlay-size goes with --overlay.")
    host, port = ("", 0) if listen is None else parse_listen(listen)
    options = ServeOptions(
        socket=socket, host=host, port=port, overlay=overlay, overlay_bytes=(overlay_size or 256) << 20, once=once,
        opening=opening, audit_log=audit_log, state=trust.state, policy_keys=trust.keys(),
        signed_policy=trust.signed, verify_all=verify_all,
    )  # fmt: skip
    if options.exposed:
        show_warnings([f"{host}: whoever reaches this address can read the disk; NBD is not encrypted here"])
    with orderly_end(), ExitStack() as verifying:
        bar = verifying.enter_context(progress_bar("verify", quiet=quiet or as_json))

        def ready(uri: str) -> None:
            verifying.close()  # the bar, which would go on being drawn as long as clients are served
            click.echo(uri, err=as_json)  # with --json stdout is for the one object at the end

        report = Serving(image, trust.policy, options, ready=ready, progress=bar, confine=True).run()
    return _finish(report, image, as_json=as_json)


def _finish(report: ServeReport, image: Path, *, as_json: bool) -> int:
    """Print what happened and return the exit code."""
    from vmgraft.cli.exitcodes import exit_code
    from vmgraft.cli.output import emit_json, report_error
    from vmgraft.cli.views import show_report, verdict_document

    code = exit_code(report.error)
    if as_json:
        document = verdict_document(report.verification, image)
        document.update(ok=code == 0, exitCode=code, uri=report.uri, auditHead=report.audit_head)
        if report.uri is not None:
            document["served"] = {**report.counters, "blocksChecked": report.blocks_checked}
        if report.failure is not None:
            document["error"] = report.failure.to_dict()
        emit_json(document)
    elif report.uri is None:
        show_report(report.verification, image)
    else:
        done = report.counters
        click.echo(
            f"ended: {done['clients']} clients, {done['bytesRead']} bytes read, {done['bytesWritten']} written, "
            f"{report.blocks_checked} blocks checked",
            err=True,
        )
        if report.failure is not None:
            report_error(report.failure, as_json=False)
    return code
