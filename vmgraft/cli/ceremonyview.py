"""What the commands of a signing ceremony show: for people, or as one JSON object."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vmgraft.cli.output import emit_ok, printable, show_warnings
from vmgraft.signing.times import format_time
from vmgraft.words import counted

if TYPE_CHECKING:
    from vmgraft.vendor.amend import Amended
    from vmgraft.vendor.ceremony import Payload
    from vmgraft.vendor.resign import Resigned
    from vmgraft.vendor.stamp import Stamped


def report_payload(written: Payload, as_json: bool) -> None:
    """Show what was written to be signed."""
    if as_json:
        emit_ok({
            "files": [str(path) for path in written.files],
            "statementSha256": written.statement_sha256,
            "payloadSha256": written.pae_sha256,
            "extensions": [{"id": name, "version": version} for name, version in written.extensions],
        })  # fmt: skip
        return
    for path in written.files:
        click.echo(f"wrote      {printable(str(path))}")
    for name, version in written.extensions:
        click.echo(f"covers     {printable(f'{name} {version}')}")
    click.echo(f"statement  sha256 {written.statement_sha256}")
    click.echo(f"to sign    sha256 {written.pae_sha256}")


def _amended_document(done: Amended) -> dict[str, Any]:
    locator = done.located.locator
    return {
        "image": str(done.path),
        "placement": None if locator is None else locator.placement.value,
        "statementSha256": done.statement_sha256,
        "added": list(done.added),
        "signatures": list(done.signatures),
        "extensions": [{"id": name, "version": version} for name, version in done.extensions],
        "warnings": list(done.notes),
    }


def report_amended(done: Amended, as_json: bool) -> None:
    """Show which signatures are new."""
    if as_json:
        emit_ok(_amended_document(done))
        return
    show_warnings(list(done.notes))
    click.echo(f"image      {printable(str(done.path))}")
    for name, version in done.extensions:
        click.echo(f"covers     {printable(f'{name} {version}')}")
    for keyid in done.added:
        click.echo(f"signed     {keyid}")
    signatures = counted(len(done.signatures), "signature")
    click.echo(f"statement  sha256 {done.statement_sha256}, now with {signatures}")


def report_resigned(done: Resigned, as_json: bool) -> None:
    """Show the new statement, and that the old one had expired where it had."""
    expires = None if done.expires is None else format_time(done.expires)
    accepted = None if done.accepted_expired is None else format_time(done.accepted_expired)
    attached = done.attached
    if as_json:
        emit_ok({
            "image": str(attached.path),
            "statementSha256": attached.statement_sha256,
            "keyids": list(attached.keyids),
            "droppedSigners": list(done.dropped_signers),
            "extensions": [{"id": package.id, "version": package.version} for package in done.extensions],
            "expires": expires,
            "acceptedExpired": accepted,
        })  # fmt: skip
        return
    if accepted is not None:
        show_warnings([f"the old statement expired at {accepted}, and was accepted; the image's hints say so"])
    click.echo(f"image      {printable(str(attached.path))}")
    for package in done.extensions:
        click.echo(f"covers     {printable(f'{package.id} {package.version}')}")
    for keyid in attached.keyids:
        click.echo(f"signed     {keyid}")
    for keyid in done.dropped_signers:
        click.echo(f"gone       the signature of {printable(keyid)}: it was over the old statement")
    click.echo(f"expires    {expires or 'never'}")
    click.echo(f"statement  sha256 {attached.statement_sha256}")


def report_stamped(done: Stamped, as_json: bool) -> None:
    """Show the timestamps that are new."""
    stamps = [{"keyid": item.keyid, "time": format_time(item.time), "authority": item.signer} for item in done.stamps]
    warnings = [*done.amended.notes, *(note for item in done.stamps for note in item.warnings)]
    if as_json:
        emit_ok({**_amended_document(done.amended), "warnings": warnings, "timestamps": stamps})
        return
    show_warnings(warnings)
    click.echo(f"image      {printable(str(done.amended.path))}")
    for item in stamps:
        click.echo(f"stamped    {printable(item['keyid'])} at {item['time']}")
        click.echo(f"by         {printable(item['authority'])}")
