"""A CPU run by KVM, with the interrupt controllers and the timer in the kernel."""

from __future__ import annotations

import signal
import struct
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from vmgraft.errors import EngineUnavailableError, HostError
from vmgraft.vmmhost.core import kvm_abi as abi
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.cpu import FLAG_INTERRUPT, SEGMENTS, Cpu, CpuEnd, Dispatcher
from vmgraft.vmmhost.core.kvm import (
    FailedExit,
    HaltExit,
    Kvm,
    MmioExit,
    PioExit,
    ShutdownExit,
    Vm,
)
from vmgraft.vmmhost.core.memory import HIGH_BASE, LOW_END, ROM_BASE, GuestRam

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Three pages for the Intel TSS and one for the identity map, below the usual firmware flash, where no RAM can be.
TSS_ADDRESS: Final = 0xFFFBD000
IDENTITY_MAP_ADDRESS: Final = 0xFFFBC000

_QUAD = struct.Struct("<Q")
_REG_AT = {name: abi.RUN_SYNC_REGS + 8 * index for index, name in enumerate(abi.REG_NAMES)}
_SEGMENT_AT = {name: abi.RUN_SYNC_SREGS + abi.SEGMENT.size * index for index, name in enumerate(SEGMENTS)}
_CR0_AT = abi.RUN_SYNC_SREGS + abi.SREGS_CR0


def require_main_thread() -> None:
    """Refuse other threads, where Python does not set the signal handlers that interrupting a guest takes.

    Raises:
        EngineUnavailableError: outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise EngineUnavailableError(
            "the KVM engine runs in the main thread only", hint="choose the soft engine in other threads"
        )


@contextmanager
def periodic_kick(seconds: float) -> Iterator[None]:
    """Interrupt system calls of the main thread every ``seconds``; restore handler and timer afterwards.

    A kick that falls just before the guest is entered is lost, the next one is not.

    Raises:
        HostError: outside the main thread, where Python does not set signal handlers.
    """
    require_main_thread()
    handler = signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    start = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        if left:  # somebody else's alarm: late rather than never
            left = max(0.001, left - (time.monotonic() - start))
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)


class KvmCpu(Cpu):
    """One vCPU on ``/dev/kvm``.

    Raises:
        EngineUnavailableError: when KVM does not work here.
    """

    engine = "kvm"

    def __init__(self, ram: GuestRam) -> None:
        super().__init__(ram)
        self.emulated: bool | None = None
        self._kvm = Kvm()
        self._vm: Vm | None = None
        try:
            self._vm = self._build(self._kvm)
            self._vcpu = self._vm.create_vcpu()
            self._vcpu.set_cpuid(self._kvm.supported_cpuid())
            self._reset()
        except HostError as error:
            self.close()
            hint = "choose --cpu soft"
            raise EngineUnavailableError(error.message, file=error.file, hint=hint) from error
        self._area = self._vcpu.area
        self._start: int | None = None
        self._next_poll = 0.0

    def _build(self, kvm: Kvm) -> Vm:
        vm = kvm.create_vm()
        try:
            vm.place_helpers(TSS_ADDRESS, IDENTITY_MAP_ADDRESS)
            vm.create_irqchip()
            address = self.ram.host_address()
            readonly = kvm.extension(abi.CAP_READONLY_MEM) > 0
            vm.set_memory(0, 0, LOW_END, address)
            vm.set_memory(1, ROM_BASE, HIGH_BASE - ROM_BASE, address + ROM_BASE, readonly=readonly)
            vm.set_memory(2, HIGH_BASE, self.ram.size - HIGH_BASE, address + HIGH_BASE)
        except HostError:
            vm.close()
            raise
        return vm

    def _reset(self) -> None:
        """Start at F000:FFF0 with the code segment based where the ROM lies."""
        sregs = self._vcpu.get_sregs()
        for index, name in enumerate(abi.SEGMENT_NAMES[:6]):
            base, selector = (ROM_BASE, ROM_BASE >> 4) if name == "cs" else (0, 0)
            struct.pack_into("<QIH", sregs, index * abi.SEGMENT.size, base, 0xFFFF, selector)
        self._vcpu.set_sregs(sregs)
        self._vcpu.set_regs(rip=0xFFF0, rsp=0x7C00, rflags=2)

    def get(self, name: str) -> int:
        """Return a general register."""
        value: int = _QUAD.unpack_from(self._area, _REG_AT[name])[0]
        return value

    def set(self, name: str, value: int) -> None:
        """Set a general register."""
        _QUAD.pack_into(self._area, _REG_AT[name], value)
        _QUAD.pack_into(self._area, abi.RUN_DIRTY_REGS, abi.SYNC_X86_REGS)

    def segment_base(self, name: str) -> int:
        """Return a segment's base."""
        base: int = _QUAD.unpack_from(self._area, _SEGMENT_AT[name])[0]
        return base

    def protected(self) -> bool:
        """Whether CR0.PE is set."""
        return bool(_QUAD.unpack_from(self._area, _CR0_AT)[0] & 1)

    def now_ns(self) -> int:
        """Return wall-clock time since :meth:`run` was first called: the guest's timers follow it too."""
        return 0 if self._start is None else time.monotonic_ns() - self._start

    def set_irq(self, line: int, level: bool) -> None:
        """Drive a line of the in-kernel controllers."""
        if self._vm is not None:
            self._vm.irq_line(line, level)

    def run(self, dispatcher: Dispatcher) -> CpuEnd | None:
        """Run until the guest ends or the dispatcher stops it."""
        if self._start is None:
            self._start = time.monotonic_ns()
        with periodic_kick(dispatcher.poll_seconds):
            end = self._loop(dispatcher)
        if end is None:
            self._settle()
        return end

    def _loop(self, dispatcher: Dispatcher) -> CpuEnd | None:
        vcpu, exits = self._vcpu, self.exits
        self._next_poll = time.monotonic() + dispatcher.poll_seconds
        while not dispatcher.stopping:
            leave = vcpu.run()
            if isinstance(leave, PioExit):
                exits["pio"] += 1
                self._pio(leave, dispatcher)
            elif isinstance(leave, MmioExit):
                exits["mmio"] += 1
                self._mmio(leave, dispatcher)
            elif isinstance(leave, ShutdownExit):
                return CpuEnd(EndReason.RESET, "triple fault")
            elif isinstance(leave, HaltExit):
                return CpuEnd(EndReason.HALT, "the CPU halted")
            elif isinstance(leave, FailedExit):
                return CpuEnd(EndReason.ERROR, f"{leave.detail} at {self._where()}")
            else:
                exits["kick"] += 1
                if vcpu.halted() and not self.get("rflags") & FLAG_INTERRUPT:
                    return CpuEnd(EndReason.HALT, f"HLT with interrupts off at {self._where()}")
            self._poll(dispatcher)
        return None

    def _poll(self, dispatcher: Dispatcher) -> None:
        now = time.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + dispatcher.poll_seconds
            dispatcher.poll()

    def _settle(self) -> None:
        """Complete the access the guest is in the midst of, so that its registers are those after it."""
        self._vcpu.immediate_exit(True)
        self._vcpu.run()
        self._vcpu.immediate_exit(False)

    def _where(self) -> str:
        return f"{self.segment_base('cs'):#x}:{self.get('rip'):#x}"

    def _pio(self, leave: PioExit, dispatcher: Dispatcher) -> None:
        area, size, mask = self._area, leave.size, (1 << (8 * leave.size)) - 1
        for start in range(leave.offset, leave.offset + size * leave.count, size):
            if leave.write:
                dispatcher.pio_write(leave.port, size, int.from_bytes(area[start : start + size], "little"))
            else:
                value = dispatcher.pio_read(leave.port, size) & mask
                area[start : start + size] = value.to_bytes(size, "little")
            # One exit may stand for thousands of accesses, and each of them may be slow.
            self._poll(dispatcher)
            if dispatcher.stopping:
                return

    def _mmio(self, leave: MmioExit, dispatcher: Dispatcher) -> None:
        if leave.write:
            dispatcher.mmio_write(leave.gpa, leave.size, int.from_bytes(leave.data, "little"))
            return
        value = dispatcher.mmio_read(leave.gpa, leave.size) & ((1 << (8 * leave.size)) - 1)
        self._area[abi.EXIT_MMIO_DATA : abi.EXIT_MMIO_DATA + leave.size] = value.to_bytes(leave.size, "little")

    def close(self) -> None:
        """Close vCPU, machine and system descriptor, in that order."""
        if hasattr(self, "_vcpu"):
            self._vcpu.close()
        if self._vm is not None:
            self._vm.close()
            self._vm = None
        self._kvm.close()
