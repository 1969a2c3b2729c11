"""From an extension folder to the bytes that are signed and grafted."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vmgraft.errors import FileError, UsageError
from vmgraft.schemas import validate
from vmgraft.signing.files import read_regular
from vmgraft.signing.manifest import canonical_manifest
from vmgraft.vendor.packfiles import pack_files

MANIFEST_NAME: Final = "manifest.toml"
#: A manifest is a page of text; anything larger is a mistake.
MAX_MANIFEST: Final = 64 << 10
#: Largest module the host would load (docs/extensions.md).
MAX_MODULE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Package:
    """An extension ready to be signed.

    Attributes:
        manifest: Canonical manifest, JSON.
        module: The WebAssembly module's bytes, or None.
        files: The bytes of all further files, cut into pieces (``vmgraft.signing.supplements``).
    """

    id: str
    version: str
    manifest: bytes
    module: bytes | None
    files: tuple[bytes, ...] = ()


def load_package(folder: Path) -> Package:
    """Read ``manifest.toml``, and the module and the files it names.

    Raises:
        UsageError: the folder is no extension, or its manifest is not valid.
        FileError: a file cannot be read, is too large, or lies outside the folder.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise UsageError(
            f"no {MANIFEST_NAME} in this folder", file=folder, hint="`vmgraft new DIR` starts an extension"
        )
    document, pieces = pack_files(folder, _parse_toml(path), path)
    validate("manifest", document, file=path, error=UsageError)
    module = None
    if "module" in document:
        module_path = folder / document["module"]
        if not module_path.exists():
            raise FileError("the module is not there", file=module_path, field="module", hint="run `make` there")
        module = _read(module_path, MAX_MODULE, what="the module")
        _check_module(module, module_path)
    return Package(document["id"], document["version"], canonical_manifest(document, file=path), module, pieces)


def _parse_toml(path: Path) -> dict[str, Any]:
    """Parse the manifest file."""
    try:
        return tomllib.loads(_read(path, MAX_MANIFEST, what="the manifest").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError("not UTF-8 text", file=path, offset=error.start) from error
    except RecursionError as error:
        raise UsageError("not a manifest: nested too deep", file=path) from error
    except ValueError as error:  # TOMLDecodeError, and what Python's int and date types refuse
        raise UsageError(f"not valid TOML: {error}", file=path, hint="see docs/extensions.md") from error


def _read(path: Path, limit: int, *, what: str) -> bytes:
    """Read a regular file of at most ``limit`` bytes; nothing may lead out of the folder by a link."""
    data = read_regular(path, limit, what=what, error=FileError, follow=False)
    if len(data) > limit:
        raise FileError(f"{what} is larger than {limit} bytes", file=path)
    return data


def _check_module(module: bytes, path: Path) -> None:
    """Refuse what no host would load: WebAssembly core modules begin with magic and version 1 (core spec, 5.5.16)."""
    if module[:8] != b"\0asm\x01\0\0\0":
        raise FileError("not a WebAssembly core module", file=path, offset=0, field="magic", hint="run `make` there")
