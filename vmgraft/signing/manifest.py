"""The manifest: what an extension is, what it claims and how much it wants, as JSON of schema ``manifest``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from vmgraft.errors import GraftFormatError, UsageError, VmgraftError
from vmgraft.schemas import strict_json, validate
from vmgraft.signing.capabilities import Capability, first_overlap, parse_capability
from vmgraft.signing.contract import Limits
from vmgraft.signing.supplements import FileEntry, check_supplements, file_entries
from vmgraft.signing.virtio import check_virtio

#: Largest manifest accepted, in bytes; a list of 1024 files takes most of it.
MAX_MANIFEST = 256 * 1024

#: JSON name of each field of ``Limits``.
LIMIT_NAMES = {
    "memory_mib": "memoryMiB",
    "fuel_per_call": "fuelPerCall",
    "call_ms": "callMs",
    "calls_per_second": "callsPerSecond",
    "log_bytes": "logBytes",
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest that passed the schema.

    Attributes:
        document: The whole document, as parsed.
        capabilities: The claims, in the order declared; none overlaps another.
        limits: The quotas asked for, defaults filled in.
        module: File name of the WebAssembly module, or None where the extension has none.
        files: Further files, in the order in which their bytes are stored.
        on_fault: ``stop``, ``detach`` or ``restart(n)``.
    """

    document: dict[str, Any]
    id: str
    version: str
    security_version: int
    generation: int
    abi: str
    module: str | None
    config: str
    on_fault: str
    capabilities: tuple[Capability, ...]
    limits: Limits
    files: tuple[FileEntry, ...] = ()


def limits_from(document: Mapping[str, int]) -> Limits:
    """Return the quotas of a ``limits`` object (manifest or grant); names it leaves out get the default."""
    return Limits(**{name: document[key] for name, key in LIMIT_NAMES.items() if key in document})


def lower_limits(wish: Limits, grant: Limits) -> Limits:
    """Return the lower of wish and grant, quota by quota."""
    return Limits(**{f.name: min(getattr(wish, f.name), getattr(grant, f.name)) for f in fields(Limits)})


def stricter_fault(one: str, other: str | None) -> str:
    """Return the stricter of two answers to a fault: ``stop``, then ``detach``, then fewer restarts before more."""

    def mildness(action: str) -> int:
        order = {"stop": 0, "detach": 1}
        return order[action] if action in order else 1 + int(action.removeprefix("restart(").removesuffix(")"))

    return one if other is None else min(one, other, key=mildness)


def manifest_from(
    document: Any, *, file: str | PathLike[str] | None = None, error: type[VmgraftError] = GraftFormatError
) -> Manifest:
    """Check a parsed manifest (from JSON or TOML) and return it.

    Raises:
        VmgraftError: (of class ``error``) the schema, a capability's bounds, two claims that overlap, or files and
            supplements that do not fit together.
    """
    validate("manifest", document, file=file, error=error)
    claims = tuple(parse_capability(text, file=file, error=error) for text in document.get("capabilities", []))
    clash = first_overlap(claims)
    if clash is not None:
        pair = f"{claims[clash[0]]} and {claims[clash[1]]}"
        raise error(f"two claims overlap: {pair}", file=file, field="capabilities")
    check_supplements(document, claims, file=file, error=error)
    check_virtio(document, claims, file=file, error=error)
    return Manifest(
        document=document,
        id=document["id"],
        version=document["version"],
        security_version=document["securityVersion"],
        generation=document.get("generation", 0),
        abi=document["abi"],
        module=document.get("module"),
        config=document.get("config", ""),
        on_fault=document.get("onFault", "stop"),
        capabilities=claims,
        limits=limits_from(document.get("limits", {})),
        files=file_entries(document),
    )


def parse_manifest(
    data: bytes, *, file: str | PathLike[str] | None = None, error: type[VmgraftError] = GraftFormatError
) -> Manifest:
    """Parse a manifest as it stands in a record.

    Args:
        data: UTF-8 JSON, at most 256 KiB.
        file: What to name in the error.
        error: Error class to raise.

    Raises:
        VmgraftError: (of class ``error``) not strict JSON, or against the schema.
    """
    return manifest_from(strict_json(data, file=file, error=error, max_bytes=MAX_MANIFEST), file=file, error=error)


def canonical_manifest(
    document: Mapping[str, Any],
    *,
    file: str | PathLike[str] | None = None,
    error: type[VmgraftError] = UsageError,
) -> bytes:
    """Return the bytes of a manifest that get signed: sorted keys, no spaces, UTF-8, one newline at the end.

    Raises:
        VmgraftError: (of class ``error``) the document is not a valid manifest.
    """
    manifest_from(dict(document), file=file, error=error)
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        data = text.encode("utf-8") + b"\n"
    except UnicodeEncodeError as exc:
        raise error("a string holds half a surrogate pair", file=file) from exc
    if len(data) > MAX_MANIFEST:
        raise error(f"the manifest has {len(data)} bytes, more than {MAX_MANIFEST}", file=file)
    return data
