"""``vmgraft new``, ``attach``, ``detach``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmgraft.cli.options import (
    DIRECTORY,
    FILE,
    flat_digest_option,
    image_argument,
    json_option,
    opening_options,
    passphrase_options,
    quiet_option,
)

if TYPE_CHECKING:
    from vmgraft.vendor.graft import Attached
    from vmgraft.vendor.pack import Package

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Opening


@click.command(epilog="Example: vmgraft new ./my-clock --id com.acme.clock")
@click.argument("folder", type=DIRECTORY)
@click.option("--id", "extension_id", help="Id in reverse-domain form; default com.example.FOLDER.")
@json_option
def new(folder: Path, extension_id: str | None, as_json: bool) -> None:
    """Start an extension: manifest.toml, C source, Makefile, README."""
    import shlex

    from vmgraft.cli.output import emit_ok, printable
    from vmgraft.vendor.scaffold import new_extension

    written = new_extension(folder, extension_id)
    if as_json:
        emit_ok({"files": [str(path) for path in written]})
        return
    for path in written:
        click.echo(f"wrote {printable(str(path))}")
    click.echo(f"next: make -C {printable(shlex.quote(str(folder)))}    (needs clang and lld)")


@click.command(epilog="Example: vmgraft attach disk.qcow2 ./clock --key acme.key")
@image_argument
@click.argument("extensions", type=DIRECTORY, nargs=-1, required=True)
@click.option("--key", "keys", multiple=True, required=True, help="Private key, path or file: URI; repeatable.")
@click.option("-o", "--output", type=FILE, help="Write a grafted copy and leave IMAGE alone.")
@click.option(
    "--binding", type=click.Choice(["image", "any"]), default="image", show_default=True,
    help="What is signed: good for this content only, or a portable extension.",
)  # fmt: skip
@click.option(
    "--placement", type=click.Choice(["auto", "inline", "sidecar"]), default="auto", show_default=True,
    help="In the file itself, or in IMAGE.vmgraft beside it; auto: inline where it fits.",
)  # fmt: skip
@flat_digest_option
@click.option(
    "--expires", type=click.DateTime(["%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%d"]), help="End of validity, UTC (2027-11-22)."
)
@passphrase_options
@opening_options
@quiet_option
@json_option
def attach(
    image: Path,
    extensions: tuple[Path, ...],
    keys: tuple[str, ...],
    output: Path | None,
    binding: str,
    placement: str,
    flat_digest: str,
    expires: datetime | None,
    passphrase_file: Path | None,
    passphrase_fd: int | None,
    opening: Opening,
    quiet: bool,
    as_json: bool,
) -> None:
    """Sign the extensions in EXTENSIONS (folders) and graft them into IMAGE.

    The guest's content stays as it is. What was written is read back and verified before the command succeeds.
    """
    from datetime import UTC

    from vmgraft.cli.output import emit_ok, orderly_end, progress_bar
    from vmgraft.cli.passphrase import existing_passphrase
    from vmgraft.imagefmt.contract import Placement
    from vmgraft.signing.keyfiles import load_private
    from vmgraft.vendor.graft import AttachOptions
    from vmgraft.vendor.graft import attach as graft
    from vmgraft.vendor.pack import load_package

    packages = [load_package(folder) for folder in extensions]
    source = existing_passphrase(passphrase_file, passphrase_fd)
    options = AttachOptions(
        output=output,
        binding=binding,
        placement=Placement(placement),
        flat=flat_digest,  # type: ignore[arg-type]  # click.Choice has narrowed it
        expires=expires.replace(tzinfo=UTC) if expires else None,
        opening=opening,
    )
    signers = [load_private(key, source) for key in keys]
    with orderly_end(), progress_bar("digest", quiet=quiet or as_json) as progress:
        done = graft(image, packages, signers, options, progress)
    if as_json:
        emit_ok(_attached_document(done, packages))
    else:
        _show_attached(done, packages)
        _raw_recipes(done.path, opening)


def _attached_document(done: Attached, packages: Sequence[Package]) -> dict[str, Any]:
    """Return the JSON object of ``attach``."""
    locator = done.located.locator
    return {
        "image": str(done.path),
        "placement": None if locator is None else locator.placement.value,
        "recordSize": None if locator is None else locator.record_size,
        "statementSha256": done.statement_sha256,
        "keyids": list(done.keyids),
        "extensions": [{"id": package.id, "version": package.version} for package in packages],
        "contentTree": done.content.tree_digest.hex(),
    }


def _show_attached(done: Attached, packages: Sequence[Package]) -> None:
    """Say what was attached, where to and under which keys."""
    from vmgraft.cli.output import human_size, printable

    locator = done.located.locator
    placed = "" if locator is None else f"  ({locator.placement.value}, record of {human_size(locator.record_size)})"
    click.echo(f"attached  {', '.join(f'{package.id} {package.version}' for package in packages)}")
    click.echo(f"to        {printable(str(done.path))}{placed}")
    for keyid in done.keyids:
        click.echo(f"signed    {keyid}")
    click.echo(f"content   sha256 tree {done.content.tree_digest.hex()}, read back and verified")


def _raw_recipes(path: Path, opening: Opening) -> None:
    """Say how other programs open a raw image without its trailer."""
    from vmgraft.cli.output import printable
    from vmgraft.imagefmt.contract import Placement
    from vmgraft.imagefmt.graft import open_image

    with open_image(path, opening) as image:
        located = image.locate()
        if image.format_name != "raw" or located.locator is None or located.locator.placement is Placement.SIDECAR:
            return
        from vmgraft.imagefmt.raw.recipes import recipes

        click.echo("To hide the trailer from other programs:")
        for name, recipe in recipes(path, image.virtual_size).items():
            click.echo(f"  {name:8} {printable(recipe)}")


@click.command(epilog="Example: vmgraft detach disk.qcow2")
@image_argument
@click.argument("ids", nargs=-1)
@click.option("-o", "--output", type=FILE, help="Write the original here and leave IMAGE alone.")
@opening_options
@json_option
def detach(image: Path, ids: tuple[str, ...], output: Path | None, opening: Opening, as_json: bool) -> None:
    """Take the graft away; the file is byte for byte what it was before.

    IDs, if given, must name all extensions of the image: taking away some of them would need a new signature.
    """
    from vmgraft.cli.output import emit_ok, orderly_end, printable
    from vmgraft.vendor.graft import check_detach_ids
    from vmgraft.vendor.graft import detach as take_away

    if ids:
        check_detach_ids(image, ids, opening)
    with orderly_end():
        path = take_away(image, output=output, opening=opening)
    if as_json:
        emit_ok({"image": str(path)})
        return
    click.echo(f"detached  {printable(str(path))}")
