"""The small devices of a PC board: keyboard controller subset, port 0x92, port 0x61, debug and power ports, CRTC."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmgraft.vmmhost.core.contract import EndReason, PioHandler
from vmgraft.vmmhost.core.portmap import CORE_PORTS

Stop = Callable[[EndReason, str], None]

#: The S5 value of QEMU's ``pc`` machine: SLP_EN with SLP_TYP 0 (ACPI 6.5, 4.8.3.2).
POWER_OFF: Final = 0x2000
#: What software written for Bochs sends to power off.
_SHUTDOWN_WORD: Final = b"Shutdown"


class KeyboardController:
    """The part of an 8042 that boot code needs: A20 gate, reset line, self-test; no keys (ports 0x60 and 0x64)."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._output: int | None = None
        self._expects: int | None = None
        self._command_byte = 0x65
        self._port = 0xDF  # A20 on, reset line high

    def pio_read(self, offset: int, size: int) -> int:
        """Read data (offset 0) or status (offset 4)."""
        if offset == 4:
            return 0x14 | (self._output is not None)  # system flag, not inhibited
        value, self._output = self._output or 0, None
        return value

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Take data or a command."""
        value &= 0xFF
        if offset == 4:
            self._command(value)
        elif self._expects == 0x60:
            self._command_byte, self._expects = value, None
        elif self._expects == 0xD1:
            self._port, self._expects = value | 2, None
            if not value & 1:
                self._stop(EndReason.RESET, "keyboard controller pulled the reset line")
        elif offset == 0:
            self._output = 0xFA  # what an attached keyboard acknowledges with

    def _command(self, value: int) -> None:
        answers = {0x20: self._command_byte, 0xAA: 0x55, 0xAB: 0x00, 0xC0: 0x80, 0xD0: self._port}
        self._expects = value if value in (0x60, 0xD1) else None
        self._output = answers.get(value, self._output)
        if value & 0xF1 == 0xF0 and value != 0xFF:  # pulse output lines, line 0 low: reset
            self._stop(EndReason.RESET, "keyboard controller reset command")


class SystemControl:
    """Port 0x92: fast A20 (always on) and fast reset."""

    def __init__(self, stop: Stop) -> None:
        self._stop, self._value = stop, 2

    def pio_read(self, offset: int, size: int) -> int:
        """Read the register."""
        return self._value

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write it; bit 0 resets."""
        self._value = value & 0xFE | 2
        if value & 1:
            self._stop(EndReason.RESET, "port 0x92")


class SpeakerPort:
    """Port 0x61: the refresh bit toggles on every read, as delay loops expect."""

    def __init__(self) -> None:
        self._value = 0

    def pio_read(self, offset: int, size: int) -> int:
        """Read with refresh (bit 4) and counter 2 output (bit 5) toggled."""
        self._value ^= 0x30
        return self._value

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Set speaker gate and data."""
        self._value = self._value & 0x30 | value & 0x03


class DebugPort:
    """A port whose bytes are collected (0x402 and 0xE9), with the value a probe reads."""

    def __init__(self, sink: bytearray, probe: int, limit: int = 1 << 20) -> None:
        self._sink, self._probe, self._limit = sink, probe, limit

    def pio_read(self, offset: int, size: int) -> int:
        """Tell that the port is there."""
        return self._probe

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Collect a byte, up to the limit."""
        if len(self._sink) < self._limit:
            self._sink.append(value & 0xFF)


class PowerControl:
    """Port 0x604, 16 bits: writing 0x2000 powers off."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def pio_read(self, offset: int, size: int) -> int:
        """Read the control register: SCI enabled."""
        return 0x0001 >> (8 * offset)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Power off on the S5 value."""
        if offset == 0 and size == 2 and value & POWER_OFF:
            self._stop(EndReason.SHUTDOWN, f"port {CORE_PORTS['power'][0]:#x}")


class ShutdownText:
    """Port 0x8900: the word "Shutdown", byte by byte, powers off."""

    def __init__(self, stop: Stop) -> None:
        self._stop, self._seen = stop, b""

    def pio_read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0xFF

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Match the next byte."""
        self._seen = (self._seen + bytes((value & 0xFF,)))[-len(_SHUTDOWN_WORD) :]
        if self._seen == _SHUTDOWN_WORD:
            self._stop(EndReason.SHUTDOWN, f"port {CORE_PORTS['shutdown'][0]:#x}")


class Crtc:
    """Index and data of a colour text CRTC (0x3D4-0x3D5) and its status (0x3DA); remembers, draws nothing."""

    def __init__(self) -> None:
        self._index, self._registers, self._status = 0, bytearray(32), 0

    def pio_read(self, offset: int, size: int) -> int:
        """Read index, data, or the status whose retrace bits toggle."""
        if offset == 6:
            self._status ^= 0x09
            return self._status
        if offset > 1:
            return 0xFFFF
        low = self._index if offset == 0 else self._registers[self._index]
        return low | (self._registers[self._index] << 8 if offset == 0 and size > 1 else 0)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Choose a register and, with 16 bits, write it too."""
        if offset == 0:
            self._index = value & 0x1F
            if size > 1:
                self._registers[self._index] = value >> 8 & 0xFF
        elif offset == 1:
            self._registers[self._index] = value & 0xFF


class Shifted:
    """Shows a device at a second port as a higher offset."""

    def __init__(self, device: PioHandler, offset: int) -> None:
        self._device, self._offset = device, offset

    def pio_read(self, offset: int, size: int) -> int:
        """Read the device."""
        return self._device.pio_read(offset + self._offset, size)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write the device."""
        self._device.pio_write(offset + self._offset, size, value)
