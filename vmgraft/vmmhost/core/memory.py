"""Guest RAM and the physical memory map of the machine.

::

    0          - 0xBFFFF   RAM; the text screen lies at 0xB8000
    0xC0000    - 0xEFFFF   no RAM: extensions may claim MMIO here; otherwise reads give all ones
    0xF0000    - 0xFFFFF   trap BIOS, read-only where the engine can do that
    0x100000   - RAM end   RAM
    above                  no RAM: extensions may claim MMIO here too
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Final

from vmgraft.errors import HostError, UsageError

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

    def host_address(self) -> int:
        """Return the address of the mapping in this process."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def close(self) -> None:
        """Release the memory; the engine that uses it must be closed before."""
        self.map.close()

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
