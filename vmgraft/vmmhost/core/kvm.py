"""KVM by file descriptor: ``Kvm`` makes a ``Vm``, a ``Vm`` makes a ``Vcpu``; each owns and closes its own.

Only ``fcntl.ioctl`` and, where its argument conversion is too narrow, libc's ``ioctl`` through ctypes.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from vmgraft.errors import EngineUnavailableError, HostError
from vmgraft.vmmhost.core import kvm_abi as abi

DEVICE = "/dev/kvm"


@dataclass(frozen=True, slots=True)
class PioExit:
    """An IN or OUT; ``count`` items of ``size`` bytes lie at ``offset`` of the run area."""

    write: bool
    port: int
    size: int
    count: int
    offset: int


@dataclass(frozen=True, slots=True)
class MmioExit:
    """An access to a guest-physical address without RAM; ``data`` are the bytes written."""

    write: bool
    gpa: int
    size: int
    data: bytes


@dataclass(frozen=True, slots=True)
class HaltExit:
    """HLT, only without an in-kernel interrupt controller."""


@dataclass(frozen=True, slots=True)
class ShutdownExit:
    """Triple fault."""


@dataclass(frozen=True, slots=True)
class InterruptedExit:
    """A signal arrived, or ``immediate_exit`` was set."""


@dataclass(frozen=True, slots=True)
class FailedExit:
    """Terminal: KVM cannot go on; ``detail`` says in which words."""

    detail: str


VcpuExit = PioExit | MmioExit | HaltExit | ShutdownExit | InterruptedExit | FailedExit

INTERRUPTED = InterruptedExit()


def _libc_ioctl(fd: int, request: int, argument: int | ctypes.Array[ctypes.c_char], what: str) -> None:
    """Call ioctl with a full-width argument, which ``fcntl.ioctl`` would squeeze through a C int."""
    libc = ctypes.CDLL(None, use_errno=True)
    value = ctypes.c_ulong(argument) if isinstance(argument, int) else argument
    if libc.ioctl(fd, ctypes.c_ulong(request), value) < 0:
        raise HostError(f"{what} failed: {os.strerror(ctypes.get_errno())}", file=DEVICE)


def _ioctl(fd: int, request: int, argument: int | bytes | bytearray, what: str) -> int:
    try:
        result = fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise HostError(f"{what} failed: {error.strerror}", file=DEVICE) from error
    return result if isinstance(result, int) else 0


class _Descriptor:
    """Owner of one file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Close the descriptor; calling it again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Kvm(_Descriptor):
    """The system descriptor.

    Raises:
        EngineUnavailableError: when the device is missing, not permitted, or speaks another API version.
    """

    def __init__(self) -> None:
        try:
            fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            hint = "choose --cpu soft, or ask for access to the device (group kvm)"
            raise EngineUnavailableError(f"cannot open: {error.strerror}", file=DEVICE, hint=hint) from error
        super().__init__(fd)
        try:
            self._check()
        except HostError as error:
            self.close()
            raise EngineUnavailableError(error.message, file=DEVICE, hint="choose --cpu soft") from error

    def _check(self) -> None:
        version = _ioctl(self.fd, abi.KVM_GET_API_VERSION, 0, "KVM_GET_API_VERSION")
        if version != abi.API_VERSION:
            raise HostError(f"KVM API version {version}, need {abi.API_VERSION}")
        needed = abi.SYNC_X86_REGS | abi.SYNC_X86_SREGS
        if self.extension(abi.CAP_SYNC_REGS) & needed != needed:
            raise HostError("this KVM lacks KVM_CAP_SYNC_REGS")
        for cap, name in ((abi.CAP_USER_MEMORY, "USER_MEMORY"), (abi.CAP_IRQCHIP, "IRQCHIP"), (abi.CAP_PIT2, "PIT2")):
            if not self.extension(cap):
                raise HostError(f"this KVM lacks KVM_CAP_{name}")

    def extension(self, capability: int) -> int:
        """Return what KVM_CHECK_EXTENSION says: 0 when missing."""
        return _ioctl(self.fd, abi.KVM_CHECK_EXTENSION, capability, "KVM_CHECK_EXTENSION")

    def run_size(self) -> int:
        """Return the size in bytes of a vCPU's shared run area."""
        size = _ioctl(self.fd, abi.KVM_GET_VCPU_MMAP_SIZE, 0, "KVM_GET_VCPU_MMAP_SIZE")
        if size < abi.RUN_MIN_SIZE:
            raise HostError(f"KVM run area of {size} bytes is too small", file=DEVICE)
        return size

    def supported_cpuid(self) -> bytes:
        """Return a ``struct kvm_cpuid2`` with every leaf the host can give a guest."""
        raw = bytearray(abi.CPUID_HEADER.size + abi.CPUID_ENTRY_SIZE * abi.CPUID_MAX_ENTRIES)
        abi.CPUID_HEADER.pack_into(raw, 0, abi.CPUID_MAX_ENTRIES, 0)
        buffer = (ctypes.c_char * len(raw)).from_buffer(raw)
        _libc_ioctl(self.fd, abi.KVM_GET_SUPPORTED_CPUID, buffer, "KVM_GET_SUPPORTED_CPUID")
        return bytes(raw)

    def create_vm(self) -> Vm:
        """Return a new, empty virtual machine."""
        run_size = self.run_size()
        return Vm(_ioctl(self.fd, abi.KVM_CREATE_VM, 0, "KVM_CREATE_VM"), run_size)


class Vm(_Descriptor):
    """One virtual machine."""

    def __init__(self, fd: int, run_size: int) -> None:
        super().__init__(fd)
        self._run_size = run_size

    def set_memory(self, slot: int, gpa: int, size: int, host_address: int, *, readonly: bool = False) -> None:
        """Back ``size`` bytes at ``gpa`` by host memory at ``host_address``."""
        flags = abi.MEM_READONLY if readonly else 0
        region = abi.MEMORY_REGION.pack(slot, flags, gpa, size, host_address)
        _ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION, region, "KVM_SET_USER_MEMORY_REGION")

    def place_helpers(self, tss: int, identity_map: int) -> None:
        """Tell Intel hosts where three pages for the TSS and one for the identity map lie free."""
        _libc_ioctl(self.fd, abi.KVM_SET_TSS_ADDR, tss, "KVM_SET_TSS_ADDR")
        packed = struct.pack("<Q", identity_map)
        _ioctl(self.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, packed, "KVM_SET_IDENTITY_MAP_ADDR")

    def create_irqchip(self) -> None:
        """Give the machine two 8259A, an I/O APIC, local APICs and an 8254 in the kernel."""
        _ioctl(self.fd, abi.KVM_CREATE_IRQCHIP, 0, "KVM_CREATE_IRQCHIP")
        _ioctl(self.fd, abi.KVM_CREATE_PIT2, abi.PIT_CONFIG.pack(0), "KVM_CREATE_PIT2")

    def irq_line(self, line: int, level: bool) -> None:
        """Drive interrupt ``line`` of the in-kernel interrupt controller."""
        _ioctl(self.fd, abi.KVM_IRQ_LINE, abi.IRQ_LEVEL.pack(line, level), "KVM_IRQ_LINE")

    def create_vcpu(self, index: int = 0) -> Vcpu:
        """Return a new virtual CPU."""
        fd = _ioctl(self.fd, abi.KVM_CREATE_VCPU, index, "KVM_CREATE_VCPU")
        return Vcpu(fd, self._run_size)


class Vcpu(_Descriptor):
    """One virtual CPU and its shared run area; registers travel in that area (KVM_CAP_SYNC_REGS)."""

    def __init__(self, fd: int, run_size: int) -> None:
        super().__init__(fd)
        try:
            self.area = mmap.mmap(fd, run_size)
        except OSError as error:
            self.close()
            raise HostError(f"mapping the KVM run area failed: {error.strerror}", file=DEVICE) from error
        self._reason = struct.Struct("<I")
        struct.pack_into("<Q", self.area, abi.RUN_VALID_REGS, abi.SYNC_X86_REGS | abi.SYNC_X86_SREGS)

    def close(self) -> None:
        """Unmap the run area and close the descriptor."""
        if hasattr(self, "area"):
            self.area.close()
        super().close()

    def set_cpuid(self, cpuid: bytes) -> None:
        """Give the guest these CPUID leaves."""
        buffer = ctypes.create_string_buffer(cpuid, len(cpuid))
        _libc_ioctl(self.fd, abi.KVM_SET_CPUID2, buffer, "KVM_SET_CPUID2")

    def get_sregs(self) -> bytearray:
        """Return ``struct kvm_sregs``."""
        raw = bytearray(abi.SREGS_SIZE)
        _ioctl(self.fd, abi.KVM_GET_SREGS, raw, "KVM_GET_SREGS")
        return raw

    def set_sregs(self, raw: bytes | bytearray) -> None:
        """Set ``struct kvm_sregs``."""
        _ioctl(self.fd, abi.KVM_SET_SREGS, bytes(raw), "KVM_SET_SREGS")

    def set_regs(self, **values: int) -> None:
        """Set all general registers: those named, the others to 0."""
        raw = struct.pack("<18Q", *(values.get(name, 0) for name in abi.REG_NAMES))
        _ioctl(self.fd, abi.KVM_SET_REGS, raw, "KVM_SET_REGS")

    def halted(self) -> bool:
        """Whether the vCPU sleeps in HLT (in-kernel interrupt controller)."""
        raw = bytearray(abi.MP_STATE.size)
        _ioctl(self.fd, abi.KVM_GET_MP_STATE, raw, "KVM_GET_MP_STATE")
        return bool(abi.MP_STATE.unpack(raw)[0] == abi.MP_STATE_HALTED)

    def immediate_exit(self, wanted: bool) -> None:
        """Let the next :meth:`run` only complete the pending exit."""
        self.area[abi.RUN_IMMEDIATE_EXIT] = int(wanted)

    def run(self) -> VcpuExit:
        """Run the guest until its next exit."""
        try:
            fcntl.ioctl(self.fd, abi.KVM_RUN, 0)
        except InterruptedError:
            return INTERRUPTED
        except OSError as error:
            return FailedExit(f"KVM_RUN failed: {error.strerror}")
        return self.exit()

    def exit(self) -> VcpuExit:
        """Return why the guest was left, as the run area says."""
        reason = self._reason.unpack_from(self.area, abi.RUN_EXIT_REASON)[0]
        decode = _DECODERS.get(reason)
        return FailedExit(f"unexpected KVM exit {reason}") if decode is None else decode(self.area)


def _pio(area: mmap.mmap) -> VcpuExit:
    direction, size, port, count, offset = abi.EXIT_IO.unpack_from(area, abi.RUN_UNION)
    if size not in (1, 2, 4) or offset + size * count > len(area):
        return FailedExit(f"KVM reports an impossible port access of {count} times {size} bytes")
    return PioExit(bool(direction), port, size, count, offset)


def _mmio(area: mmap.mmap) -> VcpuExit:
    gpa, data, size, write = abi.EXIT_MMIO.unpack_from(area, abi.RUN_UNION)
    if not 1 <= size <= 8:
        return FailedExit(f"KVM reports an impossible memory access of {size} bytes")
    return MmioExit(bool(write), gpa, size, data[:size])


def _internal(area: mmap.mmap) -> VcpuExit:
    suberror = abi.EXIT_WORDS.unpack_from(area, abi.RUN_UNION)[0]
    names = {1: "an instruction could not be emulated", 2: "exceptions nested", 3: "an exit during event delivery"}
    return FailedExit(f"KVM internal error {suberror}: {names.get(suberror, 'unknown')}")


def _fail_entry(area: mmap.mmap) -> VcpuExit:
    code = abi.EXIT_HARDWARE.unpack_from(area, abi.RUN_UNION)[0]
    return FailedExit(f"the CPU refused to enter the guest, code {code:#x}")


def _system_event(area: mmap.mmap) -> VcpuExit:
    return FailedExit(f"KVM system event {abi.EXIT_WORDS.unpack_from(area, abi.RUN_UNION)[0]}")


_DECODERS: dict[int, Callable[[mmap.mmap], VcpuExit]] = {
    abi.EXIT_REASON_IO: _pio,
    abi.EXIT_REASON_MMIO: _mmio,
    abi.EXIT_REASON_HLT: lambda _: HaltExit(),
    abi.EXIT_REASON_SHUTDOWN: lambda _: ShutdownExit(),
    abi.EXIT_REASON_INTR: lambda _: INTERRUPTED,
    abi.EXIT_REASON_INTERNAL_ERROR: _internal,
    abi.EXIT_REASON_FAIL_ENTRY: _fail_entry,
    abi.EXIT_REASON_SYSTEM_EVENT: _system_event,
}
