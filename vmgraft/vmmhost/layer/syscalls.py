"""The few Linux calls that Python lacks, through libc by ctypes. Numbers and names are those of the kernel's uapi."""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CLONE_PIDFD: Final = 0x1000  # linux/sched.h
CLONE_NEWNS: Final = 0x0002_0000
CLONE_NEWCGROUP: Final = 0x0200_0000
CLONE_NEWUTS: Final = 0x0400_0000
CLONE_NEWIPC: Final = 0x0800_0000
CLONE_NEWUSER: Final = 0x1000_0000
CLONE_NEWPID: Final = 0x2000_0000
CLONE_NEWNET: Final = 0x4000_0000

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
PR_SET_DUMPABLE: Final = 4
PR_SET_SECCOMP: Final = 22
PR_CAPBSET_READ: Final = 23
PR_CAPBSET_DROP: Final = 24
PR_SET_NO_NEW_PRIVS: Final = 38
SECCOMP_MODE_FILTER: Final = 2  # linux/seccomp.h
SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_FILTER_FLAG_TSYNC: Final = 1

#: Landlock has one set of numbers on every architecture (asm-generic/unistd.h).
SYS_LANDLOCK_CREATE_RULESET: Final = 444
SYS_LANDLOCK_ADD_RULE: Final = 445
SYS_LANDLOCK_RESTRICT_SELF: Final = 446
SYS_CLOSE_RANGE: Final = 436

_CAPABILITY_VERSION_3: Final = 0x2008_0522  # linux/capability.h
_SYS_CLONE: Final = {"x86_64": 56, "aarch64": 220}
_SYS_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}

# PyDLL keeps the interpreter lock during the call, which a child made by clone needs: it finds the lock held by itself.
_LIBC: Final = ctypes.PyDLL(None, use_errno=True)


def syscall(number: int, *args: int | bytes) -> int:
    """Make a system call; integers are passed as 64-bit words.

    Raises:
        OSError: with the call's errno.
    """
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    ctypes.set_errno(0)
    result = int(_syscall(ctypes.c_long(number), *words))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"syscall {number}: {os.strerror(code)}")
    return result


_syscall = _LIBC.syscall
_syscall.restype = ctypes.c_long


def prctl(option: int, value: int, third: int | ctypes._CArgObject = 0) -> None:
    """Call prctl(2).

    Raises:
        OSError: the kernel refuses.
    """
    last = ctypes.c_ulong(third) if isinstance(third, int) else third
    if _LIBC.prctl(option, ctypes.c_ulong(value), last, ctypes.c_ulong(0), ctypes.c_ulong(0)):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")


@dataclass(frozen=True, slots=True)
class Child:
    """A child as its parent sees it."""

    pid: int
    pidfd: int


def clone(namespaces: int) -> Child | None:
    """Fork into new namespaces with clone(2); the caller must have one thread only.

    Unlike unshare(2), this puts the child itself into a new PID namespace and gives the parent its PID and a pidfd.

    Args:
        namespaces: CLONE_NEW* flags, or 0.

    Returns:
        The child in the parent, None in the child.

    Raises:
        OSError: the kernel refuses, for example the namespaces.
    """
    number = _SYS_CLONE.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of clone is not known for {platform.machine()}")
    pidfd = array.array("i", [-1])
    address, _ = pidfd.buffer_info()
    pid = syscall(number, namespaces | CLONE_PIDFD | signal.SIGCHLD, 0, address, 0, 0)
    return Child(pid, pidfd[0]) if pid else None


def close_all_but(*keep: int) -> None:
    """Close every descriptor of this process but those named."""
    first = 0
    for last in (*(fd - 1 for fd in sorted(keep)), 2**31 - 1):
        if first <= last:
            try:
                syscall(SYS_CLOSE_RANGE, first, last, 0)
            except OSError:  # before Linux 5.9
                _close_listed(first, last)
        first = last + 2


def _close_listed(first: int, last: int) -> None:
    for entry in list(Path("/proc/self/fd").iterdir()):
        fd = int(entry.name)
        if first <= fd <= last:
            with contextlib.suppress(OSError):
                os.close(fd)


def empty_bounding_set() -> None:
    """Take every capability out of the bounding set, so that no program file can bring one back (capabilities(7)).

    Raises:
        OSError: the kernel refuses: this process has no right to.
    """
    for number in range(64):
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == errno.EINVAL and number:  # the kernel knows no more
                return
            raise


def keep_capabilities(kept: int = 0) -> None:
    """Leave of the effective and permitted sets what is in the mask ``kept``; empty the inheritable one (capset(2)).

    Raises:
        OSError: the kernel refuses.
    """
    header = ctypes.create_string_buffer(struct.pack("@Ii", _CAPABILITY_VERSION_3, 0), 8)
    sets = ctypes.create_string_buffer(24)  # twice effective, permitted, inheritable: low halves, then high ones
    if not _LIBC.capget(header, sets):
        low, _, _, high, _, _ = struct.unpack("@6I", sets.raw)
        low, high = low & kept, high & kept >> 32
        sets.raw = struct.pack("@6I", low, low, 0, high, high, 0)
    if _LIBC.capset(header, sets):
        code = ctypes.get_errno()
        raise OSError(code, f"capset: {os.strerror(code)}")


def filter_every_thread(program: ctypes._CArgObject) -> None:
    """Put a seccomp filter (``struct sock_fprog``) on every thread of this process (seccomp(2), TSYNC).

    Raises:
        OSError: the kernel refuses, or a thread has a filter of its own.
    """
    number = _SYS_SECCOMP.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"the number of seccomp is not known for {platform.machine()}")
    ctypes.set_errno(0)
    flags = ctypes.c_long(SECCOMP_FILTER_FLAG_TSYNC)
    result = int(_syscall(ctypes.c_long(number), ctypes.c_long(SECCOMP_SET_MODE_FILTER), flags, program))
    if result:  # a positive one is the thread that could not follow
        code = ctypes.get_errno() or errno.ESRCH
        raise OSError(code, f"seccomp: {os.strerror(code)}")


def protect(address: int, length: int, protection: int) -> None:
    """Call mprotect(2).

    Raises:
        OSError: the kernel refuses.
    """
    if _LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(protection)):
        code = ctypes.get_errno()
        raise OSError(code, f"mprotect: {os.strerror(code)}")


def set_exit_handler(number: int) -> None:
    """Make libc's _exit the handler of a signal: the process ends with the signal's number as its exit status."""
    _LIBC.signal.restype = ctypes.c_void_p
    _LIBC.signal(ctypes.c_int(number), ctypes.cast(_LIBC._exit, ctypes.c_void_p))
