"""``vmgraft dev-ca``."""

from __future__ import annotations

from pathlib import Path

import click

from vmgraft.cli.options import DIRECTORY, json_option


@click.command("dev-ca", epilog="Example: vmgraft dev-ca ./dev-ca    for trying things out, never for customers")
@click.argument("folder", metavar="DIR", type=DIRECTORY)
@click.option(
    "--type", "kind", type=click.Choice(["p256", "ed25519", "rsa3072", "mldsa65"]), default="p256",
    show_default=True, help="Algorithm of the code signer's key.",
)  # fmt: skip
@click.option("--days", type=click.IntRange(1, 825), default=90, show_default=True, help="How long it is all good.")
@json_option
def dev_ca(folder: Path, kind: str, days: int, as_json: bool) -> None:
    """Make a certificate authority for trying things out, in the new folder DIR.

    DEVELOPMENT ONLY: the keys are not encrypted, and every report about a signature under it says so. Makes a root, an
    intermediate, a code signer, a timestamp authority for `openssl ts`, and CRLs.
    """
    from vmgraft.cli.output import emit_ok, printable
    from vmgraft.signing.devca import make_development_ca
    from vmgraft.signing.times import format_time

    made = make_development_ca(folder, kind=kind, days=days)
    if as_json:
        emit_ok(
            {
                "developmentOnly": True,
                "folder": str(made.folder),
                "files": [str(path) for path in made.files],
                "keyid": made.keyid,
                "subject": made.subject,
                "san": f"email:{made.mailbox}",
                "notAfter": format_time(made.not_after),
            }
        )
        return
    where = printable(str(folder))
    click.secho("DEVELOPMENT ONLY: anybody who can read this folder can sign under it", fg="yellow")
    click.echo(f"sign with    {where}/release.key, certificates {where}/release.pem")
    click.echo(f"trust        {where}/root.pem, CRLs {where}/crls.pem")
    click.echo(f"timestamps   {where}/tsa.cnf, for openssl ts")
    click.echo(f"identity     x509.subject: {printable(made.subject)}")
    click.echo(f"             x509.san: email:{made.mailbox}")
    click.echo(f"ends         {format_time(made.not_after)}")
