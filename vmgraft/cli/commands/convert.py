"""``vmgraft convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmgraft.cli.options import FILE, json_option, opening_options, quiet_option

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Opening
    from vmgraft.vendor.convert import Converted


@click.command(epilog="Example: vmgraft convert disk.qcow2 disk.vhdx")
@click.argument("source", metavar="SRC", type=FILE)
@click.argument("destination", metavar="DST", type=FILE)
@click.option(
    "-O", "--output-format", type=click.Choice(["qcow2", "raw", "iso9660", "vhdx", "vmdk", "vhd", "vdi"]),
    help="Format of DST (default: what its suffix stands for).",
)  # fmt: skip
@click.option(
    "--placement", type=click.Choice(["auto", "inline", "sidecar"]), default="auto", show_default=True,
    help="Where the graft goes in DST; auto: inline where it fits.",
)  # fmt: skip
@click.option("-g", "--drop-grafts", is_flag=True, help="Leave the graft behind.")
@click.option("-c", "--compress", is_flag=True, help="Deflate clusters (qcow2).")
@click.option("--cluster-size", type=int, help="Bytes of a cluster (qcow2); default 65536.")
@opening_options
@quiet_option
@json_option
def convert(
    source: Path,
    destination: Path,
    output_format: str | None,
    placement: str,
    drop_grafts: bool,
    compress: bool,
    cluster_size: int | None,
    opening: Opening,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the disk in SRC, and its graft, to the new image DST of any format.

    What is signed is the content, so the graft still verifies. DST is read back before it gets its name. Backing files
    of SRC are merged into DST.
    """
    from vmgraft.cli.output import emit_ok, orderly_end, progress_bar, show_warnings
    from vmgraft.imagefmt.contract import Placement
    from vmgraft.imagefmt.write.base import WriteOptions
    from vmgraft.vendor.convert import ConvertOptions
    from vmgraft.vendor.convert import convert as run

    options = ConvertOptions(
        format=output_format,
        opening=opening,
        placement=Placement(placement),
        drop_grafts=drop_grafts,
        write=WriteOptions(cluster_size, compress),
    )
    with orderly_end(), progress_bar("convert", quiet=quiet or as_json) as progress:
        done = run(source, destination, options, progress)
    if not as_json:
        _show(done)
        show_warnings(list(done.warnings))
        return
    locator = None if done.located is None else done.located.locator
    emit_ok(
        {
            "image": str(done.path),
            "format": done.format,
            "virtualSize": done.virtual_size,
            "contentTree": done.tree_digest.hex(),
            "placement": None if locator is None else locator.placement.value,
            "recordSize": None if locator is None else locator.record_size,
            "dropped": None if done.dropped is None else done.dropped.value,
            "warnings": list(done.warnings),
        }
    )


def _show(done: Converted) -> None:
    """Say what was written, and what became of the graft."""
    from vmgraft.cli.output import human_size, printable

    click.echo(f"converted to {printable(str(done.path))}  ({done.format}, {human_size(done.virtual_size)})")
    locator = None if done.located is None else done.located.locator
    if locator is not None:
        click.echo(f"graft        {locator.placement.value}, record of {human_size(locator.record_size)}")
    elif done.dropped is not None:
        click.echo(f"graft        left behind (it was in state {done.dropped.value!r})")
    click.echo(f"content      sha256 tree {done.tree_digest.hex()}, read back")
