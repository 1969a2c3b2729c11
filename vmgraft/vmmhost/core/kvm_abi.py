"""Numbers and layouts of the KVM interface on x86.

Names and values are those of Linux ``include/uapi/linux/kvm.h`` and ``arch/x86/include/uapi/asm/kvm.h``; ioctl numbers
are composed as in ``asm-generic/ioctl.h``.
"""

from __future__ import annotations

import struct
from typing import Final

KVMIO: Final = 0xAE


def _io(number: int) -> int:
    return (KVMIO << 8) | number


def iow(number: int, size: int) -> int:
    """Return the number of an ioctl whose argument of ``size`` bytes is written to the kernel."""
    return (1 << 30) | (size << 16) | _io(number)


def ior(number: int, size: int) -> int:
    """Return the number of an ioctl whose argument of ``size`` bytes is read from the kernel."""
    return (2 << 30) | (size << 16) | _io(number)


def iowr(number: int, size: int) -> int:
    """Return the number of an ioctl whose argument of ``size`` bytes goes both ways."""
    return (3 << 30) | (size << 16) | _io(number)


# --- structures ---------------------------------------------------------------------------------------------------

#: struct kvm_userspace_memory_region: slot, flags, guest_phys_addr, memory_size, userspace_addr.
MEMORY_REGION: Final = struct.Struct("<IIQQQ")
#: struct kvm_irq_level: irq, level.
IRQ_LEVEL: Final = struct.Struct("<II")
#: struct kvm_pit_config: flags, 15 reserved words.
PIT_CONFIG: Final = struct.Struct("<I60x")
#: struct kvm_mp_state.
MP_STATE: Final = struct.Struct("<I")
#: struct kvm_regs: 18 quadwords in this order.
REG_NAMES: Final = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags"),
)
REGS_SIZE: Final = 8 * len(REG_NAMES)
#: struct kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding.
SEGMENT: Final = struct.Struct("<QIHBBBBBBBBBB")
SEGMENT_NAMES: Final = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
#: Offset of cr0 in struct kvm_sregs: eight segments and two 16-byte descriptor tables before it.
SREGS_CR0: Final = SEGMENT.size * len(SEGMENT_NAMES) + 2 * 16
SREGS_SIZE: Final = 312
#: struct kvm_cpuid2: nent, padding; then entries of struct kvm_cpuid_entry2.
CPUID_HEADER: Final = struct.Struct("<II")
#: struct kvm_cpuid_entry2: function, index, flags, EAX, EBX, ECX, EDX, padding.
CPUID_ENTRY: Final = struct.Struct("<7I12x")
CPUID_ENTRY_SIZE: Final = CPUID_ENTRY.size
CPUID_MAX_ENTRIES: Final = 256

# --- struct kvm_run -------------------------------------------------------------------------------------------------

RUN_IMMEDIATE_EXIT: Final = 1
RUN_EXIT_REASON: Final = 8
RUN_UNION: Final = 32
RUN_VALID_REGS: Final = 288
RUN_DIRTY_REGS: Final = 296
RUN_SYNC_REGS: Final = 304
RUN_SYNC_SREGS: Final = RUN_SYNC_REGS + REGS_SIZE
#: Smallest mapping that holds all of the above.
RUN_MIN_SIZE: Final = RUN_SYNC_SREGS + SREGS_SIZE

#: union member ``io``: direction, size, port, count, data_offset.
EXIT_IO: Final = struct.Struct("<BBHIQ")
#: union member ``mmio``: phys_addr, data[8], len, is_write.
EXIT_MMIO: Final = struct.Struct("<Q8sIB")
EXIT_MMIO_DATA: Final = RUN_UNION + 8
#: first words of ``internal`` (suberror, ndata) and of ``system_event`` (type, ndata).
EXIT_WORDS: Final = struct.Struct("<II")
#: union members ``fail_entry`` and ``hw``: one hardware code.
EXIT_HARDWARE: Final = struct.Struct("<Q")

SYNC_X86_REGS: Final = 1
SYNC_X86_SREGS: Final = 2

EXIT_REASON_IO: Final = 2
EXIT_REASON_HLT: Final = 5
EXIT_REASON_MMIO: Final = 6
EXIT_REASON_SHUTDOWN: Final = 8
EXIT_REASON_FAIL_ENTRY: Final = 9
EXIT_REASON_INTR: Final = 10
EXIT_REASON_INTERNAL_ERROR: Final = 17
EXIT_REASON_SYSTEM_EVENT: Final = 24

# --- ioctls ---------------------------------------------------------------------------------------------------------

API_VERSION: Final = 12

KVM_GET_API_VERSION: Final = _io(0x00)
KVM_CREATE_VM: Final = _io(0x01)
KVM_CHECK_EXTENSION: Final = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE: Final = _io(0x04)
KVM_GET_SUPPORTED_CPUID: Final = iowr(0x05, CPUID_HEADER.size)
KVM_CREATE_VCPU: Final = _io(0x41)
KVM_SET_USER_MEMORY_REGION: Final = iow(0x46, MEMORY_REGION.size)
KVM_SET_TSS_ADDR: Final = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR: Final = iow(0x48, 8)
KVM_CREATE_IRQCHIP: Final = _io(0x60)
KVM_IRQ_LINE: Final = iow(0x61, IRQ_LEVEL.size)
KVM_CREATE_PIT2: Final = iow(0x77, 64)
KVM_RUN: Final = _io(0x80)
KVM_GET_REGS: Final = ior(0x81, REGS_SIZE)
KVM_SET_REGS: Final = iow(0x82, REGS_SIZE)
KVM_GET_SREGS: Final = ior(0x83, SREGS_SIZE)
KVM_SET_SREGS: Final = iow(0x84, SREGS_SIZE)
KVM_SET_CPUID2: Final = iow(0x90, CPUID_HEADER.size)
KVM_GET_MP_STATE: Final = ior(0x98, MP_STATE.size)

# --- capabilities and flags -----------------------------------------------------------------------------------------

CAP_IRQCHIP: Final = 0
CAP_USER_MEMORY: Final = 3
CAP_PIT2: Final = 33
CAP_SYNC_REGS: Final = 74
CAP_READONLY_MEM: Final = 81

MEM_READONLY: Final = 1 << 1
MP_STATE_HALTED: Final = 3
