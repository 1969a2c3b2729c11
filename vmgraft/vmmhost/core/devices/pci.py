"""PCI as an i440FX board has it: configuration by ports, one bus, one window of I/O ports, four interrupt lines.

Registers: PCI Local Bus Specification 3.0, chapter 6; Intel 82441FX and 82371SB/AB data sheets for the chips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.shadow import SEGMENTS
from vmgraft.vmmhost.core.state import Remembering, State, part

Stop = Callable[[EndReason, str], None]

CONFIG_SIZE: Final = 256
#: Configuration registers by offset.
COMMAND: Final = 0x04
BAR0: Final = 0x10
SUBSYSTEM: Final = 0x2C
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D
COMMAND_IO: Final = 1 << 0
COMMAND_MASTER: Final = 1 << 2
COMMAND_NO_INTX: Final = 1 << 10
#: What QEMU's board says of itself, by which firmware knows where it runs.
SUBSYSTEM_ID: Final = (0x1AF4, 0x1100)
#: Size of the one I/O region that a device here has, in bytes.
IO_BAR_SIZE: Final = 64
#: Ports in which the host bridge looks for devices; firmware places them there.
IO_WINDOW: Final = (0xC000, 0xFFFF)
#: PAM0 to PAM6 of the host bridge; the upper half of PAM0 is the segment at 0xF0000, PAM1 begins with 0xC0000.
PAM: Final = 0x59
_PAM_WRITE: Final = 2
#: PIRQA# to PIRQD# of the ISA bridge: the ISA line, or bit 7 for none.
PIRQ_ROUTE: Final = 0x60
_PIRQ_OFF: Final = 0x80
_ALL_ONES: Final = 0xFFFFFFFF


class PciFunction(Remembering):
    """One function's configuration space: bytes, and which of their bits the guest may change.

    Args:
        vendor: Vendor ID.
        device: Device ID.
        class_code: Base class, sub-class and interface, 24 bits.
        subsystem: Subsystem vendor and device.
        pin: 1 for INTA#, 0 for no interrupt.
        multifunction: Whether the slot has further functions.
    """

    REMEMBERED: ClassVar = {"config": CONFIG_SIZE}

    def __init__(
        self,
        vendor: int,
        device: int,
        class_code: int,
        *,
        subsystem: tuple[int, int] = SUBSYSTEM_ID,
        pin: int = 0,
        multifunction: bool = False,
    ) -> None:
        self.config, self.changeable = bytearray(CONFIG_SIZE), bytearray(CONFIG_SIZE)
        for offset, size, value in (
            *((0, 2, vendor), (2, 2, device), (9, 3, class_code), (0x0E, 1, multifunction << 7)),
            *((SUBSYSTEM, 2, subsystem[0]), (SUBSYSTEM + 2, 2, subsystem[1]), (INTERRUPT_PIN, 1, pin)),
        ):
            self.config[offset : offset + size] = value.to_bytes(size, "little")
        self.changeable[COMMAND : COMMAND + 2] = (COMMAND_IO | COMMAND_MASTER | COMMAND_NO_INTX).to_bytes(2, "little")
        self.changeable[INTERRUPT_LINE] = 0xFF

    def read(self, offset: int, size: int) -> int:
        """Read configuration bytes."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Change those bits that can be changed."""
        for index, byte in enumerate(value.to_bytes(size, "little"), offset):
            mask = self.changeable[index]
            self.config[index] = self.config[index] & ~mask | byte & mask
        self.changed(offset, size)

    def changed(self, offset: int, size: int) -> None:
        """Told after every write to the configuration."""

    def command(self) -> int:
        """Return the command register."""
        return self.read(COMMAND, 2)


class PciDevice(PciFunction):
    """A function with one I/O region and an interrupt; what it does is a subclass's."""

    def __init__(self, vendor: int, device: int, class_code: int, *, subsystem: tuple[int, int]) -> None:
        super().__init__(vendor, device, class_code, subsystem=subsystem, pin=1)
        self.config[BAR0] = 1  # I/O space
        self.changeable[BAR0 : BAR0 + 4] = (_ALL_ONES & -IO_BAR_SIZE).to_bytes(4, "little")
        self.asserted = False
        #: Told when region or interrupt may have changed; the bus sets it.
        self.update: Callable[[], None] = lambda: None

    def changed(self, offset: int, size: int) -> None:
        """Let the bus see a moved region or a gated interrupt."""
        self.update()

    def io_base(self) -> int | None:
        """Return the first port of the region, None while it is not decoded."""
        return self.read(BAR0, 4) & -IO_BAR_SIZE if self.command() & COMMAND_IO else None

    def set_interrupt(self, level: bool) -> None:
        """Drive INTA#."""
        if self.asserted != level:
            self.asserted = level
            self.update()

    def io_read(self, offset: int, size: int) -> int:
        """Answer IN from the region."""
        return _ALL_ONES

    def io_write(self, offset: int, size: int, value: int) -> None:
        """Take OUT to the region."""


class HostBridge(PciFunction):
    """The 82441FX: its PAM registers make shadow RAM writable or not.

    Args:
        set_segment: Takes the index of a segment of :data:`~vmgraft.vmmhost.core.shadow.SEGMENTS`, and whether the
            guest may write there.
    """

    def __init__(self, set_segment: Callable[[int, bool], None]) -> None:
        super().__init__(0x8086, 0x1237, 0x060000)
        self._set_segment = set_segment
        self.changeable[PAM] = 0x30
        self.changeable[PAM + 1 : PAM + 7] = b"\x33" * 6

    def changed(self, offset: int, size: int) -> None:
        """Protect the shadow as the PAM registers say."""
        if offset + size <= PAM or offset >= PAM + 7:
            return
        halves = [byte >> shift for byte in self.config[PAM + 1 : PAM + 7] for shift in (0, 4)]
        for index, half in enumerate((*halves, self.config[PAM] >> 4)):
            self._set_segment(index, bool(half & _PAM_WRITE))

    def set_state(self, state: State) -> None:
        """Remember, and protect the shadow accordingly."""
        super().set_state(state)
        self.changed(PAM, len(SEGMENTS))


def isa_bridge() -> PciFunction:
    """Return the 82371SB's ISA side: where interrupts of PCI devices go."""
    bridge = PciFunction(0x8086, 0x7000, 0x060100, multifunction=True)
    bridge.config[PIRQ_ROUTE : PIRQ_ROUTE + 4] = bytes((_PIRQ_OFF,)) * 4
    bridge.changeable[PIRQ_ROUTE : PIRQ_ROUTE + 4] = b"\x8f" * 4
    return bridge


def power_function(pm_base: int) -> PciFunction:
    """Return the 82371AB's power-management side, whose ports stay at ``pm_base``.

    System management mode is said to be set up already: this machine has none.
    """
    function = PciFunction(0x8086, 0x7113, 0x068000, pin=1)
    function.config[0x40:0x44] = (pm_base | 1).to_bytes(4, "little")
    function.config[0x5B] = 0x02  # APMC enabled
    function.config[0x80] = 0x01  # the ports are decoded
    function.config[INTERRUPT_LINE] = 9
    return function


class PciBus:
    """Configuration ports 0xCF8-0xCFF, and the window of I/O ports.

    Args:
        functions: Slot and function → what sits there; the ISA bridge among them routes interrupts.
        isa: The ISA bridge.
        set_irq: Drives an ISA line.
        stop: Ends the run when the guest asks for a reset (port 0xCF9).
    """

    def __init__(
        self,
        functions: dict[tuple[int, int], PciFunction],
        isa: PciFunction,
        set_irq: Callable[[int, bool], None],
        stop: Stop,
    ) -> None:
        self._functions, self._isa, self._set_irq, self._stop = functions, isa, set_irq, stop
        self._address = 0
        self._lines = 0  # ISA lines held up by PCI devices
        self._regions: dict[int, PciDevice] = {}
        for function in functions.values():
            if isinstance(function, PciDevice):
                function.update = self.update
        self.window = _Window(self._regions)

    def _target(self, offset: int) -> tuple[PciFunction, int] | None:
        address = self._address
        if not address >> 31 or address >> 16 & 0xFF:
            return None
        function = self._functions.get((address >> 11 & 31, address >> 8 & 7))
        return None if function is None else (function, (address & 0xFC) + offset)

    def pio_read(self, offset: int, size: int) -> int:
        """Read the address register, or configuration space."""
        if offset < 4:
            return self._address >> (8 * offset) if offset + size <= 4 else _ALL_ONES
        target = self._target(offset - 4)
        if target is None or offset - 4 + size > 4:
            return _ALL_ONES
        return target[0].read(target[1], size)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Set the address, reset the machine, or write configuration space."""
        if offset < 4:
            if (offset, size) == (0, 4):
                self._address = value & 0x80FFFFFC
            elif offset == 1 and value & 4:
                self._stop(EndReason.RESET, "port 0xcf9")
            return
        target = self._target(offset - 4)
        if target is not None and offset - 4 + size <= 4:
            target[0].write(target[1], size, value & ((1 << (8 * size)) - 1))
            if target[0] is self._isa:
                self.update()

    def update(self) -> None:
        """Find out anew which ports the devices hold, and which interrupt lines are up."""
        self._regions.clear()
        lines = 0
        for (slot, _function), device in sorted(self._functions.items(), reverse=True):
            if not isinstance(device, PciDevice):
                continue
            base = device.io_base()
            if base is not None:
                self._regions[base] = device  # the lowest slot wins where two were put at the same place
            if device.asserted and not device.command() & COMMAND_NO_INTX:
                route = self._isa.config[PIRQ_ROUTE + (slot - 1 & 3)]
                lines |= 0 if route & _PIRQ_OFF else 1 << (route & 15)
        changed, self._lines = lines ^ self._lines, lines
        for line in range(16):
            if changed >> line & 1:
                self._set_irq(line, bool(lines >> line & 1))

    def state(self) -> State:
        """Return the address register and every function's state."""
        functions = {f"{slot}.{number}": each.state() for (slot, number), each in self._functions.items()}
        return {"address": self._address, "functions": functions}

    def set_state(self, state: State) -> None:
        """Remember that instead."""
        address = state.get("address")
        self._address = address & 0x80FFFFFC if type(address) is int else 0
        functions = part(state, "functions")
        for (slot, number), function in self._functions.items():
            function.set_state(part(functions, f"{slot}.{number}"))
        self.update()


class _Window:
    """The ports in which PCI devices are found, wherever the guest has put them."""

    def __init__(self, regions: dict[int, PciDevice]) -> None:
        self._regions = regions

    def pio_read(self, offset: int, size: int) -> int:
        port = IO_WINDOW[0] + offset
        device = self._regions.get(port & -IO_BAR_SIZE)
        inside = port % IO_BAR_SIZE
        if device is None or inside + size > IO_BAR_SIZE:
            return _ALL_ONES
        return device.io_read(inside, size)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        port = IO_WINDOW[0] + offset
        device = self._regions.get(port & -IO_BAR_SIZE)
        inside = port % IO_BAR_SIZE
        if device is not None and inside + size <= IO_BAR_SIZE:
            device.io_write(inside, size, value & ((1 << (8 * size)) - 1))
