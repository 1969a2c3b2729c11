"""Files of an extension, and what a host presents of them: the members ``files`` and ``supplements`` of a manifest.

An extension's files are one stream of bytes, one file after the other in the order of ``files``. In a record the
stream is cut into pieces of ``PIECE`` bytes, the last one shorter; each piece is a FILES section and a subject of the
statement (docs/format.md, "FILES"). The schema ``manifest`` says what the members look like; here is what a schema
cannot say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike, fspath
from typing import Any, Final

from vmgraft.errors import VmgraftError

#: Most files of an extension (schema ``manifest``, ``files``).
MAX_FILES: Final = 1024
#: Bytes of a full piece; a section of a record holds no more (docs/format.md).
PIECE: Final = 64 << 20
#: Most bytes of all files of an extension together: four pieces.
MAX_FILES_BYTES: Final = 256 << 20
#: Kinds of supplements; each is a capability ``supplement:KIND`` too.
KINDS: Final = ("iso", "initrd", "blocks")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as a manifest lists it.

    Attributes:
        path: Relative, with ``/``, in the portable characters of the schema.
        size: In bytes.
        sha256: Lower-case hex.
        executable: Whether it gets the execute permission where it is presented.
    """

    path: str
    size: int
    sha256: str
    executable: bool = False


@dataclass(frozen=True, slots=True)
class SupplementSpec:
    """One thing to present beside or over the image.

    Attributes:
        kind: ``iso``, ``initrd`` or ``blocks``.
        files: Pairs of the name as presented and the path in the extension, in order; for ``blocks`` the one file.
        label: Volume label of an ``iso``.
        offset: Byte offset in the guest's disk, for ``blocks``.
        drive: What an ``iso`` is to the guest: ``cdrom``, or ``disk`` for a read-only hard disk.
    """

    kind: str
    files: tuple[tuple[str, str], ...]
    label: str = ""
    offset: int = 0
    drive: str = "cdrom"

    @property
    def capability(self) -> str:
        """The capability that has to be granted for it."""
        return f"supplement:{self.kind}"


def piece_count(total: int) -> int:
    """Return how many pieces a stream of so many bytes has; none where there are no bytes."""
    return -(-total // PIECE)


def cut(stream: bytes) -> tuple[bytes, ...]:
    """Cut the bytes of all files into pieces."""
    return tuple(stream[start : start + PIECE] for start in range(0, len(stream), PIECE))


def file_entries(document: Mapping[str, Any]) -> tuple[FileEntry, ...]:
    """Return the files of a manifest that passed its schema."""
    return tuple(
        FileEntry(item["path"], item["size"], item["sha256"], item.get("executable", False))
        for item in document.get("files", ())
    )


def supplements_of(document: Mapping[str, Any]) -> tuple[SupplementSpec, ...]:
    """Return the supplements of a manifest that passed its schema and :func:`check_supplements`."""
    return tuple(_supplement(item) for item in document.get("supplements", ()))


def _supplement(item: Mapping[str, Any]) -> SupplementSpec:
    if item["kind"] == "blocks":
        return SupplementSpec("blocks", ((item["file"], item["file"]),), offset=item["offset"])
    root = item.get("root")
    start = 0 if root is None else len(root) + 1
    files = tuple((path[start:], path) for path in item["files"])
    return SupplementSpec(item["kind"], files, label=item.get("label", ""), drive=item.get("drive", "cdrom"))


def check_supplements(
    document: Mapping[str, Any],
    claims: Iterable[object],
    *,
    file: str | PathLike[str] | None,
    error: type[VmgraftError],
) -> None:
    """Check what the schema cannot say about ``files`` and ``supplements``.

    Args:
        document: A manifest that passed the schema.
        claims: Its capabilities.
        file: What to name in the error.
        error: Error class to raise.

    Raises:
        VmgraftError: (of class ``error``) too many bytes, a path twice or a file where another has its folder, a
            supplement of a file that is not listed or outside its root, one without its capability, two
            volumes of one label, or block overlays that overlap.
    """
    entries = {entry.path: entry for entry in file_entries(document)}
    for field, problem in _problems(document, entries, {str(claim) for claim in claims}):
        raise error(problem, file=None if file is None else fspath(file), field=field)


def _problems(
    document: Mapping[str, Any], entries: Mapping[str, FileEntry], claims: set[str]
) -> Iterator[tuple[str, str]]:
    """Yield (field, sentence) of what is wrong."""
    listed = document.get("files", ())
    if len(entries) != len(listed):
        yield "files", "a path stands twice"
    total = sum(entry.size for entry in entries.values())
    if total > MAX_FILES_BYTES:
        yield "files", f"all files together have {total} bytes, at most {MAX_FILES_BYTES} allowed"
    clash = _folder_clash(entries)
    if clash is not None:
        yield "files", f"{clash!r} is a file, and the folder of another"
    for index, item in enumerate(document.get("supplements", ())):
        field = f"supplements[{index}]"
        if f"supplement:{item['kind']}" not in claims:
            yield field, f"the capability supplement:{item['kind']} is not declared"
        yield from _item_problems(item, entries, field)
    labels = [item["label"] for item in document.get("supplements", ()) if item["kind"] == "iso"]
    if len(set(labels)) != len(labels):
        yield "supplements", "two volumes have the same label"
    overlap = overlap_of(supplements_of(document), {path: entry.size for path, entry in entries.items()})
    if overlap is not None:
        yield "supplements", f"two block overlays overlap at byte {overlap}"


def _folder_clash(paths: Iterable[str]) -> str | None:
    """Return a path that is both a file and the folder of another, or None."""
    known = set(paths)
    for path in known:
        steps = path.split("/")
        for depth in range(1, len(steps)):
            if "/".join(steps[:depth]) in known:
                return "/".join(steps[:depth])
    return None


def _item_problems(item: Mapping[str, Any], entries: Mapping[str, FileEntry], field: str) -> Iterator[tuple[str, str]]:
    if item["kind"] == "blocks":
        entry = entries.get(item["file"])
        if entry is None:
            yield f"{field}.file", f"{item['file']!r} is not among the files"
        elif entry.size == 0:
            yield f"{field}.file", f"{item['file']!r} is empty"
        return
    root = item.get("root")
    for path in item["files"]:
        if path not in entries:
            yield f"{field}.files", f"{path!r} is not among the files"
        elif root is not None and not path.startswith(root + "/"):
            yield f"{field}.files", f"{path!r} is not below the root {root!r}"


def overlap_of(supplements: Sequence[SupplementSpec], sizes: Mapping[str, int]) -> int | None:
    """Return the first byte of the disk that two block overlays want, or None; sizes are in bytes, by path."""
    spans = sorted(
        (item.offset, item.offset + sizes.get(item.files[0][1], 0)) for item in supplements if item.kind == "blocks"
    )
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            return start
    return None


def first_clash(documents: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
    """Say which two extensions lay bytes over the same place, or show volumes of one label; None where none do.

    Args:
        documents: Id and manifest of each extension, each manifest sound by itself.
    """
    spans: list[tuple[int, int, str]] = []
    labels: dict[str, str] = {}
    for owner, document in documents:
        sizes = {entry.path: entry.size for entry in file_entries(document)}
        for item in supplements_of(document):
            if item.kind == "blocks":
                spans.append((item.offset, item.offset + sizes[item.files[0][1]], owner))
            elif item.kind == "iso" and labels.setdefault(item.label, owner) != owner:
                return f"{labels[item.label]} and {owner} both show a volume labelled {item.label}"
    spans.sort()
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            return f"{one} and {other} both lay blocks over byte {start} of the disk"
    return None
