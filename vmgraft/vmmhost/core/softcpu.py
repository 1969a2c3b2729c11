"""A CPU emulated in software by Unicorn: needs no /dev/kvm, and repeats itself exactly.

The guest runs in slices of a counted number of instructions, so that virtual time, interrupts and the I/O trace do
not depend on the wall clock. (Unicorn stopped by another thread leaves a stale instruction pointer behind.)
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Final

from vmgraft.errors import EngineUnavailableError, HostError
from vmgraft.vmmhost.core import softstate
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.cpu import FLAG_INTERRUPT, GENERAL, SEGMENTS, TICK_SECONDS, Cpu, CpuEnd, Dispatcher
from vmgraft.vmmhost.core.keeping import set_state_of, state_of
from vmgraft.vmmhost.core.memory import ROM_BASE, GuestRam
from vmgraft.vmmhost.core.softcode import SoftCode
from vmgraft.vmmhost.core.softint import WITH_ERROR_CODE, Deliverer, DeliveryError, TripleFaultError
from vmgraft.vmmhost.core.softirq import TIMER_LINE, LevelControl, PicPair, PicPorts, Pit
from vmgraft.vmmhost.core.softmem import SoftMemory
from vmgraft.vmmhost.core.softwatch import SoftWatch
from vmgraft.vmmhost.core.state import State, flag, number, part, refuse

INSTALL_HINT: Final = "pip install 'vmgraft[soft]'"
#: Virtual nanoseconds an instruction takes; about what Unicorn does on a common CPU.
INSTRUCTION_NS: Final = 20
#: Virtual nanoseconds of a port access and of an interrupt, so that polling guests see time go by.
PIO_NS: Final = 1_000
INTERRUPT_NS: Final = 50_000
#: Instructions in a slice, at most and at least.
SLICE_MAX: Final = 100_000
SLICE_MIN: Final = 1_000
_NEVER: Final = 0xFEDFFFF0  # the address Unicorn would stop at; nothing is mapped executable there
_INVALID_OPCODE: Final = 6
_EFLAGS_VM: Final = 1 << 17
_EFER: Final = 0xC0000080
#: Port accesses and translated blocks in a slice.
_ACCESSES_MAX: Final = 4096
#: Bytes of fresh code that take about as long as an access.
_FRESH_BYTES: Final = 16


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
        self._steps = 0  # instructions of the next slice; 0 for a full one
        self._raised: BaseException | None = None
        self._dispatcher: Dispatcher | None = None
        self.pics = PicPair()
        self.pit = Pit(self.pics, self.now_ns)
        self.ports: tuple[tuple[int, int, PicPorts | Pit | LevelControl], ...] = (
            (0x20, 0x21, PicPorts(self.pics, slave=False)),
            (0xA0, 0xA1, PicPorts(self.pics, slave=True)),
            (0x40, 0x43, self.pit),
            (0x4D0, 0x4D1, LevelControl(self.pics)),
        )
        self._memory = SoftMemory(
            self._uc, ram, self._mmio_read, self._mmio_write, changing=self._end_slice, paging=self._paging
        )
        self._deliverer: Any = Deliverer(self._uc, self._names, self.segment_base, self._memory.write)
        self._code_seen = SoftCode(self._uc, self._unicorn, self._deliverer.physical)
        self._watch = SoftWatch(self._uc, self._unicorn, self._code_seen.at)
        self._add_hooks()
        self._reset()

    # --- set-up -----------------------------------------------------------------------------------------------------

    def _add_hooks(self) -> None:
        unicorn, names, uc = self._unicorn, self._names, self._uc
        uc.hook_add(unicorn.UC_HOOK_INSN, self._out, None, 1, 0, names.UC_X86_INS_OUT)
        uc.hook_add(unicorn.UC_HOOK_INSN, self._in, None, 1, 0, names.UC_X86_INS_IN)
        uc.hook_add(unicorn.UC_HOOK_INTR, self._interrupt)
        uc.hook_add(unicorn.UC_HOOK_MEM_WRITE_PROT, self._memory.rom_write)
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

    def _paging(self) -> bool:
        return bool(self._uc.reg_read(self._names.UC_X86_REG_CR0) >> 31 & 1)

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

    def show_cpuid(self, leaves: Mapping[int, tuple[int, int, int, int]]) -> None:
        """Answer these leaves in the engine's place."""
        uc, ids = self._uc, [self._ids[name] for name in ("rax", "rbx", "rcx", "rdx")]

        def answer(_uc: Any, _data: Any) -> int:
            leaf = leaves.get(int(uc.reg_read(ids[0])))
            if leaf is None:
                return 0
            for register, value in zip(ids, leaf, strict=True):
                uc.reg_write(register, value)
            return 1

        uc.hook_add(self._unicorn.UC_HOOK_INSN, answer, None, 1, 0, self._names.UC_X86_INS_CPUID)

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

    def _pass(self, uc: Any, dispatcher: Dispatcher, access: Callable[[int, int], int], address: int, size: int) -> int:
        """Pass an access on. An exception waits for the end of the slice: the engine's binding would print it too."""
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
        return self._pass(uc, dispatcher, dispatcher.pio_read, port, size)

    def _mmio_read(self, uc: Any, offset: int, size: int, start: int) -> int:
        if self._dispatcher is None:  # a snapshot comes back whose tables lie where no memory is
            return (1 << (8 * size)) - 1
        dispatcher = self._count("mmio")
        return self._pass(uc, dispatcher, dispatcher.mmio_read, start + offset, size)

    def _mmio_write(self, uc: Any, offset: int, size: int, value: int, start: int) -> None:
        if self._dispatcher is None:
            return
        dispatcher = self._count("mmio")

        def store(address: int, width: int) -> int:
            dispatcher.mmio_write(address, width, value & ((1 << (8 * width)) - 1))
            return 0

        self._pass(uc, dispatcher, store, start + offset, size)  # also when an interrupt's frame goes there

    def _end_slice(self) -> None:
        (self._memory.settle if self._dispatcher is None else self._uc.emu_stop)()

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
            if self._slice(dispatcher) and not dispatcher.resting:
                break
            end = self._after_slice(dispatcher)
            if end is not None:
                return end
            self._poll(dispatcher)
        return None

    def _prepare(self) -> None:
        """Forget what the last slice ended with."""
        self._vector = None
        self._accesses = 0
        self._watch.prepare()

    def _slice(self, dispatcher: Dispatcher) -> bool:
        """Run up to the next timer event, or a full slice; True when the machine shall stop."""
        count = SLICE_MAX
        if self.pit.due is not None:
            count = max(SLICE_MIN, min(count, (self.pit.due - self._now) // INSTRUCTION_NS))
        if self._steps:
            count, self._watch.wanted = self._steps, False  # the watched instruction itself runs now
        self.exits["slice"] += 1
        self._memory.settle()  # what the host wrote since the last slice
        self._uc.emu_start(self._pc(), _NEVER, count=count)
        if self._raised is not None:
            raise self._raised
        self._memory.settle()
        self._watch.settle()
        if not self._watch.stopped_for_fresh:
            self._now += INTERRUPT_NS if self._vector is not None else count * INSTRUCTION_NS
        return dispatcher.stopping

    def _pc(self) -> int:
        """Return the instruction pointer's low 32 bits: a 32-bit engine shows no more, in long mode too."""
        return int(self._uc.reg_read(self._names.UC_X86_REG_EIP))

    def _after_slice(self, dispatcher: Dispatcher) -> CpuEnd | None:
        self._steps = self._watch.steps
        if self._vector is not None:
            self.exits["int"] += 1
            self._deliverer.deliver(self._vector, exception=self._fault(self._vector))
        else:
            halt = self._watch.halt_at
            if halt is not None and self._next() == halt + 1:
                if not self.get("rflags") & FLAG_INTERRUPT:
                    return CpuEnd(EndReason.HALT, f"HLT with interrupts off at {self._where()}")
                self._idle(dispatcher)
        self.pit.advance(self._now)
        self._interrupt_guest()
        return None

    def _interrupt_guest(self) -> None:
        """Deliver the interrupt that waits, if the guest takes it now; else look out for the moment when it does."""
        self._watch.wanted = False
        if not self.pics.pending():
            return
        if not self.get("rflags") & FLAG_INTERRUPT:
            self._watch.wanted = True
        elif self._code_seen.shadows(self._next()):
            self._steps = 1
        else:
            vector = self.pics.acknowledge()
            if vector is not None:
                self.exits["irq"] += 1
                self._deliverer.deliver(vector, exception=False)

    def _idle(self, dispatcher: Dispatcher) -> None:
        """Sleep in HLT until an interrupt is due; virtual time never runs ahead of the wall clock while idle."""
        while not self.pics.pending() and not dispatcher.stopping:
            nap = int(TICK_SECONDS * 1e9)
            if self.pit.due is not None and self.pics.lets_through(TIMER_LINE):
                nap = max(0, min(nap, self.pit.due - self._now))
            time.sleep(nap / 1e9)
            self._now += nap
            self.pit.advance(self._now)
            self._poll(dispatcher)

    def _translated(self, uc: Any, block: Any, _before: Any, _data: Any) -> None:
        """Stop before a fresh block runs whose end is to be watched."""
        # Translating is slow, and guests that change their own code make it happen all the time.
        self._accesses += 1 + block.size // _FRESH_BYTES
        if block.pc >> 32:  # a slice would go on at the lower half of this address
            self._raised = DeliveryError(f"code at {block.pc:#x}, beyond the 4 GiB of this engine,")
        if self._raised or self._watch.look_at(block.pc + block.size - 1) or self._accesses >= _ACCESSES_MAX:
            uc.emu_stop()

    def _next(self) -> int:
        """Return the linear address of the next instruction."""
        return self.segment_base("cs") + self._pc()

    def _fault(self, vector: int) -> bool:
        """Whether this interrupt is a fault with an error code, and not an INT n that the CPU just passed."""
        if vector not in WITH_ERROR_CODE or not self.protected():
            return False
        return not self._code_seen.calls(self._next(), vector)

    def _where(self) -> str:
        return f"{self.segment_base('cs'):#x}:{self._pc():#x}"

    def state(self) -> State:
        """Return registers, chips and virtual time; what was translated is forgotten, as it is on the way back."""
        self._watch.forget()
        return {
            "registers": softstate.save(self._uc, self._names),
            "now": self._now,
            "steps": self._steps,
            "wanted": self._watch.wanted,
            "chips": [state_of(chip) for chip in self._chips()],
        }

    def _chips(self) -> tuple[object, ...]:
        return (self.pics.master, self.pics.slave, self.pit, *self.pit.counters)

    def set_state(self, state: State) -> None:
        """Bring them back."""
        chips = state.get("chips")
        if type(chips) is not list or len(chips) != len(self._chips()) or not all(type(each) is dict for each in chips):
            raise refuse("chips")
        self._now, self._steps = number(state, "now", range(1 << 62)), number(state, "steps", range(3))
        self._watch.forget()
        self._watch.wanted = flag(state, "wanted")
        for chip, remembered in zip(self._chips(), chips, strict=True):
            set_state_of(chip, remembered)
        try:
            softstate.load(self._uc, self._names, part(state, "registers"))
        except self._unicorn.UcError as error:
            raise HostError(f"the snapshot's registers do not fit its memory: {error}", field="registers") from error

    def close(self) -> None:
        """Drop the engine; unmaps nothing of the RAM, which is not its own."""
        self._memory.close()
        self._uc = self._deliverer = None
