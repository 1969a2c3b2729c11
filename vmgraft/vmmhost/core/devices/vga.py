"""The registers of a VGA (ports 0x3C0-0x3DF): remembered, so that a video BIOS finds what it wrote; nothing is drawn.

The text screen is plain memory at 0xB8000. Register files and their sizes: IBM VGA technical reference.
"""

from __future__ import annotations

from typing import ClassVar, Final

from vmgraft.vmmhost.core.state import Remembering

_ATTRIBUTE, _MISC, _SEQUENCER, _DAC_READ, _DAC_WRITE, _DAC_DATA, _MISC_READ, _GRAPHICS, _CRTC, _STATUS = (
    *(0x00, 0x02, 0x04, 0x07, 0x08, 0x09, 0x0C, 0x0E, 0x14, 0x1A),
)
#: Index port → (attribute that holds the index, registers).
_INDEXED: Final = {_SEQUENCER: "_sequencer", _GRAPHICS: "_graphics", _CRTC: "_crtc"}
_DAC_BYTES: Final = 3 * 256
_RETRACE: Final = 0x09


class Vga(Remembering):
    """Attribute controller, sequencer, graphics controller, CRTC, palette and status."""

    REMEMBERED: ClassVar = {
        **{"_attributes": 32, "_sequencer": 8, "_graphics": 16, "_crtc": 32, "_palette": _DAC_BYTES, "_indexes": 32},
        **{"_misc": range(256), "_status": range(256), "_mask": range(256)},
        **{"_flip_flop": range(2), "_dac_read": range(_DAC_BYTES), "_dac_write": range(_DAC_BYTES)},
    }

    def __init__(self) -> None:
        self._attributes, self._sequencer, self._graphics = bytearray(32), bytearray(8), bytearray(16)
        self._crtc, self._palette, self._indexes = bytearray(32), bytearray(_DAC_BYTES), bytearray(32)
        self._misc, self._status, self._mask = 0x67, 0, 0xFF  # colour addresses, 80 columns
        self._flip_flop = self._dac_read = self._dac_write = 0

    def pio_read(self, offset: int, size: int) -> int:
        """Read registers; wide reads take neighbours."""
        return sum(self._read(offset + index) << (8 * index) for index in range(size))

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Write registers; 16 bits to an index port choose a register and write it."""
        for index in range(size):
            self._write(offset + index, value >> (8 * index) & 0xFF)

    def _read(self, offset: int) -> int:
        if offset == _STATUS:
            self._flip_flop = 0
            self._status ^= _RETRACE
            return self._status
        if offset == _DAC_DATA:
            value = self._palette[self._dac_read]
            self._dac_read = (self._dac_read + 1) % _DAC_BYTES
            return value
        registers = _INDEXED.get(offset - 1)
        if registers is not None:
            return self._register(registers, self._indexes[offset - 1])
        plain = {
            **{_ATTRIBUTE: self._indexes[_ATTRIBUTE], _ATTRIBUTE + 1: self._attributes[self._indexes[_ATTRIBUTE] & 31]},
            **{_MISC_READ: self._misc, _DAC_WRITE: self._dac_write // 3, _MISC: 0x10, 0x06: self._mask},
        }
        return self._indexes[offset] if offset in _INDEXED else plain.get(offset, 0)

    def _register(self, name: str, index: int) -> int:
        registers: bytearray = getattr(self, name)
        return registers[index] if index < len(registers) else 0

    def _write(self, offset: int, value: int) -> None:
        registers = _INDEXED.get(offset - 1)
        if offset in _INDEXED:
            self._indexes[offset] = value
        elif registers is not None:
            held: bytearray = getattr(self, registers)
            if self._indexes[offset - 1] < len(held):
                held[self._indexes[offset - 1]] = value
        elif offset == _ATTRIBUTE:
            self._write_attribute(value)
        elif offset in (_DAC_READ, _DAC_WRITE):
            setattr(self, "_dac_read" if offset == _DAC_READ else "_dac_write", 3 * value)
        elif offset == _DAC_DATA:
            self._palette[self._dac_write] = value & 0x3F
            self._dac_write = (self._dac_write + 1) % _DAC_BYTES
        elif offset == _MISC:
            self._misc = value
        elif offset == 0x06:
            self._mask = value

    def _write_attribute(self, value: int) -> None:
        """The one port that takes index and data in turn."""
        if self._flip_flop:
            self._attributes[self._indexes[_ATTRIBUTE] & 31] = value
        else:
            self._indexes[_ATTRIBUTE] = value & 0x3F
        self._flip_flop ^= 1
