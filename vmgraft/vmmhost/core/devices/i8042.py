"""The keyboard controller with a keyboard behind it, as firmware that drives the hardware itself needs it.

Commands: Intel 8042 as in the IBM PC/AT technical reference; keyboard commands as in the IBM PS/2 reference. The
keyboard sends scan-code set 1, which is what the controller's translation makes of what keyboards really send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.state import State, blob, flag, number, refuse

Stop = Callable[[EndReason, str], None]

IRQ: Final = 1
#: Answers that may wait to be read; a real keyboard holds 16 bytes.
_QUEUE_MAX: Final = 16
_ACK, _RESEND, _SELF_TEST_PASSED = 0xFA, 0xFE, 0xAA
_STATUS_SYSTEM: Final = 0x14  # self-test passed, not inhibited
_COMMAND_IRQ: Final = 0x01
_COMMAND_DISABLED: Final = 0x10
#: Commands of the keyboard that a data byte follows: LEDs, scan-code set, typing rate.
_WITH_DATA: Final = (0xED, 0xF0, 0xF3)
#: Commands of the controller that a data byte follows: command byte, output port, write to output buffer, to the mouse.
_CONTROLLER_WITH_DATA: Final = (0x60, 0xD1, 0xD2, 0xD4)


class KeyboardController:
    """Ports 0x60 (offset 0) and 0x64 (offset 4).

    Args:
        stop: Ends the run when the guest pulls the reset line.
        set_irq: Drives an ISA line.
    """

    def __init__(self, stop: Stop, set_irq: Callable[[int, bool], None]) -> None:
        self._stop, self._set_irq = stop, set_irq
        self._answers: deque[int] = deque()  # of controller and keyboard, ready to be read
        self._typed: deque[int] = deque()  # scan codes that wait for the guest to take what is there
        self._command_byte, self._port = 0x54, 0xDF  # as after a reset: keyboard held off, no interrupts
        self._line = False
        self._controller_expects = self._keyboard_expects = 0
        self._scanning = False

    def type_codes(self, codes: Iterable[int]) -> None:
        """Let the keyboard send scan codes, once nothing else waits."""
        self._typed.extend(codes)
        self._refresh()

    @property
    def idle(self) -> bool:
        """Whether the guest took everything that was typed."""
        return self._scanning and not self._typed and not self._answers

    def pio_read(self, offset: int, size: int) -> int:
        """Read data or status."""
        if offset == 4:
            return _STATUS_SYSTEM | bool(self._answers)
        value = self._answers.popleft() if self._answers else 0
        self._drive(False)  # so that the next byte makes an edge
        self._refresh()
        return value

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Take a command, its data, or a byte for the keyboard."""
        value &= 0xFF
        if offset == 4:
            self._command(value)
        elif self._controller_expects:
            command, self._controller_expects = self._controller_expects, 0
            self._command_data(command, value)
        else:
            self._keyboard(value)
        self._refresh()

    def _command(self, value: int) -> None:
        self._controller_expects = value if value in _CONTROLLER_WITH_DATA else 0
        answers = {0x20: self._command_byte, 0xAA: 0x55, 0xA9: 0x00, 0xAB: 0x00, 0xC0: 0x80, 0xD0: self._port}
        if value in answers:
            self._answer(answers[value])
        elif value == 0xAD:
            self._command_byte |= _COMMAND_DISABLED
        elif value == 0xAE:
            self._command_byte &= ~_COMMAND_DISABLED
        elif value & 0xF1 == 0xF0:  # pulse output lines, line 0 low
            self._stop(EndReason.RESET, "keyboard controller reset command")

    def _command_data(self, command: int, value: int) -> None:
        if command == 0x60:
            self._command_byte = value
        elif command == 0xD1:
            self._port = value | 2
            if not value & 1:
                self._stop(EndReason.RESET, "keyboard controller pulled the reset line")
        elif command == 0xD2:
            self._answer(value)
        # 0xD4: there is no mouse, so nobody answers

    def _keyboard(self, value: int) -> None:
        if self._keyboard_expects:
            command, self._keyboard_expects = self._keyboard_expects, 0
            self._answer(_ACK)
            if command == 0xF0 and value == 0:
                self._answer(0x41)  # set 2, translated
            return
        if value == 0xEE:
            self._answer(0xEE)  # echo
            return
        if value < 0xED:
            self._answer(_RESEND)
            return
        self._answer(_ACK)
        self._keyboard_expects = value if value in _WITH_DATA else 0
        if value == 0xF2:
            self._answer(0xAB, 0x41)
        elif value == 0xF4:
            self._scanning = True
        elif value in (0xF5, 0xF6, 0xFF):
            self._scanning = value == 0xF6
            if value == 0xFF:
                self._scanning = True
                self._answer(_SELF_TEST_PASSED)

    def _answer(self, *values: int) -> None:
        for value in values:
            if len(self._answers) < _QUEUE_MAX:
                self._answers.append(value)

    def _refresh(self) -> None:
        """Let the next typed code follow when the guest has taken what there was, and tell by interrupt."""
        if not self._answers and self._typed and self._scanning and not self._command_byte & _COMMAND_DISABLED:
            self._answers.append(self._typed.popleft())
        self._drive(bool(self._answers) and bool(self._command_byte & _COMMAND_IRQ))

    def _drive(self, level: bool) -> None:
        if level != self._line:
            self._line = level
            self._set_irq(IRQ, level)

    def state(self) -> State:
        """Return what the guest wrote, and the bytes that wait; not what is typed from outside."""
        return {
            "answers": bytes(self._answers).hex(),
            "commandByte": self._command_byte,
            "port": self._port,
            "controllerExpects": self._controller_expects,
            "keyboardExpects": self._keyboard_expects,
            "scanning": self._scanning,
            "line": self._line,
        }

    def set_state(self, state: State) -> None:
        """Remember that instead."""
        answers = state.get("answers")
        if type(answers) is not str or len(answers) > 2 * _QUEUE_MAX:
            raise refuse("answers")
        self._answers = deque(blob(state, "answers", len(answers) // 2))
        self._command_byte = number(state, "commandByte", range(256))
        self._port = number(state, "port", range(256))
        self._controller_expects = number(state, "controllerExpects", range(256))
        self._keyboard_expects = number(state, "keyboardExpects", range(256))
        self._scanning = flag(state, "scanning")
        self._line = flag(state, "line")
