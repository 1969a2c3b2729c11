"""How ``policy explain`` looks to people: each check, and below those that did not pass what would change that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmgraft.cli.output import printable
from vmgraft.cli.views import show_report

if TYPE_CHECKING:
    from vmgraft.signing.explain import Explanation
    from vmgraft.signing.patches import Remedy


def show_explanation(found: Explanation, image: Path) -> None:
    """Print the report, then the ways to make each failed check pass."""
    show_report(found.report, image)
    for explained in found.checks:
        name = click.style(explained.check.name, bold=True)
        untried = [remedy for remedy in explained.remedies if remedy.edits and remedy.alone is None]
        rest = [remedy for remedy in explained.remedies if remedy not in untried]
        enough = [remedy for remedy in rest if remedy.alone is not False]
        _show(f"{name} would pass by any of:", enough)
        also = "else it takes" if enough else "takes"
        _show(f"{name} {also} several of these together:", [item for item in rest if item not in enough])
        _show(f"{name} may pass by any of:", untried)
    if any(remedy.edits for explained in found.checks for remedy in explained.remedies):
        click.echo("\nLines in braces are edits of the policy file (JSON Patch, RFC 6902).")
    for note in found.notes:
        click.echo(f"{click.style('note:', fg='cyan')} {printable(note)}")


def _show(title: str, remedies: Sequence[Remedy]) -> None:
    """Print remedies below a title, with their edits; nothing where there are none."""
    if not remedies:
        return
    click.echo(f"\n{title}")
    for remedy in remedies:
        click.echo(f"  - {printable(remedy.text)}")
        for edit in remedy.edits:
            click.echo(f"      {printable(json.dumps(edit))}")
