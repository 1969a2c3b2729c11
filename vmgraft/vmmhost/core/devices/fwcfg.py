"""The configuration device of QEMU's machines (fw_cfg), through which firmware learns about the machine.

Registers, keys and the DMA structure: QEMU, ``docs/specs/fw_cfg.rst``. Nothing can be written.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import ClassVar, Final, Protocol

from vmgraft.vmmhost.core.memory import GuestRam
from vmgraft.vmmhost.core.state import Remembering

SIGNATURE_KEY: Final = 0x00
ID_KEY: Final = 0x01
CPUS_KEYS: Final = (0x05, 0x0F)
DIRECTORY_KEY: Final = 0x19
FIRST_FILE_KEY: Final = 0x20
#: Interface versions: the traditional one, and DMA.
_ID: Final = 0b11
_DIRECTORY_ENTRY: Final = struct.Struct(">IHH56s")
_NAME_MAX: Final = 55
#: Control word, length, address; big-endian.
_DMA: Final = struct.Struct(">IIQ")
_ERROR, _READ, _SKIP, _SELECT, _WRITE = 1, 2, 4, 8, 16
_DMA_SIGNATURE: Final = b"QEMU CFG"
#: Longest transfer by DMA; no item here is near it.
_DMA_MAX: Final = 64 << 20
_PIECE: Final = 1 << 20


class Item(Protocol):
    """Content of a known size, read when the guest asks for it; a disk is one."""

    size: int

    def read(self, offset: int, length: int) -> bytes: ...  # noqa: D102


class Fixed:
    """An item held in memory."""

    def __init__(self, data: bytes) -> None:
        self._data, self.size = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        """Return a part."""
        return self._data[offset : offset + length]


class Padded:
    """Another item with zeros behind it up to a size, such as a floppy image that was cut where its data ends."""

    def __init__(self, item: Item, size: int) -> None:
        self._item, self.size = item, size

    def read(self, offset: int, length: int) -> bytes:
        """Return a part."""
        length = max(0, min(length, self.size - offset))
        inside = max(0, min(length, self._item.size - offset))
        return (self._item.read(offset, inside) if inside else b"").ljust(length, b"\0")


class FwCfg(Remembering):
    """Ports 0x510-0x51B: selector, data, and the address of a DMA request.

    Args:
        ram: Where DMA goes to.
        files: Named items; names of at most 55 ASCII characters.
    """

    REMEMBERED: ClassVar = {"_key": range(1 << 16), "_offset": range(1 << 62), "_high": range(1 << 32)}

    def __init__(self, ram: GuestRam, files: Mapping[str, Item]) -> None:
        self._ram = ram
        self._key, self._offset, self._high = 0, 0, 0
        self._items: dict[int, Item] = {
            SIGNATURE_KEY: Fixed(b"QEMU"),
            ID_KEY: Fixed(_ID.to_bytes(4, "little")),
            **{key: Fixed(b"\x01\x00") for key in CPUS_KEYS},
        }
        directory = bytearray(struct.pack(">I", len(files)))
        for key, (name, item) in enumerate(sorted(files.items()), FIRST_FILE_KEY):
            encoded = name.encode("ascii")
            if len(encoded) > _NAME_MAX:
                raise ValueError(f"the name {name!r} is too long for fw_cfg")
            self._items[key] = item
            directory += _DIRECTORY_ENTRY.pack(item.size, key, 0, encoded)
        self._items[DIRECTORY_KEY] = Fixed(bytes(directory))

    def _select(self, key: int) -> None:
        self._key, self._offset = key & 0xFFFF, 0

    def _read(self, length: int) -> bytes:
        """Return the next bytes of the chosen item, and zeros behind its end."""
        item, data = self._items.get(self._key), b""
        if item is not None and self._offset < item.size:
            data = item.read(self._offset, min(length, item.size - self._offset))
        self._offset = min(self._offset + length, (1 << 62) - 1)
        return data.ljust(length, b"\0")

    def pio_read(self, offset: int, size: int) -> int:
        """Read data, or the signature that tells that DMA is there."""
        if offset in (0, 1):
            return int.from_bytes(self._read(size if offset else 1), "little")
        if offset >= 4 and offset + size <= 12:
            return int.from_bytes(_DMA_SIGNATURE[offset - 4 : offset - 4 + size], "little")
        return 0

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Choose an item, or start a DMA request."""
        if offset == 0 and size == 2:
            self._select(value)
        elif offset == 4 and size == 4:
            self._high = _swapped(value)
        elif offset == 8 and size == 4:
            address, self._high = self._high << 32 | _swapped(value), 0
            self._request(address)

    def _request(self, address: int) -> None:
        if not self._ram.writable(address, _DMA.size):
            return  # nowhere to report to
        control, length, target = _DMA.unpack(self._ram.read(address, _DMA.size))
        if control & _SELECT:
            self._select(control >> 16)
        fine = True
        if control & _READ:
            fine = length <= _DMA_MAX and self._ram.writable(target, length)
            for start in range(0, length if fine else 0, _PIECE):
                self._ram.write(target + start, self._read(min(_PIECE, length - start)))
        elif control & _WRITE:
            fine = False
        elif control & _SKIP:
            self._offset = min(self._offset + length, (1 << 62) - 1)
        # The data may have been written over the request itself; the address is still one that can be written.
        self._ram.write(address, (0 if fine else _ERROR).to_bytes(4, "big"))


def _swapped(value: int) -> int:
    return int.from_bytes((value & 0xFFFFFFFF).to_bytes(4, "little"), "big")
