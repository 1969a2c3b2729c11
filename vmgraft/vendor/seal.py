"""Signing a set of extensions, laying it out as sections, and verifying what was written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vmgraft import __version__
from vmgraft.errors import NoRoomError, UsageError, VerificationError
from vmgraft.imagefmt.assemble import build_record
from vmgraft.imagefmt.contract import ContentDigest, GraftState, Opening
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.imagefmt.record import Section, SectionKind
from vmgraft.signing.dsse import MAX_SIGNATURES, PAYLOAD_TYPE, Envelope, Signature, pae, serialise
from vmgraft.signing.material import Material, pack_material
from vmgraft.signing.report import deciding_check
from vmgraft.signing.signers import make_signature
from vmgraft.signing.statement import MAX_EXTENSIONS, build_statement
from vmgraft.signing.verify import self_check

if TYPE_CHECKING:
    from vmgraft.signing.signers import Signer
    from vmgraft.vendor.pack import Package


@dataclass(frozen=True, slots=True)
class Terms:
    """What a statement says beside content and extensions.

    Attributes:
        binding: ``image`` (this content only) or ``any`` (a portable graft).
        expires: End of validity, or None.
    """

    binding: str
    expires: datetime | None


def preflight(packages: Sequence[Package], keys: Sequence[Signer], terms: Terms, now: datetime) -> None:
    """Refuse what can never be signed, before any long work is done.

    Raises:
        UsageError: no extension or key, too many, the same one twice, two claims that overlap, or an end in the past.
    """
    if not packages or not keys:
        raise UsageError("a graft needs at least one extension and one key")
    if len(keys) > MAX_SIGNATURES:
        raise UsageError(f"{len(keys)} keys, at most {MAX_SIGNATURES} signatures allowed", field="key")
    if len({key.keyid for key in keys}) != len(keys):
        raise UsageError("the same key is given twice", field="key", hint="name each key once")
    check_terms(packages, terms, now)


def check_terms(packages: Sequence[Package], terms: Terms, now: datetime) -> None:
    """Refuse a statement that can never be made, whoever is to sign it.

    Raises:
        UsageError: no extension, too many, the same one twice, two claims that overlap, or an end in the past.
    """
    if not packages:
        raise UsageError("a graft needs at least one extension")
    if len(packages) > MAX_EXTENSIONS:
        raise UsageError(
            f"{len(packages)} extensions, at most {MAX_EXTENSIONS} allowed in an image",
            field="extensions",
            hint="put several functions into one extension",
        )
    ids = [package.id for package in packages]
    twice = next((item for item in ids if ids.count(item) > 1), None)
    if twice is not None:
        raise UsageError(f"the extension {twice} is given twice", field="extensions", hint="an id stands for one")
    if terms.expires is not None and terms.expires <= now:
        raise UsageError("the end of validity lies in the past", field="expires", hint="name a later time, in UTC")
    parts = [(package.manifest, package.module) for package in packages]
    files = [package.files for package in packages]
    build_statement(None, parts, created=now, expires=terms.expires, binding="any", files=files)


def check_room(image: Path, packages: Sequence[Package], keys: Sequence[Signer], opening: Opening) -> None:
    """Refuse what can never fit inline, before the content is read. Signatures are not made for it, so it guesses low.

    Raises:
        NoRoomError: the record is longer than the image's room.
    """
    parts = [(package.manifest, package.module) for package in packages]
    files = [package.files for package in packages]
    statement = build_statement(None, parts, created=datetime.now(UTC), binding="any", files=files)
    envelope = serialise(Envelope(statement, tuple(_without_signature(key) for key in keys)))
    least = len(build_record(lay_out(packages, envelope)))
    with open_image(image, opening) as opened:
        located, room = opened.locate(), opened.room()
    clean = located.state is GraftState.NONE and not located.detail  # attach clears leavings away first
    if clean and least > room.inline:
        free = f"{room.inline} bytes are free ({room.reason})"
        raise NoRoomError(
            f"a record of {least} bytes or more does not fit inline, where {free}",
            file=image,
            hint="use --placement sidecar",
        )


def _without_signature(key: Signer) -> Signature:
    return Signature(key.keyid, bytes(1), pack_material(Material(tuple(key.certificates))))


def make_statement(
    packages: Sequence[Package], content: ContentDigest, terms: Terms, *, created: datetime, sector_size: int
) -> bytes:
    """Return the bytes to be signed; the order of the packages is the order in which a host loads them."""
    return build_statement(
        content if terms.binding == "image" else None,
        [(package.manifest, package.module) for package in packages],
        created=created,
        expires=terms.expires,
        binding=terms.binding,
        sector_size=sector_size,
        files=[package.files for package in packages],
    )


def sign(statement: bytes, keys: Sequence[Signer]) -> bytes:
    """Return the envelope, one signature a key, each with the certificates of its signer.

    Raises:
        VmgraftError: a key cannot sign, or its signature does not verify.
    """
    message = pae(PAYLOAD_TYPE, statement)
    return serialise(Envelope(statement, tuple(make_signature(key, message) for key in keys)))


def lay_out(packages: Sequence[Package], envelope: bytes) -> list[Section]:
    """Return the sections of a record."""
    sections = [Section(SectionKind.ENVELOPE, envelope, compress=True)]
    for package in packages:
        sections.append(Section(SectionKind.MANIFEST, package.manifest, compress=True))
        if package.module is not None:
            sections.append(Section(SectionKind.MODULE, package.module, compress=True))
        sections.extend(Section(SectionKind.FILES, piece, compress=True) for piece in package.files)
    hints = {"tool": f"vmgraft {__version__}", "attached": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    sections.append(Section(SectionKind.HINTS, json.dumps(hints, sort_keys=True).encode(), critical=False))
    return sections


def verify_written(path: Path, keys: Sequence[Signer], opening: Opening) -> None:
    """Open the image anew and verify signatures, payloads and content.

    Raises:
        VerificationError: when what was written is not what was signed (a bug, or the file changed meanwhile).
    """
    with open_image(path, opening) as image:
        report = self_check(open_graft(image), [key.public for key in keys], now=datetime.now(UTC))
    if not report.ok:
        failed = deciding_check(report)
        why = "a check was not made" if failed is None else f"{failed.name}: {failed.detail}"
        raise VerificationError(
            f"what was written does not verify ({why}); the image is as it was before",
            file=path,
            hint="was the image in use while it was grafted?",
        )
