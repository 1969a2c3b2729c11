"""What this machine can do for a host: engines by trying them, the sandbox by starting a worker in it."""

from __future__ import annotations

import shutil
from importlib import import_module, metadata
from typing import Any, Final

from vmgraft.errors import HostError, VmgraftError
from vmgraft.vmmhost.core.probe import detect
from vmgraft.vmmhost.core.seabios import load_firmware
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.filters import described
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.qemu.process import PROGRAM

PACKAGES: Final = (
    "click", "construct", "cryptography", "jsonschema", "numpy", "pycdlib", "rich", "unicorn", "wasmtime", "zstandard",
)  # fmt: skip
#: What a package that is damaged, or lacks a library, may raise when it is imported.
_IMPORT_FAILURES: Final = (
    ImportError, OSError, AttributeError, TypeError, ValueError, RuntimeError, SyntaxError, LookupError, NameError,
)  # fmt: skip
#: The smallest module of ABI vmgraft/1: one function without body, exported as its marker.
TINY_MODULE: Final = (
    b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0\x03\x02\x01\0\x07\x11\x01\x0dvmgraft_abi_1\0\0\x0a\x04\x01\x02\0\x0b"
)


def examine() -> dict[str, Any]:
    """Return engines, sandbox and packages as found; starts one worker with an empty extension.

    ``packages`` has the version of each that can be imported, ``broken`` why another that is installed cannot;
    ``programs`` the path of what else an engine or a firmware needs, or None.
    ``ready`` says whether ``vmgraft run`` can work here: some engine is usable and workers start.
    """
    engines = [
        {"name": info.name, "usable": info.usable, "emulated": info.emulated, "reason": info.reason}
        for info in detect()
    ]
    sandbox = _sandbox()
    packages, broken = _packages()
    return {
        "ready": any(engine["usable"] for engine in engines) and sandbox["works"],
        "engines": engines,
        "sandbox": sandbox,
        "filters": described(),
        "programs": {PROGRAM: shutil.which(PROGRAM), "seabios": _seabios()},
        "packages": packages,
        "broken": broken,
    }


class _NoMemory:
    """Guest memory that nobody may reach."""

    def read(self, gpa: int, length: int) -> bytes:
        raise ValueError("no guest memory")

    def write(self, gpa: int, data: bytes) -> None:
        raise ValueError("no guest memory")


def _sandbox() -> dict[str, Any]:
    """Start a worker and report the isolation it reached."""
    try:
        with ExtensionHost(
            [ExtensionSpec("org.vmgraft.doctor", "1", TINY_MODULE)],
            memory=_NoMemory(),
            audit=lambda _event, _detail: None,
            stop=lambda _detail: None,
            clock=lambda: 0,
        ) as host:
            (found,) = host.summary()
    except VmgraftError as error:
        return {"works": False, "level": None, "mechanisms": [], "reason": str(error)}
    return {"works": True, "level": found["isolation"], "mechanisms": found["mechanisms"], "reason": ""}


def _seabios() -> str | None:
    """Return the file of a stock firmware that can be used, or None."""
    try:
        return load_firmware().path
    except HostError:
        return None


def _packages() -> tuple[dict[str, str | None], dict[str, str]]:
    """Import every package; return the versions of those that work, and why the other installed ones do not."""
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    broken: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found = metadata.version(name)
            import_module(name)
        except metadata.PackageNotFoundError:
            continue
        except _IMPORT_FAILURES as error:
            broken[name] = f"{type(error).__name__}: {error}"
        else:
            versions[name] = found
    return versions, broken
