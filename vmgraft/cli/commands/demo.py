"""``vmgraft demo``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from vmgraft.cli.options import DIRECTORY, cpu_option


@click.command(epilog="Example: vmgraft demo --keep ./demo    leaves the images there to play with")
@cpu_option
@click.option("--keep", type=DIRECTORY, help="Work in this new folder and leave everything there.")
def demo(cpu: str, keep: Path | None) -> None:
    """Show the whole journey: make images, graft, inspect, verify, boot, tamper, detach."""
    import tempfile

    from vmgraft.demo.journey import Journey
    from vmgraft.errors import FileError

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vmgraft-demo-") as scratch:
        folder = keep or Path(scratch)
        try:
            folder.mkdir(parents=True, exist_ok=keep is None)
        except OSError as error:
            raise FileError(f"cannot make the folder: {error.strerror}", file=folder) from error
        journey = Journey(folder, click.echo, cpu)
        journey.run()
    click.echo("\n== Shown")
    for item in journey.shown:
        click.echo(f"   {click.style('ok', fg='green')}  {item}")
    click.echo(f"   guests ran on {', '.join(sorted(journey.engines))}")
    click.echo(f"   in {time.monotonic() - started:.1f} s")
