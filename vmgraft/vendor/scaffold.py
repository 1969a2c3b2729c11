"""`vmgraft new`: a folder that builds into a working extension."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from vmgraft.errors import FileError, UsageError

_ID = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+")


def new_extension(folder: Path, extension_id: str | None = None) -> list[Path]:
    """Write manifest.toml, extension.c, vmgraft.h, Makefile and README.md into a new or empty folder.

    Args:
        folder: Created if missing; must be empty.
        extension_id: Reverse-domain id; by default ``com.example.`` and the folder's name.

    Raises:
        UsageError: the folder is not empty or the id is not valid.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "extension"
    name = extension_id or f"com.example.{slug}"
    if not _ID.fullmatch(name) or len(name) > 128:
        raise UsageError(
            f"'{name}' is not an extension id", field="id", hint="lower-case labels with dots, as in com.example.clock"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError("the folder is not empty", file=folder)
        return [_write(folder, entry.name, entry.read_text(), name) for entry in _templates()]
    except OSError as error:
        raise FileError(f"cannot write: {error.strerror}", file=folder) from error


def _templates() -> list[resources.abc.Traversable]:
    """Return the template files that ship with the package."""
    folder = resources.files("vmgraft.vendor") / "template"
    return sorted((entry for entry in folder.iterdir() if entry.is_file()), key=lambda entry: entry.name)


def _write(folder: Path, name: str, text: str, extension_id: str) -> Path:
    """Fill the id into a template and write it."""
    path = folder / name
    path.write_text(text.replace("@ID@", extension_id))
    return path
