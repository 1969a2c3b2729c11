"""Writing what a command produced: a new file, or stdout for ``-``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vmgraft.errors import FileError


def write_output(path: Path, data: bytes, *, what: str, force: bool = False) -> None:
    """Write bytes to a file that must not exist (unless ``force``), or to stdout for ``-``.

    Raises:
        FileError: when the file exists or cannot be written.
    """
    if str(path) == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    try:
        with path.open("wb" if force else "xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise FileError(f"the {what} file exists already", file=path, hint="name a new file") from error
    except OSError as error:
        raise FileError(f"cannot write the {what}: {error.strerror}", file=path) from error
    click.echo(f"{what} written to {path}", err=True)
