"""How ``policy explain`` looks to people: each check, and below those that did not pass what would change that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmgraft.cli.output import printable
from vmgraft.cli.views import show_report

if TYPE_CHECKING:
    from vmgraft.signing.explain import Explanation


def show_explanation(found: Explanation, image: Path) -> None:
    """Print the report, then the ways to make each failed check pass."""
    show_report(found.report, image)
    for explained in found.checks:
        if not explained.remedies:
            continue
        name = click.style(explained.check.name, bold=True)
        click.echo(f"\n{name} would pass by any of:")
        for remedy in explained.remedies:
            click.echo(f"  - {printable(remedy.text)}")
            for edit in remedy.edits:
                click.echo(f"      {printable(json.dumps(edit))}")
    if any(remedy.edits for explained in found.checks for remedy in explained.remedies):
        click.echo("\nLines in braces are edits of the policy file (JSON Patch, RFC 6902).")
