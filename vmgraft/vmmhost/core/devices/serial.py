"""A 16550A serial port that always can send, and receives what it is fed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmgraft.vmmhost.core.services import ServiceTable

#: Line status: transmitter and holding register empty (National PC16550D, table II).
LSR_EMPTY: Final = 0x60
#: Modem status: carrier, data set ready, clear to send.
MSR_READY: Final = 0xB0
_LCR_DLAB: Final = 0x80
_MCR_LOOP: Final = 0x10
#: Modem control OUT2: on a PC it lets the port's interrupt through to its line (PC/AT technical reference).
_MCR_OUT2: Final = 0x08
#: Interrupt enable: received data, transmitter empty. Interrupt identification: the same (PC16550D, tables IV and V).
_IER_RECEIVED: Final = 0x01
_IER_EMPTY: Final = 0x02
_IIR_RECEIVED: Final = 0x04
_IIR_EMPTY: Final = 0x02
_IIR_NONE: Final = 0x01
_IIR_FIFO: Final = 0xC0
#: Bytes that the port itself holds for the guest, with its FIFO on and off.
_FIFO: Final = 16
#: Bytes that wait in front of the port; what is fed beyond is not taken.
BACKLOG: Final = 4096


class Serial:
    """The eight registers of a 16550A; every byte sent goes through the console service to ``sink``.

    Args:
        sink: Gets what the guest sends.
        services: The machine's services.
        irq: Drives the port's interrupt line; None where it has none.
    """

    def __init__(
        self,
        sink: Callable[[bytes], None],
        services: ServiceTable | None = None,
        irq: Callable[[bool], None] | None = None,
    ) -> None:
        self._sink, self._services = sink, services or ServiceTable()
        self._irq, self._line, self._empty = irq, False, False
        self._received, self._backlog = bytearray(), bytearray()
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

    def send(self, data: bytes) -> None:
        """Send bytes as the guest does."""
        shown = self._services.console(data)
        if shown:
            self._sink(shown)

    def feed(self, data: bytes) -> int:
        """Let the guest receive bytes; return how many were taken."""
        taken = data[: BACKLOG - len(self._backlog)]
        self._backlog += taken
        self._refill()
        return len(taken)

    def _refill(self) -> None:
        room = (_FIFO if self._registers[2] & 1 else 1) - len(self._received)
        if room > 0 and self._backlog:
            self._received += self._backlog[:room]
            del self._backlog[:room]
        self._drive()

    def _pending(self) -> int:
        """Return what the interrupt identification tells: received data goes before an empty transmitter."""
        enabled = self._registers[1]
        if self._received and enabled & _IER_RECEIVED:
            return _IIR_RECEIVED
        return _IIR_EMPTY if self._empty and enabled & _IER_EMPTY else _IIR_NONE

    def _drive(self) -> None:
        """Bring the interrupt line up to date."""
        control = self._registers[4]
        level = self._pending() != _IIR_NONE and control & (_MCR_OUT2 | _MCR_LOOP) == _MCR_OUT2
        if level != self._line:
            self._line = level
            if self._irq is not None:
                self._irq(level)

    def _identify(self) -> int:
        """Read the interrupt identification, which acknowledges an empty transmitter."""
        pending = self._pending()
        if pending == _IIR_EMPTY:
            self._empty = False
            self._drive()
        return pending | (_IIR_FIFO if self._registers[2] & 1 else 0)

    def _take(self) -> int:
        """Read the receive buffer."""
        if self._looped is not None:
            value, self._looped = self._looped, None
            return value
        if not self._received:
            return 0
        value = self._received.pop(0)
        self._refill()
        return value

    def _transmit(self, value: int) -> None:
        self._empty = False
        self._drive()  # each byte is one edge of its own
        if self._registers[4] & _MCR_LOOP:
            self._looped = value
        else:
            self.send(bytes((value,)))
        self._empty = True
        self._drive()

    def _divisor_open(self) -> bool:
        return bool(self._registers[3] & _LCR_DLAB)

    def _read(self, offset: int) -> int:
        if offset < 2 and self._divisor_open():
            return self._divisor[offset]
        if offset == 0:
            return self._take()
        if offset == 2:
            return self._identify()
        if offset == 5:
            return LSR_EMPTY | (self._looped is not None or bool(self._received))
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
            self._transmit(value)
        elif offset not in (5, 6):
            self._set(offset, value)

    def _set(self, offset: int, value: int) -> None:
        """Write a register that keeps its value."""
        risen = value & ~self._registers[offset]
        self._registers[offset] = value
        if offset == 1 and risen & _IER_EMPTY:
            self._empty = True  # enabling the interrupt of an empty transmitter raises it at once
        if offset == 2 and value & 2:
            self._received.clear()
        self._refill()
