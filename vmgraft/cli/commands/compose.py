"""``vmgraft compose``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmgraft.cli.options import (
    FILE,
    HostTrust,
    host_trust_options,
    json_option,
    opening_options,
)

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Opening


@click.command(epilog="Example: vmgraft compose base.iso site.iso -o both.iso --policy policy.json")
@click.argument("layers", metavar="LAYER...", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, required=True, help="The new volume; never written over a file.")
@click.option("--label", default="UNION", show_default=True, help="Its label: 1 to 16 of A-Z, 0-9 and _.")
@host_trust_options
@opening_options
@json_option
def compose(
    layers: tuple[Path, ...],
    output: Path,
    label: str,
    trust: HostTrust,
    opening: Opening,
    as_json: bool,
) -> None:
    """Make one read-only ISO volume of the files in the images LAYER, the first one lowest.

    Every layer must satisfy the policy, and be no older than what ran on this host (--state, which is only read). A
    file of a later layer wins over one of the same name; a file .wh.NAME hides NAME of the layers below, .wh..wh..opq
    all that they have in its folder.
    """
    from vmgraft.cli.output import emit_ok, human_size, orderly_end, printable
    from vmgraft.vmmhost.remember import RunMemory
    from vmgraft.vmmhost.supplements.compose import compose as run
    from vmgraft.vmmhost.supplements.compose import write_volume

    with orderly_end(), RunMemory(trust.state, raising=False) as memory:
        policy = memory.load_policy(trust.policy, trust.keys(), required=trust.signed)
        done = run(layers, policy, label=label, opening=opening, memory=memory.state)
        write_volume(done, output)
    if as_json:
        emit_ok(
            {
                "volume": str(output),
                "label": done.label,
                "size": done.volume.size,
                "sha256": done.volume.sha256.hex(),
                "entries": done.entries,
                "layers": list(done.layers),
            }
        )
        return
    for layer in done.layers:
        click.echo(f"layer     {printable(layer['image'])}  ({layer['entries']} files and folders, verified)")
    click.echo(
        f"composed  {printable(str(output))}  ({done.entries} files and folders, {human_size(done.volume.size)})"
    )
    click.echo(f"sha256    {done.volume.sha256.hex()}")
