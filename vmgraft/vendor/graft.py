"""Attach and detach: digest, sign, write, and verify what was written before saying so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vmgraft import __version__
from vmgraft.errors import FileError, UsageError, VerificationError, VmgraftError
from vmgraft.imagefmt.contract import PROBE, ContentDigest, GraftState, Located, Opening, Placement, Progress
from vmgraft.imagefmt.graft import attach_sections, detach_image, open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.imagefmt.tree import digest_content
from vmgraft.signing.dsse import PAYLOAD_TYPE, Envelope, Signature, pae, serialise
from vmgraft.signing.manifest import parse_manifest
from vmgraft.signing.report import deciding_check
from vmgraft.signing.statement import build_statement
from vmgraft.signing.verify import self_check
from vmgraft.vendor.pack import Package
from vmgraft.vendor.workcopy import work_copy

if TYPE_CHECKING:
    from vmgraft.imagefmt.tree import FlatMode
    from vmgraft.signing.keys import PrivateKey


@dataclass(frozen=True, slots=True)
class AttachOptions:
    """How to attach.

    Attributes:
        output: Write a grafted copy here and leave the image alone; None grafts in place.
        binding: ``image`` (this content only) or ``any`` (a portable extension).
        flat: When to sign the flat SHA-256 beside the content tree: ``auto``, ``always``, ``never``.
        expires: End of validity, or None.
        opening: How to open the image.
    """

    output: Path | None = None
    binding: str = "image"
    placement: Placement = Placement.AUTO
    flat: FlatMode = "auto"
    expires: datetime | None = None
    opening: Opening = PROBE


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
    keys: Sequence[PrivateKey],
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
    now = datetime.now(UTC)
    _preflight(packages, keys, options, now)
    with _target(image, options) as target:
        content, sector_size = _digest(target, options, progress)
        statement = build_statement(
            content if options.binding == "image" else None,
            [(package.manifest, package.module) for package in packages],
            created=now,
            expires=options.expires,
            binding=options.binding,
            sector_size=sector_size,
        )
        located = _write(target, packages, _sign(statement, keys), content, options)
        with _taken_back_on_failure(target, options):
            _verify_written(target, keys, options)
    return Attached(options.output or image, located, _sha256(statement), content, tuple(key.keyid for key in keys))


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
    """Refuse to detach only some of the extensions that a statement covers.

    Raises:
        UsageError: when the ids are not exactly those of the image.
    """
    with open_image(image, opening) as opened:
        carried = {parse_manifest(data, file=image).id for data in open_graft(opened).manifests()}
    if set(ids) != carried:
        raise UsageError(
            f"the image carries {', '.join(sorted(carried))}, and one statement covers all of it",
            file=image,
            hint="detach without ids, then attach those that should stay",
        )


def _preflight(packages: Sequence[Package], keys: Sequence[PrivateKey], options: AttachOptions, now: datetime) -> None:
    """Refuse what can never be signed, before any long work is done."""
    if not packages or not keys:
        raise UsageError("attach needs at least one extension and one key")
    ids = [package.id for package in packages]
    twice = next((item for item in ids if ids.count(item) > 1), None)
    if twice is not None:
        raise UsageError(f"the extension {twice} is given twice", field="extensions", hint="an id stands for one")
    if len({key.keyid for key in keys}) != len(keys):
        raise UsageError("the same key is given twice", field="key", hint="name each key once")
    if options.expires is not None and options.expires <= now:
        raise UsageError("the end of validity lies in the past", field="expires", hint="name a later time, in UTC")
    parts = [(package.manifest, package.module) for package in packages]
    build_statement(None, parts, created=now, expires=options.expires, binding="any")


@contextmanager
def _target(image: Path, options: AttachOptions) -> Iterator[Path]:
    """Yield the file to graft: the image itself, or a fresh copy that goes away when something fails."""
    _refuse_grafted(image, options)
    if options.output is None:
        yield image
        return
    with work_copy(image, options.output) as work:
        yield work


@contextmanager
def _taken_back_on_failure(target: Path, options: AttachOptions) -> Iterator[None]:
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
        first = str(error) or type(error).__name__
        raise FileError(
            f"{first}; and the graft could not be taken away again: {second.message}",
            file=target,
            hint=f"run `vmgraft detach` on it{'; ' + second.hint if second.hint else ''}",
        ) from error


def _refuse_grafted(image: Path, options: AttachOptions) -> None:
    """Refuse an image that carries a graft before any long work is done; the leavings of one are written over."""
    with open_image(image, options.opening) as opened:
        state = opened.locate().state
    if state not in (GraftState.NONE, GraftState.ORPHANED):
        raise UsageError(
            f"the image carries a graft already (state: {state.value})",
            file=image,
            hint="detach first; one statement covers all extensions of an image, so attach them together",
        )


def _digest(path: Path, options: AttachOptions, progress: Progress | None) -> tuple[ContentDigest, int]:
    """Read the guest content once; return its digests and the size of a sector."""
    with open_image(path, options.opening) as image:
        return digest_content(image, flat=options.flat, progress=progress), image.sector_size


def _sign(statement: bytes, keys: Sequence[PrivateKey]) -> bytes:
    """Return the envelope, one signature a key."""
    message = pae(PAYLOAD_TYPE, statement)
    return serialise(Envelope(statement, tuple(Signature(key.keyid, key.sign(message)) for key in keys)))


def _write(
    path: Path, packages: Sequence[Package], envelope: bytes, content: ContentDigest, options: AttachOptions
) -> Located:
    """Lay out the sections and attach them."""
    sections = [Section(SectionKind.ENVELOPE, envelope, compress=True)]
    for package in packages:
        sections.append(Section(SectionKind.MANIFEST, package.manifest, compress=True))
        if package.module is not None:
            sections.append(Section(SectionKind.MODULE, package.module, compress=True))
    hints = {"tool": f"vmgraft {__version__}", "attached": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    sections.append(Section(SectionKind.HINTS, json.dumps(hints, sort_keys=True).encode(), critical=False))
    return attach_sections(
        path, sections, placement=options.placement, tree_digest=content.tree_digest, opening=options.opening
    )


def _verify_written(path: Path, keys: Sequence[PrivateKey], options: AttachOptions) -> None:
    """Open the image anew and verify signatures, payloads and content.

    Raises:
        VerificationError: when what was written is not what was signed (a bug, or the file changed meanwhile).
    """
    with open_image(path, options.opening) as image:
        report = self_check(open_graft(image), [key.public for key in keys], now=datetime.now(UTC))
    if not report.ok:
        failed = deciding_check(report)
        why = "a check was not made" if failed is None else f"{failed.name}: {failed.detail}"
        raise VerificationError(
            f"what was written does not verify ({why}); the graft was taken away again",
            file=path,
            hint="was the image in use while it was grafted?",
        )


def _sha256(data: bytes) -> str:
    """Return the lowercase hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()
