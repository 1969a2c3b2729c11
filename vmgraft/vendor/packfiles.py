"""The further files of an extension: from its folder to the manifest's ``files`` and the bytes that are stored.

In ``manifest.toml`` an author writes paths only, and a folder stands for all that is in it. What gets signed lists
every file with size and SHA-256. Nothing is read through a symbolic link: an extension holds what lies in its folder.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from vmgraft.errors import FileError, UsageError
from vmgraft.schemas import validate
from vmgraft.signing.supplements import MAX_FILES, MAX_FILES_BYTES, PIECE

_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
#: Folders below each other that are followed; a path has fewer names than this (schema ``manifest``, ``path``).
_MAX_DEPTH: Final = 8


def pack_files(folder: Path, document: dict[str, Any], file: Path) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    """Return the manifest with every file listed, and the bytes of these files in pieces.

    Args:
        folder: The extension's folder.
        document: What ``manifest.toml`` says; it need not be valid.
        file: That file, for messages.

    Raises:
        UsageError: ``files`` or ``supplements`` are not lists of what they should hold, or name nothing.
        FileError: a file is missing, no regular file, behind a link, or too large.
    """
    if "files" not in document and "supplements" not in document:
        return document, ()
    wanted = _expand(folder, _paths(document.get("files", []), "files", file))
    supplements = []
    for index, item in enumerate(_supplements(document, file)):
        complete = _complete(folder, item, f"supplements[{index}]", file)
        wanted += complete.get("files", [complete["file"]] if isinstance(complete.get("file"), str) else [])
        supplements.append(complete)
    paths = list(dict.fromkeys(wanted))
    result = {key: value for key, value in document.items() if key not in ("files", "supplements")}
    if supplements:
        result["supplements"] = supplements
    if len(paths) > MAX_FILES:
        raise UsageError(f"{len(paths)} files, at most {MAX_FILES} allowed", file=file, field="files")
    if not paths:
        raise UsageError("no file is named", file=file, field="files", hint="leave it out, or name files or folders")
    _check_names(paths, file)
    result["files"], pieces = _read_all(folder, paths)
    return result, pieces


def _paths(value: Any, field: str, file: Path) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        hint = 'for example ["user-data", "conf"]; sizes and digests are filled in'
        raise UsageError("must be a list of paths of files or folders", file=file, field=field, hint=hint)
    return value


def _supplements(document: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    value = document.get("supplements", [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UsageError("must be a list of tables: [[supplements]]", file=file, field="supplements")
    return value


def _complete(folder: Path, item: dict[str, Any], field: str, file: Path) -> dict[str, Any]:
    """Return a supplement with its files listed one by one; without ``files`` it has all below its ``root``."""
    if "file" in item and "files" not in item:
        return dict(item)
    root = item.get("root")
    if isinstance(root, str):
        root = root.rstrip("/")
        named = _paths(item.get("files", [root]), f"{field}.files", file)
    else:
        named = _paths(item.get("files", []), f"{field}.files", file)
    return {**item, **({} if root is None else {"root": root}), "files": _expand(folder, named)}


def _expand(folder: Path, paths: Sequence[str]) -> list[str]:
    """Return the paths with every folder replaced by the files in it, in the order of their names."""
    found: list[str] = []
    for path in paths:
        clean = path.rstrip("/") if path != "/" else path
        target = folder / clean
        if _is_folder(target) and not clean.startswith("/") and ".." not in clean.split("/"):
            found += [f"{clean}/{name}" for name in _below(target, 1)] if clean != "." else list(_below(target, 1))
        else:
            found.append(clean)
    return list(dict.fromkeys(found))


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return False


def _below(folder: Path, depth: int) -> Iterator[str]:
    """Yield the paths of all files below a folder, relative to it; a link or device is named and refused later."""
    if depth > _MAX_DEPTH:
        raise FileError(f"folders in more than {_MAX_DEPTH} levels", file=folder, field="files")
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise FileError(f"the folder cannot be read: {error.strerror}", file=folder, field="files") from error
    for name in names:
        if _is_folder(folder / name):
            yield from (f"{name}/{rest}" for rest in _below(folder / name, depth + 1))
        else:
            yield name


def _check_names(paths: Sequence[str], file: Path) -> None:
    """Refuse names that the schema does, before anything is read by them: ``..``, absolute ones, odd characters."""
    entries = [{"path": path, "size": 0, "sha256": "0" * 64} for path in paths]
    probe = {"id": "a.b", "version": "0", "securityVersion": 0, "abi": "vmgraft/1", "files": entries}
    try:
        validate("manifest", probe, file=file, error=UsageError)
    except UsageError as error:
        bad = next((path for index, path in enumerate(paths) if f"[{index}]" in (error.field or "")), None)
        if bad is not None:
            error.message = f"{bad[:80]!r}: this is not a path of a file"
        raise


def _read_all(folder: Path, paths: Sequence[str]) -> tuple[list[dict[str, Any]], tuple[bytes, ...]]:
    """Return the list of files, and their bytes one after the other in pieces."""
    entries: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    rest, left = bytearray(), MAX_FILES_BYTES
    for path in paths:
        data, executable = _read_below(folder, path, left)
        left -= len(data)
        entry: dict[str, Any] = {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        entries.append({**entry, "executable": True} if executable else entry)
        rest += data
        while len(rest) >= PIECE:
            pieces.append(bytes(rest[:PIECE]))
            del rest[:PIECE]
    if rest:
        pieces.append(bytes(rest))
    return entries, tuple(pieces)


def _read_below(folder: Path, path: str, limit: int) -> tuple[bytes, bool]:
    """Read a regular file below a folder, no step of the way through a link; say whether it is executable."""
    *steps, name = path.split("/")
    opened: list[int] = []
    try:
        opened.append(os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY))
        for step in steps:
            opened.append(os.open(step, _OPEN | os.O_DIRECTORY, dir_fd=opened[-1]))
        opened.append(os.open(name, _OPEN, dir_fd=opened[-1]))
        status = os.fstat(opened[-1])
        if not stat.S_ISREG(status.st_mode):
            raise FileError("a file of an extension must be a regular file", file=folder / path, field="files")
        data = _read_fd(opened[-1], limit)
    except OSError as error:
        raise _unreadable(folder / path, error) from error
    finally:
        for fd in opened:
            os.close(fd)
    if len(data) > limit:
        message = f"all files together have more than {MAX_FILES_BYTES} bytes"
        raise FileError(message, file=folder / path, field="files")
    return data, bool(status.st_mode & stat.S_IXUSR)


def _read_fd(fd: int, limit: int) -> bytes:
    """Return everything, or one byte more than ``limit``."""
    with open(fd, "rb", closefd=False) as stream:
        return stream.read(limit + 1)


def _unreadable(path: Path, error: OSError) -> FileError:
    if path.is_symlink() or any(parent.is_symlink() for parent in path.parents):
        hint = "put the file itself into the folder"
        return FileError("a file of an extension must not be behind a symbolic link", file=path, hint=hint)
    return FileError(f"the file cannot be read: {error.strerror}", file=path, field="files")
