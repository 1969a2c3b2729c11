"""The lock-down of a worker, step by step. See docs/sandbox.md.

Each step that works is one `Mechanism`; one that the kernel lacks or forbids is left out of the result, which lowers
the isolation level and never hides. Only a policy's minimum decides whether that is good enough.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import resource
import signal
from typing import Final

from vmgraft.vmmhost.layer import filters, landlock, seccomp
from vmgraft.vmmhost.layer.flags import NamedFlag
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
    empty_bounding_set,
    keep_capabilities,
    prctl,
    protect,
    set_exit_handler,
)

MIB: Final = 1 << 20
NOBODY: Final = 65534  #: the kernel's overflow uid and gid
#: Address space of interpreter, engine and compiler, beside the module's own memory.
BASE_AS_BYTES: Final = 512 * MIB
_NOFILE: Final = 8
#: Beginning of a line of /proc/PID/maps about memory that can be written and executed (proc_pid_maps(5)).
_WRITABLE_CODE: Final = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) .wx", re.MULTILINE)
_MAPS_BYTES: Final = 1 << 20


class Mechanism(NamedFlag):
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
    NO_BOUNDING_SET = 1 << 19
    NO_WRITABLE_CODE = 1 << 20


NAMESPACES: Final = {
    Mechanism.NS_USER: CLONE_NEWUSER,
    Mechanism.NS_NET: CLONE_NEWNET,
    Mechanism.NS_MOUNT: CLONE_NEWNS,
    Mechanism.NS_IPC: CLONE_NEWIPC,
    Mechanism.NS_UTS: CLONE_NEWUTS,
    Mechanism.NS_CGROUP: CLONE_NEWCGROUP,
    Mechanism.NS_PID: CLONE_NEWPID,
}

#: What a worker can only say once it has compiled its module, and is believed only where it is seen too.
LATE: Final = Mechanism.SECCOMP | Mechanism.NO_WRITABLE_CODE

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


def lock_down(socket_fd: int, memory_mib: int, namespaces: Mechanism, maps_fd: int | None = None) -> Mechanism:
    """Apply everything but seccomp to this worker; to be called before it reads its first packet.

    Args:
        socket_fd: The one descriptor that stays open.
        memory_mib: Linear memory of the module, on top of `BASE_AS_BYTES`.
        namespaces: What `clone_worker` achieved.
        maps_fd: A descriptor of this process's own /proc/self/maps, which stays open for `seal_code` to close.
    """
    done = Mechanism.PROCESS | namespaces
    close_all_but(socket_fd, *(() if maps_fd is None else (maps_fd,)))
    done |= Mechanism.FDS
    os.umask(0o777)
    with contextlib.suppress(OSError):  # while there is still the right to
        empty_bounding_set()
        done |= Mechanism.NO_BOUNDING_SET
    done |= _drop_root(namespaces)
    with contextlib.suppress(OSError):
        keep_capabilities()
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


def limits(memory_mib: int) -> tuple[tuple[int, int], ...]:
    """Return a worker's resource limits, as pairs of RLIMIT_* and the most it may have."""
    return (
        (resource.RLIMIT_AS, BASE_AS_BYTES + memory_mib * MIB),
        (resource.RLIMIT_NOFILE, _NOFILE),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    )


def _limit(memory_mib: int) -> None:
    for what, value in limits(memory_mib):
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


def writable_code(maps: bytes) -> list[tuple[int, int]]:
    """Return the areas (first byte, length) that a /proc/PID/maps shows to be writable and executable at once."""
    areas = ((int(found[1], 16), int(found[2], 16)) for found in _WRITABLE_CODE.finditer(maps))
    return [(first, end - first) for first, end in areas]


def seal_code(maps_fd: int) -> Mechanism:
    """Make all code read-only, what libffi writes for callbacks included, and close the descriptor.

    To be called when every callback is made and before the filter, which allows no change of code any more.
    """
    try:
        maps = b""
        while len(maps) < _MAPS_BYTES and (piece := os.read(maps_fd, 65536)):
            maps += piece
        for first, length in writable_code(maps):
            protect(first, length, mmap.PROT_READ | mmap.PROT_EXEC)
    except OSError:
        return Mechanism(0)
    finally:
        os.close(maps_fd)
    return Mechanism.NO_WRITABLE_CODE if len(maps) < _MAPS_BYTES else Mechanism(0)


def install_worker_filter(socket_fd: int, *, kill: bool = True) -> Mechanism:
    """Put the worker's seccomp filter in place: the last step, after compilation and before the module's first code.

    Args:
        socket_fd: The only descriptor that read, write, sendto and recvfrom may name.
        kill: End the process at a forbidden call; otherwise answer EPERM, which tests use to look around.

    Returns:
        SECCOMP, or nothing where the kernel has no filters or the machine's numbers are not known.
    """
    try:
        if kill and socket_fd == filters.WORKER_FD:
            program = filters.worker_program()
        else:
            action = seccomp.RET_KILL_PROCESS if kill else seccomp.RET_EPERM
            program = seccomp.allow_only(filters.worker_rules(socket_fd), action)
        seccomp.install(program)
    except OSError:
        return Mechanism(0)
    return Mechanism.SECCOMP
