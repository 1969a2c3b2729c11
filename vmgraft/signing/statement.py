"""The in-toto Statement that gets signed: what is grafted, onto which guest content.

in-toto attestation framework v1, spec/v1/statement.md; the predicate is described in docs/signing.md. Integers are
decimal strings, since a protobuf ``Struct`` (which other verifiers parse into) holds doubles. No fact of a container is
in here, so a signature survives conversion.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from os import PathLike
from typing import Any

from vmgraft.errors import GraftFormatError, UsageError, VmgraftError
from vmgraft.schemas import strict_json, validate
from vmgraft.signing.capabilities import first_overlap
from vmgraft.signing.contract import ContentNames
from vmgraft.signing.manifest import Manifest, parse_manifest
from vmgraft.signing.supplements import MAX_FILES_BYTES, PIECE, first_clash
from vmgraft.signing.times import format_time, parse_time

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://vmgraft.dev/graft/v1"
FORMAT_VERSION = "1.0"
#: Subject that names the guest content by its flat SHA-256.
CONTENT_SUBJECT = "guest-content"
#: Largest statement accepted, in bytes; an envelope of 1 MiB holds no more.
MAX_STATEMENT = 1024 * 1024
#: Most unknown members named one by one.
MAX_UNKNOWN = 32
#: Most extensions in one statement.
MAX_EXTENSIONS = 64
#: Most pieces of files an extension has.
MAX_PIECES = MAX_FILES_BYTES // PIECE

_CRITICAL = ("binding", "extensions")
_PREDICATE = frozenset({"formatVersion", "critical", "binding", "image", "extensions", "created", "expires"})
_IMAGE = frozenset({"virtualSize", "sectorSize", "contentTree"})
_TREE = frozenset({"algorithm", "blockSize", "rootHash", "digest"})
_EXTENSION = frozenset({"id", "version", "securityVersion", "generation", "abi", "manifest"})
_SUBJECT = frozenset({"name", "digest"})


@dataclass(frozen=True, slots=True)
class ImageClaim:
    """The guest content a statement is bound to. Sizes in bytes, hashes 32 bytes."""

    virtual_size: int
    sector_size: int
    root_hash: bytes
    tree_digest: bytes


@dataclass(frozen=True, slots=True)
class ExtensionEntry:
    """One extension as the statement lists it; ``manifest``, ``module`` and ``files`` are subject names."""

    id: str
    version: str
    security_version: int
    generation: int
    abi: str
    manifest: str
    module: str | None
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Statement:
    """A well-formed statement; whether to believe it is the verifier's business.

    Attributes:
        document: The whole document, unknown members included.
        subjects: Digests by subject name: algorithm to lower-case hex.
        binding: ``image`` or ``any``.
        image: Set exactly when ``binding`` is ``image``.
        unknown: Paths of members and subjects this release does not act on.
    """

    document: dict[str, Any]
    subjects: Mapping[str, Mapping[str, str]]
    binding: str
    image: ImageClaim | None
    extensions: tuple[ExtensionEntry, ...]
    created: datetime
    expires: datetime | None
    unknown: tuple[str, ...]


def manifest_name(extension: str, version: str) -> str:
    """Return the subject name of a manifest."""
    return f"{extension}/{version}/manifest.json"


def module_name(extension: str, version: str) -> str:
    """Return the subject name of a module."""
    return f"{extension}/{version}/module.wasm"


def files_name(extension: str, version: str, piece: int) -> str:
    """Return the subject name of a piece of an extension's files, counted from 0."""
    return f"{extension}/{version}/files.{piece}"


# --- building ------------------------------------------------------------------------------------------------------


def build_statement(
    content: ContentNames | None,
    extensions: Sequence[tuple[bytes, bytes | None]],
    *,
    created: datetime,
    expires: datetime | None = None,
    binding: str = "image",
    sector_size: int = 512,
    files: Sequence[Sequence[bytes]] | None = None,
) -> bytes:
    """Return the bytes of a statement; the same input gives the same bytes.

    Args:
        content: Digests of the guest content; required for binding ``image``, not looked at for ``any``.
        extensions: Manifest bytes and module bytes (None where the manifest names no module) of each extension.
        created: When it is signed.
        expires: When it stops being valid; None for never.
        binding: ``image`` (this content only) or ``any``.
        sector_size: Bytes of a guest sector: 512, 2048 or 4096.
        files: The pieces of each extension's files (docs/format.md, "FILES"); None where no extension has any.

    Raises:
        UsageError: the parts do not make a statement.
    """
    if binding == "image" and content is None:
        raise UsageError("a statement bound to an image needs the content's digests", field="binding")
    manifests = [parse_manifest(data, error=UsageError) for data, _ in extensions]
    pieces = [()] * len(extensions) if files is None else files
    _check_parts(manifests, [module for _, module in extensions], pieces)
    predicate: dict[str, Any] = {
        "formatVersion": FORMAT_VERSION,
        "critical": list(_CRITICAL),
        "binding": binding,
        "extensions": [_entry(manifest) for manifest in manifests],
        "created": format_time(created),
    }
    if expires is not None:
        predicate["expires"] = format_time(expires)
    subjects: list[dict[str, Any]] = []
    if binding == "image" and content is not None:
        predicate["image"] = _image(content, sector_size)
        if content.flat is not None:
            subjects.append({"name": CONTENT_SUBJECT, "digest": {"sha256": content.flat.hex()}})
    for manifest, (data, module), parts in zip(manifests, extensions, pieces, strict=True):
        subjects.append(_subject(manifest_name(manifest.id, manifest.version), data))
        if module is not None:
            subjects.append(_subject(module_name(manifest.id, manifest.version), module))
        for index, piece in enumerate(parts):
            subjects.append(_subject(files_name(manifest.id, manifest.version, index), piece))
    document = {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": predicate,
    }
    data = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    parse_statement(data, error=UsageError)
    return data


def _check_parts(
    manifests: Sequence[Manifest], modules: Sequence[bytes | None], files: Sequence[Sequence[bytes]]
) -> None:
    for manifest, module in zip(manifests, modules, strict=True):
        if (manifest.module is None) != (module is None):
            what = "names a module and none was given" if module is None else "names no module and one was given"
            raise UsageError(f"the manifest of {manifest.id} {what}", field="module")
    for manifest, pieces in zip(manifests, files, strict=True):
        listed, given = sum(entry.size for entry in manifest.files), sum(map(len, pieces))
        if listed != given:
            message = f"the manifest of {manifest.id} lists {listed} bytes of files, and {given} are given"
            raise UsageError(message, field="files")
    overlay = first_clash([(manifest.id, manifest.document) for manifest in manifests])
    if overlay is not None:
        raise UsageError(overlay, field="supplements")
    owners = [manifest.id for manifest in manifests for _ in manifest.capabilities]
    claims = [claim for manifest in manifests for claim in manifest.capabilities]
    clash = first_overlap(claims)
    if clash is not None:
        one, other = clash
        pair = f"{claims[one]} of {owners[one]} and {claims[other]} of {owners[other]}"
        raise UsageError(f"two claims overlap: {pair}", field="capabilities")


def _entry(manifest: Manifest) -> dict[str, str]:
    return {
        "id": manifest.id,
        "version": manifest.version,
        "securityVersion": str(manifest.security_version),
        "generation": str(manifest.generation),
        "abi": manifest.abi,
        "manifest": manifest_name(manifest.id, manifest.version),
    }


def _image(content: ContentNames, sector_size: int) -> dict[str, Any]:
    return {
        "virtualSize": str(content.virtual_size),
        "sectorSize": str(sector_size),
        "contentTree": {
            "algorithm": "fs-verity-sha256",
            "blockSize": "65536",
            "rootHash": content.root_hash.hex(),
            "digest": content.tree_digest.hex(),
        },
    }


def _subject(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": hashlib.sha256(data).hexdigest()}}


# --- reading -------------------------------------------------------------------------------------------------------


def parse_statement(
    data: bytes, *, file: str | PathLike[str] | None = None, error: type[VmgraftError] = GraftFormatError
) -> Statement:
    """Parse a statement.

    Args:
        data: UTF-8 JSON, at most 1 MiB: the payload of an envelope, as it was verified.
        file: What to name in the error.
        error: Error class to raise.

    Raises:
        VmgraftError: (of class ``error``) malformed, contradicting itself, or with a ``critical`` name unknown here.
    """
    document = strict_json(data, file=file, error=error, max_bytes=MAX_STATEMENT)
    validate("statement", document, file=file, error=error)
    predicate = document["predicate"]

    def refuse(message: str, field: str, hint: str | None = None) -> VmgraftError:
        return error(message, file=file, field=field, hint=hint)

    for name in predicate["critical"]:
        if name not in _PREDICATE:
            hint = "a newer vmgraft may understand it"
            raise refuse(f"{name!r} must be understood and is not", "predicate.critical", hint)
        if name not in predicate:
            raise refuse(f"{name!r} is critical and missing", "predicate.critical")
    subjects: dict[str, dict[str, str]] = {}
    for subject in document["subject"]:
        if subject["name"] in subjects:
            raise refuse(f"the subject {subject['name']!r} stands twice", "subject")
        subjects[subject["name"]] = subject["digest"]
    image = _read_image(predicate, subjects, refuse)
    extensions = _read_extensions(predicate["extensions"], subjects, refuse)
    created = parse_time(predicate["created"], file=file, field="predicate.created", error=error)
    expires = None
    if "expires" in predicate:
        expires = parse_time(predicate["expires"], file=file, field="predicate.expires", error=error)
        if expires <= created:
            raise refuse("it expires before it was created", "predicate.expires")
    unknown = _unknown_members(document, extensions)
    return Statement(document, subjects, predicate["binding"], image, extensions, created, expires, unknown)


def _read_image(predicate: Mapping[str, Any], subjects: Mapping[str, Any], refuse: Any) -> ImageClaim | None:
    bound = predicate["binding"] == "image"
    if bound != ("image" in predicate):
        raise refuse("present exactly when the binding is 'image'", "predicate.image")
    if CONTENT_SUBJECT in subjects and (not bound or "sha256" not in subjects[CONTENT_SUBJECT]):
        raise refuse(f"{CONTENT_SUBJECT!r} needs the binding 'image' and a sha256", "subject")
    if not bound:
        return None
    image = predicate["image"]
    return ImageClaim(
        int(image["virtualSize"]),
        int(image["sectorSize"]),
        bytes.fromhex(image["contentTree"]["rootHash"]),
        bytes.fromhex(image["contentTree"]["digest"]),
    )


def _read_extensions(entries: Sequence[Any], subjects: Mapping[str, Any], refuse: Any) -> tuple[ExtensionEntry, ...]:
    found: dict[str, ExtensionEntry] = {}
    for index, entry in enumerate(entries):
        field = f"predicate.extensions[{index}]"
        if entry["id"] in found:
            raise refuse(f"the extension {entry['id']} is listed twice", field)
        manifest, module = manifest_name(entry["id"], entry["version"]), module_name(entry["id"], entry["version"])
        if entry["manifest"] != manifest:
            raise refuse(f"must be {manifest!r}", f"{field}.manifest")
        if "sha256" not in subjects.get(manifest, {}):
            raise refuse(f"no subject {manifest!r} with a sha256", field)
        has_module = module in subjects
        if has_module and "sha256" not in subjects[module]:
            raise refuse(f"the subject {module!r} has no sha256", field)
        found[entry["id"]] = ExtensionEntry(
            entry["id"],
            entry["version"],
            int(entry["securityVersion"]),
            int(entry["generation"]),
            entry["abi"],
            manifest,
            module if has_module else None,
            _read_pieces(entry, subjects, refuse),
        )
    return tuple(found.values())


def _read_pieces(entry: Mapping[str, Any], subjects: Mapping[str, Any], refuse: Any) -> tuple[str, ...]:
    """Return the subjects that are pieces of an extension's files: those numbered from 0 on without a gap."""
    names = []
    for piece in range(MAX_PIECES):
        name = files_name(entry["id"], entry["version"], piece)
        if name not in subjects:
            break
        if "sha256" not in subjects[name]:
            raise refuse(f"the subject {name!r} has no sha256", "subject")
        names.append(name)
    return tuple(names)


def _unknown_members(document: Mapping[str, Any], extensions: Sequence[ExtensionEntry]) -> tuple[str, ...]:
    predicate = document["predicate"]
    paths = [f"predicate.{name}" for name in sorted(predicate.keys() - _PREDICATE)]
    image = predicate.get("image", {})
    paths += [f"predicate.image.{name}" for name in sorted(image.keys() - _IMAGE)]
    paths += [f"predicate.image.contentTree.{name}" for name in sorted(image.get("contentTree", {}).keys() - _TREE)]
    for index, entry in enumerate(predicate["extensions"]):
        paths += [f"predicate.extensions[{index}].{name}" for name in sorted(entry.keys() - _EXTENSION)]
    known = {CONTENT_SUBJECT} | {entry.manifest for entry in extensions} | {entry.module for entry in extensions}
    known |= {name for entry in extensions for name in entry.files}
    for index, subject in enumerate(document["subject"]):
        paths += [f"subject[{index}].{name}" for name in sorted(subject.keys() - _SUBJECT)]
        if subject["name"] not in known:
            paths.append(f"subject {subject['name']}")
    if len(paths) > MAX_UNKNOWN:
        paths = [*paths[:MAX_UNKNOWN], f"and {len(paths) - MAX_UNKNOWN} more"]
    return tuple(path[:160].encode("unicode_escape").decode("ascii") for path in paths)
