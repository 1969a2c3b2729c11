"""``vmgraft compose``."""

from __future__ import annotations

import sys
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
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, allow_dash=True, dir_okay=False), required=True,
    help="The new volume, never written over a file; - for stdout.",
)  # fmt: skip
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
    from vmgraft.cli.files import write_stdout
    from vmgraft.cli.output import emit_ok, human_size, interactive, orderly_end, printable
    from vmgraft.errors import UsageError
    from vmgraft.vmmhost.remember import RunMemory
    from vmgraft.vmmhost.supplements.compose import compose as run
    from vmgraft.vmmhost.supplements.compose import write_volume

    streamed = str(output) == "-"
    if streamed and (as_json or interactive(sys.stdout)):
        raise UsageError("a volume goes to a file or a pipe, and not where --json prints", hint="-o FILE")
    with orderly_end(), RunMemory(trust.state, raising=False) as memory:
        policy = memory.load_policy(trust.policy, trust.keys(), required=trust.signed)
        done = run(layers, policy, label=label, opening=opening, memory=memory.state)
        if streamed:
            for chunk in done.volume.chunks():
                write_stdout(chunk)
        else:
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
        words = f"layer     {printable(layer['image'])}  ({layer['entries']} files and folders, verified)"
        click.echo(words, err=streamed)
    click.echo(
        f"composed  {printable(str(output))}  ({done.entries} files and folders, {human_size(done.volume.size)})",
        err=streamed,
    )
    click.echo(f"sha256    {done.volume.sha256.hex()}", err=streamed)
