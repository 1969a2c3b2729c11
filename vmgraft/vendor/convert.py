"""Convert: the same disk in another container, with its graft.

What is signed is the guest content and the payloads, not the container, so the envelope and the payload sections go
along byte for byte; only UNDO is made anew. The steps, in order; the same numbers stand in the code.

1. the source is opened, kept from writers, and its graft must be intact (or be left behind on request)
2. the content is read once, hashed on the way, and written to a file without a name
3. the content that was read is the one that each carried statement is bound to
4. the graft is attached to the new image
5. the new image is opened as any reader opens it: its content and its graft must be what they should be
6. only then does it get its name
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vmgraft.errors import (
    ContentMismatchError,
    FileError,
    GraftFormatError,
    MalformedImageError,
    UnsupportedError,
    UsageError,
)
from vmgraft.imagefmt.commit import Writer, atomic_output
from vmgraft.imagefmt.contract import PROBE, GraftState, Image, Located, Opening, Placement, Progress
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.graft import Graft, attach_sections, open_image
from vmgraft.imagefmt.locks import writers_kept_out
from vmgraft.imagefmt.record import Section
from vmgraft.imagefmt.registry import PROBE_SIZE, detect, get_format
from vmgraft.imagefmt.tree import build_tree
from vmgraft.imagefmt.treenodes import ContentTree
from vmgraft.imagefmt.write import format_of_name, get_writer
from vmgraft.imagefmt.write.base import NO_CHOICES, WriteOptions
from vmgraft.imagefmt.write.copy import write_content
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.statement import parse_statement
from vmgraft.vendor.carry import carried_sections
from vmgraft.vendor.workcopy import work_file


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        format: Format of the new image; None: what its name's suffix stands for.
        opening: How to open the source.
        placement: Where the graft goes in the new image.
        drop_grafts: Leave the graft behind, in whatever state it is.
        write: Choices of the format.
    """

    format: str | None = None
    opening: Opening = PROBE
    placement: Placement = Placement.AUTO
    drop_grafts: bool = False
    write: WriteOptions = NO_CHOICES


@dataclass(frozen=True, slots=True)
class Converted:
    """What convert did.

    Attributes:
        path: The new image.
        format: Its format.
        virtual_size: Bytes of guest content.
        tree_digest: fs-verity digest of the guest content (32 bytes), the same in source and new image.
        located: The graft of the new image; None when it has none.
        dropped: State of a graft that was left behind, or None.
        warnings: What a user should know.
    """

    path: Path
    format: str
    virtual_size: int
    tree_digest: bytes
    located: Located | None
    dropped: GraftState | None
    warnings: tuple[str, ...]


def convert(source: Path, destination: Path, options: ConvertOptions, progress: Progress | None = None) -> Converted:
    """Write the guest content of an image, and its graft, to a new image of any writable format.

    Backing files are merged in. Signatures are not judged here: what did not verify before does not verify after.

    Args:
        source: The image; only read.
        destination: The new image; neither it nor its sidecar may exist. It appears whole or not at all.
        options: Format, placement and so on.
        progress: Called with (bytes, bytes in all): the content is written once and read back once.

    Raises:
        UsageError: the format is not known or cannot be told.
        UnsupportedError: the format cannot hold this content, or nothing of that format can be made.
        GraftFormatError: the graft of the source is not intact.
        ContentMismatchError: the content of the source is not the one its graft was signed for.
        NoRoomError: the graft does not fit at the placement asked for.
        FileError: a file cannot be read or written, is in use, or exists already.
    """
    name = options.format or format_of_name(destination)
    get_writer(name), get_format(name)
    with _kept_from_writers(source, options.opening), open_image(source, options.opening) as image:  # 1
        if not image.is_disk:
            raise UnsupportedError(f"{image.format_name} is no disk and cannot be converted", file=source)
        if name == "iso9660":
            _check_iso(image, source)
        graft, dropped = _intact_graft(image, options)
        sections = [] if graft is None else carried_sections(graft)
        with work_file(destination) as work:
            tree = _write(image, work, name, (destination.name, options.write), _half(progress, 0))  # 2
            if graft is not None:
                _check_bound(graft, tree)  # 3
            warnings = _misread(work, name, destination, options, carries=graft is not None)
            opening = Opening(root=work.parent, format=name)
            _check_plain(work, opening, source)
            if graft is not None:  # 4
                attach_sections(
                    work, sections, placement=options.placement, tree_digest=tree.tree_digest, opening=opening
                )
            located = _check_written(work, opening, tree, sections, _half(progress, 1))  # 5
        # 6: work_file gives the names when its block ends well
    return Converted(destination, name, tree.virtual_size, tree.tree_digest, located, dropped, tuple(warnings))


def _half(progress: Progress | None, half: int) -> Progress | None:
    """Map the progress of one of two passes over the content to that of both."""
    if progress is None:
        return None
    return lambda done, total: progress(half * total + done, 2 * total)


@contextmanager
def _kept_from_writers(source: Path, opening: Opening) -> Iterator[None]:
    """Keep QEMU from writing to an image and the files it reads through; what is opened in the block stays as it is."""
    with open_image(source, opening) as image:
        paths = (image.path, *image.backing_chain())
    with ExitStack() as stack:
        for path in paths:
            file = FlatFile(path)
            stack.callback(file.close)
            stack.enter_context(writers_kept_out(file.fd, file=path))
        yield


def _intact_graft(image: Image, options: ConvertOptions) -> tuple[Graft | None, GraftState | None]:
    """Return the graft to carry along, or the state of one that is left behind."""
    located = image.locate()
    if located.state is GraftState.NONE:
        return None, None
    if options.drop_grafts:
        return None, located.state
    if located.state is not GraftState.OK:
        raise GraftFormatError(
            f"the graft is not intact ({located.state.value}: {located.detail})",
            file=image.path,
            hint="`vmgraft recover` may help; --drop-grafts converts without it",
        )
    return Graft(image, located=located), None


def _write(
    image: Image, work: Path, format_name: str, how: tuple[str, WriteOptions], progress: Progress | None
) -> ContentTree:
    """Write the content to a file that has no name before it is complete."""
    name, options = how
    with atomic_output(work) as fd:
        status = image.path.stat()
        if stat.S_ISREG(status.st_mode):  # a private image does not become a public one
            os.fchmod(fd, stat.S_IMODE(status.st_mode) & 0o777 | stat.S_IRUSR | stat.S_IWUSR)
        writer = get_writer(format_name)(Writer(fd, file=work), image.virtual_size, options, name)
        return write_content(image, writer, progress=progress)


def _check_bound(graft: Graft, tree: ContentTree) -> None:
    """Compare the content that was read with what each statement is bound to.

    Raises:
        ContentMismatchError: it is another one.
        GraftFormatError: an envelope or statement is not well-formed.
    """
    path = graft.image.path
    for stored in graft.envelopes():
        claim = parse_statement(parse_envelope(stored, file=path).payload, file=path).image
        if claim is None:
            continue
        if (claim.virtual_size, claim.root_hash, claim.tree_digest) != (
            tree.virtual_size,
            tree.root_hash,
            tree.tree_digest,
        ):
            raise ContentMismatchError(
                "the content is not the one that the graft was signed for",
                file=path,
                field="content",
                hint="`vmgraft verify` shows more; --drop-grafts converts without the graft",
            )


def _misread(work: Path, name: str, destination: Path, options: ConvertOptions, *, carries: bool) -> list[str]:
    """Look what a reader takes the new image for that is not told its format: content can look like a container."""
    try:
        found = detect(work).name
    except UnsupportedError as problem:
        found = problem.message
    if found == name:
        return []
    warning = f"without --image-format {name} the new image is taken for something else ({found})"
    if carries and options.format is None:
        raise UsageError(
            f"{warning}, and its graft is not found",
            file=destination,
            hint=f"-O {found if found == 'iso9660' else 'qcow2'}, or -O {name} if this is what you want",
        )
    return [warning]


def _check_iso(image: Image, source: Path) -> None:
    """Refuse early, before the content is copied, to call a disk an ISO image that does not begin as one.

    Raises:
        UnsupportedError: the content does not begin as ECMA-119 wants it.
    """
    if not get_format("iso9660").probe(image.read(0, PROBE_SIZE), image.virtual_size):
        raise _no_iso(source)


def _no_iso(source: Path, why: str = "") -> UnsupportedError:
    return UnsupportedError(
        f"its content is no ISO 9660 volume{why}, so it cannot be written as an ISO",
        file=source,
        hint="name another suffix or -O raw",
    )


def _check_plain(work: Path, opening: Opening, source: Path) -> None:
    """Refuse content that the format would show as a graft: a trailer at the end of the guest's own disk, say.

    Raises:
        UnsupportedError: the content cannot be told from a grafted image, or is none that the format can hold.
    """
    try:
        with open_image(work, opening) as image:
            state = image.locate().state
    except MalformedImageError as problem:
        if opening.format != "iso9660":
            raise
        raise _no_iso(source, f" ({problem.message})") from problem
    if state is not GraftState.NONE:
        raise UnsupportedError(
            f"the guest content itself looks like a grafted {opening.format} image ({state.value})",
            file=work,
            hint="convert to qcow2, which keeps content and graft apart",
        )


def _check_written(
    work: Path, opening: Opening, tree: ContentTree, sections: Sequence[Section], progress: Progress | None
) -> Located | None:
    """Read the new image as anybody would.

    Raises:
        FileError: content or graft read back differently.
    """
    with open_image(work, opening) as image:
        again = build_tree(image, progress=progress, keep_leaves=False)
        located = image.locate()
    same = (again.virtual_size, again.root_hash) == (tree.virtual_size, tree.root_hash)
    if not same or (located.state is GraftState.OK) != bool(sections):
        what = f"graft ({located.state.value}: {located.detail})" if same else "content"
        raise FileError(
            f"the {what} of the new image reads back differently", file=work, hint="check the disk it lies on"
        )
    return located if sections else None
