"""Who answers which port, address and hypercall: claims, their conflicts, and the I/O trace.

Core devices and whatever is plugged in register the same way; nobody can claim what another holds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from vmgraft.errors import CapabilityError
from vmgraft.vmmhost.core.contract import HypercallHandler, MmioHandler, PioEvent, PioHandler
from vmgraft.vmmhost.core.cpu import POLL_SECONDS
from vmgraft.vmmhost.core.memory import LOW_END, ROM_BASE

CORE: Final = "core"
#: The hypercall doorbell: one 32-bit OUT of the number; see docs/host.md.
DOORBELL_PORT: Final = 0x564
#: What hypercall 0 answers in its low half: "VGFT".
DISCOVERY_MAGIC: Final = 0x56474654
ALL_ONES_64: Final = (1 << 64) - 1
PORT_MAX: Final = 0xFFFF
HYPERCALL_MAX: Final = 0xFFFFFFFF
#: Top of the address space in which MMIO may be claimed.
MMIO_END: Final = 1 << 32
#: In-kernel on KVM (I/O APIC, local APIC, firmware flash and helper pages), so no extension may sit there.
MMIO_RESERVED: Final = ((0xFEC00000, 0xFED00000), (0xFEE00000, 0xFEF00000), (0xFFFBC000, 1 << 32))
#: Ports of the interrupt controllers and the timer, which KVM serves in the kernel.
IRQCHIP_PORTS: Final = ((0x20, 0x21), (0x40, 0x43), (0xA0, 0xA1), (0x4D0, 0x4D1))
#: Widths that a handler of MMIO knows, in bytes.
_MMIO_SIZES: Final = (1, 2, 4, 8)
#: Longest I/O trace kept; later events are only counted.
TRACE_MAX: Final = 1_000_000


class Registers(Protocol):
    """The registers of the calling guest, by name."""

    def get(self, name: str) -> int: ...  # noqa: D102
    def set(self, name: str, value: int) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Claim:
    """One owner's range, both ends included."""

    first: int
    last: int
    owner: str


@dataclass(frozen=True, slots=True)
class _Pio(Claim):
    handler: PioHandler
    traced: bool = True


@dataclass(frozen=True, slots=True)
class _Mmio(Claim):
    handler: MmioHandler


@dataclass(frozen=True, slots=True)
class _Hypercall(Claim):
    handler: HypercallHandler


class Reserved:
    """Answers ports that are taken, but not by anything in this process."""

    def pio_read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return ALL_ONES_64

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Nothing to write."""


class Bus:
    """The exit dispatcher. Implements :class:`vmgraft.vmmhost.core.cpu.Dispatcher`.

    Args:
        ram_end: First guest-physical address above RAM; MMIO may be claimed from there.
        trace: Keep every port access as a :class:`PioEvent` in :attr:`events`.
    """

    def __init__(self, ram_end: int, *, trace: bool = False) -> None:
        self.stopping = False
        self.poll_seconds = POLL_SECONDS
        self.poller: Callable[[], None] | None = None
        self.registers: Registers | None = None
        self.tracing = trace
        self.events: list[PioEvent] = []
        self.events_dropped = 0
        self._ram_end = ram_end
        self._pio: list[_Pio] = []
        self._ports: dict[int, _Pio] = {}
        self._mmio: list[_Mmio] = []
        self._hypercalls: list[_Hypercall] = []
        self._owners: set[str] = set()

    # --- claims -----------------------------------------------------------------------------------------------------

    def claim_pio(self, first: int, last: int, handler: PioHandler, owner: str, *, traced: bool = True) -> None:
        """Answer I/O ports ``first`` to ``last`` (both included) by ``handler``.

        Raises:
            CapabilityError: when the range is not valid, or overlaps another claim; the message names both owners.
        """
        if not 0 <= first <= last <= PORT_MAX:
            raise CapabilityError(f"{owner} claims ports {first:#x}-{last:#x}, which do not exist", field="pio")
        claim = _Pio(first, last, owner, handler, traced)
        if owner != CORE and first <= DOORBELL_PORT + 3 and last >= DOORBELL_PORT:
            self._refuse("ports", claim, Claim(DOORBELL_PORT, DOORBELL_PORT + 3, f"{CORE} (hypercall doorbell)"))
        self._check("ports", claim, self._pio)
        self._pio.append(claim)
        for port in range(first, last + 1):
            self._ports[port] = claim
        self._note(owner)

    def reserve_irqchip(self) -> None:
        """Take the ports that the kernel serves, so that nobody else claims them in vain."""
        for first, last in IRQCHIP_PORTS:
            if first not in self._ports:
                self.claim_pio(first, last, Reserved(), CORE, traced=False)

    def claim_mmio(self, base: int, size: int, handler: MmioHandler, owner: str) -> None:
        """Answer guest-physical addresses ``base`` up to ``base + size`` by ``handler``.

        Raises:
            CapabilityError: when the range overlaps RAM, ROM, a reserved range or another claim.
        """
        claim = _Mmio(base, base + size - 1, owner, handler)
        hole = base >= LOW_END and claim.last < ROM_BASE
        above = self._ram_end <= base and claim.last < MMIO_END
        if size < 1 or not (hole or above):
            message = f"{owner} claims MMIO {base:#x}-{claim.last:#x}, which is not free of the core's RAM and ROM"
            hint = f"claim inside {LOW_END:#x}-{ROM_BASE - 1:#x} or {self._ram_end:#x}-{MMIO_END - 1:#x}"
            raise CapabilityError(message, field="mmio", hint=hint)
        reserved = [Claim(start, end - 1, f"{CORE} (interrupt controllers)") for start, end in MMIO_RESERVED]
        self._check("MMIO", claim, [*reserved, *self._mmio])
        self._mmio.append(claim)
        self._mmio.sort(key=lambda each: each.first)
        self._note(owner)

    def claim_hypercall(self, first: int, last: int, handler: HypercallHandler, owner: str) -> None:
        """Answer hypercall numbers ``first`` to ``last`` by ``handler``; the first such claim installs the doorbell.

        Raises:
            CapabilityError: when the range holds number 0 (discovery), is not valid, or overlaps another claim.
        """
        if not 0 <= first <= last <= HYPERCALL_MAX:
            raise CapabilityError(f"{owner} claims hypercalls {first}-{last}, which do not exist", field="hypercall")
        claim = _Hypercall(first, last, owner, handler)
        self._check("hypercalls", claim, [Claim(0, 0, f"{CORE} (discovery)"), *self._hypercalls])
        if not self._hypercalls:
            self.claim_pio(DOORBELL_PORT, DOORBELL_PORT + 3, _Doorbell(self), CORE)
        self._hypercalls.append(claim)
        self._note(owner)

    def owners(self) -> tuple[str, ...]:
        """Return everybody but the core who claimed something, sorted."""
        return tuple(sorted(self._owners))

    def ports_of(self, owner: str) -> tuple[tuple[int, int], ...]:
        """Return the port ranges of an owner, sorted."""
        return tuple(sorted((claim.first, claim.last) for claim in self._pio if claim.owner == owner))

    def _note(self, owner: str) -> None:
        if owner != CORE:
            self._owners.add(owner)

    def _check(self, what: str, claim: Claim, others: Sequence[Claim]) -> None:
        for other in others:
            if claim.first <= other.last and other.first <= claim.last:
                self._refuse(what, claim, other)

    def _refuse(self, what: str, claim: Claim, other: Claim) -> None:
        message = (
            f"{claim.owner} claims {what} {claim.first:#x}-{claim.last:#x}, but {other.owner} holds"
            f" {other.first:#x}-{other.last:#x}"
        )
        raise CapabilityError(message, field=what.lower(), hint="load one of the two, or move a range")

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def pio_read(self, port: int, size: int) -> int:
        """Answer IN; unclaimed ports read as all ones."""
        claim = self._ports.get(port)
        if claim is None and size == 1:
            value = 0xFF
        elif claim is not None and port + size - 1 <= claim.last:
            value = claim.handler.pio_read(port - claim.first, size) & ((1 << (8 * size)) - 1)
        else:
            value = self._read_split(port, size)
        if self.tracing and (claim is None or claim.traced):
            self.record(PioEvent(False, port, size, value))
        return value

    def _read_split(self, port: int, size: int) -> int:
        """Answer a wide read that no single claim covers, byte by byte."""
        value = 0
        for index in range(size):
            claim = self._ports.get(port + index & PORT_MAX)
            byte = 0xFF if claim is None else claim.handler.pio_read((port + index & PORT_MAX) - claim.first, 1)
            value |= (byte & 0xFF) << (8 * index)
        return value

    def pio_write(self, port: int, size: int, value: int) -> None:
        """Take OUT; writes to unclaimed ports are dropped."""
        claim = self._ports.get(port)
        if self.tracing and (claim is None or claim.traced):
            self.record(PioEvent(True, port, size, value))
        if claim is not None and port + size - 1 <= claim.last:
            claim.handler.pio_write(port - claim.first, size, value)
        elif size > 1:
            for index in range(size):
                claim = self._ports.get(port + index & PORT_MAX)
                if claim is not None:
                    offset = (port + index & PORT_MAX) - claim.first
                    claim.handler.pio_write(offset, 1, value >> (8 * index) & 0xFF)

    def _find_mmio(self, gpa: int, size: int) -> _Mmio | None:
        index = bisect_right(self._mmio, gpa, key=lambda claim: claim.first) - 1
        if index < 0 or gpa + size - 1 > self._mmio[index].last:
            return None
        return self._mmio[index]

    def mmio_read(self, gpa: int, size: int) -> int:
        """Answer a read outside RAM; unclaimed addresses give all ones."""
        mask = (1 << (8 * size)) - 1
        if size not in _MMIO_SIZES:  # what is left of an access that crosses a page
            return sum((self.mmio_read(gpa + index, 1) & 0xFF) << (8 * index) for index in range(size))
        claim = self._find_mmio(gpa, size)
        return mask if claim is None else claim.handler.mmio_read(gpa - claim.first, size) & mask

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """Take a write outside RAM; unclaimed addresses drop it."""
        if size not in _MMIO_SIZES:
            for index in range(size):
                self.mmio_write(gpa + index, 1, value >> (8 * index) & 0xFF)
            return
        claim = self._find_mmio(gpa, size)
        if claim is not None:
            claim.handler.mmio_write(gpa - claim.first, size, value)

    def hypercall(self, number: int, args: tuple[int, int, int, int]) -> int:
        """Answer a hypercall with 64 bits; numbers nobody claimed give all ones."""
        if number == 0:
            return DISCOVERY_MAGIC | len(self._owners) << 32
        for claim in self._hypercalls:
            if claim.first <= number <= claim.last:
                return claim.handler.hypercall(number, args) & ALL_ONES_64
        return ALL_ONES_64

    def poll(self) -> None:
        """Let the machine look around; called by the CPU loop."""
        if self.poller is not None:
            self.poller()

    def record(self, event: PioEvent) -> None:
        """Add an event to the trace."""
        if len(self.events) < TRACE_MAX:
            self.events.append(event)
        else:
            self.events_dropped += 1


class _Doorbell:
    """The port behind which hypercalls wait: 32-bit writes only."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def pio_read(self, offset: int, size: int) -> int:
        return ALL_ONES_64

    def pio_write(self, offset: int, size: int, value: int) -> None:
        registers = self._bus.registers
        if offset != 0 or size != 4 or registers is None:
            return
        args = [registers.get(name) & 0xFFFFFFFF for name in ("rbx", "rcx", "rsi", "rdi")]
        result = self._bus.hypercall(value, (args[0], args[1], args[2], args[3]))
        registers.set("rax", result & 0xFFFFFFFF)
        registers.set("rdx", result >> 32)
