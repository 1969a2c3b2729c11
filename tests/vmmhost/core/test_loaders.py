"""Kernels entered without a boot program: the state of the machine at their first instruction, byte by byte."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from made_kernels import DUMP, ORIGIN, assemble, bzimage, elf32, elf64, note

from vmgraft.vmmhost.core import kvm_abi
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.kvmcpu import KvmCpu
from vmgraft.vmmhost.core.loaders import BootModule, DirectBoot, Protocol
from vmgraft.vmmhost.core.probe import Engine

GDT_AT = 0x9FD00
#: What INT 15h AX=E820h tells of 16 MiB.
E820 = [
    (0, 0x9FC00, 1),
    (0x9FC00, 0x400, 2),
    (0xF0000, 0x10000, 2),
    (0x100000, 15 << 20, 1),
]
MEMTEST = Path("/boot")


@pytest.fixture
def enter(make_machine, content):
    """Give ``enter(engine, direct)``: the machine after a kernel looked around and powered off."""

    def run(engine: Engine, direct: DirectBoot, **options):
        machine = make_machine(engine, content(bytes(1 << 20)), direct=direct, timeout=20, **options)
        result = machine.run()
        assert (result.reason, result.detail) == (EndReason.SHUTDOWN, "port 0x604")
        assert result.bios_calls == {"19/00": 1}
        return machine

    return run


def limits(engine: Engine) -> tuple[str, ...]:
    """LAR and LSL only where no KVM that emulates them away may be in the way; there the host looks itself."""
    return ("LIMITS=1",) if engine is Engine.SOFT else ()


def check_descriptors(machine, *, wide: bool) -> None:
    """Compare what the CPU holds of the segments, hidden parts included."""
    code = (0xC09B, 0xFFFFFFFF) if not wide else (0xA09B, 0xFFFFFFFF)
    data = (0xC093, 0xFFFFFFFF)
    if not isinstance(machine.cpu, KvmCpu):
        if not wide:
            found = struct.unpack("<12I", machine.ram.read(DUMP + 88, 48))
            # LAR leaves bits 16-19 undefined.
            rights = [(found[at] >> 8 & 0xF0FF, found[at + 1]) for at in range(0, 12, 2)]
            assert rights == [code] + [data] * 5
        return
    sregs = machine.cpu._vcpu.get_sregs()
    names = dict(enumerate(kvm_abi.SEGMENT_NAMES))
    for index in range(6):
        base, limit, selector, kind, present, dpl, db, s, long, granular, _avl, unusable = kvm_abi.SEGMENT.unpack_from(
            sregs, index * kvm_abi.SEGMENT.size
        )[:12]
        is_code = names[index] == "cs"
        assert (selector, present, dpl, s, granular, unusable) == (0x10 if is_code else 0x18, 1, 0, 1, 1, 0), names
        assert (kind, db, long) == ((0xB, int(not wide), int(wide)) if is_code else (0x3, 1, 0)), names[index]
        assert (base, limit) == (0, 0xFFFFFFFF), names[index]
    if not wide:
        base, limit, selector, kind, present = kvm_abi.SEGMENT.unpack_from(sregs, 6 * kvm_abi.SEGMENT.size)[:5]
        assert (base, limit, selector, kind, present) == (0, 0x67, 0x20, 0xB, 1)


def check_32(machine, **expected: int) -> None:
    """Compare registers, control registers, selectors and the descriptor table of a 32-bit entry."""
    names = (
        *("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp", "eflags", "cr0", "cr4", "efer"),
        *("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"),
    )
    found = dict(zip(names, struct.unpack("<20I", machine.ram.read(DUMP, 80)), strict=True))
    wanted = dict.fromkeys(names, 0) | {"esp": 0x2000, "eflags": 2, "cr0": 0x11, "cs": 0x10, "tr": 0x20}
    assert found == wanted | dict.fromkeys(("ds", "es", "fs", "gs", "ss"), 0x18) | expected
    assert machine.ram.read(DUMP + 80, 6) == struct.pack("<HI", 47, GDT_AT)
    flat_code, flat_data = bytes.fromhex("ffff0000009bcf00"), bytes.fromhex("ffff00000093cf00")
    busy_task = bytes.fromhex("67000000008b0000")
    assert machine.ram.read(GDT_AT, 48) == bytes(8) + flat_code * 2 + flat_data + busy_task + bytes(8)
    check_descriptors(machine, wide=False)


def check_64(machine, rsi: int) -> None:
    """The same for a 64-bit entry, and the page tables."""
    found = struct.unpack("<27Q", machine.ram.read(DUMP, 216))
    names = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16)))
    general = dict(zip(names, found, strict=False))
    assert general == dict.fromkeys(general, 0) | {"rsi": rsi, "rsp": 0x2000}
    assert found[16:21] == (2, 0x80000011, 0x9000, 0x20, 0x500)  # rflags, cr0, cr3, cr4, efer
    assert found[21:] == (0x10, 0x18, 0x18, 0x18, 0x18, 0x18)
    assert machine.ram.read(DUMP + 216, 10) == struct.pack("<HQ", 47, GDT_AT)
    table = "0000000000000000 ffff0000009bcf00 ffff0000009baf00 ffff00000093cf00 6700000000890000 0000000000000000"
    assert machine.ram.read(GDT_AT, 48) == bytes.fromhex(table)
    check_descriptors(machine, wide=True)
    tables = bytearray(6 * 4096)
    struct.pack_into("<Q", tables, 0, 0xA003)
    for index in range(4):
        struct.pack_into("<Q", tables, 0x1000 + 8 * index, 0xB003 + 0x1000 * index)
    for index in range(2048):
        struct.pack_into("<Q", tables, 0x2000 + 8 * index, index * 0x200000 + 0x83)
    # The CPU marks what it used: accessed in every level, dirty in the last.
    mask = bytes.fromhex("9fffffffffffffff") * (len(tables) // 8)
    seen = bytes(a & b for a, b in zip(machine.ram.read(0x9000, len(tables)), mask, strict=True))
    assert seen == bytes(tables)


def string(machine, address: int) -> bytes:
    raw: bytes = machine.ram.read(address, 4096)
    return raw[: raw.index(0)]


# --- multiboot ----------------------------------------------------------------------------------------------------


def multiboot_elf(engine: Engine, address: int = ORIGIN) -> bytes:
    header = struct.pack("<III", 0x1BADB002, 3, -(0x1BADB002 + 3) & 0xFFFFFFFF)
    code = assemble("entry32", *limits(engine), origin=address + 12)
    return elf32(header + code, entry=address + 12, address=address, memory=0x8000)


def check_multiboot_information(machine, at: int, cmdline: bytes, modules: list[tuple[bytes, bytes]]) -> None:
    information = machine.ram.read(at, 88)
    flags, lower, upper, device, command_line, count, modules_at = struct.unpack_from("<7I", information)
    map_length, map_at = struct.unpack_from("<2I", information, 44)
    name = struct.unpack_from("<I", information, 64)[0]
    assert flags == (0x24D if modules else 0x245)
    assert (lower, upper, device, count) == (639, 15 << 10, 0, len(modules))
    assert string(machine, command_line) == cmdline
    assert string(machine, name) == b"vmgraft"
    assert machine.ram.read(map_at, map_length) == b"".join(struct.pack("<IQQI", 20, *entry) for entry in E820)
    used = {*range(28), *range(44, 52), *range(64, 68)}
    assert not any(byte for index, byte in enumerate(information) if index not in used)
    for index, (data, text) in enumerate(modules):
        start, end, text_at, reserved = struct.unpack("<4I", machine.ram.read(modules_at + 16 * index, 16))
        assert (start % 4096, end - start, reserved) == (0, len(data), 0)
        assert machine.ram.read(start, len(data)) == data
        assert string(machine, text_at) == text


def test_multiboot_by_addresses(engine, enter):
    kernel = assemble("entry32", "MULTIBOOT=1", *limits(engine))
    machine = enter(engine, DirectBoot(kernel, cmdline="root=none quiet"))
    information = struct.unpack("<I", machine.ram.read(DUMP + 4, 4))[0]
    check_32(machine, eax=0x2BADB002, ebx=information)
    check_multiboot_information(machine, information, b"root=none quiet", [])
    assert machine.ram.read(ORIGIN, len(kernel)) == kernel


def test_multiboot_elf_with_modules(engine, enter):
    kernel = multiboot_elf(engine)
    modules = (BootModule(b"second" * 1000, "second arguments"), BootModule(b"third"))
    machine = enter(engine, DirectBoot(kernel, initrd=bytes(range(256)) * 40, modules=modules))
    information = struct.unpack("<I", machine.ram.read(DUMP + 4, 4))[0]
    check_32(machine, eax=0x2BADB002, ebx=information)
    expected = [(bytes(range(256)) * 40, b""), (b"second" * 1000, b"second arguments"), (b"third", b"")]
    check_multiboot_information(machine, information, b"", expected)


def test_multiboot_below_one_megabyte(enter):
    machine = enter(Engine.SOFT, DirectBoot(multiboot_elf(Engine.SOFT, 0x40000)))
    assert struct.unpack("<I", machine.ram.read(DUMP, 4))[0] == 0x2BADB002


# --- PVH --------------------------------------------------------------------------------------------------------------


def check_pvh(machine, cmdline: bytes, modules: list[tuple[bytes, bytes]]) -> None:
    start = struct.unpack("<I", machine.ram.read(DUMP + 4, 4))[0]
    check_32(machine, ebx=start)
    magic, version, flags, count, modules_at, command_line, rsdp, map_at, entries, reserved = struct.unpack(
        "<IIIIQQQQII", machine.ram.read(start, 56)
    )
    assert (magic, version, flags, count, rsdp, entries, reserved) == (0x336EC578, 1, 0, len(modules), 0, 4, 0)
    assert string(machine, command_line) == cmdline
    assert machine.ram.read(map_at, 24 * 4) == b"".join(struct.pack("<QQII", *entry, 0) for entry in E820)
    for index, (data, text) in enumerate(modules):
        address, size, text_at, zero = struct.unpack("<4Q", machine.ram.read(modules_at + 32 * index, 32))
        assert (size, zero, address % 4096) == (len(data), 0, 0)
        assert machine.ram.read(address, size) == data
        assert (string(machine, text_at) if text_at else b"") == text


def test_pvh_of_32_bits(engine, enter):
    kernel = elf32(assemble("entry32", *limits(engine)), entry=0, notes=note(18, struct.pack("<I", ORIGIN)))
    modules = (BootModule(b"more", "of it"),)
    machine = enter(engine, DirectBoot(kernel, b"ramdisk" * 700, "console=ttyS0", modules))
    check_pvh(machine, b"console=ttyS0", [(b"ramdisk" * 700, b""), (b"more", b"of it")])


def test_pvh_of_64_bits(engine, enter):
    notes = note(6, b"linux\0") + note(18, struct.pack("<Q", ORIGIN))
    code = assemble("entry32", *limits(engine))
    machine = enter(engine, DirectBoot(elf64(code, entry=0xFFFFFFFF81000000, virtual=0xFFFFFFFF81000000, notes=notes)))
    check_pvh(machine, b"", [])


# --- Linux ------------------------------------------------------------------------------------------------------------


def expected_parameters(kernel: bytes, start: int, initrd: tuple[int, int], command_line: int) -> bytes:
    """The zero page, written down once more from the documentation."""
    page = bytearray(4096)
    page[0x1F1:0x264] = kernel[0x1F1:0x264]
    fields = {
        0x02: ("<H", 15 << 10), 0x06: ("<B", 3), 0x07: ("<B", 80), 0x0A: ("<H", 3), 0x0E: ("<B", 25), 0x0F: ("<B", 1),
        0x10: ("<H", 16), 0x1E0: ("<I", 15 << 10), 0x1E8: ("<B", 4), 0x210: ("<B", 0xFF), 0x214: ("<I", start),
        0x218: ("<I", initrd[0]), 0x21C: ("<I", initrd[1]), 0x228: ("<I", command_line),
    }  # fmt: skip
    for offset, (form, value) in fields.items():
        struct.pack_into(form, page, offset, value)
    for index, entry in enumerate(E820):
        struct.pack_into("<QQI", page, 0x2D0 + 20 * index, *entry)
    return bytes(page)


@pytest.mark.parametrize("initrd", [b"", b"070701" * 1001], ids=["bare", "initrd"])
def test_linux_64(engine, enter, initrd):
    kernel = bzimage(b"\xf4", assemble("entry64", origin=0x400200))
    machine = enter(engine, DirectBoot(kernel, initrd, "quiet splash"))
    parameters = struct.unpack("<Q", machine.ram.read(DUMP + 32, 8))[0]
    check_64(machine, parameters)
    command_line = machine.ram.get(parameters + 0x228, 4)
    top = ((16 << 20) - len(initrd)) // 4096 * 4096 if initrd else 0
    page = machine.ram.read(parameters, 4096)
    assert page == expected_parameters(kernel, 0x400000, (top, len(initrd)), command_line)
    assert string(machine, command_line) == b"quiet splash"
    assert machine.ram.read(top, len(initrd)) == initrd
    assert machine.ram.read(0x400000, len(kernel) - 0x400) == kernel[0x400:]


def test_linux_32(engine, enter):
    fields = {"relocatable_kernel": 0, "pref_address": 0x100000, "xloadflags": 0, "initrd_addr_max": 0x7FFFFF}
    kernel = bzimage(assemble("entry32", *limits(engine)), **fields)
    machine = enter(engine, DirectBoot(kernel, b"ramdisk", "x=1"))
    parameters = struct.unpack("<I", machine.ram.read(DUMP + 16, 4))[0]
    check_32(machine, esi=parameters)
    command_line = machine.ram.get(parameters + 0x228, 4)
    page = machine.ram.read(parameters, 4096)
    assert page == expected_parameters(kernel, 0x100000, (0x7FF000, 7), command_line)


def test_a_kernel_with_both_entries_takes_the_one_asked_for(enter):
    code = assemble("entry32", "LIMITS=1", origin=0x400000)
    kernel = bzimage(code, b"\xf4")
    machine = enter(Engine.SOFT, DirectBoot(kernel, protocol=Protocol.LINUX32))
    check_32(machine, esi=0x2000)


def test_a_kernel_that_can_move_does_where_memory_is_short(enter):
    kernel = bzimage(b"\xf4", assemble("entry64", origin=0x200200), pref_address=0x1000000)
    machine = enter(Engine.SOFT, DirectBoot(kernel))
    assert machine.ram.get(0x2000 + 0x214, 4) == 0x200000


@pytest.mark.parametrize(
    ("name", "protocol", "entry"), [("ia32", "linux32", 0x100000), ("x64", "linux64", 0x100200)], ids=["ia32", "x64"]
)
def test_memtest_is_laid_out(make_machine, content, name, protocol, entry):
    direct = DirectBoot((MEMTEST / f"memtest86+{name}.bin").read_bytes(), cmdline="nosmp")
    machine = make_machine(Engine.SOFT, content(bytes(1 << 20)), direct=direct, timeout=0.2)
    machine.run()
    kernel = machine.firmware.kernel
    assert (kernel.protocol, kernel.entry) == (protocol, entry)
    page = machine.ram.read(kernel.registers["esi"], 4096)
    end = 0x202 + direct.kernel[0x201]
    untouched = {*range(0x1F1, end)} - {*range(0x210, 0x211), *range(0x214, 0x220), *range(0x228, 0x22C)}
    assert all(page[at] == direct.kernel[at] for at in untouched)
    assert string(machine, struct.unpack_from("<I", page, 0x228)[0]) == b"nosmp"
    assert page[0x1E8] == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ia32", "x64"])
def test_memtest_reaches_its_screen(make_machine, content, name):
    direct = DirectBoot((MEMTEST / f"memtest86+{name}.bin").read_bytes())
    machine = make_machine(Engine.SOFT, content(bytes(1 << 20)), direct=direct, timeout=150, until="Memtest86+ v")
    assert machine.run().reason is EndReason.UNTIL


def test_code_above_4_gib_runs_or_ends_the_run(engine, make_machine, content):
    direct = DirectBoot(bzimage(b"\xf4", assemble("high64", origin=0x400200)))
    result = make_machine(engine, content(bytes(1 << 20)), direct=direct, timeout=20).run()
    if engine is Engine.KVM:
        assert (result.reason, result.debug) == (EndReason.SHUTDOWN, b"\x80")
    else:
        assert (result.reason, result.debug) == (EndReason.ERROR, b"")
        assert "code at 0xffffff8000400" in result.detail
