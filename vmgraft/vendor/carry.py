"""Carrying a graft from one image to another: what travels, byte for byte."""

from __future__ import annotations

from typing import Final

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.carry import take_sections
from vmgraft.imagefmt.graft import Graft
from vmgraft.imagefmt.record import Section, SectionKind

#: UNDO and TREE speak of one container and one reading of it. A kind that only a later release knows stays behind too:
#: whether it would hold for another image is not known here.
CARRIED: Final = (
    SectionKind.ENVELOPE,
    SectionKind.MANIFEST,
    SectionKind.MODULE,
    SectionKind.FILES,
    SectionKind.HINTS,
)


def carried_sections(graft: Graft) -> list[Section]:
    """Return the sections of a graft that go along to another image, in the order of the record.

    Their raw bytes are the stored ones, read and checked against the record's table when the new record is built; the
    image must stay open and unchanged until then.

    Raises:
        GraftFormatError: the graft is not intact.
    """
    problem = graft.format_problem()
    if problem is not None or graft.record is None:
        raise GraftFormatError(
            f"the graft is not intact: {problem or 'no record'}",
            file=graft.image.path,
            hint="`vmgraft inspect` shows what is damaged",
        )
    return take_sections(graft.record, CARRIED)
