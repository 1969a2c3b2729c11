"""Guest RAM and the physical memory map of the machine.

::

    0          - 0xBFFFF   RAM; the text screen lies at 0xB8000
    0xC0000    - 0xEFFFF   no RAM: extensions may claim MMIO here; otherwise reads give all ones
    0xF0000    - 0xFFFFF   trap BIOS, read-only where the engine can do that
    0x100000   - RAM end   RAM
    above                  no RAM: extensions may claim MMIO here too

A machine with stock firmware has another map: :mod:`vmgraft.vmmhost.core.shadow`.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from vmgraft.errors import HostError, UsageError
from vmgraft.vmmhost.core.windows import SharedWindows

MIB: Final = 1 << 20
LOW_END: Final = 0xC0000
ROM_BASE: Final = 0xF0000
HIGH_BASE: Final = 0x100000
#: Memory bounds in MiB: the machine keeps everything below the hole at 3 GiB.
MIN_MIB: Final = 2
MAX_MIB: Final = 3072
DEFAULT_MIB: Final = 64
#: Top of what a BIOS reports as conventional memory; the extended BIOS data area follows.
CONVENTIONAL_END: Final = 0x9FC00

#: E820 types, ACPI specification 6.5, table 15.5.
E820_RAM: Final = 1
E820_RESERVED: Final = 2


def ram_bytes(mib: int) -> int:
    """Return the end of RAM for a machine of ``mib`` MiB.

    Raises:
        UsageError: when the size is out of bounds.
    """
    if not MIN_MIB <= mib <= MAX_MIB:
        raise UsageError(f"guest memory of {mib} MiB is out of bounds", hint=f"from {MIN_MIB} to {MAX_MIB} MiB")
    return mib * MIB


def is_ram(gpa: int, length: int, ram_end: int) -> bool:
    """Whether the whole range is RAM in a machine whose RAM ends at ``ram_end``."""
    end = gpa + length
    return length >= 0 and (0 <= gpa <= end <= LOW_END or HIGH_BASE <= gpa <= end <= ram_end)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of guest-physical addresses backed by memory of this process at ``address``."""

    gpa: int
    size: int
    address: int
    writable: bool


class GuestRam:
    """All RAM of a machine in one anonymous mapping, where offset = guest-physical address.

    Implements :class:`vmgraft.vmmhost.core.contract.GuestMemory`.

    Args:
        mib: Size in MiB, counted from address 0 as a PC does.

    Raises:
        UsageError: when the size is out of bounds.
        HostError: when this computer does not give that much.
    """

    def __init__(self, mib: int = DEFAULT_MIB) -> None:
        self.size = ram_bytes(mib)
        try:
            self.map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            hint = "give the guest less memory"
            raise HostError(f"no {mib} MiB of guest memory: {error.strerror}", hint=hint) from error
        #: Told (gpa, length) of every host-side write; an engine that caches translated code sets it.
        self.written: Callable[[int, int], None] | None = None
        #: Told (index in :meth:`spans`, writable) when the guest may write there from now on, or no more.
        self.protected: Callable[[int, bool], None] | None = None
        self._windows: SharedWindows | None = None

    def host_address(self) -> int:
        """Return the address of the mapping in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def spans(self) -> tuple[Span, ...]:
        """Return what backs which guest-physical addresses, in order; all bounds are multiples of 4 KiB."""
        return tuple(
            Span(start, end - start, self.host_address() + start, writable)
            for start, end, writable in (
                (0, LOW_END, True),
                (ROM_BASE, HIGH_BASE, False),
                (HIGH_BASE, self.size, True),
            )
        )

    def close(self) -> None:
        """Release the memory; the engine that uses it must be closed before."""
        if self._windows is not None:
            self._windows.close()
        self.map.close()

    def share(self, gpa: int, size: int, *, writable: bool) -> int | None:
        """Make a stretch of RAM a memory file and return a descriptor of it, which is the caller's to close.

        Returns:
            None where that cannot be: it is not all RAM, not whole pages, or overlaps another such stretch.

        Raises:
            OSError: the kernel refuses.
        """
        if not is_ram(gpa, size, self.size):
            return None
        if self._windows is None:
            self._windows = SharedWindows(self.map, self.host_address())
        return self._windows.share(gpa, size, writable=writable)

    def keep_shared(self, wanted: Collection[tuple[int, int]]) -> None:
        """Make plain RAM again of every shared stretch but these (first byte and length); what it holds stays."""
        if self._windows is not None:
            self._windows.keep(wanted)

    def refresh(self, gpa: int, length: int) -> None:
        """Take note that somebody changed guest memory there, without :meth:`write`."""
        if self.written is not None:
            self.written(gpa, length)

    def readable(self, gpa: int, length: int) -> bool:
        """Whether the whole range is RAM or ROM."""
        end = gpa + length
        return length >= 0 and (0 <= gpa <= end <= LOW_END or ROM_BASE <= gpa <= end <= self.size)

    def writable(self, gpa: int, length: int) -> bool:
        """Whether the whole range is RAM."""
        return is_ram(gpa, length, self.size)

    def read(self, gpa: int, length: int) -> bytes:
        """Return guest memory.

        Raises:
            ValueError: when the range is not all RAM or ROM.
        """
        if not self.readable(gpa, length):
            raise ValueError(f"guest-physical range {gpa:#x}+{length:#x} is not memory")
        return self.map[gpa : gpa + length]

    def write(self, gpa: int, data: bytes) -> None:
        """Change guest memory.

        Raises:
            ValueError: when the range is not all RAM.
        """
        if not self.writable(gpa, len(data)):
            raise ValueError(f"guest-physical range {gpa:#x}+{len(data):#x} is not RAM")
        self.map[gpa : gpa + len(data)] = data
        if self.written is not None:
            self.written(gpa, len(data))

    def load_rom(self, rom: bytes) -> None:
        """Put the 64 KiB ROM in place.

        Raises:
            ValueError: when it has another size.
        """
        if len(rom) != HIGH_BASE - ROM_BASE:
            raise ValueError(f"the ROM has {len(rom)} bytes, not {HIGH_BASE - ROM_BASE}")
        self.map[ROM_BASE:HIGH_BASE] = rom

    def get(self, gpa: int, size: int) -> int:
        """Return a little-endian integer of ``size`` bytes."""
        return int.from_bytes(self.read(gpa, size), "little")

    def put(self, gpa: int, size: int, value: int) -> None:
        """Write the low ``size`` bytes of ``value``, little-endian."""
        self.write(gpa, (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little"))

    def e820(self) -> tuple[tuple[int, int, int], ...]:
        """Return the memory map that INT 15h reports: (base, length, type)."""
        return (
            (0, CONVENTIONAL_END, E820_RAM),
            (CONVENTIONAL_END, 0xA0000 - CONVENTIONAL_END, E820_RESERVED),
            (ROM_BASE, HIGH_BASE - ROM_BASE, E820_RESERVED),
            (HIGH_BASE, self.size - HIGH_BASE, E820_RAM),
        )
