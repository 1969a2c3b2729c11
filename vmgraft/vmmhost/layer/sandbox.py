"""The lock-down of a worker, step by step, and what the privileged host applies to itself. See docs/sandbox.md.

Each step that works is one `Mechanism`; one that the kernel lacks or forbids is left out of the result, which lowers
the isolation level and never hides. Only a policy's minimum decides whether that is good enough.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterable
from enum import IntFlag
from typing import Final

from vmgraft.errors import HostError
from vmgraft.vmmhost.layer import landlock, seccomp
from vmgraft.vmmhost.layer.syscalls import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    Child,
    clone,
    close_all_but,
    drop_capabilities,
    prctl,
    set_exit_handler,
)

MIB: Final = 1 << 20
NOBODY: Final = 65534  #: the kernel's overflow uid and gid
#: Address space of interpreter, engine and compiler, beside the module's own memory.
BASE_AS_BYTES: Final = 512 * MIB


class Mechanism(IntFlag):
    """One thing that stands between a worker and the rest of the machine."""

    PROCESS = 1 << 0
    FDS = 1 << 1
    RLIMITS = 1 << 2
    NO_NEW_PRIVS = 1 << 3
    NOT_DUMPABLE = 1 << 4
    PARENT_DEATH = 1 << 5
    UNPRIVILEGED_UID = 1 << 6
    SECCOMP = 1 << 7
    LANDLOCK = 1 << 8
    LANDLOCK_NET = 1 << 9
    LANDLOCK_SCOPE = 1 << 10
    NS_USER = 1 << 11
    NS_NET = 1 << 12
    NS_MOUNT = 1 << 13
    NS_IPC = 1 << 14
    NS_UTS = 1 << 15
    NS_CGROUP = 1 << 16
    NS_PID = 1 << 17
    NO_CAPABILITIES = 1 << 18

    def names(self) -> list[str]:
        """Return the names as the audit log spells them, such as ``no-new-privs``."""
        return [item.name.lower().replace("_", "-") for item in Mechanism if item in self and item.name]


NAMESPACES: Final = {
    Mechanism.NS_USER: CLONE_NEWUSER,
    Mechanism.NS_NET: CLONE_NEWNET,
    Mechanism.NS_MOUNT: CLONE_NEWNS,
    Mechanism.NS_IPC: CLONE_NEWIPC,
    Mechanism.NS_UTS: CLONE_NEWUTS,
    Mechanism.NS_CGROUP: CLONE_NEWCGROUP,
    Mechanism.NS_PID: CLONE_NEWPID,
}

_LEVELS: Final = (
    Mechanism.NO_CAPABILITIES | Mechanism.NO_NEW_PRIVS | Mechanism.SECCOMP,
    Mechanism.LANDLOCK,
    Mechanism.UNPRIVILEGED_UID | Mechanism.NS_NET | Mechanism.NS_MOUNT | Mechanism.NS_IPC | Mechanism.NS_PID,
)


def level_of(mechanisms: Mechanism) -> int:
    """Return the isolation level: 0 own process, 1 + seccomp, 2 + Landlock, 3 + namespaces, no root."""
    level = 0
    for needed in _LEVELS:
        if needed not in mechanisms:
            break
        level += 1
    return level


def choose_namespaces() -> Mechanism:
    """Find out, with children that end at once, which namespaces this process can give its workers.

    Root needs no user namespace for the others and goes without, so that its workers can become another user; the root
    of a container may be able to make them only that way.
    """
    everything = Mechanism(sum(NAMESPACES))
    root = os.geteuid() == 0
    wanted = everything & ~Mechanism.NS_USER if root else everything
    if _works(wanted):
        return wanted
    possible = _probe(wanted)
    if root:
        inside = _probe(everything)
        if int(inside & ~Mechanism.NS_USER).bit_count() > int(possible).bit_count():
            return inside
    return possible


def clone_worker(namespaces: Mechanism) -> tuple[Child | None, Mechanism]:
    """Fork into the namespaces, or without any if the kernel suddenly refuses them.

    Returns:
        The child (None in the child itself), and the namespaces it is in; with UNPRIVILEGED_UID where the user behind
        it is not root, whatever a user namespace may show.

    Raises:
        OSError: not even a plain fork works.
    """
    uid = Mechanism(0) if os.geteuid() == 0 else Mechanism.UNPRIVILEGED_UID
    try:
        return clone(_flags(namespaces)), namespaces | uid
    except OSError:
        return clone(0), uid


def _flags(namespaces: Mechanism) -> int:
    return sum(flag for item, flag in NAMESPACES.items() if item in namespaces)


def _works(namespaces: Mechanism) -> bool:
    try:
        child = clone(_flags(namespaces))
    except OSError:
        return False
    if child is None:
        os._exit(0)
    os.waitpid(child.pid, 0)
    os.close(child.pidfd)
    return True


def _probe(wanted: Mechanism) -> Mechanism:
    """Add one namespace after the other, the user namespace first, and keep what works."""
    got = Mechanism(0)
    for item in NAMESPACES:
        if item in wanted and _works(got | item):
            got |= item
    return got


def lock_down(socket_fd: int, memory_mib: int, namespaces: Mechanism) -> Mechanism:
    """Apply everything but seccomp to this worker; to be called before it reads its first packet.

    Args:
        socket_fd: The one descriptor that stays open.
        memory_mib: Linear memory of the module, on top of `BASE_AS_BYTES`.
        namespaces: What `clone_worker` achieved.
    """
    done = Mechanism.PROCESS | namespaces
    close_all_but(socket_fd)
    done |= Mechanism.FDS
    os.umask(0o777)
    done |= _drop_root(namespaces)
    with contextlib.suppress(OSError):
        drop_capabilities()
        done |= Mechanism.NO_CAPABILITIES
    for option, value, mechanism in (
        (PR_SET_NO_NEW_PRIVS, 1, Mechanism.NO_NEW_PRIVS),
        (PR_SET_DUMPABLE, 0, Mechanism.NOT_DUMPABLE),
        (PR_SET_PDEATHSIG, signal.SIGKILL, Mechanism.PARENT_DEATH),
    ):
        with contextlib.suppress(OSError):
            prctl(option, value)
            done |= mechanism
    with contextlib.suppress(OSError, ValueError):
        _limit(memory_mib)
        done |= Mechanism.RLIMITS
    with contextlib.suppress(OSError):
        done |= _landlocked(landlock.restrict())
    return done


def _drop_root(namespaces: Mechanism) -> Mechanism:
    """Become nobody, where root is root. In a user namespace without a map there is no uid to change to.

    A container's root there keeps the owner's rights to its files, so it does not count as unprivileged.
    """
    if Mechanism.NS_USER in namespaces or os.getuid() != 0:
        return Mechanism(0)
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return Mechanism(0)
    return Mechanism.UNPRIVILEGED_UID


def _limit(memory_mib: int) -> None:
    address_space = BASE_AS_BYTES + memory_mib * MIB
    for what, value in (
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_NOFILE, 8),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(what, (value, value))


def limit_compile_cpu(seconds: int) -> None:
    """Let SIGXCPU end this process after so many seconds of CPU time, counted from now; 0 lifts the limit.

    The first process of a PID namespace ignores signals left at their default, so the handler is libc's _exit itself:
    the process ends with the signal's number as its exit status, even in the middle of compiled code.
    """
    set_exit_handler(signal.SIGXCPU)
    _soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = int(usage.ru_utime + usage.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + seconds if seconds else hard, hard))


def _landlocked(abi: int) -> Mechanism:
    done = Mechanism.LANDLOCK
    if abi >= 4:
        done |= Mechanism.LANDLOCK_NET
    if abi >= 6:
        done |= Mechanism.LANDLOCK_SCOPE
    return done


def install_worker_filter(socket_fd: int, *, kill: bool = True) -> Mechanism:
    """Put the worker's seccomp filter in place: the last step, after compilation and before the module's first code.

    Args:
        socket_fd: The only descriptor that read, write, sendto and recvfrom may name.
        kill: End the process at a forbidden call; otherwise answer EPERM, which tests use to look around.

    Returns:
        SECCOMP, or nothing where the kernel has no filters or the machine's numbers are not known.
    """
    action = seccomp.RET_KILL_PROCESS if kill else seccomp.RET_EPERM
    try:
        seccomp.install(seccomp.allow_only(seccomp.worker_rules(socket_fd), action))
    except OSError:
        return Mechanism(0)
    return Mechanism.SECCOMP


def confine_host(*, read: Iterable[str] = (), write: Iterable[str] = ()) -> list[str]:
    """Take from the privileged host what it no longer needs once it is set up. Cannot be undone.

    New opens are denied but for the interpreter's own directories (read only: modules are imported late) and the paths
    named; so are TCP, execve, ptrace, mount, module loading and their like, and core dumps. Call it from a program's
    main thread, never from a process that goes on to other work.

    Args:
        read: Further paths that stay readable.
        write: Paths that stay writable; files in such directories may be made.

    Returns:
        The names of what was applied: of ``no-new-privs``, ``not-dumpable``, ``no-core``, ``landlock``,
        ``landlock-net``, ``seccomp``.

    Raises:
        HostError: the list of paths is not understood by the kernel, and nothing was restricted by Landlock.
    """
    done: list[str] = []
    for option, value, name in (
        (PR_SET_NO_NEW_PRIVS, 1, "no-new-privs"),
        (PR_SET_DUMPABLE, 0, "not-dumpable"),
    ):
        with contextlib.suppress(OSError):
            prctl(option, value)
            done.append(name)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        done.append("no-core")
    done += _landlock_host(read, write)
    with contextlib.suppress(OSError):
        seccomp.install(seccomp.deny_only(seccomp.HOST_DENIED))
        done.append("seccomp")
    return done


def _landlock_host(read: Iterable[str], write: Iterable[str]) -> list[str]:
    if not landlock.abi_version():
        return []
    own = [path for path in (*sys.path, sys.prefix, sys.base_prefix) if os.path.isabs(path)]  # noqa: PTH117 - strings
    system = ["/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo", "/dev/urandom", "/proc/self"]
    try:
        # The host must be able to kill the zygote, which stays outside: no scope for signals.
        abi = landlock.restrict(read=[*own, *system, *read], write=[*write, "/dev/null"], scope=False)
    except OSError as error:
        raise HostError(f"Landlock refuses: {error.strerror}", hint="check the paths given to confine_host") from error
    return ["landlock", "landlock-net"] if abi >= 4 else ["landlock"]
