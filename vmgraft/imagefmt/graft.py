"""The facade of this room: open an image, read its graft, attach one, detach it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vmgraft.errors import FileError, GraftFormatError, NoGraftError, PayloadMismatchError, UsageError
from vmgraft.imagefmt.assemble import assemble_record
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.contract import (
    PROBE,
    ContentDigest,
    GraftState,
    Image,
    Located,
    Opening,
    OpenOptions,
    Placement,
    Progress,
    Undo,
)
from vmgraft.imagefmt.journal import BETWEEN, locate_graft, read_journal, refuse_unfinished, remove_journal
from vmgraft.imagefmt.locator import LOCATOR_SIZE
from vmgraft.imagefmt.record import Record, Section, SectionKind, StoredSection, parse_record
from vmgraft.imagefmt.registry import choose
from vmgraft.imagefmt.sidecar import RECORD_OFFSET, sidecar_path
from vmgraft.imagefmt.tree import ContentTree, digest_with_tree
from vmgraft.imagefmt.undo import pack_undo

#: Sections whose bytes a signature speaks about: damage there is the verifier's to report.
_SIGNED_KINDS = (SectionKind.ENVELOPE, SectionKind.MANIFEST, SectionKind.MODULE, SectionKind.FILES)
_PAYLOAD_KINDS = (SectionKind.MANIFEST, SectionKind.MODULE, SectionKind.FILES)
#: States in which a new graft may be written.
_FREE = (GraftState.NONE, GraftState.ORPHANED)
#: States in which the sidecar's name is taken by a sound sidecar that is not this graft's.
_FOREIGN_SIDECAR = (GraftState.SWAPPED, GraftState.STALE)


def open_image(path: str | Path, opening: Opening = PROBE, *, writable: bool = False) -> Image:
    """Open a disk image of any registered format.

    Symbolic links are resolved first, so a sidecar always lies beside the file itself. A block device named by a link
    outside /dev keeps that name: its sidecar lies beside the link.

    Args:
        path: The image.
        opening: Its format, if it is not to be asked for it, and where backing files may lie.
        writable: Open for attach or detach, and take QEMU-compatible locks.

    Raises:
        FileError: when it cannot be opened, is malformed, unsupported or in use.
    """
    real = _name_of(Path(path))
    if writable and (opening.snapshot is not None or opening.ciphertext):
        raise UsageError("snapshots and ciphertext are for reading only", file=real)
    root = None if opening.root is None else _resolve(opening.root)
    options = OpenOptions(writable=writable, root=root, snapshot=opening.snapshot, ciphertext=opening.ciphertext)
    return choose(real, opening).open(real, options)


class Graft:
    """The graft of an open image, as found; nothing in it is trusted.

    It is the evidence that ``signing`` verifies: ``format_problem``, ``envelopes``, ``payload`` and ``content``. The
    image must stay open for as long as this object is used.

    Attributes:
        image: The image it was found in.
        located: Its state and place.
        record: The parsed record, or None when its header or table are not sound.
        tree: The content tree, once ``content`` has been called, or a host has verified the stored one.
    """

    def __init__(self, image: Image, *, located: Located | None = None, progress: Progress | None = None) -> None:
        self.image = image
        self.located = locate_graft(image) if located is None else located
        self.record: Record | None = None
        self.tree: ContentTree | None = None
        self._progress = progress
        self._content: ContentDigest | None = None
        self._record_problem: str | None = None
        self._parse()

    @property
    def was_read(self) -> bool:
        """Whether all of the content was read."""
        return self._content is not None

    def _parse(self) -> None:
        data = self.located.record
        if data is None:
            self._record_problem = self.located.detail or "the record cannot be read"
            return
        file, offset = _record_place(self.image.path, self.located)
        try:
            self.record = parse_record(data, file=file, offset=offset)
        except GraftFormatError as problem:
            state, detail = self.located.state, self.located.detail
            self._record_problem = str(problem) if state is GraftState.OK else f"{state.value}: {detail} ({problem})"

    def format_problem(self) -> str | None:
        """Say what is structurally wrong, or None.

        Damage inside an envelope, manifest, module or file is left to the verifier, which can say more about it. That
        is safe in state ``OVERWRITTEN`` only, which formats report when the record's digest is all that is wrong: the
        section table's digests then show that nothing else is affected.
        """
        if self.record is None:
            return self._record_problem
        state = self.located.state
        if state not in (GraftState.OK, GraftState.OVERWRITTEN):
            return f"{state.value}: {self.located.detail}"
        damaged = self._damaged_sections()
        for section, problem in damaged:
            if section.kind not in _SIGNED_KINDS:
                return problem
        if state is GraftState.OVERWRITTEN and not (damaged and self._is_ours()):
            return f"{state.value}: {self.located.detail}"
        return None

    def _damaged_sections(self) -> list[tuple[StoredSection, str]]:
        """Return the sections that do not match the table, with the reason."""
        found = []
        known = [kind.value for kind in SectionKind]
        for section in self.record.sections if self.record is not None else ():
            if self.record is None or section.kind not in known:
                continue
            try:
                self.record.raw(section)
                if section.kind == SectionKind.UNDO:
                    self.record.undo()
            except GraftFormatError as problem:
                found.append((section, str(problem)))
        return found

    def _is_ours(self) -> bool:
        """Return whether the record has the size that the locator states, and the UNDO that attach always adds."""
        record, locator = self.record, self.located.locator
        if record is None or locator is None or record.data.size != locator.record_size:
            return False
        return bool(record.of_kind(SectionKind.UNDO))

    def envelopes(self) -> tuple[bytes, ...]:
        """Return the stored DSSE envelopes, as found even when they do not match the table."""
        if self.record is None:
            return ()
        found = []
        for section in self.record.of_kind(SectionKind.ENVELOPE):
            try:
                found.append(self.record.raw(section))
            except GraftFormatError:
                found.append(self.record.stored(section))
        return tuple(found)

    def payload(self, sha256: str) -> bytes:
        """Return the stored manifest, module or piece of files with the given SHA-256 (lowercase hex).

        Raises:
            PayloadMismatchError: when nothing stored hashes to it.
        """
        record = self.record
        problem = "no stored payload has this digest"
        for section in record.of_kind(*_PAYLOAD_KINDS) if record is not None else ():
            if record is None or section.raw_sha256.hex() != sha256:
                continue
            try:
                return record.raw(section)
            except GraftFormatError as error:
                problem = error.message
        raise PayloadMismatchError(f"{problem}: sha256:{sha256}", file=self.image.path, field="payload")

    def content(self, flat: bool) -> ContentDigest:
        """Read the guest content and return its digests; the result and the tree are kept.

        Args:
            flat: Whether the flat SHA-256 is wanted too.

        Raises:
            FileError: when the content cannot be read.
        """
        if self._content is None or (flat and self._content.flat is None):
            self._content, self.tree = digest_with_tree(
                self.image, flat="always" if flat else "never", progress=self._progress
            )
        return self._content

    def manifests(self) -> tuple[bytes, ...]:
        """Return the stored manifests, unverified; those that do not match the table are left out."""
        return self._readable(SectionKind.MANIFEST)

    def hints(self) -> bytes | None:
        """Return the unsigned hints, or None."""
        found = self._readable(SectionKind.HINTS)
        return found[0] if found else None

    def _readable(self, kind: SectionKind) -> tuple[bytes, ...]:
        record = self.record
        found = []
        for section in record.of_kind(kind) if record is not None else ():
            try:
                found.append(record.raw(section) if record is not None else b"")
            except GraftFormatError:
                continue
        return tuple(found)


def open_graft(image: Image, *, progress: Progress | None = None) -> Graft:
    """Return the graft of an open image, sound or not; where a change was interrupted, the one before it.

    Raises:
        NoGraftError: when it carries none.
    """
    located = locate_graft(image)
    if located.state is GraftState.NONE:
        raise NoGraftError("the image carries no graft", file=image.path, hint="vmgraft attach puts one in")
    if located.state is GraftState.ORPHANED:
        raise NoGraftError(
            f"the image carries no graft any more: {located.detail}",
            file=image.path,
            hint="another program dropped it, or attach or detach was interrupted: attach again, or detach to clean up",
        )
    return Graft(image, located=located, progress=progress)


def attach_sections(
    image_path: str | Path,
    sections: Sequence[Section],
    *,
    placement: Placement = Placement.AUTO,
    tree_digest: bytes,
    opening: Opening = PROBE,
) -> Located:
    """Build a record of ``sections`` and UNDO, write it, and read it back.

    Args:
        image_path: The image, which must not be in use and carry no graft; one that was cut short is cleared away.
        sections: What the record is to hold, without UNDO.
        placement: Where it goes; ``AUTO`` is inline where it fits, else a sidecar.
        tree_digest: fs-verity digest of the content (32 bytes), kept in the locator as a hint.
        opening: How to open the image.

    Returns:
        The graft as found by a reader.

    Raises:
        UsageError: when the image carries a graft already, or a section is UNDO.
        NoRoomError: when the record does not fit at that placement.
        GraftFormatError: when the sections are over a limit of the format.
        FileError: when the image cannot be written, or reads back differently.
    """
    if any(section.kind is SectionKind.UNDO for section in sections):
        raise UsageError("the UNDO section is made by attach itself")
    with open_image(image_path, opening, writable=True) as image:
        _make_free(image)
        written = put_in(image, sections, placement, tree_digest)
    with open_image(image_path, opening) as image:
        return check_written(image, written)


def put_in(image: Image, sections: Sequence[Section], placement: Placement, tree_digest: bytes) -> Blob:
    """Attach to an image that is open for writing; return the record, of ``sections`` and UNDO, for a comparison."""
    written: list[Blob] = []

    def build(undo: Undo) -> Blob:
        undo_section = Section(SectionKind.UNDO, pack_undo(undo), compress=True)
        written.append(assemble_record([undo_section, *sections], image.path.parent))
        return written[-1]

    image.attach(build, placement, tree_digest)
    return written[-1]


def _make_free(image: Image) -> None:
    """Clear away what an interrupted attach has left; refuse any other graft."""
    located = image.locate()
    if located.state in BETWEEN:
        refuse_unfinished(image)
    if located.state is GraftState.CUT:
        image.detach(find_undo(image, located))
        located = image.locate()
    if located.state not in _FREE:
        raise UsageError(
            f"the image already carries a graft ({located.state.value})", file=image.path, hint="detach it first"
        )


def check_written(image: Image, record: Blob) -> Located:
    """Compare what a reader finds with what was written.

    Raises:
        FileError: when it differs.
        GraftFormatError: when a section does not match its digest.
    """
    located, found = image.locate(), image.locate().record
    if located.state is not GraftState.OK or found is None or found.sha256 != record.sha256:
        raise FileError(
            f"what was written reads back differently ({located.state.value}: {located.detail})",
            file=image.path,
            hint="check the disk; detach, then try again",
        )
    parsed = parse_record(found, file=image.path, offset=0)
    for section in parsed.sections:
        parsed.raw(section)  # compares the digests
    return located


def detach_image(path: str | Path, opening: Opening = PROBE) -> None:
    """Take the graft away and give the original file back, byte for byte.

    Raises:
        NoGraftError: when there is none.
        GraftFormatError: when what is needed for the way back is damaged.
        UsageError: when bytes of somebody else would be lost.
        FileError: when the image cannot be written, or is in use.
    """
    with open_image(path, opening, writable=True) as image:
        located = image.locate()
        kept = read_journal(image).state is GraftState.OK
        if kept and located.state in (*BETWEEN, GraftState.OK):
            remove_journal(image.path)  # first: it must not come back to life
        if located.state is GraftState.NONE:
            if image.recovered or kept:
                return  # an interrupted detach was just brought to its end
            raise NoGraftError("the image carries no graft", file=image.path)
        if located.state in _FOREIGN_SIDECAR:
            raise GraftFormatError(
                f"{located.state.value}: {located.detail}",
                file=image.path,
                offset=located.locator_offset,
                hint=f"detach would remove {sidecar_path(image.path).name} of another graft: move it away first",
            )
        image.detach(find_undo(image, located))
        if kept:
            remove_journal(image.path)


def find_undo(image: Image, located: Located) -> Undo:
    """Return UNDO from the record, or what the format can rebuild without it.

    Raises:
        GraftFormatError: when it is nowhere.
    """
    problem = located.detail
    if located.record is not None:
        try:
            file, offset = _record_place(image.path, located)
            return parse_record(located.record, file=file, offset=offset).undo()
        except GraftFormatError as error:
            problem = str(error)
    undo = image.recovery_undo()
    if undo is None and located.state is GraftState.ORPHANED:
        return Undo(file_size=0)
    if undo is None:
        raise GraftFormatError(
            f"the way back to the original is lost ({located.state.value}): {problem}",
            file=image.path,
            offset=located.locator_offset,
            field="undo",
            hint="restore the image from a copy",
        )
    return undo


def _record_place(image: Path, located: Located) -> tuple[Path, int]:
    """Return the file and offset of a record, for messages."""
    locator = located.locator
    if located.record_file is not None:
        return located.record_file, RECORD_OFFSET
    if locator is None:
        return image, 0
    if locator.placement is Placement.SIDECAR:
        return sidecar_path(image), RECORD_OFFSET
    if locator.record_offset == 0 and located.locator_offset is not None:
        # A container that implies the record's place has it right behind the locator.
        return image, located.locator_offset + LOCATOR_SIZE
    return image, locator.record_offset


def _name_of(path: Path) -> Path:
    """Resolve links, but keep one outside /dev that names a block device: a sidecar beside the node would not last."""
    real = _resolve(path)
    if path.is_symlink() and real.is_block_device():
        link = _resolve(path.parent) / path.name
        return real if Path("/dev") in link.parents else link
    return real


def _resolve(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else "too many symbolic links"
        raise FileError(f"the file cannot be opened: {reason}", file=path) from problem
    except ValueError as problem:
        raise FileError("the file name is not valid", file=str(path)) from problem
