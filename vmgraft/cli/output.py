"""What every command prints with: one JSON object, one error line with a hint, progress on a terminal."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import click

from vmgraft.cli.exitcodes import INTERRUPTED, OK, exit_code
from vmgraft.errors import VmgraftError

if TYPE_CHECKING:
    from vmgraft.imagefmt.contract import Progress


def emit_json(document: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    # ASCII only: what a file claims cannot drive a terminal, and any file name can be printed.
    click.echo(json.dumps(document, indent=2))


def emit_ok(document: dict[str, Any]) -> None:
    """Print the JSON object of a success: ``ok`` and ``exitCode`` first."""
    emit_json({"ok": True, "exitCode": OK, **document})


def emit_or_show(document: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Print the answer of a success, for programs or for people.

    Args:
        document: The answer.
        as_json: Print it as one JSON object.
        show: Prints it for people.
    """
    if as_json:
        emit_ok(document)
    else:
        show(document)


def report_error(error: VmgraftError, as_json: bool) -> int:
    """Print an error for people (stderr) or programs (stdout) and return the exit code."""
    code = exit_code(error.code)
    if as_json:
        emit_json({"ok": False, "exitCode": code, "error": error.to_dict()})
        return code
    label = click.style("error:", fg="red", bold=True)
    click.echo(f"{label} {printable(str(error))}", err=True)
    if error.hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {printable(error.hint)}", err=True)
    return code


def report_interrupt(as_json: bool) -> int:
    """Report Ctrl-C."""
    if as_json:
        error = {**VmgraftError("interrupted").to_dict(), "code": "interrupted"}
        emit_json({"ok": False, "exitCode": INTERRUPTED, "error": error})
    else:
        click.echo("interrupted", err=True)
    return INTERRUPTED


def printable(text: str) -> str:
    """Make untrusted text safe for one line of a terminal: control characters become visible escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def interactive(stream: TextIO | None) -> bool:
    """Tell whether a standard stream is a terminal; one that was closed before the start is none."""
    return stream is not None and stream.isatty()


@contextmanager
def orderly_end() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP like Ctrl-C, so that what was begun is taken back before the program ends."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_warnings(warnings: list[str]) -> None:
    """Print warnings on stderr."""
    for warning in warnings:
        click.echo(f"{click.style('warning:', fg='yellow')} {printable(warning)}", err=True)


@contextmanager
def progress_bar(label: str, *, quiet: bool = False) -> Iterator[Progress | None]:
    """Yield a progress callback drawing a bar on stderr, or None when stderr is no terminal."""
    if quiet or not interactive(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def human_size(size: int) -> str:
    """Return a size as people read it, exact when it is a whole number of units."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:g} {unit}" if value == int(value) else f"{value:.1f} {unit}"
