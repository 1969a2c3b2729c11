"""Recover: bring a graft back that was lost half-way, by a kill or by another program. Nothing is trusted for it.

What there is to do, in this order:

1. a journal: the old graft of an interrupted change is put back in, or the journal of a finished one removed
2. an interrupted attach is rolled back, an interrupted detach finished: opening for writing does that
3. a whole record whose locator, or one of whose locators, was lost is pointed to again, where the container can
4. the first part of an inline record is removed: the rest of it is nowhere

Every step is crash-safe, and doing it again is harmless. ``verify`` still decides what is believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmgraft.errors import FileError, GraftFormatError, UnsupportedError, UsageError, VmgraftError
from vmgraft.imagefmt.contract import PROBE, GraftState, Image, Located, Opening, Placement
from vmgraft.imagefmt.graft import Graft, detach_image, open_image
from vmgraft.imagefmt.journal import BETWEEN, read_journal
from vmgraft.imagefmt.replace import finish_change, point_again

#: What is wrong with a sidecar rather than with the image.
_ASIDE = (GraftState.NO_RECORD, GraftState.SWAPPED, GraftState.STALE)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found and done.

    Attributes:
        found: What was wrong, one sentence each; empty where nothing was.
        done: What was done about it; empty for a dry run.
        before: State of the image's own graft before.
        after: And after; the same for a dry run.
    """

    found: tuple[str, ...]
    done: tuple[str, ...]
    before: GraftState
    after: GraftState


def recover(image: Path, opening: Opening = PROBE, *, dry_run: bool = False) -> Recovery:
    """Bring back what can be brought back.

    Args:
        image: Any image of a known format.
        opening: How to open the image.
        dry_run: Say what is wrong, and change nothing.

    Returns:
        What was found and done; afterwards the image carries a sound graft, or none.

    Raises:
        GraftFormatError: there is damage that cannot be undone; what could be done was done.
        FileError: the image is in use, or cannot be read or written.
    """
    found, before = _look(image, opening)
    if dry_run or not found:
        return Recovery(tuple(found), (), before, before)
    done = _finish_interrupted(image, opening)
    done += _mend(image, opening)
    with open_image(image, opening) as opened:
        located, journal = opened.locate(), read_journal(opened)
        problem = Graft(opened, located=located).format_problem() if located.state is not GraftState.NONE else None
    if problem is not None:
        raise GraftFormatError(f"the graft is still damaged: {problem}", file=image, field="graft", hint=_hint(located))
    if located.state is GraftState.NONE and journal.state is not GraftState.NONE:
        hint = f"put back the disk that it belongs to, or move {journal.path.name} away"
        raise GraftFormatError(f"an old graft cannot be put back in: {journal.detail}", file=journal.path, hint=hint)
    return Recovery(tuple(found), tuple(done), before, located.state)


def _look(image: Path, opening: Opening) -> tuple[list[str], GraftState]:
    """Say what is wrong without changing anything."""
    with open_image(image, opening) as opened:
        located, journal = opened.locate(), read_journal(opened)
        found = []
        if journal.state is GraftState.OK and located.state in BETWEEN:
            found.append(f"a change of the graft was interrupted: the one before it is kept in {journal.path.name}")
        elif journal.state is GraftState.OK:
            found.append(f"{journal.path.name} is left over from a change of the graft")
        elif journal.state is not GraftState.NONE and located.state in BETWEEN:
            found.append(f"{journal.path.name} is of no use: {journal.detail}")
        if located.state is GraftState.OK:
            problem = Graft(opened, located=located).format_problem()
            found += [text for text in (problem, located.detail) if text]
        elif located.state is not GraftState.NONE or located.detail:
            found.append(f"{located.state.value}: {located.detail}")
    return found, located.state


def _finish_interrupted(image: Path, opening: Opening) -> list[str]:
    """Steps 1 and 2."""
    done = []
    with open_image(image, opening, writable=True) as opened:  # 2 comes for free, and 1 needs it done
        if opened.recovered:
            done.append("brought an interrupted attach or detach to its end")
    change = finish_change(image, opening)  # 1
    return [*done, change] if change else done


def _mend(image: Path, opening: Opening) -> list[str]:
    """Steps 3 and 4."""
    with open_image(image, opening) as opened:
        located = opened.locate()
    if located.state is GraftState.NONE or (located.state is GraftState.OK and not located.detail):
        return []
    with open_image(image, opening, writable=True) as opened:
        located = opened.locate()
        problem = _point_again(opened, located)  # 3
    if problem is None:
        return ["pointed to the record again"]
    if located.state is GraftState.OK:
        return []  # sound as it is; the remark stays
    aside = located.locator is not None and located.locator.placement is Placement.SIDECAR
    if located.state is not GraftState.CUT or aside:
        raise GraftFormatError(
            f"nothing can be done about this: {located.state.value}: {located.detail or problem.message}",
            file=problem.file or image,
            offset=problem.offset,
            field="graft",
            hint=_hint(located, problem),
        ) from problem
    detach_image(image, opening)  # 4
    return ["removed the first part of a record, whose rest is nowhere; the content is what it was"]


def _point_again(image: Image, located: Located) -> VmgraftError | None:
    """Return why the record cannot be pointed to again, or None: it was."""
    try:
        point_again(image, located)
    except (UnsupportedError, GraftFormatError, UsageError) as problem:
        return problem
    after = image.locate()
    if after.state is not GraftState.OK:
        raise FileError(f"the graft reads back as {after.state.value}: {after.detail}", file=image.path)
    return None


def _hint(located: Located, problem: VmgraftError | None = None) -> str | None:
    """Say what a person can do where a program cannot; the format knows best, but for sidecars."""
    if problem is not None and problem.hint and located.state not in _ASIDE:
        return problem.hint
    return {
        GraftState.NO_RECORD: "put the sidecar back beside the image from a copy, then try again",
        GraftState.SWAPPED: "put the right sidecar beside the image, then try again",
        GraftState.STALE: "put the sidecar of this graft beside the image, then try again",
        GraftState.CUT: "put a whole copy of the sidecar beside the image, or detach",
        GraftState.GROWN: "shrink the file to where the graft ends if nothing of value lies behind it",
        GraftState.OVERWRITTEN: "restore the image or its sidecar from a copy, or detach and attach again",
        GraftState.DAMAGED: "restore the image or its sidecar from a copy, or detach and attach again",
    }.get(located.state)
