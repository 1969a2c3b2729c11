"""The devices of a machine's board, built and put on the bus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmgraft.vmmhost.core.bus import CORE, Bus
from vmgraft.vmmhost.core.contract import EndReason, PioHandler
from vmgraft.vmmhost.core.cpu import Cpu
from vmgraft.vmmhost.core.devices import board, i8042
from vmgraft.vmmhost.core.devices.cmos import Cmos
from vmgraft.vmmhost.core.devices.pmtimer import PmEvents, PmTimer
from vmgraft.vmmhost.core.devices.serial import Serial
from vmgraft.vmmhost.core.devices.vga import Vga
from vmgraft.vmmhost.core.portmap import FirmwareKind, arrange, ports

#: Interrupt line of the first serial port (PC/AT technical reference).
COM1_IRQ: Final = 4


@dataclass(frozen=True, slots=True)
class Wiring:
    """What the board is connected to.

    Attributes:
        stop: Ends the run.
        serial_out: Gets what the guest sends to COM1.
        debug: Collects what it sends to the debug ports.
        epoch: Seconds since 1970 (UTC) that the real-time clock shows at boot.
        firmware: What drives the devices.
    """

    stop: Callable[[EndReason, str], None]
    serial_out: Callable[[bytes], None]
    debug: bytearray
    epoch: int
    firmware: FirmwareKind = FirmwareKind.TRAP


@dataclass(frozen=True, slots=True)
class Board:
    """The devices that others than the bus ask for."""

    cmos: Cmos
    serial: Serial
    keyboard: i8042.KeyboardController
    devices: dict[str, PioHandler]


def build_board(cpu: Cpu, bus: Bus, wiring: Wiring) -> Board:
    """Build the board's devices and claim their ports; what only one firmware asks for is that firmware's own."""
    cmos = Cmos(cpu.now_ns, wiring.epoch, cpu.ram.size, bus.services)
    serial = Serial(wiring.serial_out, bus.services, lambda level: cpu.set_irq(COM1_IRQ, level))
    stock = wiring.firmware is FirmwareKind.SEABIOS
    full = i8042.KeyboardController(wiring.stop, cpu.set_irq)
    keyboard = full if stock else board.KeyboardController(wiring.stop)
    for first, last, handler in getattr(cpu, "ports", ()):
        bus.claim_pio(first, last, handler, CORE, traced=False)
    arrange(bus, wiring.firmware)
    bus.reserve_irqchip()
    devices: dict[str, PioHandler] = {
        "com1": serial,
        "cmos": cmos,
        "keyboard data": keyboard,
        "keyboard command": board.Shifted(keyboard, 4),
        "speaker": board.SpeakerPort(),
        "system control": board.SystemControl(wiring.stop),
        "debug 402": board.DebugPort(wiring.debug, 0xE9),
        "debug e9": board.DebugPort(wiring.debug, 0xE9),
        "power": board.PowerControl(wiring.stop),
        "shutdown": board.ShutdownText(wiring.stop),
    }
    if stock:
        devices |= {"vga": Vga(), "pm events": PmEvents(), "pm timer": PmTimer(cpu.now_ns)}
        devices["pm control"] = devices["power"]
    else:
        devices["crtc"] = board.Crtc()
    where = ports(wiring.firmware)
    for name, device in devices.items():
        bus.claim_pio(*where[name], device, CORE)
    return Board(cmos, serial, full, devices)
