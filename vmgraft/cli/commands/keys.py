"""``vmgraft keygen``."""

from __future__ import annotations

from pathlib import Path

import click

from vmgraft.cli.options import FILE, json_option, passphrase_options


@click.command(epilog="Example: vmgraft keygen acme --type p256    makes acme.key and acme.pub")
@click.argument("prefix", type=FILE)
@click.option(
    "--type", "kind", type=click.Choice(["p256", "ed25519", "rsa3072", "mldsa65"]), default="p256",
    show_default=True, help="Algorithm of the key.",
)  # fmt: skip
@click.option("--no-passphrase", is_flag=True, help="Write the private key unencrypted.")
@passphrase_options
@json_option
def keygen(
    prefix: Path, kind: str, no_passphrase: bool, passphrase_file: Path | None, passphrase_fd: int | None, as_json: bool
) -> None:
    """Make a key pair: PREFIX.key (PKCS#8, encrypted, mode 0600) and PREFIX.pub. Never overwrites."""
    from vmgraft.cli.output import emit_ok, printable
    from vmgraft.cli.passphrase import new_passphrase
    from vmgraft.signing.keyfiles import write_keypair
    from vmgraft.signing.keys import generate

    if no_passphrase and (passphrase_file is not None or passphrase_fd is not None):
        raise click.UsageError("--no-passphrase goes with neither --passphrase-file nor --passphrase-fd.")
    passphrase = None if no_passphrase else new_passphrase(passphrase_file, passphrase_fd)
    key = generate(kind)
    private, public = write_keypair(prefix, key, passphrase)
    if as_json:
        emit_ok({"type": kind, "keyid": key.keyid, "private": str(private), "public": str(public)})
        return
    click.echo(f"private key  {printable(str(private))}" + ("  (not encrypted)" if passphrase is None else ""))
    click.echo(f"public key   {printable(str(public))}")
    click.echo(f"keyid        {key.keyid}")
