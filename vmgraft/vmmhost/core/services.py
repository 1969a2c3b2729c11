"""Default services of the host, and who may answer in their place.

A default is a plain function in the core's path. Whatever is plugged in may register a handler for a service, with an
owner: an *override* takes the place of the default, a *chain* is asked before it. Handlers answer or pass; where all
pass, also because they are gone, the default answers. With no handler registered nothing is asked and nothing is paid.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

from vmgraft.errors import CapabilityError


class Service(IntEnum):
    """A default service, by the number an extension is asked with."""

    RTC = 1  #: the time of day that CMOS and INT 1Ah show
    CONSOLE = 2  #: bytes on their way from the serial port to its sink
    ENTROPY = 3  #: what the default hypercall 1 gives
    TIME = 4  #: the tick counter that INT 1Ah AH=00h gives
    DISK = 5  #: order and read-ahead hints, and leave to write; never content
    CPUID = 6  #: leaves 40000000h-4000000Fh, asked once before the guest's first instruction
    HYPERCALL = 7  #: the default hypercalls 1-15


#: Service names as capabilities spell them.
SERVICES: Final = tuple(service.name.lower() for service in Service)

#: First second of the year 3000, UTC: the clock ends there.
RTC_END: Final = 32_503_680_000
#: Timer ticks of a day: 24 h at 1193182 / 65536 Hz (IBM PC/AT BIOS, INT 1Ah).
TICKS_PER_DAY: Final = 0x1800B0
#: Leaves that the CPUID service may show: those kept for software (Intel SDM vol. 2A, CPUID; AMD APM vol. 3, E.3.8).
CPUID_LEAVES: Final = range(0x40000000, 0x40000010)
#: Longest piece of console output asked about at once, bytes; longer writes are cut.
CONSOLE_BYTES: Final = 4096
#: Ranges that one answer of the disk service may name.
DISK_RANGES: Final = 32
#: Bytes of data that an answer may carry, by service.
ROOM: Final = {
    Service.RTC: 0, Service.CONSOLE: CONSOLE_BYTES, Service.ENTROPY: 8, Service.TIME: 0, Service.DISK: DISK_RANGES * 16,
    Service.CPUID: 16, Service.HYPERCALL: 8,
}  # fmt: skip

_RANGE: Final = struct.Struct("<QQ")
_LEAF: Final = struct.Struct("<4I")
_ARGS: Final = struct.Struct("<4I")
#: In the disk service's second argument: this access is a write.
DISK_WRITE: Final = 1 << 32
#: In the disk service's second argument: where the number of the drive begins.
DISK_DRIVE_SHIFT: Final = 40


def repeatable_entropy(seed: bytes) -> Callable[[int], bytes]:
    """Return a source that gives the same bytes for the same seed, for runs that can be repeated: SHAKE256 (FIPS 202).

    Args:
        seed: Any bytes.
    """
    given = 0

    def take(count: int) -> bytes:
        nonlocal given
        given += 1
        return hashlib.shake_256(b"vmgraft entropy\0" + given.to_bytes(8, "little") + seed).digest(count)

    return take


class Answer(NamedTuple):
    """What a handler says: a number from 0, and data where the service has some."""

    value: int
    data: bytes = b""


class ServiceHandler(Protocol):
    """Answers for a service, or passes with None. Answers must satisfy `problem`."""

    def serve(self, service: Service, a0: int, a1: int, data: bytes) -> Answer | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class _Entry:
    owner: str
    chain: bool
    rank: int
    handler: ServiceHandler


class ServiceTable:
    """The services of one machine.

    Chains are asked in the order of their ranks, those of one rank in the order in which they came; then the override.

    Args:
        entropy: The default of that service: gives random bytes, by count.
    """

    def __init__(self, *, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._lines: dict[Service, tuple[_Entry, ...]] = {}
        self._entropy = entropy

    def register(
        self, service: Service, handler: ServiceHandler, owner: str, *, chain: bool = False, rank: int = 0
    ) -> None:
        """Let a handler answer for a service.

        Raises:
            CapabilityError: another owner overrides the service already.
        """
        line = self._lines.get(service, ())
        for entry in line:
            if not entry.chain and not chain:
                message = f"{owner} takes over the service {service.name.lower()}, which {entry.owner} has taken over"
                raise CapabilityError(message, field="service", hint="load one of the two, or chain one of them")
        entries = [*line, _Entry(owner, chain, rank, handler)]
        self._lines[service] = tuple(sorted(entries, key=lambda entry: (not entry.chain, entry.rank)))

    def release(self, owner: str) -> Callable[[], None]:
        """Forget the handlers of an owner; the function returned brings them back."""
        before = dict(self._lines)
        kept = {service: tuple(e for e in line if e.owner != owner) for service, line in before.items()}
        self._lines = {service: line for service, line in kept.items() if line}

        def undo() -> None:
            self._lines = before

        return undo

    def served(self, service: Service) -> bool:
        """Say whether anybody but the default is asked."""
        return service in self._lines

    def owners(self) -> set[str]:
        """Return everybody who registered something."""
        return {entry.owner for line in self._lines.values() for entry in line}

    def ask(self, service: Service, a0: int = 0, a1: int = 0, data: bytes = b"") -> Answer | None:
        """Ask the handlers of a service in turn; None when the default is to answer."""
        for entry in self._lines.get(service, ()):
            answer = entry.handler.serve(service, a0, a1, data)
            if answer is not None:
                return answer
        return None

    # --- the services, as the core's devices call them ----------------------------------------------------------------

    def rtc(self, seconds: int) -> int:
        """Return the time of day to show, seconds since 1970 (UTC); the default shows ``seconds``."""
        if Service.RTC not in self._lines:
            return seconds
        answer = self.ask(Service.RTC, max(0, seconds))
        return seconds if answer is None else answer.value

    def ticks(self, ticks: int) -> int:
        """Return the tick counter to show; the default shows ``ticks``."""
        if Service.TIME not in self._lines:
            return ticks
        answer = self.ask(Service.TIME, ticks)
        return ticks if answer is None else answer.value

    def console(self, data: bytes) -> bytes:
        """Return the bytes to hand on to the sink; the default hands on all of them."""
        if Service.CONSOLE not in self._lines:
            return data
        pieces = (data[at : at + CONSOLE_BYTES] for at in range(0, len(data), CONSOLE_BYTES))
        return b"".join(self._console(piece) for piece in pieces)

    def _console(self, piece: bytes) -> bytes:
        answer = self.ask(Service.CONSOLE, len(piece), 0, piece)
        return piece if answer is None else answer.data

    def entropy(self) -> int:
        """Return 64 random bits."""
        answer = self.ask(Service.ENTROPY, 8) if Service.ENTROPY in self._lines else None
        return int.from_bytes(self._entropy(8) if answer is None else answer.data, "little")

    def disk(self, sector: int, count: int, *, write: bool, drive: int) -> tuple[bool, tuple[tuple[int, int], ...]]:
        """Return whether an access may go on, and what to read ahead as (first sector, sectors) of 512 bytes."""
        if Service.DISK not in self._lines:
            return True, ()
        what = min(count, DISK_WRITE - 1) | (DISK_WRITE if write else 0) | drive << DISK_DRIVE_SHIFT
        answer = self.ask(Service.DISK, sector, what)
        if answer is None:
            return True, ()
        return not (write and answer.value), tuple(_RANGE.iter_unpack(answer.data))

    def cpuid(self) -> dict[int, tuple[int, int, int, int]]:
        """Return the leaves to show in place of the engine's: number → EAX, EBX, ECX, EDX."""
        leaves = {}
        if Service.CPUID in self._lines:
            for leaf in CPUID_LEAVES:
                answer = self.ask(Service.CPUID, leaf)
                if answer is not None:
                    leaves[leaf] = _LEAF.unpack(answer.data)
        return leaves

    def hypercall(self, number: int, args: tuple[int, int, int, int]) -> int | None:
        """Return what a handler answers to one of the default hypercalls; None when the default is to answer."""
        if Service.HYPERCALL not in self._lines:
            return None
        answer = self.ask(Service.HYPERCALL, number, 0, _ARGS.pack(*args))
        return None if answer is None else int.from_bytes(answer.data, "little")


def problem(service: Service, a0: int, answer: Answer) -> str | None:
    """Say what is wrong with an answer, or None: the layer holds every answer against this before the core sees it.

    Args:
        service: What was asked.
        a0: The first argument of the question.
        answer: What came back.
    """
    value, size = answer.value, len(answer.data)
    match service:
        case Service.RTC:
            wrong = value >= RTC_END or size
        case Service.TIME:
            wrong = value >= TICKS_PER_DAY or size
        case Service.CONSOLE:
            wrong = value != size or size > CONSOLE_BYTES
        case Service.ENTROPY:
            wrong = value != size or size != a0
        case Service.DISK:
            wrong = value > 1 or size % _RANGE.size or size > ROOM[service]
        case Service.CPUID | Service.HYPERCALL:
            wrong = value != size or size != ROOM[service]
    return f"{value} with {size} bytes is no answer of the service {service.name.lower()}" if wrong else None
