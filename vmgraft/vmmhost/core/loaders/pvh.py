"""Kernels with a PVH entry: Xen ``docs/misc/pvh.pandoc`` and ``public/arch-x86/hvm/start_info.h``, version 1."""

from __future__ import annotations

import struct
from typing import Final

from vmgraft.vmmhost.core.loaders import elf
from vmgraft.vmmhost.core.loaders.contract import COMMAND_LINE_MAX, DirectBoot, MemoryMap, Protocol
from vmgraft.vmmhost.core.loaders.entry import LoadedKernel
from vmgraft.vmmhost.core.loaders.layout import Layout

_NOTE_NAME: Final = b"Xen"
#: XEN_ELFNOTE_PHYS32_ENTRY: the physical entry point, 4 or 8 bytes.
_NOTE_ENTRY: Final = 18
MAGIC: Final = 0x336EC578
_VERSION: Final = 1
#: magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, memmap entries, reserved.
_START_INFO: Final = struct.Struct("<IIIIQQQQII")
#: paddr, size, cmdline, reserved.
_MODULE: Final = struct.Struct("<QQQQ")
#: address, size, type (as E820), reserved.
_MAP_ENTRY: Final = struct.Struct("<QQII")


def find_entry(direct: DirectBoot, executable: elf.Elf) -> int | None:
    """Return the physical entry point that the note tells, or None without such a note."""
    for name, kind, description in executable.notes(direct.kernel):
        if name == _NOTE_NAME and kind == _NOTE_ENTRY and len(description) in (4, 8):
            return int.from_bytes(description, "little")
    return None


def load(direct: DirectBoot, memory_map: MemoryMap, ram_end: int) -> LoadedKernel:
    """Lay out a kernel with a PVH entry, its modules and the start information.

    Raises:
        NotBootableError: when it is none, or does not fit.
    """
    executable = elf.parse(direct)
    entry = None if executable is None else find_entry(direct, executable)
    if executable is None or entry is None:
        raise direct.refuse("no ELF file with a PVH entry (note 18 of Xen)", field="notes", offset=0)
    if entry >> 32:
        raise direct.refuse(f"the PVH entry {entry:#x} lies above 4 GiB", field="notes")
    layout = Layout(direct, ram_end)
    executable.place(direct, layout)
    modules = b""
    for index, module in enumerate(direct.all_modules):
        address = layout.place_after(module.data, f"module {index}")
        text = layout.text(module.text, COMMAND_LINE_MAX) if module.text else 0
        modules += _MODULE.pack(address, len(module.data), text, 0)
    entries = b"".join(_MAP_ENTRY.pack(*entry, 0) for entry in memory_map)
    modules_at = layout.table(modules) if modules else 0
    values = (
        MAGIC, _VERSION, 0, len(direct.all_modules), modules_at, layout.text(direct.cmdline, COMMAND_LINE_MAX), 0,
        layout.table(entries), len(memory_map), 0,
    )  # fmt: skip
    start_info = layout.table(_START_INFO.pack(*values))
    return LoadedKernel(Protocol.PVH.value, layout.pieces, entry, registers={"ebx": start_info})
