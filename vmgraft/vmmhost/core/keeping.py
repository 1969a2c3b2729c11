"""What each device of the board remembers: attribute by attribute, so that nothing is forgotten in a snapshot.

Devices that keep themselves have ``state`` and ``set_state``; the others stand in a table here. A test holds the table
complete: every attribute is either kept or named as one that is wired anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vmgraft.vmmhost.core.devices import board
from vmgraft.vmmhost.core.devices.board import Shifted
from vmgraft.vmmhost.core.devices.cmos import Cmos
from vmgraft.vmmhost.core.devices.pmtimer import PmTimer
from vmgraft.vmmhost.core.devices.serial import BACKLOG, Serial
from vmgraft.vmmhost.core.firmware.bios import Firmware
from vmgraft.vmmhost.core.firmware.keyboard import Keyboard
from vmgraft.vmmhost.core.firmware.system import System
from vmgraft.vmmhost.core.softirq import Pit, _Counter, _Pic
from vmgraft.vmmhost.core.state import State, blob, flag, number, part, refuse

_BYTE: Final = range(1 << 8)
_WORD: Final = range(1 << 16)
_TIME: Final = range(-(1 << 62), 1 << 62)
_SECONDS: Final = range(-(1 << 40), 1 << 40)  # years that the host's calendar knows


@dataclass(frozen=True, slots=True)
class Whole:
    """An integer; None too where ``optional``."""

    allowed: range
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Sized:
    """Bytes of one length."""

    length: int


@dataclass(frozen=True, slots=True)
class Listed:
    """Up to ``most`` integers: bytes, a bytearray, a list or a deque."""

    most: int
    allowed: range = _BYTE


@dataclass(frozen=True, slots=True)
class Yes:
    """A boolean."""


Shape = Whole | Sized | Listed | Yes

#: Class → attributes that are kept.
SHAPES: Final[Mapping[type, Mapping[str, Shape]]] = {
    Cmos: {"_epoch": Whole(_SECONDS), "_index": Whole(range(128)), "_store": Sized(128)},
    Serial: {
        **{"_line": Yes(), "_empty": Yes(), "_looped": Whole(_BYTE, optional=True)},
        **{"_received": Listed(16), "_backlog": Listed(BACKLOG), "_registers": Sized(8), "_divisor": Sized(2)},
    },
    board.KeyboardController: {
        **{"_output": Whole(_BYTE, optional=True), "_expects": Whole(_BYTE, optional=True)},
        **{"_command_byte": Whole(_BYTE), "_port": Whole(_BYTE)},
    },
    board.SystemControl: {"_value": Whole(_BYTE)},
    board.SpeakerPort: {"_value": Whole(_BYTE)},
    board.ShutdownText: {"_seen": Listed(8)},
    board.Crtc: {"_index": Whole(range(32)), "_registers": Sized(32), "_status": Whole(_BYTE)},
    board.DebugPort: {},
    board.PowerControl: {},
    PmTimer: {},
    _Pic: {
        **dict.fromkeys(("base", "mask", "requested", "in_service", "level_triggered", "_lines"), Whole(_BYTE)),
        **{"_init_step": Whole(range(5)), "_read_isr": Yes(), "_auto_eoi": Yes(), "_need_icw4": Yes()},
    },
    _Counter: {
        **{"mode": Whole(range(8)), "access": Whole(range(4)), "reload": Whole(range(1, (1 << 16) + 1))},
        **{"start": Whole(_TIME), "armed": Yes(), "_read_high": Yes()},
        **{"_low": Whole(_BYTE, optional=True), "_latched": Listed(2)},
    },
    Pit: {"due": Whole(_TIME, optional=True)},
    Keyboard: {"_queue": Listed(1 << 20, _WORD), "waiting": Yes()},
    System: {"_deadline": Whole(_TIME, optional=True)},
    Firmware: {"_booted": Yes()},
}


def state_of(device: object) -> State:
    """Return what a device remembers."""
    if isinstance(device, Shifted):
        return {}  # another port of a device that is kept itself
    if hasattr(device, "state"):
        own: State = device.state()
        return own
    state: State = {}
    for attribute, shape in SHAPES[type(device)].items():
        value = getattr(device, attribute)
        if isinstance(shape, Sized):
            value = bytes(value).hex()
        elif isinstance(shape, Listed):
            value = list(value)
        state[attribute.lstrip("_")] = value
    return state


def set_state_of(device: Any, state: State) -> None:
    """Let a device remember that instead.

    Raises:
        HostError: when something is missing or out of bounds.
    """
    if isinstance(device, Shifted):
        return
    if hasattr(device, "set_state"):
        device.set_state(state)
        return
    new = {attribute: _read(state, attribute, shape) for attribute, shape in SHAPES[type(device)].items()}
    for attribute, value in new.items():
        old = getattr(device, attribute)
        if isinstance(old, bytearray):
            old[:] = bytes(value)  # others may hold the same buffer
        else:
            kinds: dict[type, Any] = {bytes: bytes, deque: deque}
            setattr(device, attribute, kinds.get(type(old), lambda each: each)(value))


def _read(state: Mapping[str, Any], attribute: str, shape: Shape) -> Any:
    name = attribute.lstrip("_")
    if isinstance(shape, Whole):
        return None if shape.optional and name in state and state[name] is None else number(state, name, shape.allowed)
    if isinstance(shape, Yes):
        return flag(state, name)
    if isinstance(shape, Sized):
        return blob(state, name, shape.length)
    values = state.get(name)
    if type(values) is not list or len(values) > shape.most:
        raise refuse(name)
    if not all(type(each) is int and each in shape.allowed for each in values):
        raise refuse(name)
    return values


def firmware_state(firmware: Firmware) -> State:
    """Return what the trap BIOS remembers outside guest memory."""
    return {
        "bios": state_of(firmware),
        "keyboard": state_of(firmware.keyboard),
        "system": state_of(firmware.system),
        "emulating": firmware.disk_services.table.emulated is not None,
    }


def set_firmware_state(firmware: Firmware, state: State) -> None:
    """Let the trap BIOS remember that instead.

    Raises:
        HostError: when something is missing or out of bounds.
    """
    table = firmware.disk_services.table
    emulating = flag(state, "emulating")
    if emulating and table.emulated is None:
        raise refuse("emulating")
    set_state_of(firmware, part(state, "bios"))
    set_state_of(firmware.keyboard, part(state, "keyboard"))
    set_state_of(firmware.system, part(state, "system"))
    if not emulating and table.emulated is not None:
        table.end_emulation()
