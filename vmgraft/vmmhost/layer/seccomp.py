"""Seccomp filters, assembled here: classic BPF over ``struct seccomp_data`` (linux/seccomp.h, linux/filter.h)."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import platform
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from vmgraft.vmmhost.layer.callnumbers import ALL as NUMBERS
from vmgraft.vmmhost.layer.syscalls import PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_every_thread, prctl

RET_KILL_PROCESS: Final = 0x8000_0000  # linux/seccomp.h
RET_ALLOW: Final = 0x7FFF_0000
RET_EPERM: Final = 0x0005_0000 | errno.EPERM
RET_ENOSYS: Final = 0x0005_0000 | errno.ENOSYS

_LD_W_ABS, _AND_K, _JEQ_K, _JGE_K, _JSET_K, _RET_K = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
_NR, _ARCH, _ARG0 = 0, 4, 16  # offsets in struct seccomp_data; each argument has 8 bytes, low half first
_X32_BIT: Final = 0x4000_0000  # asm/unistd.h: the x32 ABI shares AUDIT_ARCH_X86_64

_MACHINES: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}  # linux/audit.h: AUDIT_ARCH_*

Line = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class ArgRule:
    """What one argument of an allowed call must be; its low 32 bits count, as in the calls that rules are made for.

    Attributes:
        index: Which argument, from 0.
        equals: It must be one of these, once ``mask`` is applied; empty for no such demand.
        mask: The bits that ``equals`` speaks of.
        clear: None of these bits may be set.
        says: The rule in words.
    """

    index: int
    equals: tuple[int, ...] = ()
    mask: int = 0xFFFF_FFFF
    clear: int = 0
    says: str = ""


Rules = Mapping[str, tuple[ArgRule, ...]]


def supported() -> bool:
    """Say whether the filter knows this machine's system call numbers."""
    return platform.machine() in _MACHINES


def allow_only(rules: Rules, otherwise: int, machine: str | None = None, *, refused: Iterable[str] = ()) -> bytes:
    """Assemble a filter that allows what the rules say and answers the rest with the action ``otherwise``.

    Args:
        rules: By name of a call, of which one must hold; none for any use of the call.
        otherwise: The answer to every call without a rule, and to one whose rules do not hold.
        machine: As `platform.machine` names it; this one by default.
        refused: Calls that are answered with EPERM instead, and so is a call whose rules do not hold.

    Raises:
        OSError: the machine's numbers are not known.
    """
    names = tuple(refused)
    failed = RET_EPERM if names else otherwise
    body: list[Line] = []
    for name, number in _numbered(rules, machine):
        body += _allow(number, rules[name], failed)
    return _assemble([*_prologue(machine), *body, *_refuse(names, RET_EPERM, machine), (_RET_K, 0, 0, otherwise)])


def deny_only(names: Sequence[str], action: int = RET_EPERM, machine: str | None = None) -> bytes:
    """Assemble a filter that answers the named calls with ``action`` and allows the rest.

    Raises:
        OSError: the machine's numbers are not known.
    """
    return _assemble([*_prologue(machine), *_refuse(names, action, machine), (_RET_K, 0, 0, RET_ALLOW)])


def install(program: bytes, *, every_thread: bool = False) -> None:
    """Put a filter on this thread and all it will ever start; NO_NEW_PRIVS must be set.

    Args:
        program: An assembled filter.
        every_thread: On the threads that are there already too.

    Raises:
        OSError: the kernel refuses the filter.
    """
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    argument = ctypes.byref(ctypes.create_string_buffer(header, len(header)))
    if every_thread:
        filter_every_thread(argument)
    else:
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, argument)


def digest(program: bytes) -> str:
    """Return the SHA-256 of an assembled filter, in hexadecimal digits."""
    return hashlib.sha256(program).hexdigest()


def _machine_index(machine: str | None) -> tuple[str, int]:
    name = machine or platform.machine()
    if name not in _MACHINES:
        raise OSError(f"no system call numbers for {name}")
    return name, list(_MACHINES).index(name)


def _numbered(names: Iterable[str], machine: str | None) -> list[tuple[str, int]]:
    _, column = _machine_index(machine)
    return [(name, NUMBERS[name][column]) for name in names if NUMBERS[name][column] >= 0]


def _prologue(machine: str | None) -> list[Line]:
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


def _refuse(names: Iterable[str], action: int, machine: str | None) -> list[Line]:
    body: list[Line] = []
    for _name, number in _numbered(names, machine):
        body += [(_JEQ_K, 0, 1, number), (_RET_K, 0, 0, action)]
    return body


def _allow(number: int, rules: Sequence[ArgRule], otherwise: int) -> list[Line]:
    body: list[Line] = []
    for rule in rules:
        body += _match(rule)
    body.append((_RET_K, 0, 0, otherwise if rules else RET_ALLOW))
    return [(_JEQ_K, 0, len(body), number), *body]


def _match(rule: ArgRule) -> list[Line]:
    """Return the lines that allow the call where a rule holds, and go on behind themselves where it does not."""
    lines: list[Line] = [(_LD_W_ABS, 0, 0, _ARG0 + 8 * rule.index)]
    if not rule.equals:
        return [*lines, (_JSET_K, 1, 0, rule.clear), (_RET_K, 0, 0, RET_ALLOW)]
    if rule.mask != 0xFFFF_FFFF:
        lines.append((_AND_K, 0, 0, rule.mask))
    for value in rule.equals:
        lines += [(_JEQ_K, 0, 1, value), (_RET_K, 0, 0, RET_ALLOW)]
    return lines


def _assemble(lines: Sequence[Line]) -> bytes:
    return b"".join(struct.pack("<HBBI", *line) for line in lines)
