"""Capability strings: what an extension may claim, and whether a grant covers it.

======================  =====================================================================
``log`` ``now`` ``random`` ``tick`` ``stop`` ``kv`` ``metric``  an import of the extension ABI
``pio:0x510-0x517``     I/O ports, first and last, both included
``mmio:0xd0000+0x1000``  guest-physical addresses, start and size in bytes
``hypercall:16-31``     hypercall numbers, first and last, both included
``guest:0x10000+0x1000:rw``  a window into guest memory, start and size in bytes, ``r`` or ``rw``
``irq:5``               an ISA interrupt line of the guest
``service:rtc``         a default service of the host, to take its place; ``service:rtc:chain`` to be asked before it
``supplement:iso``      files shown to the guest beside its image, by kind
======================  =====================================================================

Each capability has one spelling only (lower-case hexadecimal or decimal, no leading zeros), so equal strings and equal
capabilities are the same thing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike

from vmgraft.errors import GraftFormatError, VmgraftError

#: I/O ports of the x86 architecture are 16 bits wide (Intel SDM vol. 1, 19.3).
MAX_PORT = 0xFFFF
#: Physical addresses of the x86 architecture end below this (MAXPHYADDR is at most 52; Intel SDM vol. 3A, 4.1.4).
GPA_LIMIT = 1 << 52
#: Hypercall numbers; 0 is kept for "none".
MAX_HYPERCALL = (1 << 31) - 1
#: Capabilities that are an import of the ABI and cover no range.
FLAGS = ("log", "now", "random", "tick", "stop", "kv", "metric")
#: Default services of the host that an extension may take over or be asked before (docs/extensions.md).
SERVICES = ("rtc", "console", "entropy", "time", "disk", "cpuid", "hypercall")
#: Ways in which files of an extension may be shown to the guest.
SUPPLEMENTS = ("iso", "initrd", "blocks")
#: ISA interrupt lines that no extension can have, as a PC is wired: timer, keyboard, cascade, COM1 (IBM PC AT).
CORE_IRQS = (0, 1, 2, 4)
MAX_IRQ = 15

_HEX = r"0x(0|[1-9a-f][0-9a-f]{0,15})"
_DEC = r"(0|[1-9][0-9]{0,9})"
_PIO = re.compile(rf"pio:{_HEX}-{_HEX}")
_MMIO = re.compile(rf"mmio:{_HEX}\+{_HEX}")
_HYPERCALL = re.compile(rf"hypercall:{_DEC}-{_DEC}")
_GUEST = re.compile(rf"guest:{_HEX}\+{_HEX}:(rw|r)")
_IRQ = re.compile(r"irq:(0|[1-9][0-9]?)")
_SERVICE = re.compile(rf"service:({'|'.join(SERVICES)})(:chain)?")
_SUPPLEMENT = re.compile(rf"supplement:({'|'.join(SUPPLEMENTS)})")
_HINT = (
    "for example log, pio:0x510-0x517, mmio:0xd0000+0x1000, hypercall:16-31, guest:0x10000+0x1000:rw, irq:5,"
    " service:rtc, service:console:chain, supplement:iso"
)


@dataclass(frozen=True, slots=True)
class Flag:
    """An import of the ABI, one of ``FLAGS``."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class PioRange:
    """I/O ports ``first`` to ``last``, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"pio:{self.first:#x}-{self.last:#x}"


@dataclass(frozen=True, slots=True)
class MmioRange:
    """``size`` bytes of guest-physical addresses from ``gpa`` on, served by the extension."""

    gpa: int
    size: int

    def __str__(self) -> str:
        return f"mmio:{self.gpa:#x}+{self.size:#x}"


@dataclass(frozen=True, slots=True)
class HypercallRange:
    """Hypercall numbers ``first`` to ``last``, both included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"hypercall:{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class GuestWindow:
    """``size`` bytes of guest memory from ``gpa`` on that the extension may read, and write when ``writable``."""

    gpa: int
    size: int
    writable: bool

    def __str__(self) -> str:
        return f"guest:{self.gpa:#x}+{self.size:#x}:{'rw' if self.writable else 'r'}"


@dataclass(frozen=True, slots=True)
class IrqLine:
    """One ISA interrupt line that the extension may raise and lower."""

    line: int

    def __str__(self) -> str:
        return f"irq:{self.line}"


@dataclass(frozen=True, slots=True)
class ServiceClaim:
    """A default service, one of ``SERVICES``: taken over, or with ``chain`` asked before whoever serves it."""

    name: str
    chain: bool = False

    def __str__(self) -> str:
        return f"service:{self.name}{':chain' if self.chain else ''}"


@dataclass(frozen=True, slots=True)
class Supplement:
    """Files shown to the guest beside its image, in one of the ways of ``SUPPLEMENTS``."""

    kind: str

    def __str__(self) -> str:
        return f"supplement:{self.kind}"


Capability = Flag | PioRange | MmioRange | HypercallRange | GuestWindow | IrqLine | ServiceClaim | Supplement


def parse_capability(
    text: str,
    *,
    file: str | PathLike[str] | None = None,
    field: str | None = "capabilities",
    error: type[VmgraftError] = GraftFormatError,
) -> Capability:
    """Return the capability a string stands for.

    Args:
        text: The string.
        file: What to name in the error.
        field: Field to name in the error.
        error: Error class to raise.

    Raises:
        VmgraftError: (of class ``error``) not a capability, or out of bounds: ports to 0xffff, addresses below 2**52,
            hypercalls 1 to 2**31 - 1, sizes above 0, interrupt lines 3 and 5 to 15.
    """
    capability = Flag(text) if text in FLAGS else _parse_range(text)
    if capability is None:
        raise error(f"{text[:64]!r} is not a capability", file=file, field=field, hint=_HINT)
    problem = _bounds_problem(capability)
    if problem is not None:
        raise error(f"{text}: {problem}", file=file, field=field)
    return capability


def format_capability(capability: Capability) -> str:
    """Return the one spelling of a capability."""
    return str(capability)


def _parse_range(text: str) -> Capability | None:
    if match := _PIO.fullmatch(text):
        return PioRange(int(match[1], 16), int(match[2], 16))
    if match := _MMIO.fullmatch(text):
        return MmioRange(int(match[1], 16), int(match[2], 16))
    if match := _HYPERCALL.fullmatch(text):
        return HypercallRange(int(match[1]), int(match[2]))
    if match := _GUEST.fullmatch(text):
        return GuestWindow(int(match[1], 16), int(match[2], 16), match[3] == "rw")
    return _parse_name(text)


def _parse_name(text: str) -> Capability | None:
    if match := _IRQ.fullmatch(text):
        return IrqLine(int(match[1]))
    if match := _SERVICE.fullmatch(text):
        return ServiceClaim(match[1], match[2] is not None)
    if match := _SUPPLEMENT.fullmatch(text):
        return Supplement(match[1])
    return None


def _bounds_problem(capability: Capability) -> str | None:
    problem = None
    match capability:
        case PioRange(first, last) if first > last or last > MAX_PORT:
            problem = f"first and last port must be in order, and at most {MAX_PORT:#x}"
        case HypercallRange(first, last) if first > last or first < 1 or last > MAX_HYPERCALL:
            problem = f"first and last number must be in order, from 1 to {MAX_HYPERCALL}"
        case MmioRange(gpa, size) | GuestWindow(gpa, size, _) if size == 0 or gpa + size > GPA_LIMIT:
            problem = "the size must be above 0 and the range must end below 2**52"
        case IrqLine(line) if line > MAX_IRQ or line in CORE_IRQS:
            problem = f"the line must be 3 or 5 to {MAX_IRQ}; the others are the core's"
        case _:
            pass
    return problem


def covers(grant: Capability, claim: Capability) -> bool:
    """Tell whether one grant covers a claim: same kind, range inside range, ``rw`` over ``r``, service over chain."""
    if type(grant) is not type(claim):
        return False
    if isinstance(grant, GuestWindow) and isinstance(claim, GuestWindow) and claim.writable and not grant.writable:
        return False
    if isinstance(grant, ServiceClaim) and isinstance(claim, ServiceClaim):
        return grant.name == claim.name and (claim.chain or not grant.chain)
    outer, inner = _span(grant), _span(claim)
    if outer is None or inner is None:
        return grant == claim
    return outer[1] <= inner[1] and inner[2] <= outer[2]


def covered(grants: Iterable[Capability], claim: Capability) -> bool:
    """Tell whether any single grant covers the claim; grants are never joined."""
    return any(covers(grant, claim) for grant in grants)


def _span(capability: Capability) -> tuple[str, int, int, bool] | None:
    """Return (address space, start, end, exclusive); a read-only window shares with other read-only windows."""
    span: tuple[str, int, int, bool] | None = None
    match capability:
        case PioRange(first, last):
            span = "pio", first, last + 1, True
        case HypercallRange(first, last):
            span = "hypercall", first, last + 1, True
        case MmioRange(gpa, size):
            span = "gpa", gpa, gpa + size, True
        case GuestWindow(gpa, size, writable):
            span = "gpa", gpa, gpa + size, writable
        case IrqLine(line):
            span = "irq", line, line + 1, True
        case ServiceClaim(name, False):
            span = "service", SERVICES.index(name), SERVICES.index(name) + 1, True
        case Flag() | ServiceClaim() | Supplement():  # everybody's
            pass
    return span


def overlaps(one: Capability, other: Capability) -> bool:
    """Tell whether two claims get in each other's way; two read-only windows never do, nor do flags or chains."""
    a, b = _span(one), _span(other)
    if a is None or b is None or a[0] != b[0]:
        return False
    return a[1] < b[2] and b[1] < a[2] and (a[3] or b[3])


def first_overlap(claims: Sequence[Capability]) -> tuple[int, int] | None:
    """Return the positions of two claims that overlap, or None; one sort, so thousands of claims are fine."""
    spans = [(span, index) for index, claim in enumerate(claims) if (span := _span(claim)) is not None]
    spans.sort(key=lambda item: item[0][:3])
    space = ""
    widest = widest_exclusive = (-1, -1)  # (end, position) of the claim reaching furthest so far
    for (name, start, end, exclusive), index in spans:
        if name != space:
            space, widest, widest_exclusive = name, (-1, -1), (-1, -1)
        blocker = widest if exclusive else widest_exclusive
        if start < blocker[0]:
            return min(blocker[1], index), max(blocker[1], index)
        widest = max(widest, (end, index))
        if exclusive:
            widest_exclusive = max(widest_exclusive, (end, index))
    return None
