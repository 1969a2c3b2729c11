"""The I/O ports that the core itself answers: machines are built from these tables, and claims tried against them."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from vmgraft.vmmhost.core.bus import CORE, Bus
from vmgraft.vmmhost.core.claims import Claim, Reserved
from vmgraft.vmmhost.core.shadow import PCI_HOLE


class FirmwareKind(StrEnum):
    """What the guest finds as its firmware."""

    TRAP = "trap"  #: BIOS services answered by the host
    SEABIOS = "seabios"  #: stock firmware that drives devices itself


#: Device → first and last port. The interrupt controllers and the timer stand in ``bus.IRQCHIP_PORTS``.
CORE_PORTS: Final[dict[str, tuple[int, int]]] = {
    "keyboard data": (0x60, 0x60),
    "speaker": (0x61, 0x61),
    "keyboard command": (0x64, 0x64),
    "cmos": (0x70, 0x71),
    "system control": (0x92, 0x92),
    "bios trap": (0xBA, 0xBA),  # as in data/trapbios.asm
    "debug e9": (0xE9, 0xE9),
    "crtc": (0x3D4, 0x3DA),
    "com1": (0x3F8, 0x3FF),
    "debug 402": (0x402, 0x402),
    "power": (0x604, 0x605),  # PM1a control port of QEMU's ``pc`` machine
    "shutdown": (0x8900, 0x8900),  # text port of Bochs
}
#: What stock firmware finds in place of the trap port and the CRTC; numbers as on QEMU's ``pc`` machine.
SEABIOS_PORTS: Final[dict[str, tuple[int, int]]] = {
    **{name: ports for name, ports in CORE_PORTS.items() if name not in ("bios trap", "crtc")},
    "vga": (0x3C0, 0x3DF),
    "fw_cfg": (0x510, 0x51B),
    "pm events": (0xB000, 0xB003),
    "pm control": (0xB004, 0xB005),
    "pm timer": (0xB008, 0xB00B),
    "pci configuration": (0xCF8, 0xCFF),
    "pci devices": (0xC000, 0xFFFF),
}
#: ISA lines of power management and of PCI, as stock firmware sets them up.
SEABIOS_IRQS: Final = (9, 10, 11)


def ports(firmware: FirmwareKind) -> dict[str, tuple[int, int]]:
    """Return the core's devices and their ports."""
    return SEABIOS_PORTS if firmware is FirmwareKind.SEABIOS else CORE_PORTS


def arrange(bus: Bus, firmware: FirmwareKind) -> None:
    """Tell a bus what the firmware's memory map and interrupt lines leave free."""
    if firmware is FirmwareKind.SEABIOS:
        bus.low_hole = range(0)
        bus.mmio_reserved.append(Claim(PCI_HOLE[0], PCI_HOLE[1] - 1, f"{CORE} (PCI)"))
        for line in SEABIOS_IRQS:
            bus.claim_irq(line, CORE)


def planning_bus(ram_size: int, firmware: FirmwareKind = FirmwareKind.TRAP) -> Bus:
    """Return a bus without a machine, on which claims can be tried: everything of the core is taken.

    Args:
        ram_size: Bytes of RAM that the machine will have.
        firmware: Its firmware.
    """
    bus = Bus(ram_size)
    arrange(bus, firmware)
    bus.reserve_irqchip()
    for first, last in ports(firmware).values():
        bus.claim_pio(first, last, Reserved(), CORE)
    return bus
