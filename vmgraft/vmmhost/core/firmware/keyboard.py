"""INT 16h: keys come from a queue that the caller of the machine filled; the guest has no live keyboard."""

from __future__ import annotations

from collections import deque
from typing import Final

from vmgraft.vmmhost.core.firmware.call import BiosData, Call

#: Scan codes of set 1 for the characters of a US keyboard, lower case or unshifted.
_ROWS: Final = ((0x02, "1234567890-="), (0x10, "qwertyuiop[]"), (0x1E, "asdfghjkl;'`"), (0x2B, "\\zxcvbnm,./"))
_SHIFTED: Final = dict(zip('!@#$%^&*()_+{}:"~|<>?', "1234567890-=[];'`\\,./", strict=True))
_SCAN: Final = {char: first + index for first, row in _ROWS for index, char in enumerate(row)}
_SPECIAL: Final = {"\n": 0x1C0D, "\r": 0x1C0D, "\t": 0x0F09, "\b": 0x0E08, "\x1b": 0x011B, " ": 0x3920}
#: How many keys a guest itself may store (INT 16h AH=05h); what the caller typed in advance is not limited.
BUFFER_KEYS: Final = 16
#: Keys without a character, for callers that name them.
NAMED_KEYS: Final = {
    "up": 0x4800,
    "down": 0x5000,
    "left": 0x4B00,
    "right": 0x4D00,
    "home": 0x4700,
    "end": 0x4F00,
    "delete": 0x5300,
    **{f"f{number}": (0x3A + number) << 8 for number in range(1, 11)},
}


def key_code(char: str) -> int:
    """Return scan code and character of a key as INT 16h gives them in AX; scan code 0 for what no key has."""
    if char in _SPECIAL:
        return _SPECIAL[char]
    base = _SHIFTED.get(char, char.lower())
    ascii_code = char.encode("cp437", "replace")[0]
    return _SCAN.get(base, 0) << 8 | ascii_code


class Keyboard:
    """A queue of keys and the services that read it."""

    def __init__(self, keys: str = "") -> None:
        self._queue = deque(key_code(char) for char in keys)
        #: Whether the guest sleeps in a read with no key to come.
        self.waiting = False

    def press(self, code: int) -> None:
        """Queue one key, as INT 16h gives it."""
        self._queue.append(code & 0xFFFF)

    def serve(self, call: Call) -> bool:
        """Serve one call; False when the function is unknown."""
        function = call.ah
        self.waiting = False
        call.ram.put(BiosData.WAIT_FLAG, 1, 0)
        if function in (0x00, 0x10):
            self._read(call)
        elif function in (0x01, 0x11):
            call.zero(not self._queue)
            if self._queue:
                call.ax = self._queue[0]
        elif function in (0x02, 0x12):
            call.al = call.ram.get(BiosData.KEYBOARD_FLAGS, 1)
        elif function == 0x05:
            full = len(self._queue) >= BUFFER_KEYS
            if not full:
                self.press(call.cx)
            call.al = int(full)
        elif function != 0x03:
            return False
        return True

    def _read(self, call: Call) -> None:
        if self._queue:
            call.ax = self._queue.popleft()
        else:
            self.waiting = True
            call.ram.put(BiosData.WAIT_FLAG, 1, 1)
