"""``vmgraft keygen``."""

from __future__ import annotations

from pathlib import Path

import click

from vmgraft.cli.options import FILE, json_option


@click.command(epilog="Example: vmgraft keygen acme --type p256    makes acme.key and acme.pub")
@click.argument("prefix", type=FILE)
@click.option("--type", "kind", type=click.Choice(["p256", "ed25519", "rsa3072", "mldsa65"]), default="p256")
@click.option("--no-passphrase", is_flag=True, help="Write the private key unencrypted.")
@click.option("--passphrase-file", type=FILE, help="Read the passphrase from the first line of this file.")
@click.option("--passphrase-fd", type=int, help="Read the passphrase from this open descriptor.")
@json_option
def keygen(
    prefix: Path, kind: str, no_passphrase: bool, passphrase_file: Path | None, passphrase_fd: int | None, as_json: bool
) -> None:
    """Make a key pair: PREFIX.key (PKCS#8, encrypted, mode 0600) and PREFIX.pub. Never overwrites."""
    from vmgraft.cli.output import emit_ok
    from vmgraft.cli.passphrase import new_passphrase
    from vmgraft.signing.keyfiles import write_keypair
    from vmgraft.signing.keys import generate

    passphrase = None if no_passphrase else new_passphrase(passphrase_file, passphrase_fd)
    key = generate(kind)
    private, public = write_keypair(prefix, key, passphrase)
    if as_json:
        emit_ok({"type": kind, "keyid": key.keyid, "private": str(private), "public": str(public)})
        return
    click.echo(f"private key  {private}" + ("  (not encrypted)" if passphrase is None else ""))
    click.echo(f"public key   {public}")
    click.echo(f"keyid        {key.keyid}")
