"""Replacing a graft in place: whoever looks, at whatever moment, finds the old one or the new one.

The order of the steps; each is on the disk before the next begins:

1. the old record is copied into the journal (``journal.py``): from now on there is a way back
2. the old graft is detached; readers find it in the journal
3. the new graft is attached; the formats make that one atomic step, and it is the commit
4. the new graft is read back and checked
5. the journal is removed

A failure in 2 to 4 goes back to the old graft. After a kill in 1 to 3 the next change of the image, or
:func:`finish_change`, does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vmgraft.errors import FileError, GraftFormatError, UnsupportedError, UsageError, VmgraftError
from vmgraft.imagefmt.assemble import assemble_record
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.carry import take_sections
from vmgraft.imagefmt.contract import PROBE, GraftState, Image, Located, Opening, Placement, Undo
from vmgraft.imagefmt.graft import check_written, find_undo, open_image, put_in
from vmgraft.imagefmt.journal import BETWEEN, read_journal, remove_journal, write_journal
from vmgraft.imagefmt.record import Record, Section, SectionKind, parse_record
from vmgraft.imagefmt.sidecar import RECORD_OFFSET, Sidecar, sidecar_path, stray_sidecar
from vmgraft.imagefmt.undo import pack_undo


def replace_sections(
    path: str | Path,
    sections: Sequence[Section],
    *,
    old: bytes,
    placement: Placement,
    tree_digest: bytes,
    keep: Sequence[SectionKind] = (),
    check: Callable[[], None] | None = None,
    opening: Opening = PROBE,
) -> Located:
    """Put another graft in the place of a sound one.

    Args:
        path: The image, which must not be in use.
        sections: What the new record is to hold, without UNDO.
        old: SHA-256 of the record that is to go (32 bytes); any other is refused.
        placement: Where the new record goes.
        tree_digest: As for ``attach_sections``.
        keep: Kinds of sections that come along from the old record.
        check: Called when the new graft is in place; what it raises brings the old one back.
        opening: How to open the image.

    Returns:
        The new graft as found by a reader.

    Raises:
        UsageError: when another record than ``old`` is there, or a sidecar lies in the way.
        VmgraftError: as ``attach_sections`` and ``check``; the image carries the old graft then.
    """
    finish_change(path, opening)
    begun = False
    try:
        with open_image(path, opening, writable=True) as image:
            located = _expected(image, old)
            begun = True
            journal = write_journal(image, located)
            kept = take_sections(_record(journal), keep)
            image.detach(find_undo(image, image.locate()))
            written = put_in(image, [*sections, *kept], placement, tree_digest)
            with open_image(path, opening) as again:
                located = check_written(again, written)
            if check is not None:
                check()
            remove_journal(image.path)
            return located
    except BaseException as error:
        if begun:
            _go_back(path, old, opening, error)
        raise


def finish_change(path: str | Path, opening: Opening = PROBE) -> str | None:
    """Bring an interrupted change to an end: the old graft is put back in, or the journal of a finished one removed.

    Opening the image for writing already rolls back an interrupted attach, or finishes a detach.

    Returns:
        What was done, or None: there was nothing to do.

    Raises:
        GraftFormatError: when the image carries another trace that stands in the way.
        FileError: when the image or its folder cannot be written.
    """
    with open_image(path, opening, writable=True) as image:
        journal = read_journal(image)
        if journal.state is not GraftState.OK:
            return None
        located = image.locate()
        if located.state not in (*BETWEEN, GraftState.OK):
            return None
        # The old graft may be sound and have lost parts already, as a copy of its locator: it is put in anew.
        still_old = located.record is not None and located.record == journal.record
        if located.state is GraftState.OK and not still_old:
            remove_journal(image.path)
            return f"removed {journal.path.name}, left over from a change of the graft"
        _restore(image, journal)
        with open_image(path, opening) as again:
            _check_restored(again, journal)
        remove_journal(image.path)
        return f"put the graft kept in {journal.path.name} back in: it was being changed"


def point_again(image: Image, located: Located) -> None:
    """Point to a whole record again: the container's own way, or for a lone sidecar by attaching the very same record.

    Args:
        image: The image, open for writing.
        located: What ``locate`` returned.

    Raises:
        UnsupportedError: there is no way.
        GraftFormatError: the record is not whole, or does not fit the image as it is now.
    """
    try:
        image.reattach(located)
    except UnsupportedError:
        locator, record = located.locator, located.record
        aside = locator is not None and locator.placement is Placement.SIDECAR
        if located.state is not GraftState.ORPHANED or not aside or locator is None or record is None:
            raise
        kept = parse_record(record, file=sidecar_path(image.path), offset=RECORD_OFFSET)

        def build(undo: Undo) -> Blob:
            if kept.undo() != undo:
                hint = "attach again, or detach to remove the sidecar"
                raise GraftFormatError("the image has changed since", file=image.path, field="undo", hint=hint)
            return kept.data

        image.attach(build, Placement.SIDECAR, locator.tree_digest)


def _expected(image: Image, old: bytes) -> Located:
    """Return the graft in place, which must be the one that is to go."""
    located = image.locate()
    if located.state is not GraftState.OK or located.record is None or located.record.sha256 != old:
        raise UsageError(
            "the graft was changed by somebody else meanwhile",
            file=image.path,
            hint="look with `vmgraft list`, then try again",
        )
    inline = located.locator is not None and located.locator.placement is Placement.INLINE
    if inline and stray_sidecar(image.path) is not None:
        raise UsageError(
            "a sidecar lies beside an image whose graft is inline, and would be taken for it in between",
            file=sidecar_path(image.path),
            hint="move it away",
        )
    return located


def _go_back(path: str | Path, old: bytes, opening: Opening, error: BaseException) -> None:
    """Bring the old graft back after a failure; where that fails too, readers still find it in the journal."""
    try:
        with open_image(path, opening, writable=True) as image:
            located = image.locate()
            journal = read_journal(image)
            ours = journal.state is GraftState.OK and journal.record is not None and journal.record.sha256 == old
            changed = located.record is not None and located.record.sha256 != old
            if ours and located.state is GraftState.OK and changed:
                image.detach(find_undo(image, located))
        finish_change(path, opening)
    except VmgraftError as second:
        first = str(error) or type(error).__name__
        raise FileError(
            f"{first}; and the old graft could not be put back in yet: {second.message}",
            file=path,
            hint="it is kept beside the image, where readers find it; run `vmgraft recover` when the cause is gone",
        ) from error


def _record(journal: Sidecar) -> Record:
    if journal.record is None:
        raise GraftFormatError("the journal holds no record", file=journal.path)
    return parse_record(journal.record, file=journal.path, offset=RECORD_OFFSET)


def _restore(image: Image, journal: Sidecar) -> None:
    """Attach what the journal holds: the very bytes, where the way back is still the one they describe."""
    record, locator = _record(journal), journal.locator
    located = image.locate()
    if located.state is not GraftState.NONE:
        image.detach(find_undo(image, located))

    def build(undo: Undo) -> Blob:
        if record.undo() == undo:
            return record.data
        others = [kind for kind in SectionKind if kind is not SectionKind.UNDO]
        section = Section(SectionKind.UNDO, pack_undo(undo), compress=True)
        return assemble_record([section, *take_sections(record, others)], image.path.parent)

    # Where it was; inline only as far as there is still room.
    aside = locator is not None and locator.placement is Placement.SIDECAR
    tree_digest = bytes(32) if locator is None else locator.tree_digest
    image.attach(build, Placement.SIDECAR if aside else Placement.AUTO, tree_digest)


def _check_restored(image: Image, journal: Sidecar) -> None:
    """Compare the sections of the graft with those of the journal."""
    located = image.locate()
    if located.state is not GraftState.OK or located.record is None:
        raise FileError(f"the old graft reads back as {located.state.value}: {located.detail}", file=image.path)
    found = parse_record(located.record, file=image.path, offset=0)

    def carried(record: Record) -> list[tuple[int, bytes]]:
        return [(item.kind, item.raw_sha256) for item in record.sections if item.kind in _OTHERS]

    if carried(found) != carried(_record(journal)):
        raise FileError("the old graft reads back differently", file=image.path)


_OTHERS = tuple(kind for kind in SectionKind if kind is not SectionKind.UNDO)
