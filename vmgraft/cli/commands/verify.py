"""``vmgraft verify``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmgraft.cli.options import (
    FILE,
    F,
    image_argument,
    json_option,
    opening_options,
    passphrase_options,
    policy_option,
    policy_trust_options,
    quiet_option,
)

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Opening
    from vmgraft.signing.contract import Report

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _duration(_context: click.Context, _parameter: click.Parameter, value: str | None) -> timedelta | None:
    """Turn ``36h`` into a duration."""
    if value is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,5})([smhd])", value)
    if found is None:
        raise click.BadParameter("a number and a unit: 90s, 30m, 36h or 7d.")
    return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


def _summary_options(function: F) -> F:
    """Everything about verification summaries: making one, or relying on one."""
    options: list[Callable[[F], F]] = [
        click.option(
            "--vsa-max-age", callback=_duration, metavar="AGE", help="How old it may be, as in 36h. Default: 7d."
        ),
        click.option(
            "--vsa-trust", type=FILE, multiple=True,
            help="Public key of an auditor (where the policy names auditors, one of them); repeatable.",
        ),
        click.option("--vsa", type=FILE, help="Rely on this summary for who signed; all else is checked all the same."),
        click.option("--verifier-id", metavar="URI", help="With --emit-vsa: who you are, as an absolute URI."),
        click.option("--vsa-key", metavar="KEY", help="With --emit-vsa: the auditor's private key, path or URI."),
        click.option(
            "--emit-vsa", type=click.Path(path_type=Path, dir_okay=False),
            help="Write a signed summary of how this verification ended (SLSA VSA) to a new file.",
        ),
    ]  # fmt: skip
    for option in options:
        function = option(function)
    return function


@click.command(
    epilog="Example: vmgraft verify disk.qcow2 --policy policy.json\n\n"
    "Example: vmgraft verify disk.qcow2 --policy policy.json --vsa disk.vsa.json --vsa-trust auditor.pub"
)
@image_argument
@policy_option
@policy_trust_options
@click.option("--state", type=FILE, help="Compare with this host's rollback memory; it is only read.")
@_summary_options
@passphrase_options
@opening_options
@quiet_option
@json_option
def verify(
    image: Path,
    policy_path: Path,
    policy_keys: tuple[Path, ...],
    signed_policy: bool,
    state: Path | None,
    emit_vsa: Path | None,
    vsa_key: str | None,
    verifier_id: str | None,
    vsa: Path | None,
    vsa_trust: tuple[Path, ...],
    vsa_max_age: timedelta | None,
    passphrase_file: Path | None,
    passphrase_fd: int | None,
    opening: Opening,
    quiet: bool,
    as_json: bool,
) -> int:
    """Check an image against a trust policy: signature, signers, content, payloads, freshness, capabilities."""
    from vmgraft.cli.exitcodes import exit_code
    from vmgraft.cli.output import emit_json, printable, progress_bar
    from vmgraft.cli.views import show_report, verdict_document

    _check_summary_options(emit_vsa, (vsa_key, verifier_id), vsa, (vsa_trust, vsa_max_age))
    with ExitStack() as stack:
        common: dict[str, Any] = {"opening": opening, **_trust(stack, policy_keys, signed_policy, state)}
        if emit_vsa is not None and vsa_key is not None:
            from vmgraft.cli.passphrase import existing_passphrase
            from vmgraft.signing.signers import load_signer

            common["signer"] = load_signer(vsa_key, existing_passphrase(passphrase_file, passphrase_fd))
            common["verifier"] = verifier_id
        elif vsa is not None:
            common["summary"] = _demand(vsa, vsa_trust, vsa_max_age)
        common["progress"] = stack.enter_context(progress_bar("verify", quiet=quiet or as_json))
        report = _verify(image, policy_path, emit_vsa, common)
    if as_json:
        emit_json(verdict_document(report, image))
    else:
        show_report(report, image)
        if emit_vsa is not None:
            click.echo(f"summary written to {printable(str(emit_vsa))}", err=True)
    return exit_code(report.error)


def _verify(image: Path, policy: Path, output: Path | None, common: dict[str, Any]) -> Report:
    """Verify, and write the summary where one is wanted."""
    from vmgraft.inspect.verdict import audit_image, verify_image

    if output is None:
        return verify_image(image, policy, **common)
    from vmgraft.errors import FileError
    from vmgraft.signing.files import write_new

    if os.path.lexists(output):  # before a long reading, that is
        raise FileError("the summary cannot be written: the file exists already", file=output, hint="name a new file")
    report, summary = audit_image(image, policy, **common)
    write_new(output, summary, what="the summary")
    return report


def _check_summary_options(
    output: Path | None, making: tuple[object, object], vsa: Path | None, relying: tuple[object, object]
) -> None:
    """Refuse options without the one they belong to; a summary of a summary would launder the auditor's word."""
    if output is not None and vsa is not None:
        raise click.UsageError("--emit-vsa and --vsa exclude each other: sum up only what you verified yourself.")
    if output is not None and None in making:
        raise click.UsageError("--emit-vsa needs --vsa-key and --verifier-id.")
    if output is None and making != (None, None):
        raise click.UsageError("--vsa-key and --verifier-id go with --emit-vsa.")
    if vsa is None and any(relying):
        raise click.UsageError("--vsa-trust and --vsa-max-age go with --vsa.")


def _trust(stack: ExitStack, policy_keys: tuple[Path, ...], signed: bool, state: Path | None) -> dict[str, Any]:
    """Return what is demanded of the policy file, and the rollback memory to compare with."""
    from vmgraft.signing.keyfiles import load_public

    keys = tuple(map(load_public, policy_keys))
    if state is None:
        from vmgraft.signing.policy import PolicyTrust

        return {"trust": PolicyTrust(keys, signed)}
    from vmgraft.signing.state import RollbackState, policy_trust

    memory = stack.enter_context(RollbackState(state, writable=False))
    return {"trust": policy_trust(memory, keys, required=signed), "memory": memory}


def _demand(path: Path, trust: tuple[Path, ...], age: timedelta | None) -> object:
    """Return the summary to rely on."""
    from vmgraft.errors import FileError
    from vmgraft.signing.dsse import MAX_ENVELOPE
    from vmgraft.signing.files import read_regular
    from vmgraft.signing.keyfiles import load_public
    from vmgraft.signing.vsa import MAX_AGE, SummaryDemand

    data = read_regular(path, MAX_ENVELOPE, what="the summary", error=FileError)
    return SummaryDemand(data, tuple(map(load_public, trust)), MAX_AGE if age is None else age, path)
