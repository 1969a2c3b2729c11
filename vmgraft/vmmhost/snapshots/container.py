"""The file around a kept guest.

::

    "VMGRSNAP"              8 bytes
    version                 4 bytes, little-endian
    length of the header    4 bytes
    length of the machine   8 bytes
    header                  JSON: when and by what it was taken, the engine, and what it is bound to
    machine                 what core/snapshot.py writes; the states of extensions are sections of it
    SHA-256                 32 bytes, over everything before

The hash finds damage; who may have written the file is looked at before it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from vmgraft import __version__
from vmgraft.errors import FileError, HostError, UsageError
from vmgraft.schemas import strict_json
from vmgraft.vmmhost.core.disk import OVERLAY_MAX
from vmgraft.vmmhost.plan import LaunchPlan
from vmgraft.vmmhost.regular import open_regular

MAGIC: Final = b"VMGRSNAP"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sIIQ")
_HASH_BYTES: Final = 32
#: Longest header, in bytes: it names every extension and its capabilities.
HEADER_MAX: Final = 4 << 20
#: Room for everything of a machine that is neither its memory nor its overlay: devices, and 64 extensions' states.
_PARTS_MAX: Final = 64 << 20
_ENGINES: Final = ("kvm", "soft")
_HINT: Final = "take a new one of this guest: vmgraft ctl SOCKET snapshot FILE"
#: Members of a launch plan that must be the same on the way back.
_BOUND: Final = (
    "contentTree", "virtualSize", "statementSha256", "memoryMiB", "boot", "firmware", "firmwareSha256",
    "videoBiosSha256", "direct", "union", "supplements",
)  # fmt: skip
#: What is compared before all else.
_FIRST: Final = {"contentTree": 0, "extensions": 1}


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A snapshot that was read, is whole, and belongs to the run that asked for it.

    Attributes:
        path: Where it came from.
        sha256: What it is called in plan and audit log, in hex.
        engine: The CPU it was taken on.
        taken: When, as it says.
        bindings: What the machine's own part must be bound to.
        machine: That part.
    """

    path: Path
    sha256: str
    engine: str
    taken: str
    bindings: dict[str, str]
    machine: memoryview = field(repr=False)


def binding(plan: LaunchPlan) -> dict[str, Any]:
    """Return what a snapshot is bound to: content, statement, the machine, and each extension with its rights."""
    shown = plan.to_dict()
    names = ("id", "version", "moduleSha256", "capabilities")
    extensions = sorted(([item[name] for name in names] for item in shown["extensions"]), key=lambda item: str(item[0]))
    bound: dict[str, Any] = json.loads(json.dumps({**{name: shown[name] for name in _BOUND}, "extensions": extensions}))
    return bound


def machine_bindings(plan: LaunchPlan) -> dict[str, str]:
    """Return the same as the machine's part holds it: one digest."""
    body = json.dumps(binding(plan), sort_keys=True, separators=(",", ":"))
    return {"run": hashlib.sha256(body.encode()).hexdigest()}


def pieces(plan: LaunchPlan, engine: str, machine: bytes) -> Iterator[bytes]:
    """Yield the file, piece by piece."""
    header = {
        "vmgraft": __version__,
        "taken": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "engine": engine,
        "binding": binding(plan),
    }
    encoded = json.dumps(header).encode()
    digest = hashlib.sha256()
    for piece in (_HEAD.pack(MAGIC, VERSION, len(encoded), len(machine)), encoded, machine):
        digest.update(piece)
        yield piece
    yield digest.digest()


def read_snapshot(path: Path, plan: LaunchPlan) -> SnapshotFile:
    """Read a snapshot for a run with this plan.

    Steps: 1 who may have written it; 2 lengths; 3 the hash; 4 the header; 5 what it is bound to.

    Raises:
        FileError: it cannot be read, others could have written it, or it is damaged or none.
        UsageError: it belongs to another image, other extensions or another machine.
    """
    with open_regular(path, "the snapshot", follow=False) as file:
        _check_owner(file, path)  # 1
        data = _read(file, path, largest(plan))
    if len(data) < _HEAD.size + _HASH_BYTES:  # 2
        raise _bad(path, "is cut short", "head", len(data))
    magic, version, header_length, machine_length = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise _bad(path, "is none: it does not begin as one does", "magic", 0)
    if version != VERSION:
        raise _bad(path, f"is of version {version}, and this program knows {VERSION}", "version", len(MAGIC))
    if header_length > HEADER_MAX or _HEAD.size + header_length + machine_length + _HASH_BYTES != len(data):
        raise _bad(path, "has another length than it says", "length", len(MAGIC) + 4)
    view, end = memoryview(data), len(data) - _HASH_BYTES
    if hashlib.sha256(view[:end]).digest() != view[end:]:  # 3
        raise _bad(path, "is damaged: its hash is another", "hash", end)
    engine, taken, bound = _header(bytes(view[_HEAD.size : _HEAD.size + header_length]), path)  # 4
    _compare(bound, binding(plan), path)  # 5
    machine = view[_HEAD.size + header_length : end]
    return SnapshotFile(path, bytes(view[end:]).hex(), engine, taken, machine_bindings(plan), machine)


def largest(plan: LaunchPlan) -> int:
    """Return the length that a snapshot of such a machine cannot exceed, in bytes: what does not shrink grows a bit."""
    full = (plan.memory_mib << 20) + OVERLAY_MAX
    return full + full // 128 + _PARTS_MAX


def _check_owner(file: BinaryIO, path: Path) -> None:
    found = os.fstat(file.fileno())
    if found.st_uid not in (0, os.geteuid()):
        raise FileError(f"the snapshot belongs to user {found.st_uid}", file=path, hint="restore snapshots of your own")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise FileError("others may write the snapshot", file=path, hint="chmod 600, if you are sure that nobody did")


def _read(file: BinaryIO, path: Path, limit: int) -> bytes:
    try:
        data = file.read(limit + 1)
    except OSError as error:
        raise FileError(f"cannot read the snapshot: {error.strerror}", file=path) from error
    if len(data) > limit:
        raise FileError(f"the snapshot is longer than one of this machine can be ({limit} bytes)", file=path)
    return data


def _header(raw: bytes, path: Path) -> tuple[str, str, dict[str, Any]]:
    header = strict_json(raw, file=path, error=FileError, max_bytes=HEADER_MAX)
    if not isinstance(header, dict):
        raise _bad(path, "has a header that is no object", "header", _HEAD.size)
    engine, taken, bound = header.get("engine"), header.get("taken"), header.get("binding")
    if engine not in _ENGINES or not isinstance(taken, str) or len(taken) > 64 or not isinstance(bound, dict):
        raise _bad(path, "has a header that makes no sense", "header", _HEAD.size)
    return engine, taken, bound


def _compare(kept: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    # What other extensions bring with them, a statement and supplements, is not what differs in the first place.
    for name, value in sorted(now.items(), key=lambda item: _FIRST.get(item[0], len(_FIRST))):
        if name not in kept or kept[name] != value:
            words = "other extensions, or with other rights" if name == "extensions" else f"another run: {name} differs"
            hint = "restore it with the image and the options that it was taken with"
            raise UsageError(f"the snapshot is of {words}", file=path, field=name, hint=hint)


def _bad(path: Path, what: str, field: str, offset: int) -> FileError:
    return FileError(f"the snapshot {what}", file=path, field=field, offset=offset, hint=_HINT)


def check_engine(asked: str, kept: str, path: Path) -> str:
    """Return the engine to restore on.

    Raises:
        HostError: another one was asked for.
    """
    if asked not in ("auto", kept):
        raise HostError(f"the snapshot was taken on the {kept} CPU", file=path, field="cpu", hint=f"--cpu {kept}")
    return kept
