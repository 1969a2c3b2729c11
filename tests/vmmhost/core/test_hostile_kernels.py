"""Kernel files that are damaged or made to harm: each is loaded within bounds or refused with file, field and hint."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_kernels import LINUX, ORIGIN, bzimage, elf32, elf64, note

from vmgraft.errors import NotBootableError
from vmgraft.vmmhost.core.loaders import BootModule, DirectBoot, LoadedKernel, Protocol, load_kernel

MIB = 1 << 20
RAM_END = 16 * MIB
MAP = ((0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (0xF0000, 0x10000, 2), (MIB, RAM_END - MIB, 1))
ENTRY = note(18, struct.pack("<I", ORIGIN))


def load(kernel: bytes, initrd: bytes = b"", **options) -> LoadedKernel:
    return load_kernel(DirectBoot(kernel, initrd, name="file.bin", **options), MAP, RAM_END)


def multiboot(*addresses: int, flags: int = 0x10003, code: bytes = b"\xf4" * 64, mode: int = 1) -> bytes:
    header = struct.pack("<III", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF)
    return header + struct.pack("<5I", *(addresses or (ORIGIN, ORIGIN, 0, 0, ORIGIN + 48))) + bytes((mode,)) + code


def check_bounds(kernel: LoadedKernel) -> None:
    """Every piece is RAM that a kernel may have, and none overlaps another."""
    pieces = sorted((piece.address, piece.end) for piece in kernel.pieces)
    for start, end in pieces:
        assert 0x2000 <= start <= end <= 0x9FC00 or MIB <= start <= end <= RAM_END
    for (_, end), (start, _) in itertools.pairwise(pieces):
        assert end <= start
    assert any(start <= kernel.entry < end for start, end in pieces)
    assert all(0 <= value <= 0xFFFFFFFF for value in kernel.registers.values())


REFUSED = {
    "empty": (b"", "header"),
    "text": (b"no kernel at all" * 100, "header"),
    "header cut": (bzimage(b"\xf4")[:0x240], "setup header"),
    "old protocol": (bzimage(b"\xf4", version=0x0209), "version"),
    "zimage": (bzimage(b"\xf4", loadflags=0), "version"),
    "truncated": (bzimage(b"\xf4" * 4096)[:-1000], "syssize"),
    "no payload": (bzimage(b"\xf4")[:0x400], "syssize"),
    "huge syssize": (bzimage(b"\xf4", syssize=0xFFFFFFFF), "syssize"),
    "many setup sectors": (bzimage(b"\xf4", setup_sects=255), "syssize"),
    "alignment 3": (bzimage(b"\xf4", kernel_alignment=3), "kernel_alignment"),
    "alignment 0": (bzimage(b"\xf4", kernel_alignment=0), "kernel_alignment"),
    "not aligned": (bzimage(b"\xf4", pref_address=0x400001), "pref_address"),
    "huge init": (bzimage(b"\xf4", init_size=0xFFFFFFFF), "load address"),
    "far away": (bzimage(b"\xf4", pref_address=1 << 62, kernel_alignment=1 << 31), "load address"),
    "fixed far away": (bzimage(b"\xf4", pref_address=(1 << 64) - 1, relocatable_kernel=0), "load address"),
    "mandatory flags": (multiboot(flags=0x10013), "flags"),
    "graphics": (multiboot(flags=0x10007, mode=0), "mode_type"),
    "no format": (multiboot(flags=0x3), "flags"),
    "load before file": (multiboot(ORIGIN, ORIGIN - 0x1000, 0, 0, ORIGIN), "load_addr"),
    "header below load": (multiboot(ORIGIN, ORIGIN + 16, 0, 0, ORIGIN), "load_addr"),
    "load end": (multiboot(ORIGIN, ORIGIN, ORIGIN + 0x10000, 0, ORIGIN), "load_addr"),
    "load end first": (multiboot(ORIGIN, ORIGIN, ORIGIN - 1, 0, ORIGIN), "load_addr"),
    "over the screen": (multiboot(0xB8000, 0xB8000, 0, 0, 0xB8000), "load address"),
    "over the ROM": (multiboot(0xF0000, 0xF0000, 0, 0, 0xF0000), "load address"),
    "over the vectors": (multiboot(0, 0, 0, 0, 0), "load address"),
    "bss beyond": (multiboot(ORIGIN, ORIGIN, 0, 0xFFFFFFFF, ORIGIN), "load address"),
    "entry elsewhere": (multiboot(ORIGIN, ORIGIN, 0, 0, 0x7C00), "entry"),
    "header at the end": (multiboot(flags=0x10003)[:12], "header_addr"),
    "no note": (elf32(b"\xf4", entry=ORIGIN), "header"),
    "elf of 3 bytes": (b"\x7fEL", "header"),
    "elf identification": (b"\x7fELF\x03\x01" + bytes(60), "e_ident"),
    "elf big endian": (b"\x7fELF\x01\x02" + bytes(60), "e_ident"),
    "elf cut": (elf64(b"\xf4", entry=0, virtual=0)[:60], "e_ident"),
    "elf object": (elf32(b"\xf4", entry=ORIGIN, notes=ENTRY).replace(b"\2\0\3\0", b"\1\0\3\0", 1), "e_type"),
    "elf for arm": (elf32(b"\xf4", entry=ORIGIN, notes=ENTRY).replace(b"\2\0\3\0", b"\2\0\x28\0", 1), "e_type"),
    "elf segment cut": (elf32(b"\xf4" * 4096, entry=ORIGIN, notes=ENTRY)[:0x1800], "p_filesz"),
    "elf segment small": (elf32(b"\xf4" * 64, entry=ORIGIN, notes=ENTRY, memory=8), "p_filesz"),
    "elf bss beyond": (elf32(b"\xf4", entry=ORIGIN, notes=ENTRY, memory=0xFFFFFFFF), "load address"),
    "elf no load": (elf32(b"", entry=ORIGIN, notes=ENTRY), "program headers"),
    "pvh entry elsewhere": (elf32(b"\xf4", entry=ORIGIN, notes=note(18, b"\0\x7c\0\0")), "entry"),
    "pvh entry above 4 GiB": (elf32(b"\xf4", entry=0, notes=note(18, b"\0" * 7 + b"\1")), "notes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    data, field = REFUSED[name]
    with pytest.raises(NotBootableError) as caught:
        load(data)
    assert caught.value.field == field, caught.value
    assert caught.value.file == "file.bin"
    assert caught.value.hint


def elf_header(phoff: int = 52, size: int = 32, count: int = 2) -> bytes:
    raw = bytearray(elf32(b"\xf4", entry=ORIGIN, notes=ENTRY))
    struct.pack_into("<I", raw, 28, phoff)
    struct.pack_into("<HH", raw, 42, size, count)
    return bytes(raw)


@pytest.mark.parametrize("fields", [{"phoff": 0xFFFFFFF0}, {"size": 31}, {"count": 0}, {"count": 65535}])
def test_program_headers_outside_the_file(fields):
    with pytest.raises(NotBootableError, match="do not lie in the file"):
        load(elf_header(**fields))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"cmdline": "x" * 2048}, "append"),
        ({"cmdline": "a\0b"}, "append"),
        ({"initrd": bytes(RAM_END)}, "initrd"),
        ({"modules": (BootModule(b"x"),)}, "modules"),
        ({"modules": (BootModule(b"x"),) * 17}, "modules"),
        ({"protocol": Protocol.MULTIBOOT}, "multiboot header"),
        ({"protocol": Protocol.PVH}, "notes"),
    ],
)
def test_linux_options(options, field):
    with pytest.raises(NotBootableError) as caught:
        load(bzimage(b"\xf4"), **options)
    assert caught.value.field == field
    assert load(bzimage(b"\xf4"), cmdline="x" * 2047).protocol == "linux64"


@pytest.mark.parametrize("protocol", [Protocol.LINUX32, Protocol.LINUX64])
def test_a_protocol_that_the_file_has_not(protocol):
    with pytest.raises(NotBootableError, match="no Linux kernel"):
        load(multiboot(), protocol=protocol)
    with pytest.raises(NotBootableError, match="64-bit entry"):
        load(bzimage(b"\xf4", xloadflags=0), protocol=Protocol.LINUX64)


def test_modules_have_limits():
    with pytest.raises(NotBootableError, match="module 1 of"):
        load(multiboot(), modules=(BootModule(b"x"), BootModule(bytes(15 * MIB))))
    with pytest.raises(NotBootableError, match="command lines find no room"):
        load(multiboot(), modules=(BootModule(b"x", "t" * 4096),) * 16)


def test_a_ramdisk_stays_below_what_the_kernel_can_reach():
    kernel = load(bzimage(b"\xf4", initrd_addr_max=0x800FFF), b"x" * 5000)
    assert [piece.address for piece in kernel.pieces if len(piece.data) == 5000] == [0x7FF000]
    with pytest.raises(NotBootableError, match="no room below"):
        load(bzimage(b"\xf4", initrd_addr_max=0x401000), b"x" * 5000)


# --- anything at all --------------------------------------------------------------------------------------------------

WORD = st.one_of(
    st.integers(0, 0xFFFFFFFF), st.sampled_from([0, 1, 0x1000, 0x100000, 0xFFFFFF, 0x1000000, 0x7FFFFFFF, 0xFFFFFFFF])
)


def mutated(data: bytes, changes: list[tuple[int, bytes]]) -> bytes:
    raw = bytearray(data)
    for offset, value in changes:
        raw[offset : offset + len(value)] = value
    return bytes(raw)


def check(data: bytes, **options) -> None:
    try:
        kernel = load(data, **options)
    except NotBootableError as error:
        assert error.file == "file.bin"
        assert error.field
        return
    check_bounds(kernel)


@settings(max_examples=250, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(set(LINUX) - {"header", "boot_flag"})), st.integers(0, (1 << 64) - 1), max_size=4
    ),
    st.integers(0, 6000),
    st.sampled_from(list(Protocol)),
)
def test_any_linux_header(fields, initrd, protocol):
    sizes = {"<B": 0xFF, "<H": 0xFFFF, "<I": 0xFFFFFFFF, "<Q": (1 << 64) - 1}
    check(
        bzimage(b"\xf4" * 3000, **{name: value & sizes[LINUX[name][0]] for name, value in fields.items()}),
        initrd=bytes(initrd),
        protocol=protocol,
    )


@settings(max_examples=250, deadline=None)
@given(st.lists(WORD, min_size=5, max_size=5), st.integers(0, 31), st.integers(0, 100), st.booleans())
def test_any_multiboot_header(addresses, flags, cut, initrd):
    data = multiboot(*addresses, flags=0x10000 | flags)
    check(data[: max(12, len(data) - cut)], initrd=b"x" * (5000 if initrd else 0))


@settings(max_examples=300, deadline=None)
@given(
    st.booleans(), st.lists(st.tuples(st.integers(4, 180), st.binary(min_size=1, max_size=8)), max_size=4),
    st.binary(max_size=60), st.integers(0, 200),
)  # fmt: skip
def test_any_elf_header(wide, changes, notes, cut):
    make = elf64(b"\xf4" * 64, entry=ORIGIN, virtual=ORIGIN, notes=ENTRY + notes) if wide else (
        elf32(b"\xf4" * 64, entry=ORIGIN, notes=notes + ENTRY)
    )  # fmt: skip
    data = mutated(make, changes)
    check(data[: len(data) - cut], initrd=b"ramdisk")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000), st.sampled_from(list(Protocol)))
def test_any_file(data, protocol):
    check(data, protocol=protocol)
