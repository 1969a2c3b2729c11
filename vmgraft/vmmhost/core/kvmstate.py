"""The state that KVM keeps of a CPU and its machine: one structure of the kernel after the other, as they are.

The kernel checks what it is given. Structures and numbers: Linux ``include/uapi/linux/kvm.h`` and
``arch/x86/include/uapi/asm/kvm.h``.
"""

from __future__ import annotations

import fcntl
import struct
from dataclasses import dataclass
from typing import Final

from vmgraft.errors import HostError
from vmgraft.vmmhost.core import kvm_abi as abi
from vmgraft.vmmhost.core.state import State, blob, refuse


@dataclass(frozen=True, slots=True)
class _Piece:
    """One structure: ioctl numbers and size; ``choice`` is written to its first word before it is read."""

    name: str
    get: int
    set: int
    size: int
    choice: int | None = None


def _pair(name: str, get: int, put: int, size: int, choice: int | None = None) -> _Piece:
    if choice is not None:  # which chip: the structure goes both ways on reading
        return _Piece(name, abi.iowr(get, size), abi.ior(put, size), size, choice)
    return _Piece(name, abi.ior(get, size), abi.iow(put, size), size)


#: Of the machine: interrupt controllers, timer, clock.
_VM: Final = (
    *(_pair(f"irqchip{index}", 0x62, 0x63, 520, index) for index in range(3)),
    _pair("pit", 0x9F, 0xA0, 112),
    _pair("clock", 0x7C, 0x7B, 48),
)
#: Of the CPU, in the order in which they are brought back: registers before events, the local APIC after its base.
_VCPU: Final = (
    _pair("sregs", 0x83, 0x84, abi.SREGS_SIZE),
    _pair("xcrs", 0xA6, 0xA7, 392),
    _pair("xsave", 0xA4, 0xA5, 4096),
    _pair("regs", 0x81, 0x82, abi.REGS_SIZE),
    _pair("lapic", 0x8E, 0x8F, 1024),
    _pair("debugregs", 0xA1, 0xA2, 128),
    _pair("mpState", 0x98, 0x99, abi.MP_STATE.size),
    _pair("events", 0x9F, 0xA0, 64),
)
_GET_MSRS: Final = abi.iowr(0x88, 8)
_SET_MSRS: Final = abi.iow(0x89, 8)
#: struct kvm_msrs with one entry: number, padding, index, reserved, data.
_MSR: Final = struct.Struct("<IIIIQ")
#: TSC, SYSENTER, MISC_ENABLE, MTRRs, PAT, EFER and the SYSCALL registers, KVM's clock (Intel SDM volume 4; Linux
#: ``Documentation/virt/kvm/x86/msr.rst``). Those that this KVM does not have are left out.
_MSRS: Final = (
    *(0x10, 0x174, 0x175, 0x176, 0x1A0, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270), 0x277, 0x2FF),
    *(0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102, 0x4B564D00, 0x4B564D01),
)
#: In struct kvm_clock_data, flags that belong to reading only.
_CLOCK_FLAGS_AT: Final = 8


def save(vm: int, vcpu: int) -> State:
    """Return what the kernel keeps; the CPU must stand between two instructions.

    Args:
        vm: Descriptor of the machine.
        vcpu: Descriptor of its CPU.

    Raises:
        HostError: when the kernel refuses.
    """
    state: State = {}
    for fd, pieces in ((vcpu, _VCPU), (vm, _VM)):
        for piece in pieces:
            raw = bytearray(piece.size)
            if piece.choice is not None:
                struct.pack_into("<I", raw, 0, piece.choice)
            _call(fd, piece.get, raw, piece.name)
            state[piece.name] = raw.hex()
    return state | {"msrs": [[index, value] for index in _MSRS if (value := _read_msr(vcpu, index)) is not None]}


def load(vm: int, vcpu: int, state: State) -> None:
    """Bring it back.

    Raises:
        HostError: when something is missing, has another size, or the kernel refuses it.
    """
    pieces = {piece.name: bytearray(blob(state, piece.name, piece.size)) for piece in (*_VM, *_VCPU)}
    msrs = state.get("msrs")
    if type(msrs) is not list or len(msrs) > len(_MSRS) or not all(_is_msr(each) for each in msrs):
        raise refuse("msrs")
    struct.pack_into("<I", pieces["clock"], _CLOCK_FLAGS_AT, 0)
    for index in range(3):
        struct.pack_into("<I", pieces[f"irqchip{index}"], 0, index)
    for piece in _VM:
        _call(vm, piece.set, pieces[piece.name], piece.name)
    for piece in _VCPU[:4]:
        _call(vcpu, piece.set, pieces[piece.name], piece.name)
    for index, value in msrs:
        _call(vcpu, _SET_MSRS, bytearray(_MSR.pack(1, 0, index, 0, value)), f"MSR {index:#x}")
    for piece in _VCPU[4:]:
        _call(vcpu, piece.set, pieces[piece.name], piece.name)


def _is_msr(item: object) -> bool:
    if type(item) is not list or len(item) != 2 or not all(type(each) is int for each in item):
        return False
    return item[0] in _MSRS and 0 <= item[1] < 1 << 64


def _read_msr(vcpu: int, index: int) -> int | None:
    raw = bytearray(_MSR.pack(1, 0, index, 0, 0))
    try:
        read = fcntl.ioctl(vcpu, _GET_MSRS, raw)
    except OSError:
        return None
    return int(_MSR.unpack(raw)[4]) if read == 1 else None


def _call(fd: int, request: int, raw: bytearray, name: str) -> None:
    try:
        fcntl.ioctl(fd, request, raw)
    except OSError as error:
        raise HostError(f"KVM and the snapshot do not agree: {error.strerror}", field=name) from error
