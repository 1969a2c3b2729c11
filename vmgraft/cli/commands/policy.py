"""``vmgraft policy``."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from vmgraft.cli.options import DIRECTORY, FILE, json_option


@click.group(epilog="Example: vmgraft policy init --trust acme.pub --grant-all-declared ./clock -o policy.json")
def policy() -> None:
    """Make and check trust policies."""


@policy.command(
    short_help="Write a first policy.",
    epilog="Example: vmgraft policy init --trust acme.pub --grant-all-declared ./clock -o policy.json",
)
@click.option("--trust", "publics", type=FILE, multiple=True, required=True, help="Public key to trust; repeatable.")
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
    """Write a policy that trusts some keys and grants no more than what is named."""
    from vmgraft.cli.files import write_output
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
    )
    write_output(output, format_policy(document), what="policy")


@policy.command(short_help="Check a policy.", epilog="Example: vmgraft policy check policy.json")
@click.argument("path", type=FILE)
@json_option
def check(path: Path, as_json: bool) -> None:
    """Check a policy: is it valid, and does it say something it can never mean?"""
    from vmgraft.cli.output import emit_ok, printable
    from vmgraft.signing.policy import load_policy
    from vmgraft.signing.policytools import check_policy

    findings = check_policy(load_policy(path), now=datetime.now(UTC))
    if as_json:
        emit_ok({"policy": str(path), "findings": findings})
        return
    for finding in findings:
        click.echo(f"warning: {printable(finding)}")
    click.echo(f"{printable(str(path))}: valid" + (f", {len(findings)} warnings" if findings else ""))
