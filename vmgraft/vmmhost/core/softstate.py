"""The registers of the software CPU, taken and brought back by name.

Only what Unicorn gives by name: raw engine state holds pointers of a process, and a snapshot is a file. Segments come
back from their selectors, and in protected mode from the guest's own descriptor tables.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final

from vmgraft.errors import HostError
from vmgraft.vmmhost.core.state import State, number, refuse

_WORD: Final = range(1 << 32)
#: Register → how many bits it has; in the order in which they are brought back: tables before segments.
_NUMBERS: Final = {
    **dict.fromkeys(("CR0", "CR2", "CR3", "CR4", *(f"DR{index}" for index in (0, 1, 2, 3, 6, 7))), _WORD),
    **dict.fromkeys(("EAX", "EBX", "ECX", "EDX", "ESI", "EDI", "EBP", "ESP"), _WORD),
    **dict.fromkeys(("FPCW", "FPSW", "FPTAG"), range(1 << 16)),
    "MXCSR": _WORD,
    **{f"XMM{index}": range(1 << 128) for index in range(8)},
}
_TABLES: Final = ("GDTR", "IDTR", "LDTR", "TR")
_SEGMENTS: Final = ("SS", "DS", "ES", "FS", "GS", "CS")
_STACK: Final = tuple(f"FP{index}" for index in range(8))
#: SYSENTER, PAT, EFER, STAR, LSTAR, CSTAR, SFMASK (Intel SDM volume 4).
_MSRS: Final = (0x174, 0x175, 0x176, 0x277, 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084)
_EFER: Final = 0xC0000080
_EFER_LMA: Final = 1 << 10
#: Protection and paging of CR0: taken back first and set again last, so that tables are there when they count.
_CR0_REAL: Final = 0x10


def save(uc: Any, names: ModuleType) -> State:
    """Return every register.

    Raises:
        HostError: in 64-bit mode, of whose registers this engine shows half.
    """
    if uc.msr_read(_EFER) & _EFER_LMA:
        raise HostError("the software CPU cannot keep a guest in 64-bit mode", hint="take the snapshot on KVM")

    def read(name: str) -> Any:
        return uc.reg_read(getattr(names, f"UC_X86_REG_{name}"))

    state: State = {name: int(read(name)) for name in (*_NUMBERS, *_SEGMENTS, "EIP", "EFLAGS")}
    state |= {name: [int(value) for value in read(name)] for name in (*_TABLES, *_STACK)}
    return state | {"msrs": [int(uc.msr_read(index)) for index in _MSRS]}


def load(uc: Any, names: ModuleType, state: State) -> None:
    """Bring every register back; guest memory must be back already.

    Raises:
        HostError: when one is missing or out of bounds.
        unicorn.UcError: when a selector does not fit the guest's tables.
    """
    values = {name: number(state, name, allowed) for name, allowed in _NUMBERS.items()}
    segments = {name: number(state, name, range(1 << 16)) for name in _SEGMENTS}
    eip, flags = number(state, "EIP", _WORD), number(state, "EFLAGS", _WORD)
    tables = {name: _integers(state, name, 4) for name in _TABLES}
    stack = {name: _integers(state, name, 2) for name in _STACK}
    msrs = _integers(state, "msrs", len(_MSRS))

    def write(name: str, value: Any) -> None:
        uc.reg_write(getattr(names, f"UC_X86_REG_{name}"), value)

    for index, value in zip(_MSRS, msrs, strict=True):
        uc.msr_write(index, value)
    for name, table in tables.items():
        write(name, table)
    write("CR0", values["CR0"] & 1 | _CR0_REAL)
    for name, value in segments.items():
        write(name, value)
    for name, register in stack.items():
        write(name, register)
    for name, value in values.items():
        write(name, value)
    write("EFLAGS", flags)
    write("EIP", eip)


def _integers(state: State, name: str, length: int) -> tuple[int, ...]:
    values = state.get(name)
    if type(values) is not list or len(values) != length:
        raise refuse(name)
    if not all(type(each) is int and 0 <= each < 1 << 64 for each in values):
        raise refuse(name)
    return tuple(values)
