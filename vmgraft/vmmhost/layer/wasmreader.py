"""A bounded cursor over the binary format of WebAssembly (core specification 2.0, chapter 5)."""

from __future__ import annotations

from typing import NoReturn

from vmgraft.errors import GraftFormatError

MAX_NAME_BYTES = 256


class WasmReader:
    """Reads from ``data`` between ``pos`` and ``end``; never past ``end``.

    Args:
        data: The whole module; offsets in errors count from its first byte.
        file: Path or name that errors carry.

    Raises:
        GraftFormatError: from every method, when the bytes end early or break the encoding.
    """

    __slots__ = ("data", "end", "file", "pos")

    def __init__(self, data: bytes, pos: int = 0, end: int | None = None, file: str | None = None) -> None:
        self.data = data
        self.pos = pos
        self.end = len(data) if end is None else end
        self.file = file

    def fail(self, message: str, field: str, *, offset: int | None = None, hint: str | None = None) -> NoReturn:
        """Raise the one error of this format, at ``offset`` or at the cursor."""
        at = self.pos if offset is None else offset
        raise GraftFormatError(message, file=self.file, offset=at, field=f"module: {field}", hint=hint)

    def byte(self, field: str) -> int:
        """Read one byte."""
        if self.pos >= self.end:
            self.fail("the data ends early", field)
        value = self.data[self.pos]
        self.pos += 1
        return value

    def take(self, count: int, field: str) -> bytes:
        """Read ``count`` bytes."""
        if count > self.end - self.pos:
            self.fail(f"{count} bytes do not fit into the {self.end - self.pos} left", field)
        chunk = self.data[self.pos : self.pos + count]
        self.pos += count
        return chunk

    def u32(self, field: str) -> int:
        """Read an unsigned LEB128 of at most 32 bits; padding is allowed, up to 5 bytes (section 5.2.2)."""
        start, value = self.pos, 0
        for shift in range(0, 35, 7):
            byte = self.byte(field)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 32:
                    self.fail("the number does not fit into 32 bits", field, offset=start)
                return value
        self.fail("the number is longer than 5 bytes", field, offset=start)

    def skip_signed(self, bits: int, field: str) -> None:
        """Pass over a signed LEB128 of at most ``bits`` bits."""
        start = self.pos
        for _ in range((bits + 6) // 7):
            if self.byte(field) < 0x80:
                return
        self.fail(f"the number is longer than {bits} bits", field, offset=start)

    def count(self, limit: int, field: str) -> int:
        """Read the length of a vector and hold it against ``limit`` and against the bytes left."""
        start = self.pos
        value = self.u32(field)
        if value > limit:
            self.fail(f"{value} entries are more than the {limit} allowed", field, offset=start)
        if value > self.end - self.pos:
            self.fail(f"{value} entries do not fit into the {self.end - self.pos} bytes left", field, offset=start)
        return value

    def name(self, field: str) -> str:
        """Read a name of at most 256 bytes of UTF-8."""
        start = self.pos
        length = self.count(MAX_NAME_BYTES, field)
        try:
            return self.take(length, field).decode("utf-8")
        except UnicodeDecodeError:
            self.fail("the name is not UTF-8", field, offset=start)

    def sub(self, length: int, field: str) -> WasmReader:
        """Return a reader of the next ``length`` bytes and step over them."""
        start = self.pos
        self.take(length, field)
        return WasmReader(self.data, start, start + length, self.file)

    def done(self, field: str) -> None:
        """Check that nothing is left."""
        if self.pos != self.end:
            self.fail(f"{self.end - self.pos} bytes are left over", field)
