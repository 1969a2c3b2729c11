"""What a BIOS service sees of its caller: 16-bit registers, flags in the interrupt frame, buffers by segment."""

from __future__ import annotations

from vmgraft.vmmhost.core.cpu import FLAG_CARRY, FLAG_ZERO, Cpu
from vmgraft.vmmhost.core.memory import GuestRam

_FLAGS_OFFSET = 4  # after IP and CS


class Call:
    """The caller's registers during one INT; ``ax`` and its like are 16 bits wide."""

    def __init__(self, cpu: Cpu, vector: int) -> None:
        self.cpu, self.ram, self.vector = cpu, cpu.ram, vector

    def _word(self, name: str) -> int:
        return self.cpu.get(name) & 0xFFFF

    def _put_word(self, name: str, value: int) -> None:
        self.cpu.set(name, (self.cpu.get(name) & ~0xFFFF) | (value & 0xFFFF))

    @property
    def ax(self) -> int:
        """AX; setting it leaves the upper half of EAX."""
        return self._word("rax")

    @ax.setter
    def ax(self, value: int) -> None:
        self._put_word("rax", value)

    @property
    def bx(self) -> int:
        """BX."""
        return self._word("rbx")

    @bx.setter
    def bx(self, value: int) -> None:
        self._put_word("rbx", value)

    @property
    def cx(self) -> int:
        """CX."""
        return self._word("rcx")

    @cx.setter
    def cx(self, value: int) -> None:
        self._put_word("rcx", value)

    @property
    def dx(self) -> int:
        """DX."""
        return self._word("rdx")

    @dx.setter
    def dx(self, value: int) -> None:
        self._put_word("rdx", value)

    @property
    def ah(self) -> int:
        """The function number, in most services; result code afterwards."""
        return self.ax >> 8

    @ah.setter
    def ah(self, value: int) -> None:
        self.ax = (self.ax & 0xFF) | (value & 0xFF) << 8

    @property
    def al(self) -> int:
        """AL."""
        return self.ax & 0xFF

    @al.setter
    def al(self, value: int) -> None:
        self.ax = (self.ax & 0xFF00) | (value & 0xFF)

    def extended(self, name: str) -> int:
        """Return a 32-bit register: ``eax``, ``ecx`` ..."""
        return self.cpu.get("r" + name[1:]) & 0xFFFFFFFF

    def set_extended(self, name: str, value: int) -> None:
        """Set a 32-bit register."""
        self.cpu.set("r" + name[1:], value & 0xFFFFFFFF)

    def pointer(self, segment: str, register: str) -> int:
        """Return the guest-physical address of ``segment:register``, 16-bit offset."""
        return self.cpu.segment_base(segment) + self._word(register)

    @property
    def frame(self) -> int:
        """Guest-physical address of the interrupt frame: IP, CS, FLAGS."""
        return self.cpu.segment_base("ss") + self._word("rsp")

    def _set_flag(self, flag: int, on: bool) -> None:
        address = self.frame + _FLAGS_OFFSET
        if self.ram.writable(address, 2):
            flags = self.ram.get(address, 2)
            self.ram.put(address, 2, flags | flag if on else flags & ~flag)

    def carry(self, on: bool) -> None:
        """Set or clear the caller's carry flag."""
        self._set_flag(FLAG_CARRY, on)

    def zero(self, on: bool) -> None:
        """Set or clear the caller's zero flag."""
        self._set_flag(FLAG_ZERO, on)


class BiosData:
    """The BIOS data area at 0x400, by the customary names (IBM PC/AT Technical Reference, section 5)."""

    EQUIPMENT = 0x410
    MEMORY_KIB = 0x413
    EBDA_SEGMENT = 0x40E
    KEYBOARD_FLAGS = 0x417
    VIDEO_MODE = 0x449
    COLUMNS = 0x44A
    PAGE_SIZE = 0x44C
    CURSOR = 0x450
    CURSOR_SHAPE = 0x460
    PAGE = 0x462
    CRTC_PORT = 0x463
    TICKS = 0x46C
    MIDNIGHT = 0x470
    FLOPPY_STATUS = 0x441
    DISK_STATUS = 0x474
    DISKS = 0x475
    ROWS = 0x484
    CHAR_HEIGHT = 0x485
    #: Not customary: tells the ROM stub to sleep and ask again.
    WAIT_FLAG = 0x4AC
    #: Not customary: tells the ROM stub of INT 13h to load ES:DI from vector 1Eh.
    POINTER_FLAG = 0x4AD


def prepare_memory(ram: GuestRam) -> None:
    """Lay out vector table and BIOS data area as after a PC's self-test."""
    for vector in range(256):
        ram.put(vector * 4, 4, 0xF0001000 + vector * 16)
    ram.put(0x1E * 4, 4, 0xF000EFC7)
    words = (
        (BiosData.EQUIPMENT, 0x0226),  # FPU, mouse port, 80x25 colour, one serial port
        (BiosData.MEMORY_KIB, 639),
        (BiosData.EBDA_SEGMENT, 0x9FC0),
        (0x400, 0x3F8),
        (BiosData.COLUMNS, 80),
        (BiosData.PAGE_SIZE, 0x1000),
        (BiosData.CURSOR_SHAPE, 0x0607),
        (BiosData.CRTC_PORT, 0x3D4),
        (0x41A, 0x1E),
        (0x41C, 0x1E),
        (0x480, 0x1E),
        (0x482, 0x3E),
        (BiosData.CHAR_HEIGHT, 16),
    )
    for address, value in words:
        ram.put(address, 2, value)
    ram.put(BiosData.VIDEO_MODE, 1, 3)
    ram.put(BiosData.ROWS, 1, 24)
    ram.put(0x9FC00, 2, 1)
