"""Kernels made for tests: machine code wrapped as multiboot, PVH and Linux files."""

from __future__ import annotations

import functools
import struct

from assembling import CORE_GUESTS, nasm

ORIGIN = 0x100000
DUMP = 0x180000


@functools.cache
def assemble(name: str, *defines: str, origin: int = ORIGIN) -> bytes:
    """Assemble a kernel's first instructions for an address."""
    options = [f"-DORIGIN={origin:#x}", f"-DDUMP={DUMP:#x}", *(f"-D{each}" for each in defines)]
    return nasm(CORE_GUESTS / f"{name}.asm", *options)


def note(kind: int, description: bytes, name: bytes = b"Xen\0") -> bytes:
    """Make an ELF note."""
    raw = struct.pack("<III", len(name), len(description), kind) + name
    return raw + description.ljust(-(-len(description) // 4) * 4, b"\0")


def elf32(code: bytes, *, entry: int, address: int = ORIGIN, notes: bytes = b"", memory: int | None = None) -> bytes:
    """Make an executable with one loadable segment, whose file part begins at 1000h, and one of notes behind it."""
    size = len(code) if memory is None else memory
    headers = struct.pack("<8I", 1, 0x1000, address, address, len(code), size, 7, 0x1000)
    headers += struct.pack("<8I", 4, 0x1000 + len(code), 0, 0, len(notes), len(notes), 4, 4)
    head = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, entry, 52, 0, 0, 52, 32, 2, 0, 0, 0)
    return (head + headers).ljust(0x1000, b"\0") + code + notes


def elf64(code: bytes, *, entry: int, virtual: int, notes: bytes = b"") -> bytes:
    """Make a 64-bit executable that is linked for one address and loaded at :data:`ORIGIN`."""
    headers = struct.pack("<IIQQQQQQ", 1, 7, 0x1000, virtual, ORIGIN, len(code), len(code), 0x1000)
    headers += struct.pack("<IIQQQQQQ", 4, 4, 0x1000 + len(code), 0, 0, len(notes), len(notes), 4)
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    return (head + headers).ljust(0x1000, b"\0") + code + notes


LINUX = {
    "setup_sects": ("<B", 0x1F1, 1),
    "syssize": ("<I", 0x1F4, None),
    "boot_flag": ("<H", 0x1FE, 0xAA55),
    "jump": ("<H", 0x200, 0x62EB),  # the header ends at 264h
    "header": ("<4s", 0x202, b"HdrS"),
    "version": ("<H", 0x206, 0x020F),
    "loadflags": ("<B", 0x211, 1),
    "code32_start": ("<I", 0x214, 0x100000),
    "initrd_addr_max": ("<I", 0x22C, 0x7FFFFFFF),
    "kernel_alignment": ("<I", 0x230, 0x200000),
    "relocatable_kernel": ("<B", 0x234, 1),
    "xloadflags": ("<H", 0x236, 1),
    "cmdline_size": ("<I", 0x238, 2047),
    "pref_address": ("<Q", 0x258, 0x400000),
    "init_size": ("<I", 0x260, 0x10000),
}


def bzimage(code32: bytes, code64: bytes = b"", **fields: int | bytes) -> bytes:
    """Make a Linux image of one setup sector: code for the 32-bit entry, and behind 200h for the 64-bit one."""
    payload = code32.ljust(0x200, b"\x90") + code64
    payload = payload.ljust(-(-len(payload) // 16) * 16, b"\0")
    image = bytearray(0x400) + payload
    for name, (form, offset, default) in LINUX.items():
        value = fields.get(name, len(payload) // 16 if default is None else default)
        struct.pack_into(form, image, offset, value)
    return bytes(image)
