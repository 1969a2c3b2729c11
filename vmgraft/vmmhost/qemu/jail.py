"""Runs in the new process, before QEMU does: gives up what QEMU does not need, then becomes QEMU.

The first line on the standard error says what was achieved; a step that this kernel or container refuses lowers that,
and never hides it. QEMU's own seccomp filter (``-sandbox``) follows once it is set up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import stat
import sys
from pathlib import Path
from typing import Final

from vmgraft.vmmhost.layer.landlock import restrict
from vmgraft.vmmhost.layer.sandbox import NOBODY
from vmgraft.vmmhost.layer.syscalls import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    prctl,
)

#: Begins the line with what was achieved.
MARK: Final = "vmgraft-jail:"
KVM: Final = "/dev/kvm"
#: Programs, libraries and firmware; everything else is out of QEMU's sight.
_EXECUTE: Final = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/libexec")
_READ: Final = (
    "/usr/share/qemu", "/usr/share/seabios", "/usr/share/vgabios", "/usr/share/ipxe", "/etc/ld.so.cache",
    "/dev/urandom", "/dev/null", "/proc/self", "/proc/cpuinfo", "/sys/devices/system",
)  # fmt: skip


def main(program: str, parent: int, kvm: bool, arguments: list[str]) -> None:
    """Confine this process and execute ``program``; returns only if that fails.

    Args:
        program: Absolute path of QEMU.
        parent: Process that this one must not outlive.
        kvm: Whether /dev/kvm is needed.
        arguments: What stands behind the program's name.
    """
    done = [*_unshare(), *_drop_root(kvm)]
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which takes it away (prctl(2))
    if os.getppid() != parent:
        os._exit(1)
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 256)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(limit, (value, value))
    with contextlib.suppress(OSError):
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        done.append("no-new-privs")
    with contextlib.suppress(OSError):
        fds = [f"/proc/{os.getpid()}/fd"]
        # No scope: QEMU's threads signal each other, and older kernels count that as the outside.
        restrict(read=[*_READ, *fds], devices=[KVM] if kvm else [], execute=[program, *_EXECUTE], scope=False)
        done.append("landlock")
    sys.stderr.write(f"{MARK} {' '.join(done)}\n")
    sys.stderr.flush()
    try:
        os.execv(program, [program, *arguments])  # noqa: S606 - no shell is what we want
    except OSError as error:
        sys.stderr.write(f"cannot start {program}: {error.strerror}\n")
    os._exit(127)


def _unshare() -> list[str]:
    """Leave the network and the System V objects behind."""
    libc = ctypes.CDLL(None, use_errno=True)
    wanted = CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if libc.unshare(wanted) and libc.unshare(wanted | CLONE_NEWUSER):
        return []
    return ["ns-net", "ns-ipc", "ns-uts"]


def _drop_root(kvm: bool) -> list[str]:
    """Become nobody, unless /dev/kvm is wanted and root's alone."""
    if os.geteuid() != 0:
        return []
    groups: list[int] = []
    if kvm:
        node = Path(KVM).stat()
        if not node.st_mode & stat.S_IWOTH:
            if not node.st_mode & stat.S_IWGRP or node.st_gid == 0:
                return []
            groups = [node.st_gid]
    try:
        os.setgroups(groups)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return []
    return ["unprivileged-uid"]
