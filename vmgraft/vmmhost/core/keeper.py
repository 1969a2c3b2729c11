"""The parts of a machine that a snapshot keeps."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from vmgraft.vmmhost.core.drives import Disk
from vmgraft.vmmhost.core.firmware.bios import Firmware
from vmgraft.vmmhost.core.keeping import firmware_state, set_firmware_state, set_state_of, state_of
from vmgraft.vmmhost.core.seabios import SeaBios
from vmgraft.vmmhost.core.state import State, part

if TYPE_CHECKING:
    from vmgraft.vmmhost.core.machine import Machine


class Keeper:
    """A machine as :mod:`~vmgraft.vmmhost.core.snapshot` sees it."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self.ram = machine, machine.ram

    def describe(self) -> State:
        """Return how the machine is built: a snapshot goes back only into the same."""
        machine, firmware = self._machine, self._machine.firmware
        described: State = {
            "engine": machine.cpu.engine,
            "memory": machine.ram.size,
            "firmware": "seabios" if isinstance(firmware, SeaBios) else "trap",
            "drives": [["boot", machine.plan.medium.value, machine.disk.size]],
        }
        described["drives"] += [[drive.name, drive.kind.value, drive.disk.size] for drive in machine.drives]
        if isinstance(firmware, SeaBios):
            described["firmwareSha256"] = [firmware.image.sha256, firmware.image.video_sha256]
        elif firmware.kernel is not None:
            described["kernelSha256"] = hashlib.sha256(repr(firmware.kernel).encode()).hexdigest()
        return described

    def disks(self) -> tuple[Disk, ...]:
        """Return the boot medium and the further drives."""
        return (self._machine.disk, *(drive.disk for drive in self._machine.drives))

    def _devices(self) -> dict[str, Any]:
        board = self._machine.board
        return {"cmos": board.cmos, "serial": board.serial, "keyboard": board.keyboard} | {
            name.replace(" ", "-"): device for name, device in board.devices.items() if hasattr(device, "pio_read")
        }

    def state(self) -> State:
        """Return what CPU, board and firmware remember."""
        firmware = self._machine.firmware
        return {
            "cpu": self._machine.cpu.state(),
            "board": {name: state_of(device) for name, device in self._devices().items()},
            "firmware": firmware_state(firmware) if isinstance(firmware, Firmware) else firmware.state(),
        }

    def set_state(self, state: State) -> None:
        """Let them remember that instead; guest memory is back already."""
        firmware, board = self._machine.firmware, part(state, "board")
        for name, device in self._devices().items():
            set_state_of(device, part(board, name))
        if isinstance(firmware, Firmware):
            set_firmware_state(firmware, part(state, "firmware"))
        else:
            firmware.set_state(part(state, "firmware"))
        self._machine.cpu.set_state(part(state, "cpu"))  # last: what devices did to its interrupt lines is overridden
