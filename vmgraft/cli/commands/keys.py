"""``vmgraft keygen`` and ``vmgraft key``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmgraft.cli.options import FILE, json_option, passphrase_options

if TYPE_CHECKING:
    from vmgraft.signing.keyinfo import KeyInfo


@click.command(epilog="Example: vmgraft keygen acme --type p256    makes acme.key and acme.pub")
@click.argument("prefix", type=FILE)
@click.option(
    "--type", "kind", type=click.Choice(["p256", "p384", "ed25519", "rsa3072", "rsa4096", "mldsa65"]), default="p256",
    show_default=True, help="Algorithm of the key.",
)  # fmt: skip
@click.option("--no-passphrase", is_flag=True, help="Write the private key unencrypted.")
@passphrase_options
@json_option
def keygen(
    prefix: Path, kind: str, no_passphrase: bool, passphrase_file: Path | None, passphrase_fd: int | None, as_json: bool
) -> None:
    """Make a key pair: PREFIX.key (PKCS#8, encrypted, mode 0600) and PREFIX.pub. Never overwrites."""
    from vmgraft.cli.output import emit_ok, printable, show_warnings
    from vmgraft.cli.passphrase import new_passphrase
    from vmgraft.signing.keyfiles import write_keypair
    from vmgraft.signing.keys import generate

    if no_passphrase and (passphrase_file is not None or passphrase_fd is not None):
        raise click.UsageError("--no-passphrase goes with neither --passphrase-file nor --passphrase-fd.")
    passphrase = None if no_passphrase else new_passphrase(passphrase_file, passphrase_fd)
    key = generate(kind)
    private, public = write_keypair(prefix, key, passphrase)
    show_warnings([key.public.warning] if key.public.warning else [])
    if as_json:
        emit_ok({"type": kind, "keyid": key.keyid, "private": str(private), "public": str(public)})
        return
    click.echo(f"private key  {printable(str(private))}" + ("  (not encrypted)" if passphrase is None else ""))
    click.echo(f"public key   {printable(str(public))}")
    click.echo(f"keyid        {key.keyid}")


@click.group(epilog="Example: vmgraft key show acme.pub")
def key() -> None:
    """Look at keys and certificates."""


@key.command(
    short_help="Say what a key or certificate is.",
    epilog="Example: vmgraft key show acme.pub\n\n"
    "Example: vmgraft key show 'pkcs11:token=release;object=acme?module-path=/usr/lib/softhsm/libsofthsm2.so'",
)
@click.argument("references", metavar="FILE|URI...", nargs=-1, required=True)
@passphrase_options
@json_option
def show(references: tuple[str, ...], passphrase_file: Path | None, passphrase_fd: int | None, as_json: bool) -> None:
    """Show kind, size, fingerprint and warnings of public keys, private keys and certificates. Nothing secret is shown.

    The fingerprint (keyid) is what `ssh-keygen -lf` prints. A URI is what --key takes:

    \b
      file:/path/to/acme.key
      pkcs11:token=T;object=K?module-path=/path/lib.so&pin-source=file:/path
      exec:/path/to/program?public-key=/path/to/acme.pub
      awskms:ID   gcpkms:projects/...   azurekms://VAULT...   hv:KEY/VERSION (Vault)
    """
    from vmgraft.cli.output import emit_ok
    from vmgraft.cli.passphrase import existing_passphrase
    from vmgraft.signing.keyinfo import describe_key

    source = existing_passphrase(passphrase_file, passphrase_fd)
    found = [info for reference in references for info in describe_key(reference, source)]
    if as_json:
        emit_ok({"keys": [info.to_dict() for info in found]})
        return
    for place, info in enumerate(found):
        if place:
            click.echo()
        _show_key(info)


def _show_key(info: KeyInfo) -> None:
    """Print one key or certificate."""
    from vmgraft.cli.output import printable, show_warnings

    document = info.to_dict()
    encrypted = {True: "  (encrypted)", False: "  (not encrypted)", None: ""}[info.encrypted]
    lines = {info.what: f"{info.source}{encrypted}"}
    if info.public is not None:
        lines |= {"kind": f"{info.public.kind}, {info.public.bits} bits", "keyid": info.public.keyid}
        lines |= {"spki sha256": document["spkiSha256"]}
    if info.certificate is not None:
        fields = document["certificate"]
        lines |= {"subject": fields["subject"], "issuer": fields["issuer"], "serial": fields["serial"]}
        lines |= {"valid": f"{fields['notBefore']} to {fields['notAfter']}", "sha256": fields["sha256"]}
        if info.certificate.sans:
            lines["also named"] = ", ".join(info.certificate.sans)
    for name, value in lines.items():
        click.echo(f"{name:12} {printable(value)}")
    show_warnings(list(info.warnings))
