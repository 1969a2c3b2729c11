"""A 16550A serial port that always can send and never receives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

#: Line status: transmitter and holding register empty (National PC16550D, table II).
LSR_EMPTY: Final = 0x60
#: Modem status: carrier, data set ready, clear to send.
MSR_READY: Final = 0xB0
_LCR_DLAB: Final = 0x80
_MCR_LOOP: Final = 0x10


class Serial:
    """The eight registers of a 16550A; every byte sent goes to ``sink``."""

    def __init__(self, sink: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._registers = bytearray(8)
        self._divisor = bytearray((12, 0))  # 9600 baud, as after a PC's self-test
        self._looped: int | None = None

    def pio_read(self, offset: int, size: int) -> int:
        """Read registers; wide reads take neighbours."""
        return sum(self._read(offset + index) << (8 * index) for index in range(size))

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write registers; wide writes give neighbours."""
        for index in range(size):
            self._write(offset + index, value >> (8 * index) & 0xFF)

    def _divisor_open(self) -> bool:
        return bool(self._registers[3] & _LCR_DLAB)

    def _read(self, offset: int) -> int:
        if offset < 2 and self._divisor_open():
            return self._divisor[offset]
        if offset == 0:
            value, self._looped = self._looped or 0, None
            return value
        if offset == 2:  # IIR: nothing pending; FIFO bits when enabled
            return 0xC1 if self._registers[2] & 1 else 0x01
        if offset == 5:
            return LSR_EMPTY | (self._looped is not None)
        if offset == 6:
            return self._loop_status() if self._registers[4] & _MCR_LOOP else MSR_READY
        return self._registers[offset]

    def _loop_status(self) -> int:
        """In loop-back mode the modem outputs come back as inputs: RTS-CTS, DTR-DSR, OUT1-RI, OUT2-DCD."""
        control = self._registers[4]
        return (control & 2) << 3 | (control & 1) << 5 | (control & 4) << 4 | (control & 8) << 4

    def _write(self, offset: int, value: int) -> None:
        if offset < 2 and self._divisor_open():
            self._divisor[offset] = value
        elif offset == 0:
            if self._registers[4] & _MCR_LOOP:
                self._looped = value
            else:
                self._sink(bytes((value,)))
        elif offset not in (5, 6):
            self._registers[offset] = value
