"""Writing what a command produced: a new file, or stdout for ``-``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vmgraft.cli.output import interactive, printable
from vmgraft.errors import UsageError
from vmgraft.signing.files import write_new


def write_output(path: Path, data: bytes, *, what: str) -> None:
    """Write bytes to a file that must not exist, or to stdout for ``-``.

    Raises:
        UsageError: stdout is a terminal, and the bytes are not plain text: they could drive it.
        FileError: when the file exists or cannot be written; nothing is left behind.
    """
    if str(path) == "-":
        if interactive(sys.stdout) and not _plain(data):
            raise UsageError(f"the {what} is not plain text, and stdout is a terminal", hint="write it with -o FILE")
        write_stdout(data)
        return
    write_new(path, data, what=f"the {what}")
    click.echo(f"{what} written to {printable(str(path))}", err=True)


def write_stdout(data: bytes) -> None:
    """Write bytes to stdout as they are.

    Raises:
        UsageError: stdout was closed before the start.
    """
    if sys.stdout is None:
        raise UsageError("stdout is closed", hint="leave it open, or name a file")
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _plain(data: bytes) -> bool:
    """Tell whether bytes are UTF-8 text without anything a terminal acts on."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\n\t" for character in text)
