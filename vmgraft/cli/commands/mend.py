"""``vmgraft move`` and ``recover``: grafts that go elsewhere, and grafts that were lost half-way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmgraft.cli.options import FILE, image_argument, json_option, opening_options, quiet_option

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Opening


@click.command(epilog="Example: vmgraft move disk.qcow2 disk.raw")
@click.argument("source", metavar="SRC", type=FILE)
@click.argument("destination", metavar="DST", type=FILE)
@click.option("--copy", is_flag=True, help="Leave the graft on SRC too.")
@click.option("--any-content", is_flag=True, help="Let a portable graft (binding: any) go to other content.")
@click.option(
    "--placement", type=click.Choice(["auto", "inline", "sidecar"]), default="auto", show_default=True,
    help="Where the graft goes in DST; auto: inline where it fits.",
)  # fmt: skip
@click.option("--dst-format", metavar="FORMAT", help="Format of DST, as --image-format says it of SRC.")
@opening_options
@quiet_option
@json_option
def move(
    source: Path,
    destination: Path,
    copy: bool,
    any_content: bool,
    placement: str,
    dst_format: str | None,
    opening: Opening,
    quiet: bool,
    as_json: bool,
) -> None:
    """Take the graft of SRC over to DST, an image of any format that holds the same content.

    No key is needed: what is signed travels byte for byte. DST is grafted and read back before SRC is detached.
    """
    from dataclasses import replace

    from vmgraft.cli.output import emit_ok, orderly_end, printable, progress_bar
    from vmgraft.imagefmt.contract import Placement
    from vmgraft.vendor.move import MoveOptions, move_graft

    options = MoveOptions(
        copy=copy,
        any_content=any_content,
        placement=Placement(placement),
        source=opening,
        destination=replace(opening, format=dst_format),
    )
    with orderly_end(), progress_bar("digest", quiet=quiet or as_json) as progress:
        moved = move_graft(source, destination, options, progress)
    locator = moved.located.locator
    where = None if locator is None else locator.placement.value
    if as_json:
        emit_ok(
            {
                "image": str(destination),
                "placement": where,
                "copied": copy,
                "contentTree": moved.tree_digest.hex(),
            }
        )
        return
    click.echo(f"{'copied' if copy else 'moved'}  from {printable(str(source))}")
    click.echo(f"to      {printable(str(destination))}  ({where})")
    click.echo(f"content sha256 tree {moved.tree_digest.hex()}, read back and compared")


@click.command(epilog="Example: vmgraft recover disk.qcow2 --dry-run")
@image_argument
@click.option("-n", "--dry-run", is_flag=True, help="Say what is wrong and change nothing.")
@opening_options
@json_option
def recover(image: Path, dry_run: bool, opening: Opening, as_json: bool) -> None:
    """Bring back a graft that was lost half-way: by a kill, a full disk, or a program that dropped it.

    Afterwards IMAGE carries a sound graft, or none; `vmgraft verify` still decides what to believe. Exit 0: nothing was
    wrong, or all of it was mended. Exit 5: something is beyond repair.
    """
    from vmgraft.cli.output import emit_ok, orderly_end, printable
    from vmgraft.imagefmt.contract import GraftState
    from vmgraft.vendor.recover import recover as run

    with orderly_end():
        result = run(image, opening, dry_run=dry_run)
    if as_json:
        emit_ok(
            {
                "image": str(image),
                "dryRun": dry_run,
                "found": list(result.found),
                "done": list(result.done),
                "before": result.before.value,
                "after": result.after.value,
            }
        )
        return
    for text in result.found:
        click.echo(f"found  {printable(text)}")
    for text in result.done:
        click.echo(f"done   {printable(text)}")
    if result.found:
        click.echo(f"state  {result.after.value}")
    else:
        sound = result.after is GraftState.OK
        click.echo(f"nothing is wrong: {'the graft is sound' if sound else 'there is no graft'}")
