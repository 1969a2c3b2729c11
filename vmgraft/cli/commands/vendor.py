"""``vmgraft new``, ``attach``, ``detach``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vmgraft.cli.options import (
    DIRECTORY,
    Signing,
    image_argument,
    json_option,
    keys_option,
    opening_options,
    quiet_option,
    signing_options,
)

if TYPE_CHECKING:
    from vmgraft.cli.keyring import Keys
    from vmgraft.imagefmt.contract import Opening
    from vmgraft.vendor.edit import Edited, EditOptions
    from vmgraft.vendor.graft import Attached, AttachOptions
    from vmgraft.vendor.pack import Package


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


@click.command(
    epilog="Example: vmgraft attach disk.qcow2 ./clock --key acme.key\n\n"
    "Example: vmgraft attach disk.qcow2 ./clock-2 --key acme.key --replace"
)
@image_argument
@click.argument("extensions", type=DIRECTORY, nargs=-1, required=True)
@keys_option(required=True)
@click.option("--add", "mode", flag_value="add", help="Add to the extensions that IMAGE carries, behind them.")
@click.option("--replace", "mode", flag_value="replace", help="As --add, but ids that are there get the new version.")
@click.option(
    "--with-tree", is_flag=True,
    help="Store the content tree too: hosts then start without reading all content. An edit keeps it.",
)  # fmt: skip
@click.option("--allow-downgrade", is_flag=True, help="With --replace: let securityVersion and generation go down.")
@signing_options
@opening_options
@quiet_option
@json_option
def attach(
    image: Path,
    extensions: tuple[Path, ...],
    keys: Keys,
    mode: str | None,
    with_tree: bool,
    allow_downgrade: bool,
    signing: Signing,
    opening: Opening,
    quiet: bool,
    as_json: bool,
) -> None:
    """Sign the extensions in EXTENSIONS (folders) and graft them into IMAGE.

    The guest's content stays as it is. What was written is read back and verified before the command succeeds. The
    order of the extensions is the order in which a host loads them.

    --add and --replace change a graft that is there. One statement covers all extensions, so all are signed anew: the
    old graft must be intact, and signed by one of the keys named with --key or --trust.
    """
    from vmgraft.cli.output import orderly_end, progress_bar
    from vmgraft.errors import UsageError
    from vmgraft.vendor import edit
    from vmgraft.vendor import graft as grafting
    from vmgraft.vendor.pack import load_package

    if mode is None and signing.trust:
        raise UsageError(
            "--trust says who signed the old graft", field="trust", hint="it goes with --add and --replace"
        )
    if allow_downgrade and mode != "replace":
        raise UsageError("nothing is replaced", field="allow-downgrade", hint="it goes with --replace")
    if with_tree and mode is not None:
        raise UsageError("an edit keeps the tree that is there", field="with-tree", hint="it goes with a fresh graft")
    packages = [load_package(folder) for folder in extensions]
    signers = keys.load()
    if mode is None:
        fresh = _attach_options(signing, opening, tree=with_tree)
        with orderly_end(), progress_bar("digest", quiet=quiet or as_json) as progress:
            done = grafting.attach(image, packages, signers, fresh, progress)
        _report_attached(done, packages, opening, as_json)
        return
    options = _edit_options(signing, opening, allow_downgrade=allow_downgrade)
    change = edit.add_extensions if mode == "add" else edit.replace_extensions
    with orderly_end(), progress_bar("digest", quiet=quiet or as_json) as progress:
        edited = change(image, packages, signers, options, progress)
    _report_edited(edited, {package.id for package in packages}, opening, as_json)


def _attach_options(signing: Signing, opening: Opening, *, tree: bool) -> AttachOptions:
    """Return how to attach, defaults filled in."""
    from vmgraft.imagefmt.contract import Placement
    from vmgraft.vendor.graft import AttachOptions

    return AttachOptions(
        output=signing.output,
        binding=signing.binding or "image",
        placement=Placement(signing.placement or "auto"),
        flat=signing.flat_digest or "auto",
        expires=signing.expires,
        opening=opening,
        tree=tree,
    )


def _edit_options(signing: Signing, opening: Opening, *, allow_downgrade: bool = False) -> EditOptions:
    """Return how to edit; what was not said stays as it is."""
    from vmgraft.imagefmt.contract import Placement
    from vmgraft.signing.keyfiles import load_public
    from vmgraft.vendor.edit import EditOptions

    return EditOptions(
        output=signing.output,
        trust=tuple(load_public(path) for path in signing.trust),
        allow_downgrade=allow_downgrade,
        placement=Placement(signing.placement) if signing.placement else None,
        binding=signing.binding,
        flat=signing.flat_digest,
        expires=signing.expires,
        opening=opening,
    )


def _report_attached(done: Attached, packages: Sequence[Package], opening: Opening, as_json: bool) -> None:
    """Say what was attached."""
    from vmgraft.cli.output import emit_ok

    if as_json:
        emit_ok(_attached_document(done, packages))
    else:
        click.echo(f"attached  {_names(packages)}")
        _show_attached(done, "to")
        _raw_recipes(done.path, opening)


def _report_edited(edited: Edited, named: set[str], opening: Opening, as_json: bool) -> None:
    """Say what an edit did to the extensions ``named`` and to the others, and whose signatures are gone."""
    from vmgraft.cli.output import emit_ok, printable

    before = {package.id: package for package in edited.before}
    now = {package.id for package in edited.extensions}
    removed = [package for package in edited.before if package.id not in now]
    replaced = [(before[item.id], item) for item in edited.extensions if item.id in before and item.id in named]
    added = [item for item in edited.extensions if item.id not in before]
    kept = [item for item in edited.extensions if item.id in before and item.id not in named]
    if as_json:
        emit_ok(
            {
                **_attached_document(edited.attached, edited.extensions),
                "removed": _entries(removed),
                "replaced": [
                    {"id": new.id, "version": new.version, "previousVersion": old.version} for old, new in replaced
                ],
                "added": _entries(added),
                "kept": _entries(kept),
                "droppedSigners": list(edited.dropped_signers),
            }
        )
        return
    exchanged = ", ".join(f"{old.id} {old.version} with {new.version}" for old, new in replaced)
    for label, text in (
        ("removed", _names(removed)), ("replaced", exchanged), ("added", _names(added)), ("kept", _names(kept)),
    ):  # fmt: skip
        if text:
            click.echo(f"{label:<9} {text}")
    _show_attached(edited.attached, "in")
    for keyid in edited.dropped_signers:
        click.echo(f"gone      the signature of {printable(keyid)}: it was over the old statement")
    _raw_recipes(edited.attached.path, opening)


def _attached_document(done: Attached, packages: Sequence[Package]) -> dict[str, Any]:
    """Return the JSON object of ``attach``."""
    locator = done.located.locator
    return {
        "image": str(done.path),
        "placement": None if locator is None else locator.placement.value,
        "recordSize": None if locator is None else locator.record_size,
        "statementSha256": done.statement_sha256,
        "keyids": list(done.keyids),
        "extensions": _entries(packages),
        "contentTree": done.content.tree_digest.hex(),
    }


def _entries(packages: Sequence[Package]) -> list[dict[str, str]]:
    """Return extensions as JSON lists them."""
    return [{"id": package.id, "version": package.version} for package in packages]


def _names(packages: Sequence[Package]) -> str:
    """Return extensions as a line lists them."""
    return ", ".join(f"{package.id} {package.version}" for package in packages)


def _show_attached(done: Attached, where: str) -> None:
    """Say where the extensions are, ``to`` or ``in``, and under which keys."""
    from vmgraft.cli.output import human_size, printable

    locator = done.located.locator
    placed = "" if locator is None else f"  ({locator.placement.value}, record of {human_size(locator.record_size)})"
    click.echo(f"{where:<9} {printable(str(done.path))}{placed}")
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


@click.command(
    epilog="Example: vmgraft detach disk.qcow2\n\n"
    "Example: vmgraft detach disk.qcow2 com.acme.clock --key acme.key"
)  # fmt: skip
@image_argument
@click.argument("ids", nargs=-1)
@keys_option(required=False)
@signing_options
@opening_options
@quiet_option
@json_option
def detach(
    image: Path,
    ids: tuple[str, ...],
    keys: Keys,
    signing: Signing,
    opening: Opening,
    quiet: bool,
    as_json: bool,
) -> None:
    """Take the graft away; the file is byte for byte what it was before.

    With IDS, only these extensions go. The others stay and are signed anew with --key, as with `attach --add`, since
    one statement covers all; if IDS are all there are, the graft is taken away.
    """
    from vmgraft.cli.output import emit_ok, orderly_end, printable, progress_bar
    from vmgraft.vendor import edit
    from vmgraft.vendor import graft as grafting

    carried = edit.carried_versions(image, opening) if ids else {}
    if ids and keys and set(ids) != set(carried):
        signers, options = keys.load(), _edit_options(signing, opening)
        with orderly_end(), progress_bar("digest", quiet=quiet or as_json) as progress:
            edited = edit.remove_extensions(image, ids, signers, options, progress)
        _report_edited(edited, set(ids), opening, as_json)
        return
    if ids:
        grafting.check_detach_ids(image, ids, opening)
    _refuse_signing(signing, named=bool(keys) and not ids)
    with orderly_end():
        path = grafting.detach(image, output=signing.output, opening=opening)
    if as_json:
        removed = [{"id": name, "version": version} for name, version in carried.items()]
        emit_ok({"image": str(path), **({"removed": removed, "kept": []} if ids else {})})
        return
    click.echo(f"detached  {printable(str(path))}")


def _refuse_signing(signing: Signing, *, named: bool) -> None:
    """Refuse options that speak of a new statement where none is made: were ids forgotten?"""
    from vmgraft.errors import UsageError

    if named:
        raise UsageError(
            "a key signs the extensions that stay, and none would",
            field="key",
            hint="name the ids that are to go, or leave out --key to take all away",
        )
    given = (signing.binding, signing.placement, signing.flat_digest, signing.expires, signing.trust or None)
    if any(value is not None for value in given):
        raise UsageError(
            "nothing is signed when the whole graft is taken away",
            hint="--binding, --placement, --flat-digest, --expires and --trust go with IDS and --key",
        )
