"""The I/O ports that the core itself answers: the machine is built from this table, and claims are tried against it."""

from __future__ import annotations

from typing import Final

from vmgraft.vmmhost.core.bus import CORE, Bus, Reserved

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


def planning_bus(ram_size: int) -> Bus:
    """Return a bus without a machine, on which claims can be tried: everything of the core is taken.

    Args:
        ram_size: Bytes of RAM that the machine will have.
    """
    bus = Bus(ram_size)
    bus.reserve_irqchip()
    for first, last in CORE_PORTS.values():
        bus.claim_pio(first, last, Reserved(), CORE)
    return bus
