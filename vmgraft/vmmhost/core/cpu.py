"""What a CPU engine is to the machine: registers by name, and a run loop that hands accesses to a dispatcher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.memory import GuestRam
from vmgraft.vmmhost.core.state import State

#: General registers that both engines know by name; in 16- and 32-bit code the upper bits are as the engine left them.
GENERAL: Final = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip", "rflags")
SEGMENTS: Final = ("cs", "ds", "es", "fs", "gs", "ss")

FLAG_CARRY: Final = 1 << 0
FLAG_ZERO: Final = 1 << 6
FLAG_TRAP: Final = 1 << 8
FLAG_INTERRUPT: Final = 1 << 9

#: Wall-clock seconds between two calls of ``Dispatcher.poll`` while somebody wants ticks, and while nobody does: where
#: KVM itself is nested, every interruption of the guest costs milliseconds.
TICK_SECONDS: Final = 0.01
POLL_SECONDS: Final = 0.05


class Dispatcher(Protocol):
    """Where a CPU takes what it cannot do itself."""

    #: Set when the machine shall stop; looked at after every access and every poll.
    stopping: bool
    #: Set with ``stopping`` when the machine shall only rest between two instructions, and go on.
    resting: bool
    #: Wall-clock seconds between two polls; read when a run starts.
    poll_seconds: float

    def pio_read(self, port: int, size: int) -> int: ...  # noqa: D102
    def pio_write(self, port: int, size: int, value: int) -> None: ...  # noqa: D102
    def mmio_read(self, gpa: int, size: int) -> int: ...  # noqa: D102
    def mmio_write(self, gpa: int, size: int, value: int) -> None: ...  # noqa: D102
    def poll(self) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class CpuEnd:
    """The CPU ended the run by itself: halted for good, triple fault, engine failure."""

    reason: EndReason
    detail: str = ""


class Cpu(ABC):
    """One virtual CPU with its interrupt controller and timer."""

    engine: ClassVar[str]
    #: Whether the instructions are emulated rather than run by hardware; None when unknown.
    emulated: bool | None
    #: Why this engine was taken, in words for people.
    why: str = ""

    def __init__(self, ram: GuestRam) -> None:
        self.ram = ram
        #: How often the guest left for the host, by kind.
        self.exits: Counter[str] = Counter()

    @abstractmethod
    def get(self, name: str) -> int:
        """Return a register of :data:`GENERAL`."""

    @abstractmethod
    def set(self, name: str, value: int) -> None:
        """Set a register of :data:`GENERAL` except ``rip``; takes effect when the guest goes on."""

    @abstractmethod
    def segment_base(self, name: str) -> int:
        """Return the linear base address of a register of :data:`SEGMENTS`."""

    @abstractmethod
    def protected(self) -> bool:
        """Whether CR0.PE is set."""

    @abstractmethod
    def now_ns(self) -> int:
        """Return virtual time since the CPU was started, in nanoseconds."""

    @abstractmethod
    def set_irq(self, line: int, level: bool) -> None:
        """Drive an ISA interrupt line (0-15)."""

    @abstractmethod
    def show_cpuid(self, leaves: Mapping[int, tuple[int, int, int, int]]) -> None:
        """Answer CPUID for these leaves with EAX, EBX, ECX, EDX; call it before the guest first runs."""

    @abstractmethod
    def run(self, dispatcher: Dispatcher) -> CpuEnd | None:
        """Run from where the CPU stands until it ends (returned) or ``dispatcher.stopping`` (None)."""

    @abstractmethod
    def state(self) -> State:
        """Return registers, interrupt controllers, timer and time; only while :meth:`run` is not running.

        Raises:
            HostError: when the engine cannot tell them.
        """

    @abstractmethod
    def set_state(self, state: State) -> None:
        """Bring that back, after guest memory.

        Raises:
            HostError: when it does not fit.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the engine; the RAM stays."""
