"""``vmgraft payload``, ``attach-signature``, ``sign``, ``resign``, ``import``, ``timestamp``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from vmgraft.cli.options import (
    DIRECTORY,
    FILE,
    image_argument,
    json_option,
    keys_option,
    opening_options,
    quiet_option,
)

if TYPE_CHECKING:
    from vmgraft.cli.keyring import Keys
    from vmgraft.imagefmt.contract import Opening
    from vmgraft.signing.keys import PublicKey
    from vmgraft.vendor.ceremony import Offered

F = TypeVar("F", bound=Callable[..., Any])

_output = click.option("-o", "--output", type=FILE, help="Write the result to a new file and leave IMAGE alone.")
_trust = click.option(
    "--trust", multiple=True, type=FILE, help="Public key that signed the statement that is there; repeatable."
)
_vouch = click.option(
    "--vouch-for-unverified", is_flag=True,
    help="Instead of --trust: sign although no signature that is there was checked.",
)  # fmt: skip
_expires = click.option(
    "--expires", type=click.DateTime(["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d"]),
    help="End of validity, UTC (2027-11-22). Default: none; for a statement that is there already: as it was.",
)  # fmt: skip


def _stacked(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    """Apply decorators in the order in which --help shows them."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


_common = _stacked((opening_options, json_option))


def _utc(when: datetime | None) -> datetime | None:
    return None if when is None else when.replace(tzinfo=UTC)


def _publics(paths: Sequence[Path]) -> tuple[PublicKey, ...]:
    from vmgraft.signing.keyfiles import load_public

    return tuple(load_public(path) for path in paths)


@click.command(
    epilog="Example: vmgraft payload disk.qcow2 ./clock -o to-sign/\n\n"
    "Example: vmgraft payload disk.qcow2 --trust acme.pub -o to-sign/"
)
@image_argument
@click.argument("extensions", type=DIRECTORY, nargs=-1)
@click.option("-o", "--output", type=DIRECTORY, required=True, help="Folder for the files.")
@click.option(
    "--binding", type=click.Choice(["image", "any"]), help="Good for this content only (default), or portable."
)
@click.option(
    "--flat-digest", type=click.Choice(["auto", "always", "never"]),
    help="Sign the flat SHA-256 too; auto (default): up to 16 GiB.",
)  # fmt: skip
@_expires
@_trust
@_vouch
@quiet_option
@_common
def payload(
    image: Path,
    extensions: tuple[Path, ...],
    output: Path,
    binding: str | None,
    flat_digest: Literal["auto", "always", "never"] | None,
    expires: datetime | None,
    trust: tuple[Path, ...],
    vouch_for_unverified: bool,
    quiet: bool,
    opening: Opening,
    as_json: bool,
) -> None:
    """Write the exact bytes to sign, for keys that are elsewhere; IMAGE stays as it is.

    With EXTENSIONS (folders), a new statement about them and IMAGE. Without, the statement that IMAGE carries, for
    another signature. `attach-signature` takes what was signed.
    """
    from vmgraft.cli.ceremonyview import report_payload
    from vmgraft.cli.output import progress_bar
    from vmgraft.errors import UsageError
    from vmgraft.vendor.ceremony import write_carried_payload, write_payload
    from vmgraft.vendor.graft import AttachOptions
    from vmgraft.vendor.pack import load_package

    with progress_bar("digest", quiet=quiet or as_json) as bar:
        if extensions:
            if trust or vouch_for_unverified:
                hint = "leave out --trust, or leave out EXTENSIONS to sign the statement that is there"
                raise UsageError("a new statement has no signature to trust", field="trust", hint=hint)
            options = AttachOptions(
                binding=binding or "image", flat=flat_digest or "auto", expires=_utc(expires), opening=opening
            )
            written = write_payload(image, [load_package(folder) for folder in extensions], options, output, bar)
        else:
            if binding or flat_digest or expires:
                hint = "--binding, --flat-digest and --expires go with EXTENSIONS; `resign` makes a new statement"
                raise UsageError("the statement that is there cannot change", field="extensions", hint=hint)
            written = write_carried_payload(
                image, output, trust=_publics(trust), vouch_for_unverified=vouch_for_unverified,
                opening=opening, progress=bar,
            )  # fmt: skip
    report_payload(written, as_json)


@click.command(
    "attach-signature",
    epilog="Example: vmgraft attach-signature disk.img ./clock --payload to-sign/ --signature s.bin --public-key a.pub",
)
@image_argument
@click.argument("extensions", type=DIRECTORY, nargs=-1)
@click.option("--payload", "folder", type=DIRECTORY, required=True, help="What `vmgraft payload` has written.")
@click.option("--signature", "signatures", type=FILE, multiple=True, required=True, help="A signature; repeatable.")
@click.option(
    "--public-key", "public_keys", type=FILE, multiple=True, required=True,
    help="The key that made it: one for each --signature, in the same order.",
)  # fmt: skip
@click.option(
    "--certificate",
    "certificates",
    type=FILE,
    multiple=True,
    help="PEM chain for one of the keys, leaf first; repeatable.",
)
@click.option("--placement", type=click.Choice(["auto", "inline", "sidecar"]), help="Of a new graft; default: auto.")
@_output
@quiet_option
@_common
def attach_signature(
    image: Path,
    extensions: tuple[Path, ...],
    folder: Path,
    signatures: tuple[Path, ...],
    public_keys: tuple[Path, ...],
    certificates: tuple[Path, ...],
    placement: str | None,
    output: Path | None,
    quiet: bool,
    opening: Opening,
    as_json: bool,
) -> None:
    """Attach EXTENSIONS with signatures that were made elsewhere, or add those to a graft that is there.

    Signatures, extensions and content are compared with the statement in the payload before IMAGE is touched.
    """
    from vmgraft.cli.ceremonyview import report_amended
    from vmgraft.cli.output import orderly_end, progress_bar
    from vmgraft.errors import UsageError
    from vmgraft.imagefmt.contract import Placement
    from vmgraft.vendor.ceremony import CeremonyOptions, attach_signatures
    from vmgraft.vendor.pack import load_package
    from vmgraft.words import counted

    if len(signatures) != len(public_keys):
        raise UsageError(
            f"{counted(len(signatures), 'signature')} and {counted(len(public_keys), 'public key')}",
            field="public-key",
            hint="name the key of each signature, in the same order",
        )
    offered = _offered(signatures, public_keys, certificates)
    packages = [load_package(path) for path in extensions]
    options = CeremonyOptions(output, Placement(placement or "auto"), opening)
    with orderly_end(), progress_bar("digest", quiet=quiet or as_json) as bar:
        done = attach_signatures(image, packages, folder, offered, options, progress=bar)
    report_amended(done, as_json)


def _offered(signatures: Sequence[Path], public_keys: Sequence[Path], certificates: Sequence[Path]) -> list[Offered]:
    """Put signatures, keys and chains together."""
    from vmgraft.vendor.ceremony import Offered, assign_chains

    publics = _publics(public_keys)
    chains = assign_chains(publics, certificates)
    return [Offered(path, public, chain) for path, public, chain in zip(signatures, publics, chains, strict=True)]


@click.command(epilog="Example: vmgraft sign disk.qcow2 --append --key auditor.key --trust acme.pub")
@image_argument
@keys_option(required=True)
@click.option("--append", is_flag=True, help="Add to the signatures that are there (`attach` makes the first one).")
@_trust
@_vouch
@_output
@quiet_option
@_common
def sign(
    image: Path,
    keys: Keys,
    append: bool,
    trust: tuple[Path, ...],
    vouch_for_unverified: bool,
    output: Path | None,
    quiet: bool,
    opening: Opening,
    as_json: bool,
) -> None:
    """Sign the statement that IMAGE carries once more; the signatures that are there stay.

    Extensions and content are compared with the statement first, and one signature must be of a key named by --trust.
    """
    from vmgraft.cli.ceremonyview import report_amended
    from vmgraft.cli.output import orderly_end, progress_bar
    from vmgraft.errors import UsageError
    from vmgraft.vendor.amend import AmendOptions, append_signatures, refuse_unsure

    if not append:
        hint = "--append adds a signature; `attach` signs extensions, `resign` makes a new statement"
        raise UsageError("say that a signature is to be added", field="append", hint=hint)
    publics = _publics(trust)
    refuse_unsure(publics, vouch_for_unverified)  # before anybody is asked for a passphrase
    signers = keys.load()
    with orderly_end(), progress_bar("digest", quiet=quiet or as_json) as bar:
        done = append_signatures(
            image, signers, AmendOptions(output, opening), trust=publics,
            vouch_for_unverified=vouch_for_unverified, progress=bar,
        )  # fmt: skip
    report_amended(done, as_json)


@click.command(epilog="Example: vmgraft resign disk.qcow2 --key acme.key --expires 2028-11-22")
@image_argument
@keys_option(required=True)
@_expires
@click.option("--accept-expired", is_flag=True, help="Sign anew although the old statement has expired.")
@_trust
@_output
@quiet_option
@_common
def resign(
    image: Path,
    keys: Keys,
    expires: datetime | None,
    accept_expired: bool,
    trust: tuple[Path, ...],
    output: Path | None,
    quiet: bool,
    opening: Opening,
    as_json: bool,
) -> None:
    """Make a new statement about what IMAGE carries, and sign it: new validity, or other keys.

    The old signature is checked first: one of the --keys or --trust keys must have made it, and extensions and content
    must be the signed ones. The signatures that are there go, since they are over the old statement.
    """
    from vmgraft.cli.ceremonyview import report_resigned
    from vmgraft.cli.output import orderly_end, progress_bar
    from vmgraft.vendor.resign import ResignOptions
    from vmgraft.vendor.resign import resign as make_anew

    publics, signers = _publics(trust), keys.load()
    options = ResignOptions(output, publics, _utc(expires), accept_expired, opening)
    with orderly_end(), progress_bar("digest", quiet=quiet or as_json) as bar:
        done = make_anew(image, signers, options, bar)
    report_resigned(done, as_json)


@click.command("import", epilog="Example: vmgraft import disk.qcow2 auditor.sigstore.json --public-key auditor.pub")
@image_argument
@click.argument("source", metavar="FILE", type=FILE)
@click.option("--public-key", "public_keys", type=FILE, multiple=True, help="Key that made a signature; repeatable.")
@click.option("--ca", type=FILE, multiple=True, help="Root (PEM) that the signer's certificate leads to; repeatable.")
@click.option(
    "--intermediates", type=FILE, multiple=True,
    help="Certificates (PEM) between the two that FILE lacks, as bundles v0.3 do; repeatable.",
)  # fmt: skip
@click.option(
    "--tsa-ca", type=FILE, multiple=True,
    help="Root (PEM) of a timestamp authority, for certificates that have expired; repeatable.",
)  # fmt: skip
@_output
@quiet_option
@_common
def import_(
    image: Path,
    source: Path,
    public_keys: tuple[Path, ...],
    ca: tuple[Path, ...],
    intermediates: tuple[Path, ...],
    tsa_ca: tuple[Path, ...],
    output: Path | None,
    quiet: bool,
    opening: Opening,
    as_json: bool,
) -> None:
    """Add the signatures of FILE, an envelope or a Sigstore bundle over the very statement that IMAGE carries."""
    from vmgraft.cli.ceremonyview import report_amended
    from vmgraft.cli.output import orderly_end, progress_bar
    from vmgraft.errors import UsageError
    from vmgraft.signing.merge import Vouchers, load_certificates
    from vmgraft.vendor.amend import AmendOptions, import_signatures

    if not public_keys and not ca:
        raise UsageError(
            "nobody is named who may have signed", field="public-key",
            hint="--public-key names the key, --ca the root that the signer's certificate leads to",
        )  # fmt: skip
    vouchers = Vouchers(_publics(public_keys), load_certificates(ca), load_certificates(tsa_ca))
    with orderly_end(), progress_bar("digest", quiet=quiet or as_json) as bar:
        done = import_signatures(
            image, source, vouchers, AmendOptions(output, opening),
            intermediates=load_certificates(intermediates), progress=bar,
        )  # fmt: skip
    report_amended(done, as_json)


@click.command(
    epilog="Example: vmgraft timestamp disk.qcow2 --tsa http://tsa.example/tsr --tsa-ca tsa.pem\n\n"
    "Example: vmgraft timestamp disk.qcow2 --request q.tsq    and later    --request q.tsq --response r.tsr"
)
@image_argument
@click.option("--tsa", metavar="URL", help="Authority to ask over HTTP.")
@click.option("--request", type=FILE, help="Write the request to this file; with --response: the one that was written.")
@click.option("--response", type=FILE, help="The answer to the request.")
@click.option("--signer", "keyids", multiple=True, metavar="KEYID", help="Whose signature; default: all without one.")
@click.option("--tsa-ca", type=FILE, multiple=True, help="Root (PEM) that the authority must lead to; repeatable.")
@_output
@_common
def timestamp(
    image: Path,
    tsa: str | None,
    request: Path | None,
    response: Path | None,
    keyids: tuple[str, ...],
    tsa_ca: tuple[Path, ...],
    output: Path | None,
    opening: Opening,
    as_json: bool,
) -> None:
    """Add RFC 3161 timestamps to signatures, so that they outlive their certificates.

    Over HTTP with --tsa. Or through files: --request writes what an authority is to answer, for one signature, and
    --request with --response takes the answer in.
    """
    from vmgraft.cli.ceremonyview import report_stamped
    from vmgraft.cli.output import emit_ok, orderly_end, printable
    from vmgraft.errors import UsageError
    from vmgraft.signing.merge import load_certificates
    from vmgraft.vendor import stamp
    from vmgraft.vendor.amend import AmendOptions

    if (tsa is None) is (request is None) or (response is not None and (request is None or keyids)):
        hint = "--tsa URL, or --request FILE, and later --request FILE --response FILE"
        raise UsageError("say how the authority is to be asked", field="tsa", hint=hint)
    options, roots = AmendOptions(output, opening), load_certificates(tsa_ca)
    with orderly_end():
        if tsa is not None:
            done = stamp.stamp_online(image, tsa, options, keyids=keyids, roots=roots)
        elif request is not None and response is not None:
            done = stamp.stamp_offline(image, request, response, options, roots=roots)
        elif request is not None:
            if output or roots:
                raise UsageError("a request changes no image", field="request", hint="leave out -o and --tsa-ca")
            keyid = stamp.write_request(image, request, opening, keyids=keyids)
            if as_json:
                emit_ok({"request": str(request), "keyid": keyid})
            else:
                click.echo(f"wrote {printable(str(request))}, for the signature of {printable(keyid)}")
            return
    report_stamped(done, as_json)
