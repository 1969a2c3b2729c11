"""The system calls that are left: to a worker once its module is compiled, to the host once it is set up. Data only.

The assembled programs are hashed into the audit log; `listing` is what docs/sandbox.md prints.
"""

from __future__ import annotations

import functools
import mmap
import platform
from collections.abc import Iterator
from typing import Any, Final

from vmgraft.vmmhost.layer import callnumbers, seccomp
from vmgraft.vmmhost.layer.seccomp import RET_ENOSYS, RET_KILL_PROCESS, ArgRule, Rules

#: The one descriptor of a worker, so that every worker has the same filter.
WORKER_FD: Final = 3

_CLONE_THREAD: Final = 0x0001_0000  # linux/sched.h
_KVMIO: Final = 0xAE  # linux/kvm.h: the second byte of every KVM request
_PR_SET_NAME, _PR_SET_VMA = 15, 0x5356_4D41  # linux/prctl.h
#: asm-generic/ioctls.h: terminal modes and size, bytes waiting, blocking, closing at exec. TIOCSTI is not among them.
_IOCTLS: Final = (0x5401, 0x5402, 0x5403, 0x5404, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

#: What the privileged host never needs again once it is set up, where there is no more than that to go by.
HOST_DENIED: Final = tuple(callnumbers.REFUSED)
_HOST_REFUSED: Final = (*callnumbers.REFUSED, *callnumbers.REFUSED_TOO)
_HOST_ARGUMENTS: Final = {
    "ioctl": (
        ArgRule(1, equals=(_KVMIO << 8,), mask=0xFF00, says="KVM requests"),
        ArgRule(1, equals=_IOCTLS, says="terminal modes and size, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX"),
    ),
    "clone": (ArgRule(0, equals=(_CLONE_THREAD,), mask=_CLONE_THREAD, says="threads"),),
    "prctl": (ArgRule(0, equals=(_PR_SET_NAME, _PR_SET_VMA), says="names of threads and of memory"),),
    "socketpair": (ArgRule(0, equals=(1,), says="AF_UNIX"),),
}


def worker_rules(socket_fd: int) -> Rules:
    """Return what a worker may call once its module is compiled: talk on its socket, move memory, end."""
    on_socket = (ArgRule(0, equals=(socket_fd,), says="on its socket"),)
    no_exec = (ArgRule(2, clear=mmap.PROT_EXEC, says="without PROT_EXEC"),)
    rules = dict.fromkeys(callnumbers.WORKER, ())
    return {
        **rules,
        **dict.fromkeys(("read", "write", "sendto", "recvfrom"), on_socket),
        **dict.fromkeys(("mmap", "mprotect"), no_exec),
    }


def host_rules() -> Rules:
    """Return what the host may call once it is set up: run guests, serve blocks, log, read what Landlock leaves."""
    return {name: _HOST_ARGUMENTS.get(name, ()) for name in callnumbers.HOST}


@functools.cache
def worker_program(machine: str | None = None) -> bytes:
    """Assemble the filter of every worker: whatever it does not allow ends the process.

    Raises:
        OSError: the machine's numbers are not known.
    """
    return seccomp.allow_only(worker_rules(WORKER_FD), RET_KILL_PROCESS, machine)


@functools.cache
def host_program(machine: str | None = None) -> bytes:
    """Assemble the filter of the host: what it does not allow is not permitted, or is no call at all.

    Raises:
        OSError: the machine's numbers are not known.
    """
    return seccomp.allow_only(host_rules(), RET_ENOSYS, machine, refused=_HOST_REFUSED)


def fingerprint(program: bytes) -> dict[str, str]:
    """Return what the audit log says of a filter: its SHA-256, and the machine it is for."""
    return {"sha256": seccomp.digest(program), "arch": platform.machine()}


def worker_filter() -> dict[str, str] | None:
    """Return the fingerprint of a worker's filter; None where the machine's numbers are not known."""
    return fingerprint(worker_program()) if seccomp.supported() else None


def listing(rules: Rules) -> Iterator[str]:
    """Yield a line for every call that is allowed, in the order of their names, with what its arguments must be."""
    for name in sorted(rules):
        words = "; ".join(rule.says for rule in rules[name])
        yield f"{name}: {words}" if words else name


def described() -> dict[str, Any]:
    """Return both filters for ``vmgraft doctor --json``; None where the machine's numbers are not known."""
    if not seccomp.supported():
        return {"worker": None, "host": None}
    return {
        "worker": {**fingerprint(worker_program()), "allowed": list(listing(worker_rules(WORKER_FD)))},
        "host": {**fingerprint(host_program()), "allowed": list(listing(host_rules()))},
    }
