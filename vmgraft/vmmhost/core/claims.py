"""What stands on the bus: claims of ranges, and the two devices that belong to the bus itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from vmgraft.vmmhost.core.contract import HypercallHandler, MmioHandler, PioHandler

ALL_ONES_64: Final = (1 << 64) - 1


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
class PioClaim(Claim):
    """I/O ports; ``traced`` says whether accesses go into the I/O trace."""

    handler: PioHandler
    traced: bool = True


@dataclass(frozen=True, slots=True)
class MmioClaim(Claim):
    """Guest-physical addresses."""

    handler: MmioHandler


@dataclass(frozen=True, slots=True)
class HypercallClaim(Claim):
    """Hypercall numbers."""

    handler: HypercallHandler


class Reserved:
    """Answers ports that are taken, but not by anything in this process."""

    def pio_read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return ALL_ONES_64

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Nothing to write."""


class Bell(Protocol):
    """What the doorbell rings."""

    registers: Registers | None

    def hypercall(self, number: int, args: tuple[int, int, int, int]) -> int: ...  # noqa: D102


class Doorbell:
    """The port behind which hypercalls wait: 32-bit writes only."""

    def __init__(self, bus: Bell) -> None:
        self._bus = bus

    def pio_read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return ALL_ONES_64

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Make the call that the guest's registers describe."""
        registers = self._bus.registers
        if offset != 0 or size != 4 or registers is None:
            return
        args = [registers.get(name) & 0xFFFFFFFF for name in ("rbx", "rcx", "rsi", "rdi")]
        result = self._bus.hypercall(value, (args[0], args[1], args[2], args[3]))
        registers.set("rax", result & 0xFFFFFFFF)
        registers.set("rdx", result >> 32)
