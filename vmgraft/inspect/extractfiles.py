"""``extract files``: the further files of an extension, as a folder; nothing is verified."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from vmgraft.errors import FileError, GraftFormatError, UsageError
from vmgraft.imagefmt.contract import PROBE, Opening
from vmgraft.imagefmt.graft import Graft, open_graft, open_image
from vmgraft.signing.dsse import parse_envelope
from vmgraft.signing.manifest import parse_manifest
from vmgraft.signing.signedfiles import SignedFiles
from vmgraft.signing.statement import ExtensionEntry, Statement, parse_statement


def extract_files(
    path: Path, folder: Path, *, extension: str | None = None, opening: Opening = PROBE
) -> tuple[Path, ...]:
    """Write an extension's files into a new or empty folder, all of them or none.

    The bytes are compared with what the image itself says of them; whether that is to be believed is not looked at.

    Args:
        path: The image.
        folder: Made if missing. What is in it stays below it: paths are what a manifest may hold.
        extension: Id of the extension, needed when several have files.
        opening: How to open the image.

    Raises:
        NoGraftError: the image carries none.
        GraftFormatError: envelope, statement or manifest are missing or malformed.
        PayloadMismatchError: a file is missing or damaged.
        UsageError: no such extension, it has no files, or it is not said which.
        FileError: the folder holds something already, or cannot be written.
    """
    with open_image(path, opening) as image:
        graft = open_graft(image)
        files = _choose(graft, extension, path)
        return _write(files, folder)


def _choose(graft: Graft, extension: str | None, path: Path) -> SignedFiles:
    envelopes = graft.envelopes()
    if not envelopes:
        raise GraftFormatError(graft.format_problem() or "the record has no envelope", file=path, field="envelope")
    statement = parse_statement(parse_envelope(envelopes[0], file=path).payload, file=path)
    found = [entry for entry in statement.extensions if extension in (None, entry.id)]
    if extension is None:
        found = [entry for entry in found if entry.files]
    if len(found) != 1:
        ids = ", ".join(entry.id for entry in statement.extensions)
        message = "no extension has files" if extension is None and not found else "say which with --extension ID"
        raise UsageError(message, file=path, hint=f"the image carries {ids}")
    return _files(graft, statement, found[0], path)


def _files(graft: Graft, statement: Statement, entry: ExtensionEntry, path: Path) -> SignedFiles:
    manifest = parse_manifest(graft.payload(statement.subjects[entry.manifest]["sha256"]), file=path)
    if not manifest.files:
        raise UsageError(f"{entry.id} has no files", file=path)
    pieces = [(name, statement.subjects[name]) for name in entry.files]
    return SignedFiles(graft, pieces, manifest.files, name=entry.manifest)


def _write(files: SignedFiles, folder: Path) -> tuple[Path, ...]:
    """Write into a folder beside the target, then put it in the target's place: it is never half there."""
    target = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow a link
    work: Path | None = None
    try:
        _refuse_taken(target, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".vmgraft-", dir=target.parent))
        written = [_write_one(work, files, entry.path, executable=entry.executable) for entry in files.entries]
        work.chmod(0o777 & ~_umask())
        work.rename(target)
    except BaseException as error:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            raise FileError(f"the files cannot be written: {error.strerror}", file=folder) from error
        raise
    return tuple(folder / path for path in written)


def _refuse_taken(target: Path, folder: Path) -> None:
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        hint = "files are never overwritten; choose another folder"
        raise FileError("the folder holds something already", file=folder, hint=hint)


def _write_one(work: Path, files: SignedFiles, path: str, *, executable: bool) -> str:
    place = work / path
    place.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o777 if executable else 0o666)
    with open(fd, "wb") as stream:
        stream.write(files.read(path))
    return path


def _umask() -> int:
    """Return the umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
