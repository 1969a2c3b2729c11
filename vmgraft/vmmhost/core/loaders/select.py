"""Choosing the protocol of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmgraft.errors import NotBootableError
from vmgraft.vmmhost.core.loaders import elf, linux, multiboot, pvh
from vmgraft.vmmhost.core.loaders.contract import MODULES_MAX, DirectBoot, MemoryMap, Protocol
from vmgraft.vmmhost.core.loaders.entry import LoadedKernel
from vmgraft.vmmhost.core.memory import CONVENTIONAL_END, HIGH_BASE

_LOADERS: Final[dict[Protocol, Callable[[DirectBoot, MemoryMap, int], LoadedKernel]]] = {
    Protocol.MULTIBOOT: multiboot.load,
    Protocol.PVH: pvh.load,
    Protocol.LINUX64: linux.load,
    Protocol.LINUX32: linux.load,
}


def load_kernel(direct: DirectBoot, memory_map: MemoryMap, ram_end: int) -> LoadedKernel:
    """Lay out a kernel by its protocol; nothing is written yet.

    Args:
        direct: Kernel, ramdisk, command line.
        memory_map: What the kernel is told of memory: (base, length, E820 type).
        ram_end: End of RAM.

    Raises:
        NotBootableError: when the kernel cannot be loaded, with the file, offset and field at fault.
    """
    if len(direct.modules) > MODULES_MAX:
        raise direct.refuse(f"{len(direct.modules)} modules", field="modules", hint=f"at most {MODULES_MAX}")
    if direct.protocol is not Protocol.AUTO:
        if direct.protocol in (Protocol.LINUX64, Protocol.LINUX32) and not linux.is_linux(direct.kernel):
            raise direct.refuse("no Linux kernel (bzImage)", field="header", offset=0x202)
        loaded = _LOADERS[direct.protocol](direct, memory_map, ram_end)
    else:
        loaded = _detect(direct)(direct, memory_map, ram_end)
    in_low, in_high = loaded.entry < CONVENTIONAL_END, HIGH_BASE <= loaded.entry < ram_end
    if not (in_low or in_high) or not any(each.address <= loaded.entry < each.end for each in loaded.pieces):
        raise direct.refuse(f"the entry point {loaded.entry:#x} is not in what was loaded", field="entry")
    return loaded


def _detect(direct: DirectBoot) -> Callable[[DirectBoot, MemoryMap, int], LoadedKernel]:
    if linux.is_linux(direct.kernel):
        return linux.load
    if multiboot.find_header(direct.kernel) is not None:
        return multiboot.load
    executable = elf.parse(direct)
    if executable is not None and pvh.find_entry(direct, executable) is not None:
        return pvh.load
    raise NotBootableError(
        "no multiboot, PVH or Linux kernel",
        file=direct.name,
        offset=0,
        field="header",
        hint="a bzImage, a multiboot 1 kernel, or an ELF file with a PVH note",
    )
