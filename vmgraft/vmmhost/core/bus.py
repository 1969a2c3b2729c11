"""Who answers which port, address and hypercall: claims, their conflicts, and the I/O trace.

Core devices and whatever is plugged in register the same way; nobody can claim what another holds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final

from vmgraft.errors import CapabilityError
from vmgraft.vmmhost.core.claims import (
    ALL_ONES_64,
    Claim,
    Doorbell,
    HypercallClaim,
    MmioClaim,
    PioClaim,
    Registers,
    Reserved,
)
from vmgraft.vmmhost.core.contract import HypercallHandler, MmioHandler, PioEvent, PioHandler
from vmgraft.vmmhost.core.cpu import POLL_SECONDS
from vmgraft.vmmhost.core.hypercalls import DEFAULTS, DefaultHypercalls
from vmgraft.vmmhost.core.memory import LOW_END, ROM_BASE
from vmgraft.vmmhost.core.services import Service, ServiceHandler, ServiceTable

CORE: Final = "core"
#: The hypercall doorbell: one 32-bit OUT of the number; see docs/host.md.
DOORBELL_PORT: Final = 0x564
#: What hypercall 0 answers in its low half: "VGFT".
DISCOVERY_MAGIC: Final = 0x56474654
PORT_MAX: Final = 0xFFFF
HYPERCALL_MAX: Final = 0xFFFFFFFF
#: Top of the address space in which MMIO may be claimed.
MMIO_END: Final = 1 << 32
#: In-kernel on KVM (I/O APIC, local APIC, firmware flash and helper pages), so no extension may sit there.
MMIO_RESERVED: Final = ((0xFEC00000, 0xFED00000), (0xFEE00000, 0xFEF00000), (0xFFFBC000, 1 << 32))
#: Ports of the interrupt controllers and the timer, which KVM serves in the kernel.
IRQCHIP_PORTS: Final = ((0x20, 0x21), (0x40, 0x43), (0xA0, 0xA1), (0x4D0, 0x4D1))
#: ISA lines of timer, keyboard, cascade and COM1 (IBM PC AT); the others are free until claimed.
CORE_IRQS: Final = (0, 1, 2, 4)
IRQ_MAX: Final = 15
#: Services that guests reach through the doorbell.
_BELLS: Final = (Service.HYPERCALL, Service.ENTROPY)
#: Widths that a handler of MMIO knows, in bytes.
_MMIO_SIZES: Final = (1, 2, 4, 8)
#: Longest I/O trace kept; later events are only counted.
TRACE_MAX: Final = 1_000_000


class Bus:
    """The exit dispatcher. Implements :class:`vmgraft.vmmhost.core.cpu.Dispatcher`.

    Args:
        ram_end: First guest-physical address above RAM; MMIO may be claimed from there.
        trace: Keep every port access as a :class:`PioEvent` in :attr:`events`.
        services: The machine's services; None for a table of its own.
    """

    def __init__(self, ram_end: int, *, trace: bool = False, services: ServiceTable | None = None) -> None:
        self.stopping = self.resting = False
        self.poll_seconds = POLL_SECONDS
        self.poller: Callable[[], None] | None = None
        self.registers: Registers | None = None
        self.tracing = trace
        self.events: list[PioEvent] = []
        self.events_dropped = 0
        self._ram_end = ram_end
        #: Where MMIO may be claimed below 1 MiB, and what is taken above RAM.
        self.low_hole = range(LOW_END, ROM_BASE)
        self.mmio_reserved = [Claim(start, end - 1, f"{CORE} (interrupt controllers)") for start, end in MMIO_RESERVED]
        self._pio: list[PioClaim] = []
        self._ports: dict[int, PioClaim] = {}
        self._mmio: list[MmioClaim] = []
        self._hypercalls: list[HypercallClaim] = []
        self._irqs: dict[int, str] = dict.fromkeys(CORE_IRQS, CORE)
        self._owners: dict[str, str] = {}  # owner → what the guest is told about it
        self.services = ServiceTable() if services is None else services
        #: Answers hypercalls 1-15; None where there is no machine.
        self.defaults: DefaultHypercalls | None = None
        #: Drives an interrupt line of the machine.
        self.irq_driver: Callable[[int, bool], None] | None = None

    # --- claims -----------------------------------------------------------------------------------------------------

    def claim_pio(self, first: int, last: int, handler: PioHandler, owner: str, *, traced: bool = True) -> None:
        """Answer I/O ports ``first`` to ``last`` (both included) by ``handler``.

        Raises:
            CapabilityError: when the range is not valid, or overlaps another claim; the message names both owners.
        """
        if not 0 <= first <= last <= PORT_MAX:
            raise CapabilityError(f"{owner} claims ports {first:#x}-{last:#x}, which do not exist", field="pio")
        claim = PioClaim(first, last, owner, handler, traced)
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
        claim = MmioClaim(base, base + size - 1, owner, handler)
        hole = base >= self.low_hole.start and claim.last < self.low_hole.stop
        above = self._ram_end <= base and claim.last < MMIO_END
        if size < 1 or not (hole or above):
            message = f"{owner} claims MMIO {base:#x}-{claim.last:#x}, which is not free of the core's RAM and ROM"
            low = f"{self.low_hole.start:#x}-{self.low_hole.stop - 1:#x} or " if self.low_hole else ""
            hint = f"claim inside {low}{self._ram_end:#x}-{MMIO_END - 1:#x}"
            raise CapabilityError(message, field="mmio", hint=hint)
        self._check("MMIO", claim, [*self.mmio_reserved, *self._mmio])
        self._mmio.append(claim)
        self._mmio.sort(key=lambda each: each.first)
        self._note(owner)

    def claim_hypercall(self, first: int, last: int, handler: HypercallHandler, owner: str) -> None:
        """Answer hypercall numbers ``first`` to ``last`` by ``handler``; the first such claim installs the doorbell.

        Raises:
            CapabilityError: when the range holds one of the core's own numbers 0-15, is not valid, or overlaps another
                claim.
        """
        if not 0 <= first <= last <= HYPERCALL_MAX:
            raise CapabilityError(f"{owner} claims hypercalls {first}-{last}, which do not exist", field="hypercall")
        claim = HypercallClaim(first, last, owner, handler)
        own = Claim(0, DEFAULTS.stop - 1, f"{CORE} (default hypercalls)")
        self._check("hypercalls", claim, [own, *self._hypercalls])
        self._hypercalls.append(claim)
        self._hang_doorbell()
        self._note(owner)

    def claim_service(
        self, service: Service, handler: ServiceHandler, owner: str, *, chain: bool = False, rank: int = 0
    ) -> None:
        """Let a handler answer for a default service; see :class:`~vmgraft.vmmhost.core.services.ServiceTable`.

        Raises:
            CapabilityError: another owner overrides the service already.
        """
        self.services.register(service, handler, owner, chain=chain, rank=rank)
        self._hang_doorbell()
        self._note(owner)

    def claim_irq(self, line: int, owner: str) -> Callable[[bool], None]:
        """Take an ISA interrupt line; the function returned drives it, for as long as the owner holds it.

        Raises:
            CapabilityError: the line does not exist, or another owner holds it.
        """
        if not 0 <= line <= IRQ_MAX:
            raise CapabilityError(f"{owner} claims interrupt line {line}, which does not exist", field="irq")
        if line in self._irqs:
            message = f"{owner} claims interrupt line {line}, which {self._irqs[line]} holds"
            raise CapabilityError(message, field="irq", hint="load one of the two, or use another line")
        self._irqs[line] = owner
        self._note(owner)

        def drive(level: bool) -> None:
            if self.irq_driver is not None and self._irqs.get(line) == owner:
                self.irq_driver(line, level)

        return drive

    def _hang_doorbell(self) -> None:
        """Put the doorbell where guests find it as soon as there is something behind it, and take it away after."""
        wanted = bool(self._hypercalls) or any(self.services.served(service) for service in _BELLS)
        if wanted and DOORBELL_PORT not in self._ports:
            self.claim_pio(DOORBELL_PORT, DOORBELL_PORT + 3, Doorbell(self), CORE)
        elif not wanted and DOORBELL_PORT in self._ports:
            self._drop_ports([self._ports[DOORBELL_PORT]])

    def _drop_ports(self, claims: Sequence[PioClaim]) -> None:
        for claim in claims:
            self._pio.remove(claim)
            for port in range(claim.first, claim.last + 1):
                del self._ports[port]

    def release(self, owner: str) -> Callable[[], None]:
        """Take back everything that an owner claimed; the function returned gives it back.

        That works as long as nobody else has claimed any of it in between.

        Raises:
            ValueError: the owner is the core.
        """
        if owner == CORE:
            raise ValueError("the core keeps its claims")
        ports = [claim for claim in self._pio if claim.owner == owner]
        mmio = [claim for claim in self._mmio if claim.owner == owner]
        hypercalls = [claim for claim in self._hypercalls if claim.owner == owner]
        irqs = [line for line, holder in self._irqs.items() if holder == owner]
        text = self._owners.pop(owner, None)
        self._drop_ports(ports)
        self._mmio = [claim for claim in self._mmio if claim.owner != owner]
        self._hypercalls = [claim for claim in self._hypercalls if claim.owner != owner]
        for line in irqs:
            del self._irqs[line]
        undo_services = self.services.release(owner)
        self._hang_doorbell()

        def undo() -> None:
            for claim in ports:
                self.claim_pio(claim.first, claim.last, claim.handler, owner, traced=claim.traced)
            self._mmio = sorted([*self._mmio, *mmio], key=lambda each: each.first)
            self._hypercalls += hypercalls
            self._irqs |= dict.fromkeys(irqs, owner)
            undo_services()
            self._hang_doorbell()
            if text is not None:
                self._owners[owner] = text

        return undo

    def owners(self) -> tuple[str, ...]:
        """Return everybody but the core who claimed something, sorted."""
        return tuple(sorted(self._owners))

    def describe(self, owner: str, text: str) -> None:
        """Say what the guest is told about an owner; those who claimed nothing are not told of."""
        if owner in self._owners:
            self._owners[owner] = text

    def descriptions(self) -> tuple[str, ...]:
        """Return what the guest is told about each owner, in the order of :meth:`owners`."""
        return tuple(self._owners[owner] for owner in self.owners())

    def ports_of(self, owner: str) -> tuple[tuple[int, int], ...]:
        """Return the port ranges of an owner, sorted."""
        return tuple(sorted((claim.first, claim.last) for claim in self._pio if claim.owner == owner))

    def _note(self, owner: str) -> None:
        if owner != CORE:
            self._owners.setdefault(owner, owner)

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

    def _find_mmio(self, gpa: int, size: int) -> MmioClaim | None:
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
        if number in DEFAULTS and self.defaults is not None:
            return self.defaults.hypercall(number, args) & ALL_ONES_64
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
