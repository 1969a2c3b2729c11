"""A CPU emulated in software by Unicorn: needs no /dev/kvm, and repeats itself exactly.

The guest runs in slices of a counted number of instructions, so virtual time, interrupts and the I/O trace do not depend
on the wall clock. (Stopping Unicorn asynchronously leaves a stale instruction pointer behind; counting does not.)
"""

from __future__ import annotations

import importlib
import time
from types import ModuleType
from typing import Any, Final

from vmgraft.errors import EngineUnavailableError
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.cpu import FLAG_INTERRUPT, GENERAL, POLL_SECONDS, SEGMENTS, Cpu, CpuEnd, Dispatcher
from vmgraft.vmmhost.core.memory import HIGH_BASE, LOW_END, ROM_BASE, GuestRam
from vmgraft.vmmhost.core.softint import DeliveryError, Deliverer
from vmgraft.vmmhost.core.softirq import PicPair, PicPorts, Pit

INSTALL_HINT: Final = "pip install 'vmgraft[soft]'"
#: Virtual nanoseconds an instruction takes; about what Unicorn does on a common CPU.
INSTRUCTION_NS: Final = 20
#: Virtual nanoseconds of a port access and of an interrupt, so that polling guests see time go by.
PIO_NS: Final = 1_000
INTERRUPT_NS: Final = 2_000
#: Instructions in a slice, at most and at least.
SLICE_MAX: Final = 200_000
SLICE_MIN: Final = 1_000
_NEVER: Final = 0xFFFFFFF0  # the address Unicorn would stop at; nothing is mapped executable there
_HLT: Final = 0xF4
_CLI: Final = 0xFA
_STI: Final = 0xFB
_POP_SS: Final = 0x17
_MOV_SREG: Final = 0x8E
_EFLAGS_VM: Final = 1 << 17
_EFER: Final = 0xC0000080
_READ_WRITE_EXECUTE: Final = 7
_FOUR_GIB: Final = 1 << 32


def load_unicorn() -> tuple[ModuleType, ModuleType]:
    """Import the engine and its x86 register numbers.

    Raises:
        EngineUnavailableError: when it is not installed.
    """
    try:
        return importlib.import_module("unicorn"), importlib.import_module("unicorn.x86_const")
    except ImportError as error:
        raise EngineUnavailableError(f"the software CPU cannot be loaded: {error}", hint=INSTALL_HINT) from error


class SoftCpu(Cpu):
    """One emulated CPU with two 8259A and an 8254.

    Raises:
        EngineUnavailableError: when Unicorn is missing.
    """

    engine = "soft"
    emulated: bool | None = True

    def __init__(self, ram: GuestRam) -> None:
        super().__init__(ram)
        self._unicorn, self._names = load_unicorn()
        self._uc = self._unicorn.Uc(self._unicorn.UC_ARCH_X86, self._unicorn.UC_MODE_32)
        self._ids = {name: getattr(self._names, f"UC_X86_REG_{'E' + name[1:].upper()}") for name in GENERAL}
        self._ids["rflags"] = self._names.UC_X86_REG_EFLAGS
        self._segment_ids = {name: getattr(self._names, f"UC_X86_REG_{name.upper()}") for name in SEGMENTS}
        self._now = 0
        self._vector: int | None = None
        self._last_eip = -1
        self._dispatcher: Dispatcher | None = None
        self.pics = PicPair()
        self.pit = Pit(self.pics, self.now_ns)
        self.ports: tuple[tuple[int, int, PicPorts | Pit], ...] = (
            (0x20, 0x21, PicPorts(self.pics, slave=False)),
            (0xA0, 0xA1, PicPorts(self.pics, slave=True)),
            (0x40, 0x43, self.pit),
        )
        self._deliverer = Deliverer(self._uc, self._names, self.segment_base)
        self._map_memory()
        self._add_hooks()
        self._reset()

    # --- set-up -----------------------------------------------------------------------------------------------------

    def _map_memory(self) -> None:
        address, uc = self.ram.host_address(), self._uc
        spans = ((0, LOW_END), (ROM_BASE, HIGH_BASE - ROM_BASE), (HIGH_BASE, self.ram.size - HIGH_BASE))
        for start, size in spans:
            uc.mem_map_ptr(start, size, _READ_WRITE_EXECUTE, address + start)
        for start, end in ((LOW_END, ROM_BASE), (self.ram.size, _FOUR_GIB)):
            uc.mmio_map(start, end - start, self._mmio_read, start, self._mmio_write, start)
        self.ram.written = lambda gpa, length: uc.ctl_remove_cache(gpa, gpa + length)

    def _add_hooks(self) -> None:
        unicorn, names, uc = self._unicorn, self._names, self._uc
        uc.hook_add(unicorn.UC_HOOK_INSN, self._out, None, 1, 0, names.UC_X86_INS_OUT)
        uc.hook_add(unicorn.UC_HOOK_INSN, self._in, None, 1, 0, names.UC_X86_INS_IN)
        uc.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)

    def _reset(self) -> None:
        uc, names = self._uc, self._names
        # 32-bit start with PE off: from there real, protected and long mode all work.
        uc.reg_write(names.UC_X86_REG_CR0, 0x10)
        uc.reg_write(names.UC_X86_REG_IDTR, (0, 0, 0x3FF, 0))
        for name in SEGMENTS:
            uc.reg_write(self._segment_ids[name], 0)
        uc.reg_write(names.UC_X86_REG_CS, ROM_BASE >> 4)
        uc.reg_write(names.UC_X86_REG_EIP, 0xFFF0)
        uc.reg_write(names.UC_X86_REG_ESP, 0x7C00)

    # --- registers --------------------------------------------------------------------------------------------------

    def get(self, name: str) -> int:
        """Return a general register, its low 32 bits."""
        return int(self._uc.reg_read(self._ids[name]))

    def set(self, name: str, value: int) -> None:
        """Set a general register, its low 32 bits."""
        self._uc.reg_write(self._ids[name], value & 0xFFFFFFFF)

    def protected(self) -> bool:
        """Whether CR0.PE is set."""
        return bool(self._uc.reg_read(self._names.UC_X86_REG_CR0) & 1)

    def segment_base(self, name: str) -> int:
        """Return a segment's base; in protected mode as the global descriptor table says now."""
        selector = int(self._uc.reg_read(self._segment_ids[name]))
        if not self.protected() or self.get("rflags") & _EFLAGS_VM:
            return selector << 4
        if selector & 4 or self._uc.msr_read(_EFER) >> 10 & 1:
            return 0
        table = self._uc.reg_read(self._names.UC_X86_REG_GDTR)
        try:
            descriptor = self._uc.mem_read(int(table[1]) + (selector & ~7), 8)
        except self._unicorn.UcError:
            return 0
        return int.from_bytes(bytes(descriptor[2:5]) + bytes(descriptor[7:8]), "little")

    def now_ns(self) -> int:
        """Return virtual time: instructions, accesses and idle time so far."""
        return self._now

    def set_irq(self, line: int, level: bool) -> None:
        """Drive a line of the 8259A pair."""
        self.pics.set_line(line, level)

    # --- what the guest does to the outside -------------------------------------------------------------------------

    def _count(self, kind: str) -> Dispatcher:
        if self._dispatcher is None:
            raise RuntimeError("the guest ran outside run()")
        self.exits[kind] += 1
        self._now += PIO_NS
        return self._dispatcher

    def _out(self, uc: Any, port: int, size: int, value: int, _data: Any) -> None:
        dispatcher = self._count("pio")
        dispatcher.pio_write(port, size, value & ((1 << (8 * size)) - 1))
        if dispatcher.stopping:
            uc.emu_stop()

    def _in(self, uc: Any, port: int, size: int, _data: Any) -> int:
        dispatcher = self._count("pio")
        value = dispatcher.pio_read(port, size) & ((1 << (8 * size)) - 1)
        if dispatcher.stopping:
            uc.emu_stop()
        return value

    def _mmio_read(self, uc: Any, offset: int, size: int, start: int) -> int:
        dispatcher = self._count("mmio")
        value = dispatcher.mmio_read(start + offset, size) & ((1 << (8 * size)) - 1)
        if dispatcher.stopping:
            uc.emu_stop()
        return value

    def _mmio_write(self, uc: Any, offset: int, size: int, value: int, start: int) -> None:
        dispatcher = self._count("mmio")
        dispatcher.mmio_write(start + offset, size, value & ((1 << (8 * size)) - 1))
        if dispatcher.stopping:
            uc.emu_stop()

    def _interrupt(self, uc: Any, vector: int, _data: Any) -> None:
        self._vector = vector
        uc.emu_stop()

    # --- the run loop -----------------------------------------------------------------------------------------------

    def run(self, dispatcher: Dispatcher) -> CpuEnd | None:
        """Run until the guest ends or the dispatcher stops it."""
        self._dispatcher = dispatcher
        try:
            return self._loop(dispatcher)
        except self._unicorn.UcError as error:
            return CpuEnd(EndReason.ERROR, f"emulation failed at {self._where()}: {error}")
        except DeliveryError as error:
            return CpuEnd(EndReason.ERROR, f"{error} at {self._where()}")
        finally:
            self._dispatcher = None

    def _loop(self, dispatcher: Dispatcher) -> CpuEnd | None:
        next_poll = time.monotonic() + POLL_SECONDS
        while not dispatcher.stopping:
            self._slice()
            if dispatcher.stopping:
                break
            end = self._after_slice(dispatcher)
            if end is not None:
                return end
            now = time.monotonic()
            if now >= next_poll:
                next_poll = now + POLL_SECONDS
                dispatcher.poll()
        return None

    def _slice(self) -> None:
        """Run up to the next timer event, or a full slice."""
        count = SLICE_MAX
        if self.pit.due is not None:
            count = max(SLICE_MIN, min(count, (self.pit.due - self._now) // INSTRUCTION_NS))
        if self._shadowed():
            count = 1
        self._vector = None
        self._uc.emu_start(self._pc(), _NEVER, count=count)
        self._now += INTERRUPT_NS if self._vector is not None else count * INSTRUCTION_NS
        self.exits["slice"] += 1

    def _pc(self) -> int:
        register = self._names.UC_X86_REG_RIP if self._uc.msr_read(_EFER) >> 10 & 1 else self._names.UC_X86_REG_EIP
        return int(self._uc.reg_read(register))

    def _after_slice(self, dispatcher: Dispatcher) -> CpuEnd | None:
        if self._vector is not None:
            self.exits["int"] += 1
            self._deliverer.deliver(self._vector, exception=not self._software_interrupt())
            return None
        if self._halted():
            if not self.get("rflags") & FLAG_INTERRUPT:
                return CpuEnd(EndReason.HALT, f"HLT with interrupts off at {self._where()}")
            self._idle(dispatcher)
            if dispatcher.stopping:
                return None
        self.pit.advance(self._now)
        if self.pics.pending() and self.get("rflags") & FLAG_INTERRUPT and not self._shadowed():
            vector = self.pics.acknowledge()
            if vector is not None:
                self.exits["irq"] += 1
                self._deliverer.deliver(vector, exception=False)
        return None

    def _idle(self, dispatcher: Dispatcher) -> None:
        """Sleep in HLT until an interrupt is due; virtual time never runs ahead of the wall clock while idle."""
        while not self.pics.pending() and not dispatcher.stopping:
            nap = int(POLL_SECONDS * 1e9)
            if self.pit.due is not None:
                nap = max(0, min(nap, self.pit.due - self._now))
            time.sleep(nap / 1e9)
            self._now += nap
            self.pit.advance(self._now)
            dispatcher.poll()

    # --- looking at the code around the instruction pointer ---------------------------------------------------------

    def _around(self, before: int, after: int) -> bytes:
        """Return code bytes around the instruction pointer, or nothing where they are out of reach."""
        try:
            base = self.segment_base("cs")
            return bytes(self._uc.mem_read(base + self._pc() - before, before + after))
        except self._unicorn.UcError:
            return b""

    def _software_interrupt(self) -> bool:
        """Whether the CPU stands behind INT n, INT3, INTO or INT1, and not at a faulting instruction."""
        code = self._around(2, 0)
        return len(code) == 2 and (code[0] == 0xCD or code[1] in (0xCC, 0xCE, 0xF1))

    def _shadowed(self) -> bool:
        """Whether the last instruction holds interrupts off for one more: STI, MOV SS, POP SS."""
        code = self._around(2, 0)
        if len(code) < 2:
            return False
        return code[1] in (_STI, _POP_SS) or (code[0] == _MOV_SREG and code[1] & 0xF8 == 0xD0)

    def _halted(self) -> bool:
        """Whether the slice ended in HLT rather than because its instructions were used up.

        Unicorn does not tell. A byte F4 just before the instruction pointer is HLT, or the tail of another instruction
        at which the count happened to end. With interrupts on, taking it for HLT only costs idle time. With interrupts
        off it must look like the end of a program: after CLI, before a jump back to it, or met twice in a row.
        """
        code = self._around(2, 3)
        if len(code) < 5 or code[1] != _HLT:
            self._last_eip = -1
            return False
        if self.get("rflags") & FLAG_INTERRUPT or code[0] == _CLI or code[2] == _HLT:
            return True
        jumps_back = code[2] == 0xEB and code[3] in (0xFB, 0xFC, 0xFD, 0xFE)
        jumps_back = jumps_back or (code[2] == 0xE9 and code[4] == 0xFF)
        again = self._last_eip == self._pc()
        self._last_eip = self._pc()
        return jumps_back or again

    def _where(self) -> str:
        return f"{self.segment_base('cs'):#x}:{self._pc():#x}"

    def close(self) -> None:
        """Drop the engine; unmaps nothing of the RAM, which is not its own."""
        self.ram.written = None
        self._uc.release_handle()
