"""Move: take the graft of one image over to another that holds the same disk, without any key.

The envelope and all that it speaks of travel byte for byte, so the signatures stay good. The destination is grafted and
checked first and the source detached last: whenever the move is interrupted, the graft is on one of them or on both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vmgraft.errors import ContentMismatchError, FileError, GraftFormatError, UsageError, VmgraftError
from vmgraft.imagefmt.contract import PROBE, Located, Opening, Placement, Progress
from vmgraft.imagefmt.graft import Graft, attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.record import SectionKind
from vmgraft.imagefmt.tree import ContentTree, digest_with_tree
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.statement import Statement, parse_statement
from vmgraft.vendor.carry import CARRIED, carried_sections
from vmgraft.vendor.graft import refuse_grafted

#: Blocks compared, at most, to name the first one that differs: 256 GiB of content.
_MAX_COMPARED = 1 << 22
_BLOCK = 65536


@dataclass(frozen=True, slots=True)
class MoveOptions:
    """How to move.

    Attributes:
        copy: Leave the graft on the source too.
        any_content: Let a portable graft (binding ``any``) go to an image with other content.
        placement: Where the record goes in the destination.
        source: How to open the source.
        destination: How to open the destination.
    """

    copy: bool = False
    any_content: bool = False
    placement: Placement = Placement.AUTO
    source: Opening = PROBE
    destination: Opening = PROBE


@dataclass(frozen=True, slots=True)
class Moved:
    """What a move did: the graft as found in the destination, and the content's digest there (32 bytes)."""

    located: Located
    tree_digest: bytes


def move_graft(source: Path, destination: Path, options: MoveOptions, progress: Progress | None = None) -> Moved:
    """Carry the graft of ``source`` over to ``destination``.

    Args:
        source: A grafted image.
        destination: An image of any container with the same content and no graft.
        options: How.
        progress: Called with (bytes, bytes in all) while contents are read, once for each image, and again to verify.

    Raises:
        NoGraftError: the source carries none.
        GraftFormatError: the graft of the source is not intact.
        UsageError: the destination carries a graft, or is the source.
        ContentMismatchError: the contents differ, or are not the one that the statement is bound to.
        FileError: an image cannot be read or written, or is in use.
    """
    if os.path.realpath(source) == os.path.realpath(destination):
        raise UsageError("source and destination are the same image", file=destination)
    refuse_grafted(destination, options.destination)
    if not options.copy:
        with open_image(source, options.source, writable=True):
            pass  # it can be written, and nobody else does: better known now than when the destination is done
    with open_image(source, options.source) as image:
        graft = open_graft(image, progress=progress)
        sections = carried_sections(graft)
        expected = _compare(graft, destination, options, progress)
        located = attach_sections(
            destination,
            sections,
            placement=options.placement,
            tree_digest=expected,
            opening=options.destination,
        )
        try:
            _check(graft, destination, expected, options.destination, progress)
        except BaseException:
            detach_image(destination, options.destination)
            raise
    if not options.copy:
        _let_go(source, destination, options.source)
    return Moved(located, expected)


def _compare(graft: Graft, destination: Path, options: MoveOptions, progress: Progress | None) -> bytes:
    """Return the digest of the destination's content, once it is known to be what the graft is for."""
    statement = _statement(graft)
    with open_image(destination, options.destination) as image:
        there, tree = digest_with_tree(image, flat="never", progress=progress)
    if statement.image is None and options.any_content:
        return there.tree_digest
    graft.content(flat=False)  # equal trees mean equal content: no flat digest is needed
    if graft.tree is None or graft.tree.tree_digest != there.tree_digest:
        raise ContentMismatchError(
            f"the two images do not hold the same content{_first_difference(graft.tree, tree)}",
            file=destination,
            field="content",
            hint="`vmgraft diff` shows where they differ" + _portable(statement),
        )
    if statement.image is not None and statement.image.tree_digest != there.tree_digest:
        raise ContentMismatchError(
            "the two images hold the same content, but it is not the one that the statement is bound to",
            file=destination,
            field="content",
            hint="the content was changed after it was signed",
        )
    return there.tree_digest


def _portable(statement: Statement) -> str:
    return "" if statement.image is not None else "; this graft is portable: --any-content moves it all the same"


def _statement(graft: Graft) -> Statement:
    """Return the statement, unverified: it tells what the graft is bound to, and nothing is granted for it."""
    envelopes = graft.envelopes()
    if len(envelopes) != 1:
        raise GraftFormatError(f"the record holds {len(envelopes)} envelopes and must hold one", file=graft.image.path)
    return parse_statement(parse_envelope(envelopes[0], file=graft.image.path).payload, file=graft.image.path)


def _first_difference(one: ContentTree | None, other: ContentTree) -> str:
    """Say which block is the first that differs, from the trees alone."""
    if one is None:
        return ""
    differ = one.virtual_size != other.virtual_size
    sizes = f": {one.virtual_size} and {other.virtual_size} bytes," if differ else ":"
    for index in range(min(one.block_count, other.block_count, _MAX_COMPARED)):
        if one.leaf(index) != other.leaf(index):
            start = index * _BLOCK
            end = min(start + _BLOCK, one.virtual_size, other.virtual_size)
            return f"{sizes} the first difference lies within bytes {start} to {end - 1}"
    return sizes.removesuffix(",") if differ else ""


def _check(graft: Graft, destination: Path, expected: bytes, opening: Opening, progress: Progress | None) -> None:
    """Read the destination anew and compare sections and content with what was meant to be there.

    Raises:
        FileError: a section differs.
        ContentMismatchError: the content changed.
    """
    with open_image(destination, opening) as image:
        found = open_graft(image, progress=progress)
        problem = found.format_problem()
        if problem is not None or _digests(found) != _digests(graft):
            raise FileError(f"what was written reads back differently: {problem or 'sections'}", file=destination)
        if found.content(flat=False).tree_digest != expected:
            raise ContentMismatchError("the content changed while it was grafted", file=destination, field="content")


def _digests(graft: Graft) -> list[tuple[SectionKind, bytes]]:
    sections = graft.record.of_kind(*CARRIED) if graft.record is not None else ()
    return [(SectionKind(section.kind), section.raw_sha256) for section in sections]


def _let_go(source: Path, destination: Path, opening: Opening) -> None:
    try:
        detach_image(source, opening)
    except VmgraftError as error:
        raise FileError(
            f"both images carry the graft now: it could not be taken away from the source ({error.message})",
            file=source,
            hint=f"detach it yourself; {destination.name} is done",
        ) from error
