"""Finding room in guest memory for a kernel, its modules, its boot structures and its texts."""

from __future__ import annotations

from typing import Final

from vmgraft.vmmhost.core.loaders.contract import DirectBoot, encode_text
from vmgraft.vmmhost.core.loaders.entry import FREE_LOW, STRINGS_AT, STRINGS_END, TABLES_AT, TABLES_END, Piece
from vmgraft.vmmhost.core.memory import CONVENTIONAL_END, HIGH_BASE

PAGE: Final = 4096


def page_up(value: int) -> int:
    """Return the next page boundary."""
    return -(-value // PAGE) * PAGE


class Layout:
    """What lies where; nothing may overlap, and everything must be RAM.

    Args:
        direct: What is loaded, for messages.
        ram_end: End of RAM.
    """

    def __init__(self, direct: DirectBoot, ram_end: int) -> None:
        self._direct, self._ram_end = direct, ram_end
        self._pieces: list[Piece] = []
        self._tables, self._strings = TABLES_AT, STRINGS_AT

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What was placed."""
        return tuple(self._pieces)

    @property
    def kernel_end(self) -> int:
        """First address behind everything above 1 MiB that was placed so far."""
        return max((piece.end for piece in self._pieces if piece.address >= HIGH_BASE), default=HIGH_BASE)

    def place(self, address: int, data: bytes | memoryview, zeros: int, what: str, offset: int | None = None) -> None:
        """Put a part of the kernel where it wants to be.

        Raises:
            NotBootableError: when that is not free RAM.
        """
        piece = Piece(address, data, zeros)
        fits = (
            FREE_LOW <= address <= piece.end <= CONVENTIONAL_END or HIGH_BASE <= address <= piece.end <= self._ram_end
        )
        if not fits:
            message = f"{what} wants memory {address:#x}-{piece.end:#x}"
            hint = (
                f"free are {FREE_LOW:#x}-{CONVENTIONAL_END:#x} and {HIGH_BASE:#x}-{self._ram_end:#x};"
                " more with --memory"
            )
            raise self._direct.refuse(message, field="load address", offset=offset, hint=hint)
        other = next((each for each in self._pieces if address < each.end and each.address < piece.end), None)
        if other is not None and piece.end > address:
            message = f"{what} at {address:#x}-{piece.end:#x} overlaps what lies at {other.address:#x}"
            raise self._direct.refuse(message, field="load address", offset=offset)
        if piece.end > address:
            self._pieces.append(piece)

    def place_high(self, data: bytes, highest: int, what: str) -> int:
        """Put a file as high as possible below ``highest`` and everything placed above the kernel; return where.

        Raises:
            NotBootableError: when there is no room.
        """
        address = (min(highest, self._ram_end) - len(data)) // PAGE * PAGE
        if address < self.kernel_end:
            message = f"{what} of {len(data)} bytes finds no room below {min(highest, self._ram_end):#x}"
            raise self._direct.refuse(message, field=what, hint="give the guest more memory with --memory")
        if data:
            self._pieces.append(Piece(address, data))
        return address

    def place_after(self, data: bytes, what: str) -> int:
        """Put a file on the next page behind everything; return where.

        Raises:
            NotBootableError: when there is no room.
        """
        address = page_up(self.kernel_end)
        if address + len(data) > self._ram_end:
            message = f"{what} of {len(data)} bytes at {address:#x} reaches beyond RAM"
            raise self._direct.refuse(message, field=what, hint="give the guest more memory with --memory")
        self._pieces.append(Piece(address, data))
        return address

    def table(self, data: bytes, align: int = 8) -> int:
        """Put a boot structure into low memory; return where.

        Raises:
            NotBootableError: when there are too many.
        """
        address = -(-self._tables // align) * align
        if address + len(data) > TABLES_END:
            raise self._direct.refuse("the boot structures find no room", field="modules", hint="take fewer modules")
        self._tables = address + len(data)
        self._pieces.append(Piece(address, data))
        return address

    def text(self, text: str, limit: int) -> int:
        """Put a command line into low memory; return where.

        Raises:
            NotBootableError: when it is too long, or there are too many.
        """
        raw, address = encode_text(self._direct, text, limit), self._strings
        if address + len(raw) > STRINGS_END:
            raise self._direct.refuse("the command lines find no room", field="append", hint="shorten them")
        self._strings = address + len(raw)
        self._pieces.append(Piece(address, raw))
        return address
