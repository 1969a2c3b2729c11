"""Linux kernels (bzImage) by the 32- and 64-bit boot protocols: Documentation/arch/x86/boot.rst and zero-page.rst."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from vmgraft.vmmhost.core.loaders.contract import DirectBoot, MemoryMap, Protocol
from vmgraft.vmmhost.core.loaders.entry import LoadedKernel
from vmgraft.vmmhost.core.loaders.layout import PAGE, Layout
from vmgraft.vmmhost.core.screen import COLUMNS, ROWS

MAGIC: Final = b"HdrS"
_MAGIC_AT: Final = 0x202
_BOOT_FLAG_AT: Final = 0x1FE
_SECTOR: Final = 512
#: The setup header from 0x1F1: setup_sects, root_flags, syssize, ram_size, vid_mode, root_dev, boot_flag, jump, header,
#: version, 8 bytes for real mode, type_of_loader, loadflags, setup_move_size, code32_start.
_FIRST: Final = struct.Struct("<BHIHHHH2s4sH8xBBHI")
_HEADER_AT: Final = 0x1F1
#: From 0x22C: initrd_addr_max, kernel_alignment, relocatable_kernel, min_alignment, xloadflags, cmdline_size, 28 bytes,
#: pref_address, init_size.
_SECOND: Final = struct.Struct("<IIBBHI28xQI")
_SECOND_AT: Final = 0x22C
#: The header must hold all of :data:`_SECOND`: protocol 2.10 (Linux 2.6.31) brought init_size; 2.12 brought xloadflags.
_VERSION_MIN: Final = 0x020A
_VERSION_XLOADFLAGS: Final = 0x020C
_LOADED_HIGH: Final = 0x01
_XLF_KERNEL_64: Final = 0x0001
#: The header's last byte is told by the jump at 0x200; in the boot parameters it may fill up to here.
_HEADER_END_MAX: Final = 0x290
_SETUP_SECTS_DEFAULT: Final = 4
#: The 64-bit entry lies this far behind the 32-bit one.
_ENTRY_64: Final = 0x200
#: Where an image that does not say otherwise belongs.
_LOAD_ADDRESS: Final = 0x100000

# --- boot parameters ("zero page") ------------------------------------------------------------------------------------

_PARAMETERS_SIZE: Final = PAGE
#: screen_info: cursor column and row, KiB of extended memory, page, mode, columns, EGA memory, lines, VGA, font height.
_SCREEN: Final = struct.Struct("<BBHHBBxxHxxBBH")
_ALT_MEM_AT: Final = 0x1E0
_E820_COUNT_AT: Final = 0x1E8
_E820_AT: Final = 0x2D0
_E820_ENTRY: Final = struct.Struct("<QQI")
_E820_MAX: Final = 128
_TYPE_OF_LOADER_AT: Final = 0x210
_UNDEFINED_LOADER: Final = 0xFF
_CODE32_START_AT: Final = 0x214
_RAMDISK_AT: Final = 0x218  # ramdisk_image, ramdisk_size
_CMD_LINE_PTR_AT: Final = 0x228


@dataclass(frozen=True, slots=True)
class _Header:
    """What the setup header says, bounded."""

    raw: bytes
    payload_at: int
    payload: memoryview
    initrd_max: int
    alignment: int
    relocatable: bool
    is_64: bool
    cmdline_max: int
    preferred: int
    init_size: int


def is_linux(kernel: bytes) -> bool:
    """Whether the file has the magic of a Linux setup header."""
    return kernel[_MAGIC_AT : _MAGIC_AT + 4] == MAGIC and kernel[_BOOT_FLAG_AT : _BOOT_FLAG_AT + 2] == b"\x55\xaa"


def _parse(direct: DirectBoot) -> _Header:
    kernel = direct.kernel
    if len(kernel) < _SECOND_AT + _SECOND.size:
        raise direct.refuse("the file ends within its setup header", field="setup header", offset=len(kernel))
    sects, _flags, syssize, _ram, _mode, _root, _flag, jump, _magic, version, _type, load_flags, _move, _start = (
        _FIRST.unpack_from(kernel, _HEADER_AT)
    )
    if version < _VERSION_MIN or not load_flags & _LOADED_HIGH:
        message = f"boot protocol {version >> 8}.{version & 0xFF:02}, load flags {load_flags:#x}"
        hint = "this host takes a bzImage of protocol 2.10 or later"
        raise direct.refuse(message, field="version", offset=0x206, hint=hint)
    initrd_max, alignment, relocatable, _min, x_flags, cmdline_max, preferred, init_size = _SECOND.unpack_from(
        kernel, _SECOND_AT
    )
    payload_at = ((sects or _SETUP_SECTS_DEFAULT) + 1) * _SECTOR
    # The length is counted in units of 16 bytes, so that the file may end up to 15 bytes early.
    if payload_at >= len(kernel) or len(kernel) - payload_at <= (syssize - 1) * 16:
        message = f"the file has {len(kernel)} bytes, but its header tells of {payload_at + syssize * 16}"
        raise direct.refuse(message, field="syssize", offset=0x1F4, hint="the file is truncated")
    if alignment & (alignment - 1) or (relocatable and not alignment):
        raise direct.refuse(f"an alignment of {alignment:#x}", field="kernel_alignment", offset=0x230)
    end = min(_MAGIC_AT + jump[1], _HEADER_END_MAX)
    return _Header(
        raw=kernel[_HEADER_AT : max(end, _SECOND_AT + _SECOND.size)],
        payload_at=payload_at,
        payload=memoryview(kernel)[payload_at:],
        initrd_max=initrd_max,
        alignment=alignment,
        relocatable=bool(relocatable),
        is_64=version >= _VERSION_XLOADFLAGS and bool(x_flags & _XLF_KERNEL_64),
        cmdline_max=cmdline_max,
        preferred=preferred,
        init_size=init_size,
    )


def load(direct: DirectBoot, memory_map: MemoryMap, ram_end: int) -> LoadedKernel:
    """Lay out a bzImage.

    Raises:
        NotBootableError: when the file is none, needs more memory, or cannot be entered as asked.
    """
    header = _parse(direct)
    wide = header.is_64 if direct.protocol is Protocol.AUTO else direct.protocol is Protocol.LINUX64
    if wide and not header.is_64:
        hint = "it is entered in 32-bit mode where no protocol is asked for"
        raise direct.refuse("the kernel has no 64-bit entry", field="xloadflags", offset=0x236, hint=hint)
    if direct.modules:
        raise direct.refuse("Linux takes one initial ramdisk and no modules", field="modules", hint="leave them out")
    layout = Layout(direct, ram_end)
    address = _address(direct, header, ram_end)
    # The kernel unpacks itself where it prefers to run: all of that must be free, whatever the file's own size.
    start = max(header.preferred, address) if header.preferred else address
    if header.relocatable:
        start = address
    needed = max(start + header.init_size, address + len(header.payload))
    layout.place(address, header.payload, needed - address - len(header.payload), "the kernel", header.payload_at)
    initrd = layout.place_high(direct.initrd, header.initrd_max + 1, "initrd") if direct.initrd else 0
    cmdline = layout.text(direct.cmdline, header.cmdline_max)
    page = _parameters(header, memory_map, ram_end)
    struct.pack_into("<I", page, _CODE32_START_AT, address)
    struct.pack_into("<II", page, _RAMDISK_AT, initrd, len(direct.initrd))
    struct.pack_into("<I", page, _CMD_LINE_PTR_AT, cmdline)
    parameters = layout.table(bytes(page), PAGE)
    return LoadedKernel(
        protocol=(Protocol.LINUX64 if wide else Protocol.LINUX32).value,
        pieces=layout.pieces,
        entry=address + (_ENTRY_64 if wide else 0),
        wide=wide,
        registers={"esi": parameters},
    )


def _address(direct: DirectBoot, header: _Header, ram_end: int) -> int:
    """Return where to put the payload: where it prefers to be, or lower when that is beyond RAM and it can move."""
    if not header.relocatable:
        return _LOAD_ADDRESS
    preferred = header.preferred or _LOAD_ADDRESS
    if preferred % header.alignment:
        message = f"preferred address {preferred:#x} is not aligned to {header.alignment:#x}"
        raise direct.refuse(message, field="pref_address", offset=0x258)
    lowest = -(-_LOAD_ADDRESS // header.alignment) * header.alignment
    return preferred if preferred + header.init_size <= ram_end else min(lowest, preferred)


def _parameters(header: _Header, memory_map: MemoryMap, ram_end: int) -> bytearray:
    """Return the boot parameters: the header as it is in the file, the screen, and the memory map."""
    page = bytearray(_PARAMETERS_SIZE)
    extended = (ram_end >> 10) - 1024
    page[: _SCREEN.size] = _SCREEN.pack(0, 0, min(extended, 0xFFFF), 0, 3, COLUMNS, 3, ROWS, 1, 16)
    struct.pack_into("<I", page, _ALT_MEM_AT, extended)
    page[_HEADER_AT : _HEADER_AT + len(header.raw)] = header.raw
    entries = memory_map[:_E820_MAX]
    page[_E820_COUNT_AT] = len(entries)
    for index, entry in enumerate(entries):
        _E820_ENTRY.pack_into(page, _E820_AT + index * _E820_ENTRY.size, *entry)
    page[_TYPE_OF_LOADER_AT] = _UNDEFINED_LOADER
    return page
