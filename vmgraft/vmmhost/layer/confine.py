"""What the privileged host takes from itself once it is set up. See docs/sandbox.md."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

from vmgraft.errors import HostError
from vmgraft.vmmhost.layer import filters, landlock, seccomp
from vmgraft.vmmhost.layer.syscalls import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, keep_capabilities, prctl

#: linux/capability.h: files of others (Landlock says which), killing workers, keeping them on a processor.
_KEPT_CAPABILITIES: Final = 1 << 1 | 1 << 3 | 1 << 5 | 1 << 23

_LEVELS: Final = (
    {"no-new-privs", "seccomp"},
    {"landlock"},
    {"seccomp-allow", "few-capabilities"},
)


def confine_host(
    *, read: Iterable[str] = (), write: Iterable[str] = (), remove: Iterable[str] = (), strict: bool = True
) -> list[str]:
    """Take from the privileged host what it no longer needs once it is set up. Cannot be undone.

    New opens are denied but for the interpreter's own directories (read only: modules are imported late) and the paths
    named; so are sockets, processes, execve, ptrace, mount, module loading and their like, and core dumps. Call it from
    a program's main thread, never from a process that goes on to other work.

    Args:
        read: Further paths that stay readable.
        write: Paths that stay writable; files in such directories may be made.
        remove: Directories in which files may be removed.
        strict: Allow only the system calls of a running host; else refuse only those that it never needs.

    Returns:
        The names of what was applied: of ``no-new-privs``, ``not-dumpable``, ``no-core``, ``few-capabilities``,
        ``landlock``, ``landlock-net``, ``seccomp`` and, where only listed calls are left, ``seccomp-allow``.

    Raises:
        HostError: the list of paths is not understood by the kernel, and nothing was restricted by Landlock.
    """
    done: list[str] = []
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("no-new-privs", lambda: prctl(PR_SET_NO_NEW_PRIVS, 1)),
        ("not-dumpable", lambda: prctl(PR_SET_DUMPABLE, 0)),
        ("no-core", lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))),
        ("few-capabilities", lambda: keep_capabilities(_KEPT_CAPABILITIES)),
    )
    for name, step in steps:
        with contextlib.suppress(OSError, ValueError):
            step()
            done.append(name)
    done += _landlock_host(read, write, remove)
    return done + _filter_host(strict=strict)


def host_level(names: Iterable[str]) -> int:
    """Return the host's own level: 0 as started, 1 + seccomp, 2 + Landlock, 3 + only what a running host calls."""
    level, have = 0, set(names)
    for needed in _LEVELS:
        if not needed <= have:
            break
        level += 1
    return level


def host_record(names: list[str]) -> dict[str, Any]:
    """Return what the audit log says of the host's own confinement: its names, its level and its filter."""
    strict = "seccomp-allow" in names
    filter_used = filters.fingerprint(filters.host_program()) if strict else None
    return {"host": names, "hostLevel": host_level(names), "hostFilter": filter_used}


def require_host_level(names: Iterable[str], minimum: int) -> None:
    """Hold what was achieved against what is demanded.

    Raises:
        HostError: it is less.
    """
    have = list(names)
    level = host_level(have)
    if level < minimum:
        applied = ", ".join(have) or "nothing"
        hint = f"applied: {applied}; see docs/sandbox.md"
        raise HostError(f"the host's own confinement is of level {level}, and {minimum} is demanded", hint=hint)


def _landlock_host(read: Iterable[str], write: Iterable[str], remove: Iterable[str]) -> list[str]:
    if not landlock.abi_version():
        return []
    own = [path for path in (*sys.path, sys.prefix, sys.base_prefix) if os.path.isabs(path)]  # noqa: PTH117 - strings
    system = ["/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/dev/urandom", "/proc/self"]
    try:
        # The host must be able to kill the zygote, which stays outside: no scope for signals.
        abi = landlock.restrict(read=[*own, *system, *read], write=[*write, "/dev/null"], remove=remove, scope=False)
    except OSError as error:
        raise HostError(f"Landlock refuses: {error.strerror}", hint="check the paths given to confine_host") from error
    return ["landlock", "landlock-net"] if abi >= 4 else ["landlock"]


def _filter_host(*, strict: bool) -> list[str]:
    """Install the narrowest filter that this kernel takes, on every thread."""
    with contextlib.suppress(OSError):
        if strict:
            seccomp.install(filters.host_program(), every_thread=True)
            return ["seccomp", "seccomp-allow"]
    with contextlib.suppress(OSError):
        seccomp.install(seccomp.deny_only(filters.HOST_DENIED))
        return ["seccomp"]
    return []
