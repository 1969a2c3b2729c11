"""A CPU run by KVM, with the interrupt controllers and the timer in the kernel."""

from __future__ import annotations

import fcntl
import signal
import struct
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from vmgraft.errors import EngineUnavailableError, HostError
from vmgraft.vmmhost.core import kvm_abi as abi
from vmgraft.vmmhost.core import kvmstate
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.cpu import FLAG_INTERRUPT, SEGMENTS, Cpu, CpuEnd, Dispatcher
from vmgraft.vmmhost.core.kvm import (
    INTERRUPTED,
    FailedExit,
    HaltExit,
    Kvm,
    MmioExit,
    PioExit,
    ShutdownExit,
    VcpuExit,
    Vm,
)
from vmgraft.vmmhost.core.memory import ROM_BASE, GuestRam
from vmgraft.vmmhost.core.state import State, number, part

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: Three pages for the Intel TSS and one for the identity map, below the usual firmware flash, where no RAM can be.
TSS_ADDRESS: Final = 0xFFFBD000
IDENTITY_MAP_ADDRESS: Final = 0xFFFBC000

#: Sizes of a port access, and the bits of its value.
_PORT_SIZES: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF}
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


def with_leaves(table: bytes, leaves: Mapping[int, tuple[int, int, int, int]]) -> bytes:
    """Return a ``struct kvm_cpuid2`` in which these leaves, whatever their subleaf, read as given.

    What no longer fits falls off the end of the table, where KVM lists its own leaves.
    """
    count = min(abi.CPUID_HEADER.unpack_from(table)[0], abi.CPUID_MAX_ENTRIES)
    start, size = abi.CPUID_HEADER.size, abi.CPUID_ENTRY_SIZE
    entries = [table[at : at + size] for at in range(start, start + count * size, size)]
    ours = [abi.CPUID_ENTRY.pack(leaf, 0, 0, *registers) for leaf, registers in sorted(leaves.items())]
    others = [entry for entry in entries if int.from_bytes(entry[:4], "little") not in leaves]
    kept = [*others[: abi.CPUID_MAX_ENTRIES - len(ours)], *ours]
    return abi.CPUID_HEADER.pack(len(kept), 0) + b"".join(kept)


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
        self._left: VcpuExit | None = None  # an access that came while the guest was brought to rest
        self._next_poll = 0.0

    def _build(self, kvm: Kvm) -> Vm:
        vm = kvm.create_vm()
        try:
            vm.place_helpers(TSS_ADDRESS, IDENTITY_MAP_ADDRESS)
            vm.create_irqchip()
            readonly = kvm.extension(abi.CAP_READONLY_MEM) > 0
            for slot, span in enumerate(self.ram.spans()):
                vm.set_memory(slot, span.gpa, span.size, span.address, readonly=readonly and not span.writable)
        except HostError:
            vm.close()
            raise
        self.ram.protected = self._protect if readonly else None
        return vm

    def _protect(self, slot: int, writable: bool) -> None:
        """Make a slot read-only or writable: KVM takes no such change, but a slot that is made anew."""
        if self._vm is not None:
            span = self.ram.spans()[slot]
            self._vm.set_memory(slot, span.gpa, 0, span.address, readonly=not span.writable)
            self._vm.set_memory(slot, span.gpa, span.size, span.address, readonly=not writable)

    def _reset(self) -> None:
        """Start at F000:FFF0 with the code segment based where the ROM lies."""
        sregs = self._vcpu.get_sregs()
        for index, name in enumerate(abi.SEGMENT_NAMES[:6]):
            base, selector = (ROM_BASE, ROM_BASE >> 4) if name == "cs" else (0, 0)
            struct.pack_into("<QIH", sregs, index * abi.SEGMENT.size, base, 0xFFFF, selector)
        self._vcpu.set_sregs(sregs)
        self._vcpu.set_regs(rip=0xFFF0, rsp=0x7C00, rflags=2)

    def show_cpuid(self, leaves: Mapping[int, tuple[int, int, int, int]]) -> None:
        """Replace these leaves; those that KVM itself reads, such as its signature, among them."""
        self._vcpu.set_cpuid(with_leaves(self._kvm.supported_cpuid(), leaves))

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
        while self._left is not None or not dispatcher.stopping:
            leave, self._left = self._left or self._ports(dispatcher), None
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
            elif leave is not None:
                exits["kick"] += 1
                if vcpu.halted() and not self.get("rflags") & FLAG_INTERRUPT:
                    return CpuEnd(EndReason.HALT, f"HLT with interrupts off at {self._where()}")
            self._poll(dispatcher)
        return None

    def _ports(self, dispatcher: Dispatcher) -> VcpuExit | None:
        """Run the guest and serve its accesses to ports in as few steps as can be, until something else happens.

        Returns:
            Why the guest was left, for the caller to deal with; None when it is only time to look around.
        """
        area, fd, ioctl, unpack = self._area, self._vcpu.fd, fcntl.ioctl, abi.EXIT_IO.unpack_from
        enter, why, ports, union = abi.KVM_RUN, abi.RUN_EXIT_REASON, abi.EXIT_REASON_IO, abi.RUN_UNION
        read, write, served, now = dispatcher.pio_read, dispatcher.pio_write, 0, time.monotonic
        try:
            while True:
                try:
                    ioctl(fd, enter, 0)
                except InterruptedError:
                    return INTERRUPTED
                except OSError as error:
                    return FailedExit(f"KVM_RUN failed: {error.strerror}")
                if area[why] != ports:
                    return self._vcpu.exit()
                outwards, size, port, count, at = unpack(area, union)
                if count != 1 or size not in _PORT_SIZES:
                    return self._vcpu.exit()
                served += 1
                if size == 1:
                    if outwards:
                        write(port, 1, area[at])
                    else:
                        area[at] = read(port, 1) & 0xFF
                elif outwards:
                    write(port, size, int.from_bytes(area[at : at + size], "little"))
                else:
                    area[at : at + size] = (read(port, size) & _PORT_SIZES[size]).to_bytes(size, "little")
                if dispatcher.stopping or now() >= self._next_poll:
                    return None
        finally:
            self.exits["pio"] += served

    def _poll(self, dispatcher: Dispatcher) -> None:
        now = time.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + dispatcher.poll_seconds
            dispatcher.poll()

    def _settle(self) -> None:
        """Complete the access the guest is in the midst of, so that its registers are those after it.

        An instruction may have further accesses: the next one is kept for the next :meth:`run`.
        """
        self._vcpu.immediate_exit(True)
        leave = self._vcpu.run()
        self._vcpu.immediate_exit(False)
        self._left = None if leave is INTERRUPTED else leave

    def state(self) -> State:
        """Return what the kernel keeps, and the time."""
        if self._vm is None or self._left is not None:
            raise HostError("the guest is in the midst of an instruction with many accesses", hint="try again")
        return {"kernel": kvmstate.save(self._vm.fd, self._vcpu.fd), "now": self.now_ns()}

    def set_state(self, state: State) -> None:
        """Bring it back."""
        if self._vm is None:
            raise HostError("the machine is closed")
        now = number(state, "now", range(1 << 62))
        kvmstate.load(self._vm.fd, self._vcpu.fd, part(state, "kernel"))
        self._start = time.monotonic_ns() - now

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
            if dispatcher.stopping and not dispatcher.resting:
                return

    def _mmio(self, leave: MmioExit, dispatcher: Dispatcher) -> None:
        if leave.write:
            dispatcher.mmio_write(leave.gpa, leave.size, int.from_bytes(leave.data, "little"))
            return
        value = dispatcher.mmio_read(leave.gpa, leave.size) & ((1 << (8 * leave.size)) - 1)
        self._area[abi.EXIT_MMIO_DATA : abi.EXIT_MMIO_DATA + leave.size] = value.to_bytes(leave.size, "little")

    def close(self) -> None:
        """Close vCPU, machine and system descriptor, in that order."""
        self.ram.protected = None
        if hasattr(self, "_vcpu"):
            self._vcpu.close()
        if self._vm is not None:
            self._vm.close()
            self._vm = None
        self._kvm.close()
