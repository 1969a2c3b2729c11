"""What every change of a graft in place begins with: the file to work on, and what of the old graft stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.graft import Graft
from vmgraft.imagefmt.journal import journal_path
from vmgraft.imagefmt.sidecar import refuse_long_name
from vmgraft.vendor.workcopy import work_copy


@contextmanager
def editable(image: Path, output: Path | None) -> Iterator[Path]:
    """Yield the file to change: the image itself, or a fresh copy that goes away when something fails.

    Raises:
        FileError: the output's name is taken, the copy fails, or the journal's name is too long.
    """
    if output is None:
        refuse_long_name(journal_path(Path(os.path.realpath(image))))
        yield image
        return
    with work_copy(image, output) as work:
        yield work


def record_digest(graft: Graft) -> bytes:
    """Return the SHA-256 of a graft's record: its name for ``replace_sections``.

    Raises:
        GraftFormatError: there is none.
    """
    if graft.located.record is None:
        raise GraftFormatError("the graft has no record", file=graft.image.path)
    return graft.located.record.sha256


def same_placement(graft: Graft) -> Placement:
    """A sidecar stays one; an inline record may have to become one."""
    locator = graft.located.locator
    return Placement.SIDECAR if locator is not None and locator.placement is Placement.SIDECAR else Placement.AUTO
