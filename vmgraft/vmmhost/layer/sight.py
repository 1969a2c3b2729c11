"""A worker seen from outside: what /proc says of a process that says of itself how it is locked in.

The zygote looks, because it is the worker's parent, sees no module, and keeps the rights that the host gives up once a
guest runs. What cannot be read is neither shown nor denied.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import resource
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmgraft.vmmhost.layer.faults import FaultKind, WorkerFaultError
from vmgraft.vmmhost.layer.flags import NamedFlag
from vmgraft.vmmhost.layer.sandbox import LATE, NAMESPACES, Mechanism, limits, writable_code

#: Longest /proc file that is read; a worker's list of mappings has some 15 KiB.
_PROC_BYTES: Final = 1 << 20
#: Most linear memory of a module (schema ``manifest``), and most guest memory that is mapped beside it.
_MODULE_MIB: Final = 256 + 128
#: Most windows that a worker has mapped.
MAX_INODES: Final = 64
_FIELD: Final = re.compile(rb"^(\w+):[\t ]*(.*)$", re.MULTILINE)
_NAMESPACE_FILES: Final = {
    Mechanism.NS_USER: "user", Mechanism.NS_NET: "net", Mechanism.NS_MOUNT: "mnt", Mechanism.NS_IPC: "ipc",
    Mechanism.NS_UTS: "uts", Mechanism.NS_CGROUP: "cgroup", Mechanism.NS_PID: "pid",
}  # fmt: skip
_LIMIT: Final = re.compile(rb"^(Max [a-z ]+?) {2,}(\w+) +(\w+)", re.MULTILINE)
_LIMIT_NAMES: Final = {
    resource.RLIMIT_AS: b"Max address space", resource.RLIMIT_NOFILE: b"Max open files",
    resource.RLIMIT_NPROC: b"Max processes", resource.RLIMIT_CORE: b"Max core file size",
    resource.RLIMIT_FSIZE: b"Max file size", resource.RLIMIT_MEMLOCK: b"Max locked memory",
    resource.RLIMIT_MSGQUEUE: b"Max msgqueue size",
}  # fmt: skip
_ALL_NAMESPACES: Final = Mechanism(sum(NAMESPACES))
#: Mapped objects that no worker has, with their inodes: devices, KVM's, memory files but its own windows.
_FOREIGN: Final = re.compile(rb" (\d+) +(?:/dev/|anon_inode:|/memfd:)")
_SIGHT: Final = struct.Struct("<III")


class View(NamedFlag):
    """What of a worker could be looked at."""

    STATUS = 1 << 0
    LIMITS = 1 << 1
    NAMESPACES = 1 << 2
    DESCRIPTORS = 1 << 3
    MAPPINGS = 1 << 4


NO_VIEW: Final = View(0)
NOTHING: Final = Mechanism(0)


@dataclass(frozen=True, slots=True)
class Sight:
    """What an onlooker found.

    Attributes:
        views: What could be looked at.
        shown: Mechanisms that are there.
        denied: Mechanisms that are not.
    """

    views: View = NO_VIEW
    shown: Mechanism = NOTHING
    denied: Mechanism = NOTHING

    def pack(self) -> bytes:
        """Return the form in which the zygote tells it."""
        return _SIGHT.pack(self.views, self.shown, self.denied)

    @classmethod
    def unpack(cls, data: bytes) -> Sight:
        """Take in what the zygote told; nothing was seen where it is no sight."""
        if len(data) != _SIGHT.size:
            return cls()
        views, shown, denied = _SIGHT.unpack(data)
        return cls(View(views), Mechanism(shown), Mechanism(denied))


SIGHT_BYTES: Final = _SIGHT.size


def pack_inodes(inodes: Sequence[int]) -> bytes:
    """Return the form in which the zygote is told which files a worker may have mapped."""
    return struct.pack(f"<{len(inodes)}Q", *inodes)


def unpack_inodes(data: bytes) -> tuple[int, ...]:
    """Take that in."""
    return struct.unpack(f"<{len(data) // 8}Q", data[: len(data) // 8 * 8])


def look(pid: int, windows: Sequence[int] = ()) -> Sight:
    """Look at a process that this one has started.

    Args:
        pid: The process.
        windows: Inodes of the memory files that it may have mapped.
    """
    views, shown, denied = View(0), Mechanism(0), Mechanism(0)
    for view, onlooker in (
        (View.STATUS, _status),
        (View.LIMITS, _limits),
        (View.NAMESPACES, _namespaces),
        (View.DESCRIPTORS, _descriptors),
        (View.MAPPINGS, functools.partial(_mappings, windows)),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):
            seen, missing = onlooker(pid)
            views, shown, denied = views | view, shown | seen, denied | missing
    return Sight(views, shown & ~denied, denied)


def believed(told: Mechanism, early: Mechanism, namespaces: Mechanism, sight: Sight) -> Mechanism:
    """Return what is known of a worker that has compiled its module.

    What it said before it read the first byte from outside, and what the zygote did to it, stands unless it is seen to
    be otherwise. What it says afterwards counts only where it is seen.

    Args:
        told: What it says now.
        early: What it said at first.
        namespaces: Those that the zygote put it into.
        sight: What was seen.

    Raises:
        WorkerFaultError: ISOLATION: it lies.
    """
    if told & ~LATE != early or early & LATE or early & _ALL_NAMESPACES != namespaces & _ALL_NAMESPACES:
        changed = _words((told & ~LATE) ^ early) if told & ~LATE != early else "its namespaces"
        raise WorkerFaultError(FaultKind.ISOLATION, f"what the worker says of its isolation changed: {changed}")
    lies = told & sight.denied
    if lies:
        raise WorkerFaultError(FaultKind.ISOLATION, f"the worker lies about its isolation: no {_words(lies)}")
    return early | (told & LATE & sight.shown)


def _words(mechanisms: Mechanism) -> str:
    return ", ".join(mechanisms.names()) or "none known"


def _read(path: str) -> bytes:
    with Path(path).open("rb", buffering=0) as file:
        data = b""
        while piece := file.read(65536):
            data += piece
            if len(data) > _PROC_BYTES:
                raise ValueError("longer than any worker's")
    return data


def _fields(pid: int | str) -> dict[bytes, bytes]:
    return dict(_FIELD.findall(_read(f"/proc/{pid}/status")))


def _sort(found: dict[Mechanism, bool]) -> tuple[Mechanism, Mechanism]:
    """Return what is there and what is not."""
    shown, denied = Mechanism(0), Mechanism(0)
    for mechanism, there in found.items():
        if there:
            shown |= mechanism
        else:
            denied |= mechanism
    return shown, denied


def _status(pid: int) -> tuple[Mechanism, Mechanism]:
    """Read proc_pid_status(5), as the kernel writes it; a name with a line feed in it is escaped there."""
    its, own = _fields(pid), _fields("self")
    uids = [int(word) for word in its[b"Uid"].split()]
    capabilities = (b"CapInh", b"CapPrm", b"CapEff", b"CapAmb")
    found = {
        Mechanism.NO_NEW_PRIVS: its[b"NoNewPrivs"] == b"1",
        Mechanism.NO_CAPABILITIES: not any(int(its[name], 16) for name in capabilities),
        Mechanism.NO_BOUNDING_SET: not int(its[b"CapBnd"], 16),
        Mechanism.UNPRIVILEGED_UID: 0 not in uids,
        Mechanism.NS_PID: len(its[b"NSpid"].split()) > len(own[b"NSpid"].split()),
    }
    if 0 not in uids:  # files about a process that is not dumpable belong to root (proc(5))
        found[Mechanism.NOT_DUMPABLE] = os.stat(f"/proc/{pid}/status").st_uid != uids[1]  # noqa: PTH116 - a string
    filtered = _filtered(its, own)
    if filtered is not None:
        found[Mechanism.SECCOMP] = filtered
    return _sort(found)


def _filtered(its: dict[bytes, bytes], own: dict[bytes, bytes]) -> bool | None:
    """Tell whether a process has a filter that this one has not; None where that cannot be told.

    A filter holds for a thread: with a second thread, made before, it says nothing.
    """
    if its[b"Seccomp"] != b"2" or its[b"Threads"] != b"1":
        return False
    if b"Seccomp_filters" in its and b"Seccomp_filters" in own:
        return int(its[b"Seccomp_filters"]) > int(own[b"Seccomp_filters"])
    return None if own[b"Seccomp"] == b"2" else True  # before Linux 5.9


def _limits(pid: int) -> tuple[Mechanism, Mechanism]:
    """Read proc_pid_limits(5): unlike prlimit(2) it asks for no right over a process of another user."""
    held = {name: (soft, hard) for name, soft, hard in _LIMIT.findall(_read(f"/proc/{pid}/limits"))}
    for what, most in limits(_MODULE_MIB):
        if any(value == b"unlimited" or int(value) > most for value in held[_LIMIT_NAMES[what]]):
            return _sort({Mechanism.RLIMITS: False})
    return _sort({Mechanism.RLIMITS: True})


def _namespaces(pid: int) -> tuple[Mechanism, Mechanism]:
    found = {}
    for mechanism, name in _NAMESPACE_FILES.items():
        found[mechanism] = os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")  # noqa: PTH115
    return _sort(found)


def _descriptors(pid: int) -> tuple[Mechanism, Mechanism]:
    folder = f"/proc/{pid}/fd"
    names = os.listdir(folder)  # noqa: PTH208 - strings
    only_socket = len(names) == 1 and os.readlink(f"{folder}/{names[0]}").startswith("socket:")  # noqa: PTH115
    return _sort({Mechanism.FDS: only_socket})


def _mappings(windows: Sequence[int], pid: int) -> tuple[Mechanism, Mechanism]:
    maps = _read(f"/proc/{pid}/maps")
    if not maps:
        raise ValueError("a process that is gone")
    foreign = {int(found[1]) for found in _FOREIGN.finditer(maps)} - set(windows)
    return _sort({Mechanism.NO_WRITABLE_CODE: not writable_code(maps), Mechanism.PROCESS: not foreign})
