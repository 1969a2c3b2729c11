"""The ACPI ports of a PC's power management beside the control register: events, and the timer on virtual time.

ACPI 6.5, 4.8.3; the ports are where SeaBIOS puts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from vmgraft.vmmhost.core.state import Remembering

#: Frequency of the power-management timer in Hz; its counter has 24 bits (ACPI 6.5, 4.8.3.3).
PM_TIMER_HZ: Final = 3_579_545
_COUNTER_MASK: Final = 0xFFFFFF


class PmTimer:
    """Port 0xB008: counts up at 3.58 MHz."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock

    def pio_read(self, offset: int, size: int) -> int:
        """Read the counter."""
        return (self._clock() * PM_TIMER_HZ // 1_000_000_000 & _COUNTER_MASK) >> (8 * offset)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Nothing to write."""


class PmEvents(Remembering):
    """Ports 0xB000-0xB003: status, in which nothing ever happens, and the enable bits, which are remembered."""

    REMEMBERED: ClassVar = {"_enabled": 2}

    def __init__(self) -> None:
        self._enabled = bytearray(2)

    def pio_read(self, offset: int, size: int) -> int:
        """Read status (offset 0) and enable bits (offset 2)."""
        return int.from_bytes((bytes(2) + self._enabled)[offset : offset + size], "little")

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Remember enable bits."""
        for index in range(size):
            if 2 <= offset + index < 4:
                self._enabled[offset + index - 2] = value >> (8 * index) & 0xFF
