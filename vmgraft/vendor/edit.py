"""Changing the extensions of a grafted image: add, replace, remove. One statement covers all, so it is signed anew.

Before a key signs extensions that were there already, the old graft must be intact: the record sound, the old envelope
signed by a key that the caller trusts, every payload and the content as signed. Then nothing gets a new signature that
did not have a trusted one before. The steps are numbered, and the same numbers stand in the code:

1. an interrupted change of the graft is brought to its end
2. the old graft is sound, its envelope verifies under a trusted key, and its statement is in force
3. the new list of extensions is made, and refused if it could not be signed
4. the content is read once and compared with the old statement
5. the new statement is signed
6. the new graft takes the place of the old one (``imagefmt.replace``), is read back and verified
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from vmgraft.errors import RollbackError, UsageError
from vmgraft.imagefmt.contract import PROBE, ContentDigest, Opening, Placement, Progress
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.imagefmt.replace import finish_change, replace_sections
from vmgraft.imagefmt.tree import FLAT_AUTO_LIMIT
from vmgraft.imagefmt.treesection import kept_tree
from vmgraft.signing.manifest import parse_manifest
from vmgraft.signing.statement import CONTENT_SUBJECT
from vmgraft.vendor.graft import Attached
from vmgraft.vendor.inplace import editable, record_digest, same_placement
from vmgraft.vendor.oldgraft import OldGraft, check_content, read_old_graft
from vmgraft.vendor.pack import Package
from vmgraft.vendor.seal import Terms, lay_out, make_statement, preflight, sign, verify_written

if TYPE_CHECKING:
    from vmgraft.imagefmt.tree import FlatMode
    from vmgraft.signing.keys import PublicKey
    from vmgraft.signing.signers import Signer

#: From the extensions that are there to those that shall be there, both in load order.
Change = Callable[[Sequence[Package]], list[Package]]


@dataclass(frozen=True, slots=True)
class EditOptions:
    """How to edit. What is None stays as the old statement has it.

    Attributes:
        output: Write an edited copy here and leave the image alone; None edits in place.
        trust: Public keys, one of which must have signed the old statement; the signing keys count too.
        allow_downgrade: Let ``securityVersion`` and ``generation`` go down.
        placement: Where the record goes; None: a sidecar stays one, else inline where it fits.
        binding: ``image`` or ``any``.
        flat: When to sign the flat SHA-256: ``auto``, ``always``, ``never``.
        expires: End of validity. Needed when the old statement has expired.
        opening: How to open the image.
    """

    output: Path | None = None
    trust: tuple[PublicKey, ...] = ()
    allow_downgrade: bool = False
    placement: Placement | None = None
    binding: str | None = None
    flat: FlatMode | None = None
    expires: datetime | None = None
    opening: Opening = PROBE


@dataclass(frozen=True, slots=True)
class Edited:
    """What an edit did.

    Attributes:
        attached: The new graft.
        extensions: All extensions the image carries now, in load order.
        before: All extensions it carried before, in load order.
        dropped_signers: keyids of the old envelope that have not signed the new statement. They are what it claims;
            only one of them need have been checked.
    """

    attached: Attached
    extensions: tuple[Package, ...]
    before: tuple[Package, ...]
    dropped_signers: tuple[str, ...]


def add_extensions(
    image: Path,
    packages: Sequence[Package],
    keys: Sequence[Signer],
    options: EditOptions,
    progress: Progress | None = None,
) -> Edited:
    """Add extensions behind those that are there.

    Args:
        image: A grafted image.
        packages: The extensions, in the order the host will load them.
        keys: One signature each.
        options: Where, how, and whom to trust.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        UsageError: one is there already, or the new list cannot be signed.
        NoGraftError: the image carries none.
        GraftFormatError: the old graft is not intact.
        VerificationError: the old graft does not verify, or has expired.
        VmgraftError: see the formats; whatever fails, the image carries what it carried.
    """

    def change(old: Sequence[Package]) -> list[Package]:
        present = {package.id: package.version for package in old}
        for package in packages:
            if package.id in present:
                raise UsageError(
                    f"the image carries {package.id} {present[package.id]} already",
                    file=image,
                    field="extensions",
                    hint="--replace puts another version in its place",
                )
        return [*old, *packages]

    return _edit(image, change, keys, options, progress)


def replace_extensions(
    image: Path,
    packages: Sequence[Package],
    keys: Sequence[Signer],
    options: EditOptions,
    progress: Progress | None = None,
) -> Edited:
    """Put extensions in the place of those with their ids; an id that is not there yet is added at the end.

    Args:
        image: A grafted image.
        packages: The extensions; an id keeps its position.
        keys: One signature each.
        options: Where, how, and whom to trust.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        RollbackError: a security version or generation would go down.
        VmgraftError: as :func:`add_extensions`.
    """

    def change(old: Sequence[Package]) -> list[Package]:
        fresh = {package.id: package for package in packages}
        if len(fresh) != len(packages):
            raise UsageError("an extension is given twice", field="extensions", hint="an id stands for one")
        if not options.allow_downgrade:
            for package in old:
                _refuse_downgrade(package, fresh.get(package.id), image)
        return [*(fresh.pop(package.id, package) for package in old), *fresh.values()]

    return _edit(image, change, keys, options, progress)


def remove_extensions(
    image: Path,
    ids: Sequence[str],
    keys: Sequence[Signer],
    options: EditOptions,
    progress: Progress | None = None,
) -> Edited:
    """Take some extensions out; to take all of them is ``detach``.

    Args:
        image: A grafted image.
        ids: Ids of the extensions that go.
        keys: One signature each, over those that stay.
        options: Where, how, and whom to trust.
        progress: Called with (bytes, bytes in all) while the content is read.

    Raises:
        UsageError: an id is not there, or none would be left.
        VmgraftError: as :func:`add_extensions`.
    """

    def change(old: Sequence[Package]) -> list[Package]:
        carried = [package.id for package in old]
        missing = sorted(set(ids) - set(carried))
        if missing:
            raise UsageError(
                f"the image does not carry {', '.join(missing)}",
                file=image,
                field="extensions",
                hint=f"it carries {', '.join(carried)}",
            )
        left = [package for package in old if package.id not in ids]
        if not left:
            raise UsageError("no extension would be left", file=image, hint="detach without ids takes all away")
        return left

    return _edit(image, change, keys, options, progress)


def carried_versions(image: Path, opening: Opening = PROBE) -> dict[str, str]:
    """Return id and version of the extensions that an image claims to carry; nothing is verified.

    Raises:
        NoGraftError: the image carries no graft.
        GraftFormatError: a manifest cannot be read.
    """
    with open_image(image, opening) as opened:
        manifests = [parse_manifest(data, file=image) for data in open_graft(opened).manifests()]
    return {manifest.id: manifest.version for manifest in manifests}


def _refuse_downgrade(old: Package, new: Package | None, image: Path) -> None:
    """Refuse a lower security version or generation: hosts that know the higher one would not run the image."""
    if new is None:
        return
    there, here = parse_manifest(old.manifest), parse_manifest(new.manifest)
    numbers = (
        ("securityVersion", there.security_version, here.security_version),
        ("generation", there.generation, here.generation),
    )
    for name, before, after in numbers:
        if after < before:
            raise RollbackError(
                f"{new.id}: {name} would go down from {before} to {after}",
                file=image,
                field=name,
                hint="--allow-downgrade does it all the same",
            )


def _edit(
    image: Path, change: Change, keys: Sequence[Signer], options: EditOptions, progress: Progress | None
) -> Edited:
    if not keys:
        raise UsageError(
            "one statement covers all extensions, so an edit needs a key", field="key", hint="name a --key"
        )
    trusted = {key.public for key in keys} | set(options.trust)
    now = datetime.now(UTC)
    with editable(image, options.output) as target:
        finish_change(target, options.opening)  # 1
        with open_image(target, options.opening) as opened:
            graft = open_graft(opened, progress=progress)
            old = read_old_graft(graft, trusted, now=now, renewed=options.expires is not None)  # 2
            packages = change(old.packages)
            terms = Terms(options.binding or old.statement.binding, options.expires or old.statement.expires)
            preflight(packages, keys, terms, now)  # 3
            content = _content(graft, old, trusted, options, now)  # 4
            sector_size = opened.sector_size
            trees = kept_tree(graft) if terms.binding == "image" else ()
        statement = make_statement(packages, content, terms, created=now, sector_size=sector_size)  # 5
        located = replace_sections(  # 6
            target,
            [*lay_out(packages, sign(statement, keys)), *trees],
            old=record_digest(graft),
            placement=options.placement or same_placement(graft),
            tree_digest=content.tree_digest,
            check=lambda: verify_written(target, keys, options.opening),
            opening=options.opening,
        )
    keyids = tuple(key.keyid for key in keys)
    digest = hashlib.sha256(statement).hexdigest()
    attached = Attached(options.output or image, located, digest, content, keyids)
    gone = tuple(item for item in old.signers if item not in keyids)
    return Edited(attached, tuple(packages), tuple(old.packages), gone)


def _content(
    graft: Graft, old: OldGraft, trusted: set[PublicKey], options: EditOptions, now: datetime
) -> ContentDigest:
    """Read the content once, with the flat digest where the old statement or the new one has it, and compare."""
    had_flat = CONTENT_SUBJECT in old.statement.subjects
    small = graft.image.virtual_size <= FLAT_AUTO_LIMIT
    if options.flat is None and old.statement.image is not None:
        wanted = had_flat
    else:
        wanted = options.flat == "always" or (options.flat in (None, "auto") and small)
    content = graft.content(had_flat or wanted)
    check_content(graft, trusted, now)
    return content if wanted else dataclasses.replace(content, flat=None)
