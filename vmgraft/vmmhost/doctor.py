"""What this machine can do for a host: engines by trying them, the sandbox by starting a worker in it."""

from __future__ import annotations

from importlib import metadata
from typing import Any, Final

from vmgraft.errors import VmgraftError
from vmgraft.vmmhost.core.probe import detect
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.filters import described
from vmgraft.vmmhost.layer.spec import ExtensionSpec

PACKAGES: Final = (
    "click", "construct", "cryptography", "jsonschema", "numpy", "pycdlib", "rich", "unicorn", "wasmtime", "zstandard",
)  # fmt: skip
#: The smallest module of ABI vmgraft/1: one function without body, exported as its marker.
TINY_MODULE: Final = (
    b"\0asm\x01\0\0\0\x01\x04\x01\x60\0\0\x03\x02\x01\0\x07\x11\x01\x0dvmgraft_abi_1\0\0\x0a\x04\x01\x02\0\x0b"
)


def examine() -> dict[str, Any]:
    """Return engines, sandbox and packages as found; starts one worker with an empty extension.

    ``ready`` says whether ``vmgraft run`` can work here: some engine is usable and workers start.
    """
    engines = [
        {"name": info.name, "usable": info.usable, "emulated": info.emulated, "reason": info.reason}
        for info in detect()
    ]
    sandbox = _sandbox()
    return {
        "ready": any(engine["usable"] for engine in engines) and sandbox["works"],
        "engines": engines,
        "sandbox": sandbox,
        "filters": described(),
        "packages": {name: _version(name) for name in PACKAGES},
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


def _version(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
