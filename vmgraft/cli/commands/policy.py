"""``vmgraft policy``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmgraft.cli.options import (
    DIRECTORY,
    FILE,
    image_argument,
    json_option,
    keys_option,
    opening_options,
    policy_option,
    policy_trust_options,
    quiet_option,
)

if TYPE_CHECKING:
    from vmgraft.cli.keyring import Keys
    from vmgraft.imagefmt.contract import Opening

OUTPUT = click.Path(path_type=Path, allow_dash=True, dir_okay=False)


@click.group(epilog="Example: vmgraft policy init --trust acme.pub --grant-all-declared ./clock -o policy.json")
def policy() -> None:
    """Make, check, sign and explain trust policies."""


def _named(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """Read ``NAME=FILE``, or ``FILE`` for the file's own name."""
    found: dict[str, Path] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        path = Path(rest if equals else value)
        name = name if equals else path.stem
        if name in found:
            raise click.BadParameter(f"the name {name!r} stands twice; say NAME=FILE.")
        found[name] = path
    return found


def _read(path: Path, what: str) -> bytes:
    from vmgraft.errors import FileError
    from vmgraft.signing.files import read_regular
    from vmgraft.signing.notary import MAX_FILE

    data = read_regular(path, MAX_FILE, what=what, error=FileError)
    if len(data) > MAX_FILE:
        raise FileError(f"{what} has more than {MAX_FILE} bytes", file=path)
    return data


@policy.command(
    short_help="Write a first policy.",
    epilog="Example: vmgraft policy init --trust acme.pub --grant-all-declared ./clock -o policy.json",
)
@click.option("--trust", "publics", type=FILE, multiple=True, help="Public key to trust; repeatable.")
@click.option(
    "--ca", "authorities", metavar="[NAME=]FILE", multiple=True, callback=_named,
    help="Root certificates whose certified keys are trusted; goes with --identity; repeatable.",
)  # fmt: skip
@click.option(
    "--identity",
    "identities",
    multiple=True,
    help="Whose certificates count: 'x509.subject: C=US, O=Acme, CN=Release', 'x509.san: email:a@b'; repeatable.",
)
@click.option(
    "--crl", "crls", metavar="[NAME=]FILE", multiple=True, callback=_named,
    help="Revocation list (several in one PEM file) for the --ca of that name, which then must have one; repeatable.",
)  # fmt: skip
@click.option(
    "--tsa", "timestampers", metavar="[NAME=]FILE", multiple=True, callback=_named,
    help="Root certificates of a timestamp authority: signatures outlive their certificates; repeatable.",
)  # fmt: skip
@click.option("--minimum", type=click.IntRange(1, 16), default=1, show_default=True, help="Keys that must sign.")
@click.option(
    "--grant-all-declared", "folders", type=DIRECTORY, multiple=True,
    help="Grant what the manifest in this extension folder declares; repeatable.",
)  # fmt: skip
@click.option("--require", is_flag=True, help="Demand that each extension so granted is there.")
@click.option(
    "--binding",
    type=click.Choice(["image", "any"]),
    default="image",
    show_default=True,
    help="any: accept portable statements too.",
)
@click.option(
    "--image-scope",
    "images",
    multiple=True,
    default=["*"],
    show_default=True,
    help="Images it is for: '*', name:GLOB or tree:sha256:HEX; repeatable.",
)
@click.option(
    "--extension-scope",
    "extensions",
    multiple=True,
    default=["*"],
    show_default=True,
    help="Extensions it is for: '*', an id, or com.acme.*; repeatable.",
)
@click.option(
    "--expires",
    type=click.DateTime(["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d"]),
    help="When the policy itself ends, UTC (2027-11-22).",
)
@click.option("--name", default="default", show_default=True, help="Name of the policy.")
@click.option("-o", "--output", type=click.Path(path_type=Path, allow_dash=True), required=True, help="File, or - .")
def init(
    publics: tuple[Path, ...],
    authorities: dict[str, Path],
    identities: tuple[str, ...],
    crls: dict[str, Path],
    timestampers: dict[str, Path],
    minimum: int,
    folders: tuple[Path, ...],
    require: bool,
    binding: str,
    images: tuple[str, ...],
    extensions: tuple[str, ...],
    expires: datetime | None,
    name: str,
    output: Path,
) -> None:
    """Write a policy that trusts some keys or authorities and grants no more than what is named."""
    from vmgraft.signing.keyfiles import load_public
    from vmgraft.signing.manifest import parse_manifest
    from vmgraft.signing.policytools import format_policy, init_policy, name_keys
    from vmgraft.vendor.pack import load_package

    document = init_policy(
        name_keys((path.stem, load_public(path)) for path in publics),
        [parse_manifest(load_package(folder).manifest) for folder in folders],
        name=name,
        minimum=minimum,
        image_scopes=images,
        extension_scopes=extensions,
        binding=binding,
        require=require,
        expires=expires.replace(tzinfo=UTC) if expires else None,
        stores=_stores(authorities, crls, timestampers),
        identities=identities,
    )
    _write_new(output, format_policy(document))


def _write_new(output: Path, data: bytes) -> None:
    """Write a policy that was just made, and warn where it trusts a development authority."""
    from vmgraft.cli.files import write_output
    from vmgraft.cli.output import show_warnings
    from vmgraft.signing.policy import parse_policy
    from vmgraft.signing.policylint import development_stores

    show_warnings(development_stores(parse_policy(data)))
    write_output(output, data, what="policy")


def _stores(authorities: dict[str, Path], crls: dict[str, Path], timestampers: dict[str, Path]) -> list[dict[str, Any]]:
    from vmgraft.errors import UsageError
    from vmgraft.signing.truststores import store_document

    stray = sorted(crls.keys() - authorities.keys())
    if stray:
        raise UsageError(f"--crl {stray[0]} belongs to no --ca", hint=f"--ca {stray[0]}=ROOTS.pem")
    stores = []
    for name, path in authorities.items():
        lists = _read(crls[name], "the revocation list") if name in crls else b""
        certificates = _read(path, "the certificate")
        stores.append(store_document(name, "ca", certificates, lists, require_crls=name in crls))
    for name, path in timestampers.items():
        stores.append(store_document(name, "tsa", _read(path, "the certificate")))
    return stores


@policy.command(short_help="Check a policy.", epilog="Example: vmgraft policy check policy.json --against ./clock")
@click.argument("path", type=FILE)
@click.option(
    "--against", "folders", type=DIRECTORY, multiple=True,
    help="Extension folder: say which grants are wider or narrower than what its manifest declares; repeatable.",
)  # fmt: skip
@policy_trust_options
@json_option
def check(
    path: Path, folders: tuple[Path, ...], policy_keys: tuple[Path, ...], signed_policy: bool, as_json: bool
) -> None:
    """Check a policy: is it valid, does it say what it can never mean, and what ends soon?"""
    from vmgraft.cli.output import emit_ok, printable
    from vmgraft.signing.keyfiles import load_public
    from vmgraft.signing.manifest import parse_manifest
    from vmgraft.signing.policy import PolicyTrust, load_policy
    from vmgraft.signing.policylint import check_policy
    from vmgraft.vendor.pack import load_package
    from vmgraft.words import counted

    loaded = load_policy(path, PolicyTrust(tuple(map(load_public, policy_keys)), signed_policy))
    manifests = [parse_manifest(load_package(folder).manifest) for folder in folders]
    findings = check_policy(loaded, now=datetime.now(UTC), against=manifests)
    if as_json:
        emit_ok({"policy": str(path), "findings": findings, "signedBy": list(loaded.signed_by)})
        return
    for finding in findings:
        click.echo(f"warning: {printable(finding)}")
    signed = f", signed by {', '.join(loaded.signed_by)}" if loaded.signed_by else ""
    click.echo(
        f"{printable(str(path))}: valid{signed}" + (f", {counted(len(findings), 'warning')}" if findings else "")
    )


@policy.command(
    short_help="Sign a policy.", epilog="Example: vmgraft policy sign policy.json --key admin.key -o policy.dsse"
)
@click.argument("path", type=FILE)
@keys_option(required=True)
@click.option("-o", "--output", type=OUTPUT, required=True, help="A new file, or - .")
def sign(path: Path, keys: Keys, output: Path) -> None:
    """Wrap a policy in an envelope with a signature by each key, for hosts that demand one (--policy-key)."""
    from vmgraft.cli.files import write_output
    from vmgraft.signing.policysign import read_policy_file, sign_policy

    data = read_policy_file(path)
    write_output(output, sign_policy(data, keys.load(), file=path), what="policy")


@policy.command(
    "import-notary",
    short_help="Read a Notary Project trust policy.",
    epilog="Example: vmgraft policy import-notary trustpolicy.json --trust-store ~/.config/notation/truststore -o -",
)
@click.argument("path", type=FILE)
@click.option("--trust-store", "folder", type=DIRECTORY, required=True, help="Folder that holds x509/ca/NAME/*.crt .")
@click.option(
    "--scope", "scopes", metavar="REGISTRY_SCOPE=IMAGE_SCOPE", multiple=True,
    help="Which images a registry scope stands for: reg.example/app=name:app-*; repeatable.",
)  # fmt: skip
@click.option(
    "--crl", "crls", metavar="[NAME=]FILE", multiple=True, callback=_named,
    help="Revocation list for the ca: store of that name; needed where revocation is enforced; repeatable.",
)  # fmt: skip
@click.option("-o", "--output", type=OUTPUT, required=True, help="A new file, or - .")
def import_notary(path: Path, folder: Path, scopes: tuple[str, ...], crls: dict[str, Path], output: Path) -> None:
    """Write the policy that says the same as a Notary Project trust policy, or say which field cannot be said.

    It grants nothing to any extension: add grants before use.
    """
    from vmgraft.errors import UsageError
    from vmgraft.signing import notary
    from vmgraft.signing.policytools import format_policy

    pairs = [scope.partition("=") for scope in scopes]
    if any(not equals for _, equals, _ in pairs):
        raise UsageError("--scope needs REGISTRY_SCOPE=IMAGE_SCOPE", field="scope")
    document = notary.import_notary(
        _read(path, "the trust policy"), folder, scopes={name: rest for name, _, rest in pairs},
        crls={name: _read(file, "the revocation list") for name, file in crls.items()}, file=path,
    )  # fmt: skip
    _write_new(output, format_policy(document))


@policy.command(
    short_help="Say why an image is accepted or refused.",
    epilog="Example: vmgraft policy explain disk.qcow2 --policy policy.json",
)
@image_argument
@policy_option
@policy_trust_options
@click.option("--state", type=FILE, help="Rollback memory to compare with; it is only read.")
@opening_options
@quiet_option
@json_option
def explain(
    image: Path,
    policy_path: Path,
    policy_keys: tuple[Path, ...],
    signed_policy: bool,
    state: Path | None,
    opening: Opening,
    quiet: bool,
    as_json: bool,
) -> int:
    """Say for each check why it passed or failed, and which line of the policy or the image would change that.

    Exit codes as for `verify`. What would make a check pass is not advice: whoever writes the policy decides.
    """
    from vmgraft.cli.exitcodes import exit_code
    from vmgraft.cli.output import emit_json, progress_bar
    from vmgraft.cli.policyview import show_explanation
    from vmgraft.inspect.explain import explain_image
    from vmgraft.signing.keyfiles import load_public

    with progress_bar("verify", quiet=quiet or as_json) as bar:
        found = explain_image(
            image, policy_path, policy_keys=tuple(map(load_public, policy_keys)), signed_policy=signed_policy,
            state=state, opening=opening, progress=bar,
        )  # fmt: skip
    code = exit_code(found.report.error)
    if as_json:
        emit_json({"ok": found.report.ok, "exitCode": code, "image": str(image), **found.to_dict()})
    else:
        show_explanation(found, image)
    return code
