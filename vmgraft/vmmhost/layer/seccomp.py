"""Seccomp filters, assembled here: classic BPF over ``struct seccomp_data`` (linux/seccomp.h, linux/filter.h)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vmgraft.vmmhost.layer.syscalls import PR_SET_SECCOMP, SECCOMP_MODE_FILTER, prctl

RET_KILL_PROCESS: Final = 0x8000_0000  # linux/seccomp.h
RET_ALLOW: Final = 0x7FFF_0000
RET_EPERM: Final = 0x0005_0000 | errno.EPERM

_LD_W_ABS, _JEQ_K, _JGE_K, _JSET_K, _RET_K = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
_NR, _ARCH, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data; each argument has 8 bytes, low half first
_X32_BIT: Final = 0x4000_0000  # asm/unistd.h: the x32 ABI shares AUDIT_ARCH_X86_64

_MACHINES: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}  # linux/audit.h: AUDIT_ARCH_*

#: asm/unistd_64.h and asm-generic/unistd.h: (x86_64, aarch64); -1 where there is none.
_WORKER_CALLS: Final = {
    "read": (0, 63), "write": (1, 64), "sendto": (44, 206), "recvfrom": (45, 207), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "futex": (202, 98),
    "clock_gettime": (228, 113), "getrandom": (318, 278), "restart_syscall": (219, 128), "getpid": (39, 172),
    "gettid": (186, 178), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
_HOST_CALLS: Final = {
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "kcmp": (312, 272), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "perf_event_open": (298, 241), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "open_by_handle_at": (304, 265), "userfaultfd": (323, 282), "reboot": (169, 142), "swapon": (167, 224),
    "acct": (163, 89), "quotactl": (179, 60), "io_uring_setup": (425, 425), "iopl": (172, -1), "ioperm": (173, -1),
}  # fmt: skip
NUMBERS: Final[dict[str, tuple[int, int]]] = _WORKER_CALLS | _HOST_CALLS
#: What the privileged host never needs again once it is set up.
HOST_DENIED: Final = tuple(_HOST_CALLS)


@dataclass(frozen=True, slots=True)
class ArgRule:
    """Allows a call only if argument ``index`` (its low 32 bits) is ``equals``, or has none of the bits ``clear``."""

    index: int
    equals: int | None = None
    clear: int = 0


def worker_rules(socket_fd: int) -> dict[str, ArgRule | None]:
    """Return what a worker may call once its module is compiled: talk on its socket, move memory, end."""
    on_socket = ArgRule(0, equals=socket_fd)
    no_exec = ArgRule(2, clear=mmap.PROT_EXEC)
    rules: dict[str, ArgRule | None] = dict.fromkeys(("read", "write", "sendto", "recvfrom"), on_socket)
    rules |= dict.fromkeys(("mmap", "mprotect"), no_exec)
    rules |= dict.fromkeys(
        ("munmap", "mremap", "madvise", "brk", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "futex",
         "clock_gettime", "getrandom", "restart_syscall", "getpid", "gettid", "exit", "exit_group")
    )  # fmt: skip
    return rules


def supported() -> bool:
    """Say whether the filter knows this machine's system call numbers."""
    return platform.machine() in _MACHINES


def allow_only(rules: Mapping[str, ArgRule | None], otherwise: int, machine: str | None = None) -> bytes:
    """Assemble a filter that allows what the rules say and answers the rest with the action ``otherwise``.

    Raises:
        OSError: the machine's numbers are not known.
    """
    body: list[tuple[int, int, int, int]] = []
    for number, rule in _numbered(rules, machine):
        body += _allow(number, rule, otherwise)
    return _assemble([*_prologue(machine), *body, (_RET_K, 0, 0, otherwise)])


def deny_only(names: Sequence[str], action: int = RET_EPERM, machine: str | None = None) -> bytes:
    """Assemble a filter that answers the named calls with ``action`` and allows the rest.

    Raises:
        OSError: the machine's numbers are not known.
    """
    body: list[tuple[int, int, int, int]] = []
    for number, _ in _numbered(dict.fromkeys(names), machine):
        body += [(_JEQ_K, 0, 1, number), (_RET_K, 0, 0, action)]
    return _assemble([*_prologue(machine), *body, (_RET_K, 0, 0, RET_ALLOW)])


def install(program: bytes) -> None:
    """Put a filter on this thread and all it will ever start; NO_NEW_PRIVS must be set.

    Raises:
        OSError: the kernel refuses the filter.
    """
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(ctypes.create_string_buffer(header, len(header))))


def _machine_index(machine: str | None) -> tuple[str, int]:
    name = machine or platform.machine()
    if name not in _MACHINES:
        raise OSError(f"no system call numbers for {name}")
    return name, list(_MACHINES).index(name)


def _numbered(rules: Mapping[str, ArgRule | None], machine: str | None) -> list[tuple[int, ArgRule | None]]:
    _, column = _machine_index(machine)
    return [(NUMBERS[name][column], rule) for name, rule in rules.items() if NUMBERS[name][column] >= 0]


def _prologue(machine: str | None) -> list[tuple[int, int, int, int]]:
    name, _ = _machine_index(machine)
    lines = [
        (_LD_W_ABS, 0, 0, _ARCH),
        (_JEQ_K, 1, 0, _MACHINES[name]),
        (_RET_K, 0, 0, RET_KILL_PROCESS),
        (_LD_W_ABS, 0, 0, _NR),
    ]
    if name == "x86_64":
        lines += [(_JGE_K, 0, 1, _X32_BIT), (_RET_K, 0, 0, RET_KILL_PROCESS)]
    return lines


def _allow(number: int, rule: ArgRule | None, otherwise: int) -> list[tuple[int, int, int, int]]:
    if rule is None:
        return [(_JEQ_K, 0, 1, number), (_RET_K, 0, 0, RET_ALLOW)]
    good = (_JEQ_K, 0, 1, rule.equals) if rule.equals is not None else (_JSET_K, 1, 0, rule.clear)
    return [
        (_JEQ_K, 0, 4, number),
        (_LD_W_ABS, 0, 0, _ARG0 + 8 * rule.index),
        good,
        (_RET_K, 0, 0, RET_ALLOW),
        (_RET_K, 0, 0, otherwise),
    ]


def _assemble(lines: Sequence[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("<HBBI", *line) for line in lines)
