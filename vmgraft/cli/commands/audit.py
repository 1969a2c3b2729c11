"""``vmgraft list``, ``inspect``, ``extract``, ``digest``, ``diff``, ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmgraft.cli.options import (
    FILE,
    flat_digest_option,
    image_argument,
    json_option,
    opening_options,
    quiet_option,
)

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Opening


@click.command("list", epilog="Example: vmgraft list disk.qcow2")
@image_argument
@opening_options
@json_option
def list_(image: Path, opening: Opening, as_json: bool) -> None:
    """List the extensions in an image; nothing is verified."""
    from vmgraft.cli.output import emit_or_show
    from vmgraft.cli.views import show_list
    from vmgraft.inspect.report import list_extensions

    listing = list_extensions(image, opening)
    emit_or_show(listing, as_json, show_list)


@click.command(epilog="Example: vmgraft inspect disk.qcow2")
@image_argument
@opening_options
@json_option
def inspect(image: Path, opening: Opening, as_json: bool) -> None:
    """Show everything an image carries. Trusts nothing: what the file claims is marked as unverified."""
    from vmgraft.cli.output import emit_or_show
    from vmgraft.cli.views import show_inspection
    from vmgraft.inspect.report import inspect_image

    report = inspect_image(image, opening)
    emit_or_show(report, as_json, show_inspection)


@click.command(epilog="Example: vmgraft extract disk.qcow2 statement -o -")
@image_argument
@click.argument("part", type=click.Choice(["statement", "envelope", "manifest", "module", "files", "record"]))
@click.option("--extension", help="Which extension's manifest, module or files.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, allow_dash=True), default="-", show_default=True,
    help="A new file, or - for stdout; for files a new or empty folder.",
)  # fmt: skip
@opening_options
def extract(image: Path, part: str, extension: str | None, output: Path, opening: Opening) -> None:
    """Write a part of the graft as it is stored; nothing is verified."""
    if part == "files":
        _extract_files(image, extension, output, opening)
        return
    from vmgraft.cli.files import write_output
    from vmgraft.inspect.extract import extract_part

    write_output(output, extract_part(image, part, extension=extension, opening=opening), what=part)


def _extract_files(image: Path, extension: str | None, output: Path, opening: Opening) -> None:
    """Write an extension's files and say which."""
    from vmgraft.cli.output import printable
    from vmgraft.errors import UsageError
    from vmgraft.inspect.extractfiles import extract_files

    if str(output) == "-":
        raise UsageError("files go into a folder", field="output", hint="name a new or empty one with -o")
    for path in extract_files(image, output, extension=extension, opening=opening):
        click.echo(f"wrote {printable(str(path))}")


@click.command(epilog="Example: vmgraft digest disk.qcow2 --json")
@image_argument
@flat_digest_option
@click.option("--snapshot", metavar="NAME|ID", help="Digest an internal snapshot of a qcow2 image.")
@click.option(
    "--ciphertext", is_flag=True,
    help="Digest what an encrypted image (LUKS, or qcow2 with LUKS or AES) stores, without decrypting it.",
)  # fmt: skip
@opening_options
@quiet_option
@json_option
def digest(
    image: Path, flat_digest: str, snapshot: str | None, ciphertext: bool, opening: Opening, quiet: bool, as_json: bool
) -> None:
    """Print the digests of the guest content: the same for every container that holds it."""
    from dataclasses import replace

    from vmgraft.cli.output import emit_or_show, progress_bar
    from vmgraft.cli.views import digest_document, show_digest
    from vmgraft.imagefmt.graft import open_image
    from vmgraft.imagefmt.tree import digest_content
    from vmgraft.inspect.report import state_warnings

    opening = replace(opening, snapshot=snapshot, ciphertext=ciphertext)
    with open_image(image, opening) as opened, progress_bar("digest", quiet=quiet or as_json) as bar:
        result = digest_content(opened, flat=flat_digest, progress=bar)  # type: ignore[arg-type]  # a click.Choice
        warnings = state_warnings(opened)
    document = digest_document(result, opening, warnings)
    emit_or_show(document, as_json, show_digest)


@click.command(epilog="Example: vmgraft diff golden.raw suspect.qcow2")
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@opening_options
@quiet_option
@json_option
def diff(a: Path, b: Path, opening: Opening, quiet: bool, as_json: bool) -> int:
    """Show where the guest contents of A and B differ. Exit 0: identical, 12: different."""
    from vmgraft.cli.exitcodes import exit_code
    from vmgraft.cli.output import emit_json, human_size, printable, progress_bar, show_warnings
    from vmgraft.errors import ContentMismatchError
    from vmgraft.imagefmt.graft import open_image
    from vmgraft.inspect.diff import diff_images
    from vmgraft.inspect.report import state_warnings
    from vmgraft.words import counted

    with open_image(a, opening) as left, open_image(b, opening) as right:
        with progress_bar("compare", quiet=quiet or as_json) as bar:
            ranges = diff_images(left, right, bar)
        sizes = (left.virtual_size, right.virtual_size)
        warnings = state_warnings(left) + state_warnings(right)
    code = exit_code(ContentMismatchError.code if ranges else None)
    if as_json:
        found = [item.to_dict() for item in ranges]
        document = {"ok": not ranges, "exitCode": code, "identical": not ranges, "sizes": list(sizes), "ranges": found,
                    "warnings": warnings}  # fmt: skip
        if ranges:
            document["error"] = ContentMismatchError("the guest contents differ", file=b).to_dict()
        emit_json(document)
        return code
    for item in ranges:
        where = f"  only in {printable(str(a if item.only_in == 'a' else b))}" if item.only_in else ""
        click.echo(f"{item.start:#014x}-{item.end:#014x}  {human_size(item.end - item.start)}{where}")
    total = sum(item.end - item.start for item in ranges)
    click.echo(f"{counted(len(ranges), 'range')}, {human_size(total)} differ" if ranges else "identical")
    show_warnings(warnings)
    return code


@click.command(epilog="Example: vmgraft export disk.qcow2 --format openssl --key acme.pub -o check/")
@image_argument
@click.option(
    "--format", "form", type=click.Choice(["bundle", "openssl"]), required=True,
    help="Sigstore bundles, or files and a script for OpenSSL.",
)  # fmt: skip
@click.option("--key", "publics", type=FILE, multiple=True, help="Public key of a signer (for openssl); repeatable.")
@click.option("--bare", is_flag=True, help="In bundles: name keys only, leave certificates and timestamps out.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder.")
@opening_options
@json_option
def export(
    image: Path, form: str, publics: tuple[Path, ...], bare: bool, output: Path, opening: Opening, as_json: bool
) -> None:
    """Write the signatures in forms that other tools verify: Sigstore bundles, or files for OpenSSL."""
    import shlex

    from vmgraft.cli.output import emit_ok, printable
    from vmgraft.inspect.exports import export_image

    files = export_image(image, form, output, publics, bare=bare, opening=opening)
    if as_json:
        emit_ok({"files": [str(path) for path in files]})
        return
    for path in files:
        click.echo(f"wrote {printable(str(path))}")
    if form == "openssl":
        click.echo(f"check with: sh {printable(shlex.quote(str(output / 'verify.sh')))}")
