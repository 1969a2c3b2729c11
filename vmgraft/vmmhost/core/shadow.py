"""The memory of a machine with stock PC firmware: a flash ROM below 4 GiB, and shadow RAM below 1 MiB.

::

    0          - 0xBFFFF   RAM; the text screen lies at 0xB8000
    0xC0000    - 0xFFFFF   shadow RAM in 13 segments, each writable or not as the host bridge's PAM registers say
    0x100000   - RAM end   RAM
    RAM end    - 0x7FFFFFFF no RAM: extensions may claim MMIO here
    0x80000000 - 0xFEBFFFFF kept free for PCI devices, unless it is RAM
    0xFFFC0000 - 4 GiB     flash ROM, read-only

The shadow holds the last 128 KiB of the ROM at 0xE0000 from the start, as those addresses show them after a reset,
and all ones below. What a PAM register says on reading is remembered but has no effect: RAM is read always.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

from vmgraft.errors import HostError
from vmgraft.vmmhost.core.memory import DEFAULT_MIB, HIGH_BASE, LOW_END, GuestRam, Span

#: First address of the shadow segments; Intel 82441FX data sheet, 3.2.13: twelve of 16 KiB, then one of 64 KiB.
SEGMENTS: Final = (*range(LOW_END, 0xF0000, 0x4000), 0xF0000)
FLASH_SIZE: Final = 256 << 10
FLASH_BASE: Final = (1 << 32) - FLASH_SIZE
#: How much of the ROM's end is seen below 1 MiB as well.
ALIAS_SIZE: Final = 128 << 10
#: Where PCI devices may be placed, which is no place for anything else.
PCI_HOLE: Final = (0x80000000, 0xFEC00000)
#: The shadow's spans stand behind conventional memory in :meth:`ShadowedRam.spans`.
_FIRST_SHADOW_SPAN: Final = 1


class ShadowedRam(GuestRam):
    """RAM without a hole below 1 MiB, and a flash ROM.

    Args:
        mib: Size in MiB.
        rom: The firmware, 256 KiB.

    Raises:
        UsageError: when the size is out of bounds.
        HostError: when this computer does not give that much.
        ValueError: when the firmware has another size.
    """

    def __init__(self, mib: int = DEFAULT_MIB, *, rom: bytes) -> None:
        if len(rom) != FLASH_SIZE:
            raise ValueError(f"the firmware has {len(rom)} bytes, not {FLASH_SIZE}")
        super().__init__(mib)
        self._writable = [False] * len(SEGMENTS)
        try:
            self._flash = mmap.mmap(-1, FLASH_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            self.map.close()
            raise HostError(f"no memory for the firmware: {error.strerror}") from error
        self._flash[:] = rom
        self.map[LOW_END : HIGH_BASE - ALIAS_SIZE] = b"\xff" * (HIGH_BASE - ALIAS_SIZE - LOW_END)
        self.map[HIGH_BASE - ALIAS_SIZE : HIGH_BASE] = rom[-ALIAS_SIZE:]

    def spans(self) -> tuple[Span, ...]:
        """Return what backs which guest-physical addresses, in order."""
        base = self.host_address()
        ends = (*SEGMENTS[1:], HIGH_BASE)
        shadow = [
            Span(start, end - start, base + start, writable)
            for start, end, writable in zip(SEGMENTS, ends, self._writable, strict=True)
        ]
        flash = ctypes.addressof(ctypes.c_char.from_buffer(self._flash))
        return (
            Span(0, LOW_END, base, writable=True),
            *shadow,
            Span(HIGH_BASE, self.size - HIGH_BASE, base + HIGH_BASE, writable=True),
            Span(FLASH_BASE, FLASH_SIZE, flash, writable=False),
        )

    def set_segment(self, index: int, writable: bool) -> None:
        """Let the guest write a shadow segment, or no more."""
        if self._writable[index] != writable:
            if self.protected is not None:
                self.protected(_FIRST_SHADOW_SPAN + index, writable)
            self._writable[index] = writable

    def readable(self, gpa: int, length: int) -> bool:
        """Whether the whole range is RAM or shadow."""
        return length >= 0 and 0 <= gpa <= gpa + length <= self.size

    def writable(self, gpa: int, length: int) -> bool:
        """Whether the whole range is RAM, or shadow that is writable now."""
        end = gpa + length
        if not self.readable(gpa, length):
            return False
        if end <= LOW_END or gpa >= HIGH_BASE:
            return True
        bounds = zip(SEGMENTS, (*SEGMENTS[1:], HIGH_BASE), self._writable, strict=True)
        return all(writable or end <= first or gpa >= last for first, last, writable in bounds)

    def close(self) -> None:
        """Release memory and ROM."""
        self._flash.close()
        super().close()
