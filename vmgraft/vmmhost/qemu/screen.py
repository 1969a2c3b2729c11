"""The text screen of a guest in QEMU, read through its monitor."""

from __future__ import annotations

from typing import Final

from vmgraft.errors import HostError
from vmgraft.vmmhost.core.screen import COLUMNS, ROWS, TEXT_BASE, TextScreen
from vmgraft.vmmhost.qemu.qmp import Qmp

_SIZE: Final = COLUMNS * ROWS * 2
BLANK: Final = b" \x07" * (COLUMNS * ROWS)


def read_cells(qmp: Qmp) -> bytes:
    """Return the cells of the screen; blanks where QEMU says nothing that can be read as such.

    Raises:
        HostError: QEMU is gone.
    """
    arguments = {"command-line": f"xp /{_SIZE}bx {TEXT_BASE:#x}"}
    dump = qmp.execute("human-monitor-command", arguments)
    try:
        words = [word for line in str(dump).splitlines() for word in line.partition(":")[2].split()]
        cells = bytes(int(word, 16) for word in words)
    except ValueError:
        return BLANK
    return cells if len(cells) == _SIZE else BLANK


def last_cells(qmp: Qmp, before: bytes) -> bytes:
    """Return the cells of the screen, or those of before when QEMU is gone."""
    try:
        return read_cells(qmp)
    except HostError:
        return before


class _Cells:
    """The cells as guest memory, for the core's screen."""

    def __init__(self, cells: bytes) -> None:
        self._cells = cells

    def read(self, gpa: int, length: int) -> bytes:
        return self._cells[gpa - TEXT_BASE : gpa - TEXT_BASE + length]

    def write(self, gpa: int, data: bytes) -> None:
        raise ValueError("the screen is only read")


def lines_of(cells: bytes) -> list[str]:
    """Return the 25 lines, without trailing blanks."""
    return TextScreen(_Cells(cells)).lines()
