"""``-o``: work on a copy that gets its name, and its sidecar's, only when everything went well."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vmgraft.errors import FileError, VmgraftError
from vmgraft.imagefmt.commit import sync_folder
from vmgraft.imagefmt.copy import copy_file
from vmgraft.imagefmt.journal import journal_path
from vmgraft.imagefmt.sidecar import sidecar_path


@contextmanager
def work_file(output: Path) -> Iterator[Path]:
    """Yield a temporary name in the output's folder; nothing has that name yet.

    When the block ends well, the file made there, and its sidecar, get the output's names; else they go away. A process
    that is killed leaves at most the hidden temporary files, never an unfinished output.

    Args:
        output: The name the file gets; neither it nor its sidecar's or journal's name may be taken.

    Raises:
        FileError: a name is taken, or there is no such folder.
    """
    if not output.parent.is_dir():
        raise FileError("no such folder", file=output.parent, hint="make it first, or name another output")
    for path in (output, sidecar_path(output), journal_path(output)):
        _refuse_taken(path)
    work = output.with_name(f".vmgraft-{secrets.token_hex(8)}.tmp")
    try:
        yield work
        _publish(work, output)
    except VmgraftError as error:
        _rename_in(error, work, output)
        raise
    finally:
        for path in (work, sidecar_path(work), journal_path(work)):
            with suppress(OSError):
                path.unlink(missing_ok=True)


@contextmanager
def work_copy(image: Path, output: Path) -> Iterator[Path]:
    """Yield a copy of an image, its sidecar and its journal, under a temporary name as :func:`work_file` does.

    Args:
        image: The image; a symbolic link is followed, so that the sidecar beside the real file comes along.
        output: The name the copy gets; neither it nor its sidecar's name may be taken.

    Raises:
        FileError: a name is taken, or the copy fails.
    """
    with work_file(output) as work:
        source = Path(os.path.realpath(image))
        copy_file(source, work)
        for name in (sidecar_path, journal_path):
            beside = name(source)
            if os.path.isfile(beside) and not os.path.islink(beside):  # noqa: PTH113,PTH114 - Path raises for long names
                copy_file(beside, name(work))
        yield work


def _refuse_taken(path: Path) -> None:
    if os.path.lexists(path):
        raise FileError("the output file exists already", file=path, hint="name a new file, or remove this one")


def _publish(work: Path, output: Path) -> None:
    """Give the copy its name: the sidecar first, so that an image never points to one that is not there."""
    named: list[Path] = []
    try:
        for source, target in ((sidecar_path(work), sidecar_path(output)), (work, output)):
            if source.exists():
                _name(source, target)
                named.append(target)
    except OSError as error:
        for path in named:
            path.unlink(missing_ok=True)
        raise FileError(f"the output cannot be put in place: {error.strerror}", file=output) from error
    sync_folder(output.parent)


def _name(source: Path, target: Path) -> None:
    """Name a file without ever replacing another; file systems that know no links get a rename after a look."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        _refuse_taken(target)
        source.rename(target)


def _rename_in(error: VmgraftError, work: Path, output: Path) -> None:
    """Let an error speak of the output, not of the temporary name."""
    if error.file is not None and Path(error.file).name.startswith(work.name):
        error.file = str(output) + Path(error.file).name.removeprefix(work.name)
