"""Boot images that do whatever comes to mind to ports, memory and BIOS calls, by a seed."""

from __future__ import annotations

import random
import struct

from vmgraft.vmmhost.core.bus import IRQCHIP_PORTS
from vmgraft.vmmhost.core.portmap import FirmwareKind, ports

#: Where the boot sector loads the program to, and how much of it.
PROGRAM, PROGRAM_MAX = 0x8000, 64 * 512
#: xor ax, ax; DS, ES, SS = 0; SP = 7C00h; read 64 sectors to 8000h; go there.
_LOADER = bytes.fromhex("31c0 8ed8 8ec0 8ed0 bc007c b84002 b90200 ba8000 bb0080 cd13 ea00800000")
#: Stack and interrupts back to sense.
_SANE = bytes.fromhex("31c0 8ed0 bc007c fb")
_POWER_OFF = bytes.fromhex("ba0406 b80020 ef")
_WORDS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFF0, 0xFFFF)
_EDGES = (
    *_WORDS,
    *(0x9FC00, 0xB8000, 0xBFFF0, 0xC0000, 0xF0000, 0xFFFFF, 0x100000, 0x10FFEF, 0x1000000, 0x7FFFFFFF),
    *(0x80000000, 0xFEC00000, 0xFEE00000, 0xFFFFFFF0, 0xFFFFFFFF),
)
#: Ports that end the run.
_ENDS = frozenset((0x60, 0x64, 0x92, 0x604, 0x605, 0xCF9, 0xB004, 0xB005))
_CALLS = {
    0x10: (0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 14, 15, 0x12, 0x13, 0x1A, 0x4F),
    0x13: (0, 1, 2, 3, 4, 8, 0x15, 0x16, 0x41, 0x42, 0x43, 0x44, 0x47, 0x48, 0x4B),
    0x15: (0x24, 0x53, 0x87, 0x88, 0xC0, 0xE8),
    0x16: (1, 2, 3, 5, 0x11, 0x12),
    0x1A: (0, 1, 2, 3, 4, 0xB1),
}
_DRIVES = (0, 1, 0x7F, 0x80, 0x81, 0x82, 0xE0, 0xE1, 0xFF)
_PCI = (0xCF8, 0xCFC, 0xCFD, 0xCFE, 0xC008, 0xC00E, 0xC010, 0xC012, 0xC050, 0x510, 0x511, 0x514, 0x518)


class Programmer:
    """Writes programs for one firmware."""

    def __init__(self, seed: int, firmware: FirmwareKind) -> None:
        self.chance = random.Random(seed)
        self._firmware = firmware
        self._ranges = (*ports(firmware).values(), *IRQCHIP_PORTS, (0, 0xFFFF))

    def value(self) -> int:
        """A number that is likely to be at some edge."""
        return self.chance.choice(_EDGES) if self.chance.random() < 0.7 else self.chance.getrandbits(32)

    def word(self) -> bytes:
        return struct.pack("<H", self.chance.choice(_WORDS) if self.chance.random() < 0.7 else self.value() & 0xFFFF)

    def port(self) -> bytes:
        """IN or OUT of any width."""
        chance, value = self.chance, self.value()
        port = chance.randint(*chance.choice(self._ranges))
        if self._firmware is FirmwareKind.SEABIOS and chance.random() < 0.4:
            port = chance.choice(_PCI)
            address = 1 << 31 | chance.randrange(8) << 11 | chance.randrange(64) * 4
            value = chance.choice((address, 0xC001, 0xD001, 5, 7, 0, 0x103, value))
        if port in _ENDS:
            port = 0x80
        access = chance.choice(("ee", "ef", "66ef", "ec", "ed", "66ed"))
        return b"\x66\xb8" + struct.pack("<I", value) + b"\xba" + struct.pack("<H", port) + bytes.fromhex(access)

    def call(self) -> bytes:
        """A BIOS call with wild registers."""
        chance = self.chance
        vector, functions = chance.choice(list(_CALLS.items()))
        code = b"\xb8" + self.word() + b"\x8e\xd8\xb8" + self.word() + b"\x8e\xc0"
        for register in (0xBB, 0xB9, 0xBA, 0xBE, 0xBF, 0xBD):
            value = self.value()
            if (vector, register) == (0x13, 0xBA):
                value = value & ~0xFF | chance.choice(_DRIVES)
            if (vector, register) == (0x10, 0xB9):
                value &= 0x3FF
            code += b"\x66" + bytes((register,)) + struct.pack("<I", value)
        ax = self.value() & 0xFFFF00FF | chance.choice(functions) << 8
        return code + b"\x66\xb8" + struct.pack("<I", ax) + bytes((0xCD, vector))

    def packet(self) -> bytes:
        """A disk address packet at 500h, and INT 13h with it."""
        chance = self.chance
        packet = struct.pack(
            "<BBHHHQQ", chance.choice((16, 24, 0, 255)), 0, chance.choice((0, 1, 127, 0xFFFF)),
            chance.choice((0, 0x8000, 0xFFFF)), chance.choice((0, 0x1000, 0xFFFF)),
            chance.choice((0, 1, 2047, 1 << 32, 1 << 63, (1 << 64) - 1)), chance.choice((0x20000, 1 << 63, 0xF0000)),
        )  # fmt: skip
        code = b"\x31\xc0\x8e\xd8"
        for at in range(0, 24, 4):
            code += b"\x66\xc7\x06" + struct.pack("<H", 0x500 + at) + packet[at : at + 4]
        function = bytes((0, chance.choice((0x42, 0x43, 0x44, 0x47, 0x48))))
        return code + b"\xbe\0\5\xb8" + function + b"\xba" + bytes((chance.choice(_DRIVES), 0)) + b"\xcd\x13"

    def store(self) -> bytes:
        """A write anywhere below 1 MiB: vector table, screen, hole and ROM among it."""
        return b"\xb8" + self.word() + b"\x8e\xd8\x66\xa3" + self.word()

    def program(self) -> bytes:
        """A program that goes on for ever, or powers off."""
        mix = self.chance.choice(((1, 0, 0, 0), (0, 1, 1, 0), (2, 2, 1, 1)))
        code, makers = b"", (self.port, self.call, self.packet, self.store)
        while len(code) < 12000:
            code += self.chance.choices(makers, mix)[0]() + (_SANE if self.chance.random() < 0.1 else b"")
        again = b"\xe9" + struct.pack("<h", -len(code) - 3)
        return code + (again if self.chance.random() < 0.5 else _POWER_OFF)


def hostile_image(seed: int, firmware: FirmwareKind, size: int = 1 << 20) -> bytes:
    """Return a disk that boots a program made from a seed."""
    program = Programmer(seed, firmware).program()
    return (_LOADER.ljust(510, b"\0") + b"\x55\xaa" + program[:PROGRAM_MAX]).ljust(size, b"\0")
