"""Guest memory as the software CPU sees it: what is mapped, and what becomes of writes into read-only stretches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from vmgraft.vmmhost.core.memory import GuestRam

_READ_EXECUTE: Final = 5
_READ_WRITE_EXECUTE: Final = 7
_FOUR_GIB: Final = 1 << 32
_PAGE: Final = 4096


class SoftMemory:
    """Maps a machine's memory into Unicorn.

    Args:
        uc: The engine.
        ram: The memory; told here is what the host writes, for the engine caches code.
        mmio_read: ``(uc, offset, size, start)`` answers reads where no memory is.
        mmio_write: ``(uc, offset, size, value, start)`` takes writes there.
        changing: Called when protections are to change, or translated code is stale: something that the engine can do
            between two slices only.
        paging: Whether addresses are translated now.
    """

    def __init__(
        self,
        uc: Any,
        ram: GuestRam,
        mmio_read: Callable[[Any, int, int, int], int],
        mmio_write: Callable[[Any, int, int, int, int], None],
        *,
        changing: Callable[[], None],
        paging: Callable[[], bool],
    ) -> None:
        self._uc, self._ram, self._changing, self._paging = uc, ram, changing, paging
        self._stale = False
        self._pages: dict[int, bytes] = {}  # what stood in read-only pages before this slice wrote to them
        self._protections: list[tuple[int, int, bool]] = []
        end = 0
        for span in (*ram.spans(), None):
            start = _FOUR_GIB if span is None else span.gpa
            if start > end:
                uc.mmio_map(end, start - end, mmio_read, end, mmio_write, end)
            if span is not None:
                access = _READ_WRITE_EXECUTE if span.writable else _READ_EXECUTE
                uc.mem_map_ptr(span.gpa, span.size, access, span.address)
                end = span.gpa + span.size
        ram.written = self._written
        ram.protected = self._protect

    def rom_write(self, uc: Any, _access: int, address: int, size: int, _value: int, _data: Any) -> bool:
        """Let a write into the ROM pass, which the engine cannot drop; :meth:`settle` undoes it."""
        for page in {address & -_PAGE, (address + size - 1) & -_PAGE}:
            if page not in self._pages and page < _FOUR_GIB:
                self._pages[page] = bytes(uc.mem_read(page, _PAGE))
        return True

    def _written(self, gpa: int, length: int) -> None:
        """Forget the code that the host wrote over; the engine finds it by linear address, so with paging all of it."""
        if self._paging():
            self._stale = True
            self._changing()
        else:
            self._uc.ctl_remove_cache(gpa, gpa + length)

    def write(self, gpa: int, data: bytes) -> None:
        """Write what the CPU stores on its own, such as an interrupt's frame: read-only memory stays as it is.

        Raises:
            unicorn.UcError: beyond 4 GiB.
        """
        if self._ram.writable(gpa, len(data)):
            self._uc.mem_write(gpa, data)
            return
        read_only = [range(span.gpa, span.gpa + span.size) for span in self._ram.spans() if not span.writable]
        for address, byte in enumerate(data, gpa):
            if not any(address in span for span in read_only):
                self._uc.mem_write(address, bytes((byte,)))

    def _protect(self, index: int, writable: bool) -> None:
        span = self._ram.spans()[index]
        self._protections.append((span.gpa, span.size, writable))
        self._changing()

    def settle(self) -> None:
        """Between two slices: undo writes into the ROM, and change protections."""
        for page, content in self._pages.items():
            self._uc.mem_write(page, content)
            self._uc.ctl_remove_cache(page, page + _PAGE)
        self._pages.clear()
        for gpa, size, writable in self._protections:
            self._uc.mem_protect(gpa, size, _READ_WRITE_EXECUTE if writable else _READ_EXECUTE)
        self._protections.clear()
        if self._stale:
            self._stale = False
            self._uc.ctl_flush_tb()

    def close(self) -> None:
        """Let go of the RAM."""
        self._ram.written = self._ram.protected = None
