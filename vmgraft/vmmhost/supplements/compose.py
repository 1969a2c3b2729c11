"""One volume out of several images: each is verified against the policy, and read block by block as verified.

A layer is an image. Its files are those of the ISO 9660 volume that it contains, if it does, with the ISO supplements
of its extensions laid over. The layers themselves are laid over one another as ``union`` says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from vmgraft import errors
from vmgraft.errors import CapabilityError, FileError, UnsupportedError, UsageError, VerificationError, VmgraftError
from vmgraft.imagefmt.blob import Blob
from vmgraft.imagefmt.contract import PROBE, Opening
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.signing.contract import Report
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.memory import Memory
from vmgraft.signing.policy import Policy
from vmgraft.signing.report import deciding_check
from vmgraft.signing.supplements import supplements_of
from vmgraft.signing.verify import verify_evidence
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.drives import Drive, DriveKind
from vmgraft.vmmhost.supplements.iso import Node, build_volume
from vmgraft.vmmhost.supplements.isotree import has_volume, read_tree
from vmgraft.vmmhost.supplements.media import ReadOnlyDisk
from vmgraft.vmmhost.supplements.present import EPOCH, created_of, signed_tree
from vmgraft.vmmhost.supplements.union import merge

#: Most images that one volume is made of.
MAX_LAYERS: Final = 32
#: Label of a volume that was given none.
LABEL: Final = "UNION"
_FAMILIES: Final[dict[str, type[VmgraftError]]] = {
    item.code: item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, VmgraftError)
}


@dataclass(frozen=True, slots=True)
class Shown:
    """What a host may remember of a layer that it shows to a guest.

    Attributes:
        verdict: The verification that accepted the layer.
        extensions: Ids of the extensions of which files are shown.
        statement_sha256: SHA-256 of the signed statement, in hex.
    """

    verdict: Report
    extensions: frozenset[str]
    statement_sha256: str


@dataclass(frozen=True, slots=True)
class Composed:
    """A volume, and what it was made of.

    Attributes:
        volume: Its bytes; the images may be closed.
        label: Its label.
        layers: For each layer ``image``, ``contentTree``, ``signers`` and ``entries``, the lowest first.
        entries: Files, links and folders in it.
        shown: For each layer, what a host that shows the volume may remember.
    """

    volume: Blob
    label: str
    layers: tuple[dict[str, Any], ...]
    entries: int
    shown: tuple[Shown, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what a launch plan shows of it."""
        return {
            "label": self.label,
            "size": self.volume.size,
            "sha256": self.volume.sha256.hex(),
            "layers": list(self.layers),
        }

    def drive(self) -> Drive:
        """Return the volume as a drive of a machine."""
        return Drive(ReadOnlyDisk(self.volume), DriveKind.CDROM, read_only=True, name=self.label)


def compose(
    images: Sequence[Path],
    policy: Policy,
    *,
    label: str = LABEL,
    opening: Opening = PROBE,
    memory: Memory | None = None,
) -> Composed:
    """Verify images and make one read-only volume of their files; equal images give equal volumes.

    Args:
        images: The layers, the lowest first.
        policy: Every one of them must satisfy it.
        label: Volume label.
        opening: How to open the images.
        memory: The highest security versions that were accepted before, where a host keeps them. It is only read.

    Raises:
        UsageError: no layer, too many, or too much for a volume.
        NoGraftError: a layer carries no graft.
        VerificationError: a layer does not satisfy the policy; of the class that ``verify`` would name.
        MalformedImageError: a file system or a whiteout is malformed.
        UnsupportedError: a layer holds no files that can be read.
        ContentMismatchError, FileError: what reading raises.
    """
    if not 1 <= len(images) <= MAX_LAYERS:
        raise UsageError(f"{len(images)} layers, 1 to {MAX_LAYERS} can be composed", field="layer")
    with ExitStack() as stack:
        layers = [_open(path, policy, opening, stack, memory) for path in images]
        tree = merge([(str(layer.path), part) for layer in layers for part in layer.trees])
        created = max(layer.created for layer in layers)
        volume = build_volume(label, tree, created=created)
    return Composed(
        volume, label, tuple(layer.facts for layer in layers), len(tree), tuple(layer.shown for layer in layers)
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    path: Path
    trees: tuple[dict[str, Node], ...]
    created: datetime
    facts: dict[str, Any]
    shown: Shown


def _open(path: Path, policy: Policy, opening: Opening, stack: ExitStack, memory: Memory | None) -> _Layer:
    """Verify an image and read what is in it; it stays open."""
    image = stack.enter_context(open_image(path, opening))
    graft = open_graft(image)
    report = verify_evidence(graft, policy, image_name=path.name, now=datetime.now(UTC), memory=memory)
    if not report.ok:
        raise _refusal(report, path)
    trees = _trees(graft, report, path)
    entries = sum(len(tree) for tree in trees)
    tree_digest = "" if graft.tree is None else graft.tree.tree_digest.hex()
    facts = {"image": str(path), "contentTree": tree_digest, "signers": list(report.signers), "entries": entries}
    sources = {extension.id for extension in report.extensions if "iso" in _kinds(extension.manifest)}
    statement = hashlib.sha256(parse_envelope(graft.envelopes()[0]).payload).hexdigest()
    created = created_of(report.statement) if report.statement else EPOCH
    return _Layer(path, trees, created, facts, Shown(report, frozenset(sources), statement))


def _kinds(manifest: dict[str, Any]) -> set[str]:
    return {item.kind for item in supplements_of(manifest)}


def _refusal(report: Report, path: Path) -> VmgraftError:
    """Return the error that a failed verification amounts to."""
    failed = deciding_check(report)
    family = _FAMILIES.get(report.error or "", VerificationError)
    what = "it could not be verified" if failed is None else f"{failed.name}: {failed.detail}"
    return family(f"the layer is refused: {what}", file=path, hint=None if failed is None else failed.hint)


def _trees(graft: Graft, report: Report, path: Path) -> tuple[dict[str, Node], ...]:
    """Return the file trees of a verified image, the lowest first."""
    trees: list[dict[str, Node]] = []
    if graft.tree is None:
        graft.content(flat=False)
    if graft.image.is_disk and graft.tree is not None:
        disk = VerifiedDisk(graft.image, graft.tree.check)
        if has_volume(disk):
            trees.append(read_tree(disk, name=str(path)))
    for extension in report.extensions:
        for item in supplements_of(extension.manifest):
            if item.kind != "iso":
                continue
            if item.capability not in extension.capabilities:
                message = f"{extension.id} has a supplement of kind iso, which the policy does not grant"
                raise CapabilityError(message, file=path, field=item.capability)
            trees.append(dict(signed_tree(extension, item)))
    if not trees:
        raise UnsupportedError(
            "the layer holds no ISO 9660 volume, and no extension adds one",
            file=path,
            hint="layers are ISO images, or images with a supplement of kind iso",
        )
    return tuple(trees)


def write_volume(composed: Composed, path: Path) -> None:
    """Write a composed volume to a file that must not exist; nothing is left behind when that fails.

    Raises:
        FileError: it exists, or cannot be written.
    """
    try:
        with path.open("xb") as file:
            try:
                for chunk in composed.volume.chunks():
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except FileExistsError as error:
        hint = "files are never overwritten; choose another name"
        raise FileError("the volume cannot be written: the file exists already", file=path, hint=hint) from error
    except OSError as error:
        raise FileError(f"the volume cannot be written: {error.strerror}", file=path) from error
