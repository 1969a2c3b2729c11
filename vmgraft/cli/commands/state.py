"""``vmgraft state``: what a host remembers, so that nothing older comes back."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from vmgraft.cli.options import FILE, F, json_option


def _place(function: F) -> F:
    """``--state``: which memory; unlike ``run``, these commands need one."""
    return click.option(
        "--state", "path", type=FILE, help="The rollback memory (default: ~/.local/state/vmgraft/state.db)."
    )(function)


def _file(path: Path | None) -> Path:
    from vmgraft.signing.statefile import default_path

    return default_path() if path is None else path


@click.group(epilog="Example: vmgraft state show")
def state() -> None:
    """Show and change what this host remembers: the highest versions that ran, and whose policies it follows.

    `vmgraft run` refuses what is older. Only `reset` makes it forget.
    """


@state.command(short_help="Begin an empty memory.", epilog="Example: vmgraft state init")
@_place
@json_option
def init(path: Path | None, as_json: bool) -> None:
    """Begin an empty memory; one that is there is never touched. `run` does it too, unless the policy demands one."""
    from vmgraft.cli.output import emit_ok, printable
    from vmgraft.errors import FileError
    from vmgraft.signing.state import create_state

    file = _file(path)
    if not create_state(file):
        raise FileError("there is a rollback memory already", file=file, hint="see: vmgraft state show")
    if as_json:
        emit_ok({"file": str(file)})
    else:
        click.echo(f"an empty rollback memory was made: {printable(str(file))}")


@state.command(short_help="Show everything remembered.", epilog="Example: vmgraft state show --json")
@_place
@json_option
def show(path: Path | None, as_json: bool) -> None:
    """Show everything that is remembered."""
    from vmgraft.cli.output import emit_ok
    from vmgraft.signing.state import RollbackState

    file = _file(path)
    with RollbackState(file, writable=False) as memory:
        document = memory.export()
    if as_json:
        emit_ok({"file": str(file), **document})
    else:
        _show(document)


def _show(document: dict[str, Any]) -> None:
    from vmgraft.cli.output import printable

    lines = [
        f"{seen['policy']}  {seen['extension']}  security version {seen['securityVersion']}, "
        f"generation {seen['generation']}, since {seen['raised']}"
        for seen in document["extensions"]
    ]
    lines += [
        f"signed policies of {seen['signer']}: version {seen['policyVersion']}, since {seen['raised']}"
        for seen in document["policies"]
    ]
    lines += [f"pinned policy key {pin['keyid']}, since {pin['pinned']}" for pin in document["pinnedPolicyKeys"]]
    for line in lines or ["nothing is remembered yet"]:
        click.echo(printable(line))


@state.command(short_help="Write everything as JSON.", epilog="Example: vmgraft state export -o state.json")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, allow_dash=True, dir_okay=False), default="-", show_default=True,
    help="A new file, or - for stdout.",
)  # fmt: skip
@_place
def export(path: Path | None, output: Path) -> None:
    """Write everything that is remembered as JSON, read at one point in time."""
    import json

    from vmgraft.cli.files import write_output
    from vmgraft.signing.state import RollbackState

    with RollbackState(_file(path), writable=False) as memory:
        document = memory.export()
    write_output(output, json.dumps(document, indent=2).encode("ascii") + b"\n", what="export")


@state.command(
    short_help="Forget an extension, or a policy key.",
    epilog="Example: vmgraft state reset acme-appliances com.acme.clock --yes",
)
@click.argument("policy", required=False)
@click.argument("extension", required=False)
@click.option("--policy-key", "signer", metavar="KEYID", help="Forget this key: its pin and its policies' version.")
@click.option("--yes", is_flag=True, help="Without it nothing is forgotten.")
@_place
@json_option
def reset(
    policy: str | None, extension: str | None, signer: str | None, yes: bool, path: Path | None, as_json: bool
) -> None:
    """Forget an EXTENSION under a trust POLICY: old releases of it run again. Or forget a key that signs policies."""
    from vmgraft.cli.output import emit_ok, printable
    from vmgraft.errors import UsageError
    from vmgraft.signing.state import RollbackState

    if (policy is None or extension is None) if signer is None else policy is not None:
        raise click.UsageError("Name POLICY and EXTENSION, or --policy-key KEYID.")
    what = f"{extension} under {policy}" if signer is None else f"the policy key {signer}"
    if not yes:
        raise UsageError(f"{what} would be forgotten, and what is old accepted again", hint="say --yes to do it")
    forgotten = None
    with RollbackState(_file(path)) as memory:
        if signer is not None:
            memory.reset_signer(signer)
        elif policy is not None and extension is not None:
            forgotten = memory.reset(policy, extension).to_dict()
    if as_json:
        emit_ok({"forgotten": forgotten if signer is None else {"keyid": signer}})
    else:
        click.echo(f"forgotten: {printable(what)}")


@state.command(short_help="Accept signed policies only.", epilog="Example: vmgraft state pin fleet-policy.pub")
@click.argument("key", type=FILE)
@_place
@json_option
def pin(key: Path, path: Path | None, as_json: bool) -> None:
    """From now on accept only policies that a pinned KEY has signed; the first pin is what switches that on."""
    from vmgraft.cli.output import emit_ok
    from vmgraft.signing.keyfiles import load_public
    from vmgraft.signing.state import RollbackState

    public = load_public(key)
    with RollbackState(_file(path)) as memory:
        memory.pin(public, when=datetime.now(UTC))
    if as_json:
        emit_ok({"keyid": public.keyid})
    else:
        click.echo(f"pinned: {public.keyid}")
