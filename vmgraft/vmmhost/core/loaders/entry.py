"""From a laid-out kernel to its first instruction: memory, descriptor table, page tables, registers.

The ROM's code does the switching of modes (``data/trapbios.asm``, KERNEL), so that every engine goes the same way.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from vmgraft.vmmhost.core.firmware.call import Call
from vmgraft.vmmhost.core.memory import GuestRam

# --- low memory, all of it free for the kernel once it has read what it needs ---------------------------------------

#: Stack pointer at the entry; it grows down to the end of the BIOS data area.
STACK_TOP: Final = 0x2000
#: Boot structures: a page or more of them.
TABLES_AT: Final = 0x2000
TABLES_END: Final = 0x7000
#: One page map level 4, one page directory pointer table, four page directories: 4 GiB in pages of 2 MiB.
PAGES_AT: Final = 0x9000
PAGES_END: Final = 0xF000
#: Command lines, each ended by a zero byte.
STRINGS_AT: Final = 0x10000
STRINGS_END: Final = 0x20000
#: From here to the extended BIOS data area, and from 1 MiB up, a kernel may have itself loaded.
FREE_LOW: Final = 0x20000

# --- what the ROM reads, in the extended BIOS data area (trapbios.asm) ----------------------------------------------

_EBDA: Final = 0x9FC00
#: Where the descriptor table lies; the kernel may use it until it has its own.
GDT_AT: Final = _EBDA + 0x100
#: Table limit and base, 64-bit mode or not, page tables, stack pointer.
_AREA: Final = struct.Struct("<HIBxII")
AREA_AT: Final = _EBDA + 0x140
_TARGET_32: Final = struct.Struct("<IH")
_TARGET_64: Final = struct.Struct("<Q")
TARGET_AT: Final = _EBDA + 0x150
_REGISTERS: Final = struct.Struct("<3I4x4I")
REGISTERS_AT: Final = _EBDA + 0x160
_REGISTER_NAMES: Final = ("edi", "esi", "ebp", "ebx", "edx", "ecx", "eax")
#: Offset in the ROM's segment of the code that enters a kernel.
ROM_ENTRY: Final = 0x0C00
_ROM_SEGMENT: Final = 0xF000
_FLAGS: Final = 0x0002  # interrupts off; this bit is always set

# --- descriptors (Intel SDM volume 3, 3.4.5 and 7.2.2) ----------------------------------------------------------------

#: Flat 4 GiB, accessed: 32-bit code, 64-bit code, data; and a 32-bit task state segment at 0 with a limit of 67h.
CODE_32: Final = 0x00CF9B000000FFFF
CODE_64: Final = 0x00AF9B000000FFFF
DATA: Final = 0x00CF93000000FFFF
TASK: Final = 0x0000890000000067
#: Selectors as Linux wants them (Documentation/arch/x86/boot.rst); the first code segment is the ROM's way in.
CODE_SELECTOR: Final = 0x10
DATA_SELECTOR: Final = 0x18
TASK_SELECTOR: Final = 0x20

_PRESENT_WRITABLE: Final = 0x03
_LARGE_PAGE: Final = 0x83
_ENTRIES: Final = 512
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes at a guest-physical address, followed by ``zeros`` bytes of zero."""

    address: int
    data: bytes | memoryview
    zeros: int = 0

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.address + len(self.data) + self.zeros


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """A kernel laid out in guest memory, ready to be entered.

    Attributes:
        protocol: ``multiboot``, ``pvh``, ``linux64`` or ``linux32``.
        pieces: What to write where; nothing of it overlaps.
        entry: Guest-physical address of the first instruction.
        wide: Enter in 64-bit mode with the first 4 GiB mapped one to one, else in 32-bit mode without paging.
        registers: 32-bit registers at the entry by name (``eax`` ...); those not named are 0.
    """

    protocol: str
    pieces: tuple[Piece, ...]
    entry: int
    wide: bool = False
    registers: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


def descriptor_table(*, wide: bool) -> bytes:
    """Return the global descriptor table at the entry."""
    return struct.pack("<6Q", 0, CODE_32, CODE_64 if wide else CODE_32, DATA, TASK, 0)


def page_tables() -> bytes:
    """Return the page tables for 64-bit mode, as they lie at :data:`PAGES_AT`."""
    directory, first = PAGES_AT + 0x1000, PAGES_AT + 0x2000
    top = struct.pack("<Q", directory | _PRESENT_WRITABLE).ljust(0x1000, b"\0")
    pointers = b"".join(struct.pack("<Q", first + 0x1000 * index | _PRESENT_WRITABLE) for index in range(4))
    pages = struct.pack(f"<{4 * _ENTRIES}Q", *(index << 21 | _LARGE_PAGE for index in range(4 * _ENTRIES)))
    return top + pointers.ljust(0x1000, b"\0") + pages


def enter(kernel: LoadedKernel, call: Call) -> None:
    """Write a kernel to memory, and let the IRET of the BIOS call go where the ROM enters it."""
    ram = call.ram
    for piece in kernel.pieces:
        _write(ram, piece)
    if kernel.wide:
        ram.write(PAGES_AT, page_tables())
    table = descriptor_table(wide=kernel.wide)
    ram.write(GDT_AT, table)
    ram.write(AREA_AT, _AREA.pack(len(table) - 1, GDT_AT, kernel.wide, PAGES_AT, STACK_TOP))
    target = _TARGET_64.pack(kernel.entry) if kernel.wide else _TARGET_32.pack(kernel.entry, CODE_SELECTOR)
    ram.write(TARGET_AT, target)
    ram.write(REGISTERS_AT, _REGISTERS.pack(*(kernel.registers.get(name, 0) for name in _REGISTER_NAMES)))
    ram.put(call.frame, 2, ROM_ENTRY)
    ram.put(call.frame + 2, 2, _ROM_SEGMENT)
    ram.put(call.frame + 4, 2, _FLAGS)


def _write(ram: GuestRam, piece: Piece) -> None:
    """Write a piece, in chunks: neither a second copy of a large ramdisk nor gigabytes of zeros are made."""
    view = memoryview(piece.data)
    for start in range(0, len(view), _CHUNK):
        ram.write(piece.address + start, bytes(view[start : start + _CHUNK]))
    zeros = bytes(min(piece.zeros, _CHUNK))
    for start in range(piece.address + len(view), piece.end, _CHUNK):
        ram.write(start, zeros[: piece.end - start])
