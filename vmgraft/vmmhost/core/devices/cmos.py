"""CMOS memory and real-time clock at ports 0x70-0x71 (Motorola MC146818A), on virtual time."""

from __future__ import annotations

import calendar
import time
from collections.abc import Callable, Sequence
from typing import Final

from vmgraft.vmmhost.core.services import ServiceTable

_INDEX_MASK: Final = 0x7F
#: Registers A-D: oscillator on at 32 kHz; 24-hour BCD; nothing pending; battery good.
_REGISTER_A: Final = 0x26
_REGISTER_B: Final = 0x02
_REGISTER_D: Final = 0x80
#: Registers that tell the time of day: seconds to year, and the century (register 32h, as ACPI firmware keeps it).
_CLOCK_REGISTERS: Final = frozenset((0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32))


def bcd(value: int) -> int:
    """Return two decimal digits as packed BCD."""
    return (value // 10 % 10) << 4 | value % 10


class Cmos:
    """128 bytes behind an index port.

    Args:
        clock: Virtual nanoseconds since boot.
        epoch: Seconds since 1970 (UTC) at boot.
        ram_size: Bytes of RAM, told in the usual memory-size registers.
        services: The machine's services, of which ``rtc`` has the last word on the time; None for the default.
    """

    def __init__(
        self, clock: Callable[[], int], epoch: int, ram_size: int, services: ServiceTable | None = None
    ) -> None:
        self._services = services or ServiceTable()
        self._clock, self._epoch, self._index = clock, epoch, 0
        self._store = bytearray(128)
        extended = min(0xFFFF, (ram_size - (1 << 20)) >> 10)
        above_16 = min(0xFFFF, max(0, ram_size - (16 << 20)) >> 16)
        for register, value in ((0x15, 639), (0x17, extended), (0x30, extended), (0x34, above_16)):
            self._store[register : register + 2] = value.to_bytes(2, "little")
        self._store[0x0A], self._store[0x0B], self._store[0x0D] = _REGISTER_A, _REGISTER_B, _REGISTER_D

    def set_floppies(self, types: Sequence[int], equipment: int) -> None:
        """Tell which floppy drives there are (PC/AT technical reference, CMOS 10h, 14h and the checksum at 2Eh).

        Args:
            types: Types of the first two: 1 for 360 KB, 2 for 1.2 MB, 3 for 720 KB, 4 for 1.44 MB, 6 for 2.88 MB.
            equipment: Low byte of the equipment word.
        """
        first, second = (*types, 0, 0)[:2]
        self._store[0x10], self._store[0x14] = first << 4 | second, equipment
        self._store[0x2E:0x30] = sum(self._store[0x10:0x2E]).to_bytes(2, "big")

    def now(self) -> time.struct_time:
        """Return the time of day, UTC."""
        return time.gmtime(self._services.rtc(self._epoch + self._clock() // 1_000_000_000))

    def set_time(self, hour: int, minute: int, second: int) -> None:
        """Move the clock to another time of the same day."""
        now = self.now()
        self._shift((now.tm_year, now.tm_mon, now.tm_mday, hour, minute, second))

    def _shift(self, fields: tuple[int, int, int, int, int, int]) -> None:
        self._epoch = calendar.timegm((*fields, 0, 0, 0)) - self._clock() // 1_000_000_000

    def _clock_register(self, index: int) -> int:
        now = self.now()
        values = {
            0x00: now.tm_sec,
            0x02: now.tm_min,
            0x04: now.tm_hour,
            0x06: (now.tm_wday + 1) % 7 + 1,
            0x07: now.tm_mday,
            0x08: now.tm_mon,
            0x09: now.tm_year % 100,
            0x32: now.tm_year // 100,
        }
        return values[index] if self._store[0x0B] & 4 else bcd(values[index])

    def pio_read(self, offset: int, size: int) -> int:
        """Read the register chosen by the index port."""
        if offset == 0:
            return 0xFF
        if self._index in _CLOCK_REGISTERS:
            return self._clock_register(self._index)
        return self._store[self._index]

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Choose a register, or write it; the clock's own registers are not settable here."""
        if offset == 0:
            self._index = value & _INDEX_MASK
            if size > 1:
                self.pio_write(1, 1, value >> 8 & 0xFF)
        elif self._index not in (0x0C, 0x0D):
            self._store[self._index] = value & 0xFF
