"""The journal: ``IMAGE.vmgraft-journal``, the old graft, kept while a new one takes its place.

Replacing a graft is detach and attach, and between the two the image carries none. The old record is therefore copied
beside the image first, whole or not at all, and removed last. A reader that finds an image without a sound graft takes
the journal's: the image reads as before until the new graft is in place, and as after from then on. The next change of
the image, or ``vmgraft recover``, puts the old graft back in and removes the journal.

The file is laid out like a sidecar, and the same rules hold for it. In its locator ``placement`` says where the old
record was, ``record_offset`` is 0, and ``file_size`` is the size of the *guest content*, which every container knows in
any state: a journal beside another disk is not taken.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from vmgraft.errors import GraftFormatError, UsageError
from vmgraft.imagefmt.contract import GraftState, Image, Located, Locator
from vmgraft.imagefmt.sidecar import Sidecar, read_record_file, remove_record_file, write_record_file

SUFFIX: Final = ".vmgraft-journal"
#: What an image is in between detach and attach: without a graft, with one that nothing points to any more or yet, or
#: with the first part of one.
BETWEEN: Final = (GraftState.NONE, GraftState.ORPHANED, GraftState.CUT)


def journal_path(image: Path) -> Path:
    """Return the name of an image's journal."""
    return image.with_name(image.name + SUFFIX)


def write_journal(image: Image, located: Located) -> Sidecar:
    """Copy a sound graft into the image's journal, flush it, and read it back.

    Raises:
        FileError: when it cannot be written, or a file of another kind has that name.
        GraftFormatError: when there is no sound graft to keep, or it reads back differently.
    """
    locator, record = located.locator, located.record
    if located.state is not GraftState.OK or locator is None or record is None:
        raise GraftFormatError("only a sound graft can be kept", file=image.path)
    kept = Locator(
        placement=locator.placement,
        record_offset=0,
        record_size=record.size,
        record_sha256=record.sha256,
        tree_digest=locator.tree_digest,
        file_size=image.virtual_size,
    )
    write_record_file(journal_path(image.path), image.path, kept, record)
    found = read_journal(image)
    if found.state is not GraftState.OK or found.locator != kept:
        raise GraftFormatError(f"the journal reads back differently: {found.detail}", file=found.path)
    return found


def read_journal(image: Image) -> Sidecar:
    """Return the image's journal and its state: ``NONE`` without one, ``OK`` only when it can be this image's."""
    found = read_record_file(journal_path(image.path))
    if found.state is GraftState.OK and found.locator is not None and found.locator.file_size != image.virtual_size:
        detail = (
            f"the journal {found.path.name} was made for guest content of {found.locator.file_size} bytes, not "
            f"{image.virtual_size}"
        )
        return replace(found, state=GraftState.SWAPPED, detail=detail)
    return found


def refuse_unfinished(image: Image) -> None:
    """Refuse an image whose graft is being changed, also when the journal beside it is not this image's.

    Raises:
        UsageError: a journal lies beside it.
    """
    found = read_journal(image)
    if found.state in (GraftState.OK, GraftState.SWAPPED):
        what = "a change of the image's graft was interrupted" if found.state is GraftState.OK else found.detail
        hint = f"run `vmgraft recover` or `vmgraft detach`, or move {found.path.name} away"
        raise UsageError(what, file=image.path, hint=hint)


def remove_journal(image: Path) -> None:
    """Remove an image's journal if there is one; a file of that name that is none stays.

    Raises:
        FileError: when the system refuses.
    """
    remove_record_file(journal_path(image))


def locate_graft(image: Image) -> Located:
    """Find the graft of an image: its own, or while a change of it is unfinished, the one in the journal."""
    located = image.locate()
    if located.state not in BETWEEN:
        return located
    found = read_journal(image)
    if found.state is GraftState.NONE:
        return located
    if found.state is GraftState.OK:
        detail = f"a change was interrupted: this is the graft as it was before, kept in {found.path.name}"
        return Located(GraftState.OK, detail, found.locator, None, found.record, found.path)
    note = f"what lies beside the image is of no use: {found.detail}"
    return replace(located, detail=f"{located.detail}; {note}" if located.detail else note)
