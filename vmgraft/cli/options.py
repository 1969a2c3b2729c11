"""Options that several commands share, as named decorators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path, dir_okay=False)
DIRECTORY = click.Path(path_type=Path, file_okay=False)


def json_option(function: F) -> F:
    """``--json``: exactly one JSON object on stdout, on success and on failure."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object, on success and on failure.")(
        function
    )


def image_argument(function: F) -> F:
    """The image to work on."""
    return click.argument("image", type=FILE)(function)


def root_option(function: F) -> F:
    """``--root``: the folder that backing files may lie in."""
    return click.option(
        "--root", type=DIRECTORY, help="Folder that backing files must lie in (default: the image's own folder)."
    )(function)


def policy_option(function: F) -> F:
    """``--policy``: the trust policy file; there is no default, since a missing policy means no."""
    return click.option("--policy", "policy_path", type=FILE, required=True, help="The trust policy file.")(function)


def quiet_option(function: F) -> F:
    """``--quiet``: no progress bar."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress bar.")(function)


def passphrase_options(function: F) -> F:
    """``--passphrase-file`` and ``--passphrase-fd``."""
    function = click.option("--passphrase-fd", type=int, help="Read the passphrase from this descriptor.")(function)
    return click.option("--passphrase-file", type=FILE, help="Read the passphrase from the first line of this file.")(
        function
    )
