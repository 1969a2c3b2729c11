"""A CPU emulated in software by Unicorn: needs no /dev/kvm, and repeats itself exactly.

The guest runs in slices of a counted number of instructions, so that virtual time, interrupts and the I/O trace do
not depend on the wall clock. (Unicorn stopped by another thread leaves a stale instruction pointer behind.)
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from vmgraft.errors import EngineUnavailableError
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.cpu import FLAG_INTERRUPT, GENERAL, SEGMENTS, TICK_SECONDS, Cpu, CpuEnd, Dispatcher
from vmgraft.vmmhost.core.memory import HIGH_BASE, LOW_END, ROM_BASE, GuestRam
from vmgraft.vmmhost.core.softint import WITH_ERROR_CODE, Deliverer, DeliveryError, TripleFaultError
from vmgraft.vmmhost.core.softirq import PicPair, PicPorts, Pit

INSTALL_HINT: Final = "pip install 'vmgraft[soft]'"
#: Virtual nanoseconds an instruction takes; about what Unicorn does on a common CPU.
INSTRUCTION_NS: Final = 20
#: Virtual nanoseconds of a port access and of an interrupt, so that polling guests see time go by.
PIO_NS: Final = 1_000
INTERRUPT_NS: Final = 50_000
#: Instructions in a slice, at most and at least.
SLICE_MAX: Final = 100_000
SLICE_MIN: Final = 1_000
_NEVER: Final = 0xFFFFFFF0  # the address Unicorn would stop at; nothing is mapped executable there
_HLT: Final = 0xF4
_STI: Final = 0xFB
_POP_SS: Final = 0x17
_MOV_SREG: Final = 0x8E
_INT: Final = 0xCD
_INVALID_OPCODE: Final = 6
_EFLAGS_VM: Final = 1 << 17
_EFER: Final = 0xC0000080
_READ_EXECUTE: Final = 5
_READ_WRITE_EXECUTE: Final = 7
_FOUR_GIB: Final = 1 << 32
#: HLT addresses watched before the watch list starts anew; port accesses and translated blocks in a slice.
_WATCHED_MAX: Final = 1024
_ACCESSES_MAX: Final = 4096


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
        self._uc: Any = self._unicorn.Uc(self._unicorn.UC_ARCH_X86, self._unicorn.UC_MODE_32)
        self._ids = {name: getattr(self._names, f"UC_X86_REG_{'E' + name[1:].upper()}") for name in GENERAL}
        self._ids["rflags"] = self._names.UC_X86_REG_EFLAGS
        self._segment_ids = {name: getattr(self._names, f"UC_X86_REG_{name.upper()}") for name in SEGMENTS}
        self._now = 0
        self._vector: int | None = None
        self._accesses = 0
        self._next_poll = 0.0
        self._single_step = self._rom_dirty = False
        self._rom = b""
        self._raised: BaseException | None = None
        self._watched: dict[int, int] = {}  # linear address of a possible HLT -> Unicorn hook
        self._to_watch: int | None = None
        self._halt_at: int | None = None
        self._dispatcher: Dispatcher | None = None
        self.pics = PicPair()
        self.pit = Pit(self.pics, self.now_ns)
        self.ports: tuple[tuple[int, int, PicPorts | Pit], ...] = (
            (0x20, 0x21, PicPorts(self.pics, slave=False)),
            (0xA0, 0xA1, PicPorts(self.pics, slave=True)),
            (0x40, 0x43, self.pit),
        )
        self._deliverer: Any = Deliverer(self._uc, self._names, self.segment_base)
        self._map_memory()
        self._add_hooks()
        self._reset()

    # --- set-up -----------------------------------------------------------------------------------------------------

    def _map_memory(self) -> None:
        address, uc = self.ram.host_address(), self._uc
        spans = ((0, LOW_END), (ROM_BASE, HIGH_BASE - ROM_BASE), (HIGH_BASE, self.ram.size - HIGH_BASE))
        for start, size in spans:
            uc.mem_map_ptr(start, size, _READ_WRITE_EXECUTE, address + start)
        uc.mem_protect(ROM_BASE, HIGH_BASE - ROM_BASE, _READ_EXECUTE)
        for start, end in ((LOW_END, ROM_BASE), (self.ram.size, _FOUR_GIB)):
            uc.mmio_map(start, end - start, self._mmio_read, start, self._mmio_write, start)
        self.ram.written = lambda gpa, length: uc.ctl_remove_cache(gpa, gpa + length)

    def _add_hooks(self) -> None:
        unicorn, names, uc = self._unicorn, self._names, self._uc
        uc.hook_add(unicorn.UC_HOOK_INSN, self._out, None, 1, 0, names.UC_X86_INS_OUT)
        uc.hook_add(unicorn.UC_HOOK_INSN, self._in, None, 1, 0, names.UC_X86_INS_IN)
        uc.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)
        uc.hook_add(unicorn.UC_HOOK_MEM_WRITE_PROT, self._rom_write)
        uc.hook_add(unicorn.UC_HOOK_INSN_INVALID, self._invalid)
        uc.hook_add(unicorn.UC_HOOK_EDGE_GENERATED, self._translated)

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
        self._accesses += 1
        return self._dispatcher

    def _served(self, uc: Any, dispatcher: Dispatcher) -> None:
        """After an access, which may have been slow: look around in time, and end the slice where called for."""
        self._poll(dispatcher)
        if dispatcher.stopping or self._accesses >= _ACCESSES_MAX:
            uc.emu_stop()

    def _read(self, uc: Any, dispatcher: Dispatcher, access: Callable[[int, int], int], address: int, size: int) -> int:
        """Answer a read. An exception waits for the end of the slice: the engine's binding would print it as well."""
        try:
            value = access(address, size) & ((1 << (8 * size)) - 1)
            self._served(uc, dispatcher)
        except BaseException as error:  # noqa: BLE001 - `_slice` raises it again
            self._raised = error
            uc.emu_stop()
            return 0
        return value

    def _poll(self, dispatcher: Dispatcher) -> None:
        now = time.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + dispatcher.poll_seconds
            dispatcher.poll()

    def _out(self, uc: Any, port: int, size: int, value: int, _data: Any) -> None:
        dispatcher = self._count("pio")
        dispatcher.pio_write(port, size, value & ((1 << (8 * size)) - 1))
        self._served(uc, dispatcher)

    def _in(self, uc: Any, port: int, size: int, _data: Any) -> int:
        dispatcher = self._count("pio")
        return self._read(uc, dispatcher, dispatcher.pio_read, port, size)

    def _mmio_read(self, uc: Any, offset: int, size: int, start: int) -> int:
        dispatcher = self._count("mmio")
        return self._read(uc, dispatcher, dispatcher.mmio_read, start + offset, size)

    def _mmio_write(self, uc: Any, offset: int, size: int, value: int, start: int) -> None:
        dispatcher = self._count("mmio")
        dispatcher.mmio_write(start + offset, size, value & ((1 << (8 * size)) - 1))
        self._served(uc, dispatcher)

    def _rom_write(self, _uc: Any, _access: int, _address: int, _size: int, _value: int, _data: Any) -> bool:
        """Let a write into the ROM pass, which the engine cannot drop; it is undone at the end of the slice."""
        if not self._rom_dirty:
            self._rom, self._rom_dirty = self.ram.read(ROM_BASE, HIGH_BASE - ROM_BASE), True
        return True

    def _interrupt(self, uc: Any, vector: int, _data: Any) -> None:
        self._vector = vector
        uc.emu_stop()

    def _invalid(self, uc: Any, _data: Any) -> bool:
        """Turn an instruction the engine does not know into the guest's exception."""
        self._vector = _INVALID_OPCODE
        uc.emu_stop()
        return True

    # --- the run loop -----------------------------------------------------------------------------------------------

    def run(self, dispatcher: Dispatcher) -> CpuEnd | None:
        """Run until the guest ends or the dispatcher stops it."""
        self._dispatcher = dispatcher
        try:
            return self._loop(dispatcher)
        except self._unicorn.UcError as error:
            return CpuEnd(EndReason.ERROR, f"emulation failed at {self._where()}: {error}")
        except TripleFaultError as error:
            return CpuEnd(EndReason.RESET, f"triple fault at {self._where()}: {error}")
        except DeliveryError as error:
            return CpuEnd(EndReason.ERROR, f"{error} at {self._where()}")
        finally:
            self._dispatcher = None

    def _loop(self, dispatcher: Dispatcher) -> CpuEnd | None:
        self._next_poll = time.monotonic() + dispatcher.poll_seconds
        while not dispatcher.stopping:
            self._prepare()
            if self._slice(dispatcher):
                break
            end = self._after_slice(dispatcher)
            if end is not None:
                return end
            self._poll(dispatcher)
        return None

    def _prepare(self) -> None:
        """Forget what the last slice ended with."""
        self._vector = self._to_watch = self._halt_at = None
        self._accesses = 0

    def _slice(self, dispatcher: Dispatcher) -> bool:
        """Run up to the next timer event, or a full slice; True when the machine shall stop."""
        count = SLICE_MAX
        if self.pit.due is not None:
            count = max(SLICE_MIN, min(count, (self.pit.due - self._now) // INSTRUCTION_NS))
        if self._single_step:
            count = 1
        self.exits["slice"] += 1
        self._uc.emu_start(self._pc(), _NEVER, count=count)
        if self._raised is not None:
            raise self._raised
        if self._rom_dirty:
            self._rom_dirty = False
            self.ram.load_rom(self._rom)
            self._uc.ctl_remove_cache(ROM_BASE, HIGH_BASE)
        if self._to_watch is not None:
            self._watch(self._to_watch)
        else:
            self._now += INTERRUPT_NS if self._vector is not None else count * INSTRUCTION_NS
        return dispatcher.stopping

    def _pc(self) -> int:
        """Return the instruction pointer's low 32 bits: a 32-bit engine shows no more, in long mode too."""
        return int(self._uc.reg_read(self._names.UC_X86_REG_EIP))

    def _after_slice(self, dispatcher: Dispatcher) -> CpuEnd | None:
        if self._vector is not None:
            self.exits["int"] += 1
            self._deliverer.deliver(self._vector, exception=self._fault(self._vector))
            return None
        if self._halt_at is not None and self.segment_base("cs") + self._pc() == self._halt_at + 1:
            if not self.get("rflags") & FLAG_INTERRUPT:
                return CpuEnd(EndReason.HALT, f"HLT with interrupts off at {self._where()}")
            self._idle(dispatcher)
        self.pit.advance(self._now)
        self._single_step = False
        if self.pics.pending() and self.get("rflags") & FLAG_INTERRUPT:
            self._single_step = self._shadowed()
            vector = None if self._single_step else self.pics.acknowledge()
            if vector is not None:
                self.exits["irq"] += 1
                self._deliverer.deliver(vector, exception=False)
        return None

    def _idle(self, dispatcher: Dispatcher) -> None:
        """Sleep in HLT until an interrupt is due; virtual time never runs ahead of the wall clock while idle."""
        while not self.pics.pending() and not dispatcher.stopping:
            nap = int(TICK_SECONDS * 1e9)
            if self.pit.due is not None:
                nap = max(0, min(nap, self.pit.due - self._now))
            time.sleep(nap / 1e9)
            self._now += nap
            self.pit.advance(self._now)
            dispatcher.poll()

    # --- telling HLT from a slice that was used up --------------------------------------------------------------------

    def _translated(self, uc: Any, block: Any, _before: Any, _data: Any) -> None:
        """Stop before a fresh block that may end in HLT runs for the first time, so that its last byte is watched.

        Unicorn does not tell why it stopped. A hook on the very byte does: it is called only if an instruction starts
        there, and F4 as an instruction is HLT.
        """
        last = block.pc + block.size - 1
        self._accesses += 1  # translating is slow, and guests that change their own code make it happen all the time
        if last not in self._watched and self._code(last, 1) == bytes((_HLT,)):
            self._to_watch = last
        if self._to_watch is not None or self._accesses >= _ACCESSES_MAX:
            uc.emu_stop()

    def _watch(self, address: int) -> None:
        if len(self._watched) >= _WATCHED_MAX:
            for hook in self._watched.values():
                self._uc.hook_del(hook)
            self._watched.clear()
            self._uc.ctl_flush_tb()
        hook = self._uc.hook_add(self._unicorn.UC_HOOK_CODE, self._before_halt, None, address, address)
        self._watched[address] = hook
        self._uc.ctl_remove_cache(address, address + 1)

    def _before_halt(self, _uc: Any, address: int, size: int, _data: Any) -> None:
        if size == 1 and self._code(address, 1) == bytes((_HLT,)):
            self._halt_at = address

    # --- looking at the code around the instruction pointer ---------------------------------------------------------

    def _code(self, linear: int, size: int) -> bytes:
        """Return code bytes, or nothing where they are out of reach."""
        try:
            return bytes(self._uc.mem_read(self._deliverer.physical(linear), size))
        except (self._unicorn.UcError, DeliveryError):
            return b""

    def _behind(self) -> bytes:
        """Return the two bytes before the instruction pointer."""
        return self._code(self.segment_base("cs") + self._pc() - 2, 2)

    def _fault(self, vector: int) -> bool:
        """Whether this interrupt is a fault with an error code, and not an INT n that the CPU just passed."""
        if vector not in WITH_ERROR_CODE or not self.protected():
            return False
        return self._behind() != bytes((_INT, vector))

    def _shadowed(self) -> bool:
        """Whether the last instruction holds interrupts off for one more: STI, MOV SS, POP SS."""
        code = self._behind()
        if len(code) < 2:
            return False
        return code[1] in (_STI, _POP_SS) or (code[0] == _MOV_SREG and code[1] & 0xF8 == 0xD0)

    def _where(self) -> str:
        return f"{self.segment_base('cs'):#x}:{self._pc():#x}"

    def close(self) -> None:
        """Drop the engine; unmaps nothing of the RAM, which is not its own."""
        self.ram.written = None
        self._uc = self._deliverer = None
