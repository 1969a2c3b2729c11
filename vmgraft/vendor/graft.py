"""Attach and detach: digest, sign, write, and verify what was written before saying so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vmgraft.errors import FileError, UsageError, VmgraftError
from vmgraft.imagefmt.contract import PROBE, ContentDigest, GraftState, Located, Opening, Placement, Progress
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.journal import locate_graft
from vmgraft.imagefmt.tree import digest_content, digest_with_tree
from vmgraft.imagefmt.treesection import tree_section
from vmgraft.signing.manifest import parse_manifest
from vmgraft.vendor.pack import Package
from vmgraft.vendor.seal import Terms, check_room, lay_out, make_statement, preflight, sign
from vmgraft.vendor.seal import verify_written as _verify_written
from vmgraft.vendor.workcopy import work_copy

if TYPE_CHECKING:
    from vmgraft.imagefmt.record import Section
    from vmgraft.imagefmt.tree import FlatMode
    from vmgraft.signing.signers import Signer


@dataclass(frozen=True, slots=True)
class AttachOptions:
    """How to attach.

    Attributes:
        output: Write a grafted copy here and leave the image alone; None grafts in place.
        binding: ``image`` (this content only) or ``any`` (a portable extension).
        flat: When to sign the flat SHA-256 beside the content tree: ``auto``, ``always``, ``never``.
        expires: End of validity, or None.
        opening: How to open the image.
        tree: Put the content tree into the record, so that hosts check blocks when they are first read.
    """

    output: Path | None = None
    binding: str = "image"
    placement: Placement = Placement.AUTO
    flat: FlatMode = "auto"
    expires: datetime | None = None
    opening: Opening = PROBE
    tree: bool = False


@dataclass(frozen=True, slots=True)
class Attached:
    """What attach did."""

    path: Path
    located: Located
    statement_sha256: str
    content: ContentDigest
    keyids: tuple[str, ...]


def attach(
    image: Path,
    packages: Sequence[Package],
    keys: Sequence[Signer],
    options: AttachOptions,
    progress: Progress | None = None,
) -> Attached:
    """Sign extensions and graft them into an image, then verify the result with the signing keys.

    Args:
        image: The image, which must carry no graft.
        packages: The extensions, in the order the host will load them.
        keys: One signature each.
        options: Where and how.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        UsageError: nothing to attach, the same extension twice, or no key.
        NoRoomError: the record does not fit at that placement.
        VmgraftError: see the formats; whatever fails, the image is as it was.
    """
    now, terms = datetime.now(UTC), Terms(options.binding, options.expires)
    preflight(packages, keys, terms, now)
    if options.tree and options.binding != "image":
        raise UsageError(
            "a portable graft has no content tree of its own", field="with-tree", hint="leave out --binding any"
        )
    with _target(image, packages, keys, options) as target:
        content, sector_size, trees = _digest(target, options, progress)
        statement = make_statement(packages, content, terms, created=now, sector_size=sector_size)
        located = attach_sections(
            target,
            [*lay_out(packages, sign(statement, keys)), *trees],
            placement=options.placement,
            tree_digest=content.tree_digest,
            opening=options.opening,
        )
        with taken_back_on_failure(target, options):
            _verify_written(target, keys, options.opening)
    digest = hashlib.sha256(statement).hexdigest()
    return Attached(options.output or image, located, digest, content, tuple(key.keyid for key in keys))


def detach(image: Path, *, output: Path | None = None, opening: Opening = PROBE) -> Path:
    """Take the graft away; the file is byte for byte what it was before attach.

    Args:
        image: A grafted image.
        output: Write the original here and leave the image alone; None works in place.
        opening: How to open the image.

    Raises:
        NoGraftError: there is none.
        GraftFormatError: the record is damaged, so the way back is not known.
        FileError: the output's name is taken, or a file cannot be read or written.
    """
    if output is None:
        detach_image(image, opening)
        return image
    with work_copy(image, output) as work:
        detach_image(work, opening)
    return output


def check_detach_ids(image: Path, ids: Sequence[str], opening: Opening = PROBE) -> None:
    """Refuse to detach only some of the extensions that a statement covers, where no key can sign the rest.

    Raises:
        UsageError: when the ids are not exactly those of the image.
    """
    with open_image(image, opening) as opened:
        carried = {parse_manifest(data, file=image).id for data in open_graft(opened).manifests()}
    if set(ids) != carried:
        raise UsageError(
            f"the image carries {', '.join(sorted(carried))}, and one statement covers all of it",
            file=image,
            hint="name the key that signs the rest with --key, or detach all and attach those that should stay",
        )


@contextmanager
def _target(image: Path, packages: Sequence[Package], keys: Sequence[Signer], options: AttachOptions) -> Iterator[Path]:
    """Yield the file to graft: the image itself, or a fresh copy that goes away when something fails."""
    refuse_grafted(image, options.opening)
    if options.placement is Placement.INLINE:
        check_room(image, packages, keys, options.opening)
    if options.output is None:
        yield image
        return
    with work_copy(image, options.output) as work:
        yield work


@contextmanager
def taken_back_on_failure(target: Path, options: AttachOptions) -> Iterator[None]:
    """Take the graft away again when the block fails, Ctrl-C included; a copy goes away as a whole anyway."""
    try:
        yield
    except BaseException as error:
        if options.output is None:
            _take_back(target, options, error)
        raise


def _take_back(target: Path, options: AttachOptions, error: BaseException) -> None:
    try:
        detach_image(target, options.opening)
    except VmgraftError as second:
        first = (error.message if isinstance(error, VmgraftError) else str(error)) or type(error).__name__
        raise FileError(
            f"{first}; and the graft could not be taken away again: {second.message}",
            file=target,
            hint=f"run `vmgraft detach` on it{'; ' + second.hint if second.hint else ''}",
        ) from error


def refuse_grafted(image: Path, opening: Opening) -> None:
    """Refuse an image that carries a graft before any long work is done; the leavings of one are written over.

    Raises:
        UsageError: it carries one, or a change of it was interrupted.
    """
    with open_image(image, opening) as opened:
        located = locate_graft(opened)
    if located.state not in (GraftState.NONE, GraftState.ORPHANED):
        hint = "--add and --replace change the extensions of a grafted image; else detach first"
        if located.record_file is not None:
            hint = "`vmgraft recover` puts it back in; `vmgraft detach` takes it away"
        raise UsageError(f"the image carries a graft already (state: {located.state.value})", file=image, hint=hint)


def _digest(
    path: Path, options: AttachOptions, progress: Progress | None
) -> tuple[ContentDigest, int, tuple[Section, ...]]:
    """Read the guest content once; return its digests, the size of a sector, and the tree's section if it is wanted.

    Raises:
        UsageError: there is no room for so large a tree in a section.
    """
    with open_image(path, options.opening) as image:
        if not options.tree:
            return digest_content(image, flat=options.flat, progress=progress), image.sector_size, ()
        content, tree = digest_with_tree(image, flat=options.flat, progress=progress)
        return content, image.sector_size, (tree_section(tree),)
