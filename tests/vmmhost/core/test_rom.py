"""The trap BIOS is what its source says."""

from __future__ import annotations

import re
from importlib.resources import as_file, files

from assembling import nasm

from vmgraft.vmmhost.core.firmware import bios
from vmgraft.vmmhost.core.firmware.call import BiosData
from vmgraft.vmmhost.core.loaders import entry

DATA = files("vmgraft.vmmhost").joinpath("data")


def test_rom_is_its_source_assembled():
    with as_file(DATA.joinpath("trapbios.asm")) as source:
        assert nasm(source) == bios.rom_image()


def test_rom_and_host_agree():
    source = DATA.joinpath("trapbios.asm").read_text()

    def value(name: str) -> int:
        found = re.search(rf"^{name}\s+equ\s+(\w+)", source, re.MULTILINE)
        assert found is not None
        return int(found.group(1), 0)

    assert value("TRAP") == bios.TRAP_PORT
    assert 0xF0000 + value("STUBS") == bios.STUBS
    assert value("STUB_SIZE") == bios.STUB_SIZE
    assert 0x400 + value("WAIT_FLAG") == BiosData.WAIT_FLAG
    assert 0x400 + value("POINTER_FLAG") == BiosData.POINTER_FLAG
    assert value("KERNEL") == entry.ROM_ENTRY
    area = value("EBDA") << 4
    places = {name: area + value(name) for name in ("TABLE", "WIDE", "PAGES", "STACK", "TARGET", "REGISTERS")}
    assert places["TABLE"] == entry.AREA_AT
    # limit (2), base (4), 64-bit mode (1), padding, page tables (4), stack pointer (4)
    assert [places[name] - entry.AREA_AT for name in ("WIDE", "PAGES", "STACK")] == [6, 8, 12]
    assert (places["TARGET"], places["REGISTERS"]) == (entry.TARGET_AT, entry.REGISTERS_AT)


def test_rom_layout():
    rom = bios.rom_image()
    assert len(rom) == 0x10000
    assert rom[0xFFF0:0xFFF5] == b"\xea\x00\x00\x00\xf0"
    assert rom[0xFFFE] == 0xFC
    trap = bytes((0xE6, bios.TRAP_PORT))
    for vector in range(256):
        stub = rom[0x1000 + vector * 16 : 0x1010 + vector * 16]
        silent = 0x09 <= vector <= 0x0F or 0x70 <= vector <= 0x77 or vector == 0x1C
        assert stub.startswith(trap) != silent
