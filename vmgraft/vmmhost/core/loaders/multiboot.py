"""Multiboot kernels: Multiboot Specification version 0.6.96, as ELF or by the addresses of its header."""

from __future__ import annotations

import struct
from typing import Final

from vmgraft.vmmhost.core.loaders import elf
from vmgraft.vmmhost.core.loaders.contract import COMMAND_LINE_MAX, DirectBoot, MemoryMap, Protocol
from vmgraft.vmmhost.core.loaders.entry import LoadedKernel
from vmgraft.vmmhost.core.loaders.layout import Layout
from vmgraft.vmmhost.core.memory import CONVENTIONAL_END, E820_RAM, HIGH_BASE

#: Section 3.1.1: magic, flags and checksum, on a boundary of 4 bytes within the first 8192 bytes.
HEADER_MAGIC: Final = 0x1BADB002
_SEARCH: Final = 8192
_HEADER: Final = struct.Struct("<III")
#: Section 3.1.3: header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr; 3.1.4: mode_type.
_ADDRESSES: Final = struct.Struct("<IIIII")
_MODE_TYPE: Final = struct.Struct("<I")
_ALIGN_MODULES: Final = 1 << 0
_MEMORY_INFO: Final = 1 << 1
_VIDEO_MODE: Final = 1 << 2
_MANDATORY: Final = 0xFFFF
_HAS_ADDRESSES: Final = 1 << 16
_TEXT_MODE: Final = 1

#: Section 3.2: what EAX holds at the entry; EBX points to the information.
LOADER_MAGIC: Final = 0x2BADB002
#: Section 3.3: flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, 16 bytes of symbols,
#: mmap_length, mmap_addr, drives, config_table, boot_loader_name, apm_table, VBE.
_INFORMATION: Final = struct.Struct("<IIIIIII16xIIIIIII16x")
_INFO_MEMORY: Final = 1 << 0
_INFO_CMDLINE: Final = 1 << 2
_INFO_MODULES: Final = 1 << 3
_INFO_MAP: Final = 1 << 6
_INFO_NAME: Final = 1 << 9
#: mod_start, mod_end, string, reserved.
_MODULE: Final = struct.Struct("<IIII")
#: Size of the rest, base, length, type.
_MAP_ENTRY: Final = struct.Struct("<IQQI")
_LOADER_NAME: Final = "vmgraft"


def find_header(kernel: bytes) -> int | None:
    """Return the offset of the multiboot header, or None."""
    magic = struct.pack("<I", HEADER_MAGIC)
    position = kernel.find(magic, 0, _SEARCH)
    while position >= 0:
        whole = position % 4 == 0 and position + _HEADER.size <= min(len(kernel), _SEARCH)
        if whole and not sum(_HEADER.unpack_from(kernel, position)) & 0xFFFFFFFF:
            return position
        position = kernel.find(magic, position + 1, _SEARCH)
    return None


def load(direct: DirectBoot, memory_map: MemoryMap, ram_end: int) -> LoadedKernel:
    """Lay out a multiboot kernel, its modules and the information for it.

    Raises:
        NotBootableError: when the file is none, or wants something that is not there.
    """
    header = find_header(direct.kernel)
    if header is None:
        raise direct.refuse("no multiboot header in the first 8192 bytes", field="multiboot header", offset=0)
    flags = _HEADER.unpack_from(direct.kernel, header)[1]
    unknown = flags & _MANDATORY & ~(_ALIGN_MODULES | _MEMORY_INFO | _VIDEO_MODE)
    if unknown:
        message = f"the kernel demands features {unknown:#x} that this host does not know"
        raise direct.refuse(message, field="flags", offset=header + 4)
    _check_mode(direct, header, flags)
    layout = Layout(direct, ram_end)
    entry = _place_kernel(direct, layout, header, flags)
    information = _information(direct, layout, memory_map)
    registers = {"eax": LOADER_MAGIC, "ebx": information}
    return LoadedKernel(Protocol.MULTIBOOT.value, layout.pieces, entry, registers=registers)


def _check_mode(direct: DirectBoot, header: int, flags: int) -> None:
    """Refuse a kernel that cannot do without a graphics mode; the text screen is what there is."""
    if not flags & _VIDEO_MODE:
        return
    at = header + _HEADER.size + _ADDRESSES.size
    if at + _MODE_TYPE.size > len(direct.kernel):
        raise direct.refuse("the file ends within its multiboot header", field="mode_type", offset=len(direct.kernel))
    if _MODE_TYPE.unpack_from(direct.kernel, at)[0] != _TEXT_MODE:
        hint = "this host has a text screen only"
        raise direct.refuse("the kernel demands a graphics mode", field="mode_type", offset=at, hint=hint)


def _place_kernel(direct: DirectBoot, layout: Layout, header: int, flags: int) -> int:
    """Put the kernel where it belongs; return its entry point."""
    if flags & _HAS_ADDRESSES:
        return _by_addresses(direct, layout, header)
    executable = elf.parse(direct)
    if executable is None:
        hint = "it must be an ELF file, or its header must tell the addresses (flag 16)"
        raise direct.refuse("a multiboot kernel of unknown format", field="flags", offset=header + 4, hint=hint)
    executable.place(direct, layout)
    return executable.physical_entry()


def _by_addresses(direct: DirectBoot, layout: Layout, header: int) -> int:
    at, kernel = header + _HEADER.size, direct.kernel
    if at + _ADDRESSES.size > len(kernel):
        raise direct.refuse("the file ends within its multiboot header", field="header_addr", offset=len(kernel))
    header_address, load, load_end, bss_end, entry = _ADDRESSES.unpack_from(kernel, at)
    start = header - (header_address - load)
    size = load_end - load if load_end else len(kernel) - start
    if header_address < load or start < 0 or size <= 0 or start + size > len(kernel):
        message = f"load addresses {load:#x}-{load_end:#x} do not match a file of {len(kernel)} bytes"
        raise direct.refuse(message, field="load_addr", offset=at)
    zeros = max(0, bss_end - (load + size)) if bss_end else 0
    layout.place(load, memoryview(kernel)[start : start + size], zeros, "the kernel", start)
    return int(entry)


def _information(direct: DirectBoot, layout: Layout, memory_map: MemoryMap) -> int:
    """Write the information structure and what it points to; return its address."""
    modules = b""
    for index, module in enumerate(direct.all_modules):
        address = layout.place_after(module.data, f"module {index}")
        text = layout.text(module.text, COMMAND_LINE_MAX)
        modules += _MODULE.pack(address, address + len(module.data), text, 0)
    entries = b"".join(_MAP_ENTRY.pack(_MAP_ENTRY.size - 4, *entry) for entry in memory_map)
    command_line, name = layout.text(direct.cmdline, COMMAND_LINE_MAX), layout.text(_LOADER_NAME, COMMAND_LINE_MAX)
    flags = _INFO_MEMORY | _INFO_CMDLINE | _INFO_MAP | _INFO_NAME | (_INFO_MODULES if modules else 0)
    upper = next((size for base, size, kind in memory_map if base == HIGH_BASE and kind == E820_RAM), 0)
    modules_at = layout.table(modules) if modules else 0
    values = (
        flags, CONVENTIONAL_END >> 10, upper >> 10, 0, command_line, len(direct.all_modules), modules_at,
        len(entries), layout.table(entries), 0, 0, 0, name, 0,
    )  # fmt: skip
    return layout.table(_INFORMATION.pack(*values))
