"""Options that several commands share, as named decorators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

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


def opening_options(function: F) -> F:
    """``--image-format`` and ``--root``; the command gets one ``opening``."""

    @functools.wraps(function)
    def command(*args: Any, root: Path | None, image_format: str | None, **kwargs: Any) -> Any:
        from vmgraft.imagefmt.contract import Opening

        return function(*args, opening=Opening(root=root, format=image_format), **kwargs)

    for option in (
        click.option(
            "--root", type=DIRECTORY, help="Folder that backing files must lie in (default: the image's own folder)."
        ),
        click.option(
            "--image-format", type=click.Choice(["qcow2", "iso9660", "raw"]),
            help="Format of the image (default: found out). Name it for raw disks whose guest is not trusted.",
        ),
    ):  # fmt: skip
        command = option(command)
    return cast("F", command)


def policy_option(function: F) -> F:
    """``--policy``: the trust policy file; there is no default, since a missing policy means no."""
    return click.option("--policy", "policy_path", type=FILE, required=True, help="The trust policy file.")(function)


def quiet_option(function: F) -> F:
    """``--quiet``: no progress bar."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress bar.")(function)


def flat_digest_option(function: F) -> F:
    """``--flat-digest``: whether the flat SHA-256 is computed beside the content tree."""
    return click.option(
        "--flat-digest", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True,
        help="Compute the flat SHA-256 too; auto: up to 16 GiB.",
    )(function)  # fmt: skip


def cpu_option(function: F) -> F:
    """``--cpu``: what executes the guest's instructions."""
    return click.option(
        "--cpu", type=click.Choice(["auto", "kvm", "soft"]), default="auto", show_default=True,
        help="CPU engine; auto: /dev/kvm where it works, else the soft CPU.",
    )(function)  # fmt: skip


def passphrase_options(function: F) -> F:
    """``--passphrase-file`` and ``--passphrase-fd``."""
    function = click.option(
        "--passphrase-fd", type=click.IntRange(0, (1 << 31) - 1), help="Read the passphrase from this open descriptor."
    )(function)
    return click.option("--passphrase-file", type=FILE, help="Read the passphrase from the first line of this file.")(
        function
    )
