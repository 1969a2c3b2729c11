"""The words that the privileged core speaks with whatever is plugged into it.

Nothing here knows what an extension is: a handler is a device that answers accesses in a claimed range, seen as offsets
from the start of that range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class PioHandler(Protocol):
    """A device behind a range of I/O ports; ``offset`` is relative to the range, ``size`` 1, 2 or 4."""

    def pio_read(self, offset: int, size: int) -> int: ...  # noqa: D102
    def pio_write(self, offset: int, size: int, value: int) -> None: ...  # noqa: D102


class MmioHandler(Protocol):
    """A device behind a range of guest-physical addresses; ``size`` 1, 2, 4 or 8."""

    def mmio_read(self, offset: int, size: int) -> int: ...  # noqa: D102
    def mmio_write(self, offset: int, size: int, value: int) -> None: ...  # noqa: D102


class HypercallHandler(Protocol):
    """Answers a range of hypercall numbers; arguments are unsigned 32-bit, the result is 64-bit."""

    def hypercall(self, number: int, args: tuple[int, int, int, int]) -> int: ...  # noqa: D102


class GuestMemory(Protocol):
    """Guest RAM by guest-physical address (GPA); out of range raises ValueError."""

    def read(self, gpa: int, length: int) -> bytes: ...  # noqa: D102
    def write(self, gpa: int, data: bytes) -> None: ...  # noqa: D102


#: Called by the vCPU loop about every 10 ms of wall-clock time, with nanoseconds of virtual time since boot.
TickHandler = Callable[[int], None]


class EndReason(StrEnum):
    """Why a guest run ended."""

    HALT = "halt"  #: HLT with interrupts off, or INT 18h
    SHUTDOWN = "shutdown"  #: the guest asked for power-off (APM, ACPI port, triple fault is RESET)
    RESET = "reset"
    TIMEOUT = "timeout"
    UNTIL = "until"  #: the text waited for appeared
    KEY_WAIT = "key-wait"  #: the guest waits for a key and none will ever come
    FAULT = "extension-fault"
    DISK = "content-mismatch"  #: a block read differs from what was verified
    ERROR = "cpu-error"  #: KVM internal error, emulation failure
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class PioEvent:
    """One line of the I/O trace: what the guest did to a port."""

    write: bool
    port: int
    size: int
    value: int
