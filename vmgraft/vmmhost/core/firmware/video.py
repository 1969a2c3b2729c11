"""INT 10h: the text screen, kept in guest RAM where guests also write it directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vmgraft.vmmhost.core.firmware.call import BiosData, Call
from vmgraft.vmmhost.core.memory import GuestRam
from vmgraft.vmmhost.core.screen import COLUMNS, ROWS, TEXT_BASE

_PAGES: Final = 8
_PAGE_BYTES: Final = 0x1000
_DEFAULT_ATTRIBUTE: Final = 0x07
_TEXT_MODES: Final = (0, 1, 2, 3, 7)


class Video:
    """The services of INT 10h that text programs use; graphics modes and VBE are answered as not there."""

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._clear()
        self._services: dict[int, Callable[[Call], None]] = {
            0x00: self._set_mode,
            0x01: lambda call: ram.put(BiosData.CURSOR_SHAPE, 2, call.cx),
            0x02: lambda call: self._move(call.bx >> 8, call.dx >> 8, call.dx & 0xFF),
            0x03: self._get_cursor,
            0x05: lambda call: ram.put(BiosData.PAGE, 1, call.al % _PAGES),
            0x06: lambda call: self._scroll_call(call, up=True),
            0x07: lambda call: self._scroll_call(call, up=False),
            0x08: self._read_cell,
            0x09: lambda call: self._repeat(call, attribute=call.bx & 0xFF),
            0x0A: lambda call: self._repeat(call, attribute=None),
            0x0E: lambda call: self.teletype(call.al, self._ram.get(BiosData.PAGE, 1)),
            0x0F: self._get_mode,
            0x12: self._alternate,
            0x13: self._write_string,
            0x1A: self._display_code,
            0x4F: self._vbe,
        }

    def serve(self, call: Call) -> bool:
        """Serve one call; False when the function is unknown."""
        service = self._services.get(call.ah)
        if service is not None:
            service(call)
        return service is not None

    # --- cells ------------------------------------------------------------------------------------------------------

    def _cell(self, page: int, row: int, column: int) -> int:
        return TEXT_BASE + page % _PAGES * _PAGE_BYTES + (row * COLUMNS + column) * 2

    def _clear(self) -> None:
        blank = bytes((0x20, _DEFAULT_ATTRIBUTE)) * (_PAGE_BYTES // 2)
        self._ram.write(TEXT_BASE, blank * _PAGES)

    def _put(self, page: int, row: int, column: int, char: int, attribute: int | None) -> None:
        cell = self._cell(page, row, column)
        if attribute is None:
            self._ram.put(cell, 1, char)
        else:
            self._ram.put(cell, 2, char | attribute << 8)

    def _cursor(self, page: int) -> tuple[int, int]:
        """Return (row, column), brought inside the screen: the guest can write the field itself."""
        word = self._ram.get(BiosData.CURSOR + page % _PAGES * 2, 2)
        return min(word >> 8, ROWS - 1), min(word & 0xFF, COLUMNS - 1)

    def _move(self, page: int, row: int, column: int) -> None:
        self._ram.put(BiosData.CURSOR + page % _PAGES * 2, 2, row << 8 | column)

    def _scroll(self, page: int, window: tuple[int, int, int, int], lines: int, attribute: int) -> None:
        """Move a window (top, left, bottom, right) up by ``lines`` (down when negative); 0 clears it."""
        top, left, bottom, right = window
        width = (right - left + 1) * 2
        rows = [self._ram.read(self._cell(page, row, left), width) for row in range(top, bottom + 1)]
        blank = bytes((0x20, attribute)) * (width // 2)
        count = len(rows)
        if lines == 0 or abs(lines) >= count:
            rows = [blank] * count
        elif lines > 0:
            rows = rows[lines:] + [blank] * lines
        else:
            rows = [blank] * -lines + rows[:lines]
        if width == COLUMNS * 2:  # the rows adjoin: one write, as a string of line feeds scrolls thousands of times
            rows = [b"".join(rows)]
        for row, data in enumerate(rows, top):
            self._ram.write(self._cell(page, row, left), data)

    def teletype(self, char: int, page: int, attribute: int | None = None) -> None:
        """Write a character at the cursor and move on; BEL, BS, LF and CR act."""
        row, column = self._cursor(page)
        if char == 0x08:
            column = max(0, column - 1)
        elif char == 0x0A:
            row += 1
        elif char == 0x0D:
            column = 0
        elif char != 0x07:
            self._put(page, row, column, char, attribute)
            column += 1
        if column >= COLUMNS:
            row, column = row + 1, 0
        if row >= ROWS:
            below = self._ram.get(self._cell(page, ROWS - 1, 0) + 1, 1)
            self._scroll(page, (0, 0, ROWS - 1, COLUMNS - 1), 1, below)
            row = ROWS - 1
        self._move(page, row, column)

    # --- services ---------------------------------------------------------------------------------------------------

    def _set_mode(self, call: Call) -> None:
        mode = call.al & 0x7F
        if mode in _TEXT_MODES:
            self._ram.put(BiosData.VIDEO_MODE, 1, mode)
            for page in range(_PAGES):
                self._move(page, 0, 0)
            self._ram.put(BiosData.PAGE, 1, 0)
            if not call.al & 0x80:
                self._clear()
        call.al = 0x30

    def _get_cursor(self, call: Call) -> None:
        row, column = self._cursor(call.bx >> 8)
        call.dx = row << 8 | column
        call.cx = self._ram.get(BiosData.CURSOR_SHAPE, 2)

    def _scroll_call(self, call: Call, *, up: bool) -> None:
        top, left = call.cx >> 8, call.cx & 0xFF
        bottom, right = min(call.dx >> 8, ROWS - 1), min(call.dx & 0xFF, COLUMNS - 1)
        if top <= bottom and left <= right:
            page = self._ram.get(BiosData.PAGE, 1)
            self._scroll(page, (top, left, bottom, right), call.al if up else -call.al, call.bx >> 8)

    def _read_cell(self, call: Call) -> None:
        call.ax = self._ram.get(self._cell(call.bx >> 8, *self._cursor(call.bx >> 8)), 2)

    def _repeat(self, call: Call, *, attribute: int | None) -> None:
        """Write a character CX times from the cursor, which stays."""
        page = call.bx >> 8
        row, column = self._cursor(page)
        start = row * COLUMNS + column
        for position in range(start, min(start + call.cx, COLUMNS * ROWS)):
            self._put(page, position // COLUMNS, position % COLUMNS, call.al, attribute)

    def _get_mode(self, call: Call) -> None:
        call.ax = COLUMNS << 8 | self._ram.get(BiosData.VIDEO_MODE, 1)
        call.bx = call.bx & 0xFF | self._ram.get(BiosData.PAGE, 1) << 8

    def _alternate(self, call: Call) -> None:
        if call.bx & 0xFF == 0x10:  # EGA information: colour, 256 KiB
            call.bx, call.cx = 0x0003, 0x0009

    def _write_string(self, call: Call) -> None:
        page, mode = call.bx >> 8, call.al
        cell_size = 2 if mode & 2 else 1
        address, length = call.pointer("es", "rbp"), call.cx * cell_size
        if not self._ram.readable(address, length):
            return
        data, before = self._ram.read(address, length), self._cursor(page)
        self._move(page, min(call.dx >> 8, ROWS - 1), min(call.dx & 0xFF, COLUMNS - 1))
        for index in range(0, len(data), cell_size):
            self.teletype(data[index], page, data[index + 1] if mode & 2 else call.bx & 0xFF)
        if not mode & 1:
            self._move(page, *before)

    def _display_code(self, call: Call) -> None:
        if call.al == 0:
            call.al, call.bx = 0x1A, 0x0008  # VGA with analogue colour display

    def _vbe(self, call: Call) -> None:
        call.ax = 0x0100  # no VBE here
