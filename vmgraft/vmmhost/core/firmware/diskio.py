"""INT 13h: one drive, either hard disk 0x80 (CHS and LBA) or no-emulation CD 0xE0 (LBA, 2048-byte sectors).

Function and status numbers: IBM PC/AT BIOS, Phoenix Enhanced Disk Drive Specification 3.0 and El Torito 1.0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from vmgraft.vmmhost.core.boot import CDROM, BootPlan
from vmgraft.vmmhost.core.disk import OverlayFullError, VerifiedDisk
from vmgraft.vmmhost.core.firmware.call import BiosData, Call

OK: Final = 0x00
BAD_COMMAND: Final = 0x01
WRITE_PROTECTED: Final = 0x03
SECTOR_NOT_FOUND: Final = 0x04
DMA_BOUNDARY: Final = 0x09
WRITE_FAULT: Final = 0xCC

SECTORS_PER_TRACK: Final = 63
_CYLINDERS: Final = 1024
#: Disk address packet: size, reserved, blocks, offset, segment, block number; then a flat 64-bit buffer address.
_PACKET: Final = struct.Struct("<BBHHHQ")
_FLAT_BUFFER: Final = struct.Struct("<Q")
#: Drive parameters, 26 bytes: size, flags, cylinders, heads, sectors per track, sectors, bytes a sector.
_PARAMETERS: Final = struct.Struct("<HHIIIQH")
_CD_FLAGS: Final = 0x0074  # removable, lockable, change line, geometry not valid
#: El Torito specification packet, 19 bytes.
_SPECIFICATION: Final = struct.Struct("<BBBBIHHHHBBB")


def geometry(sectors: int) -> tuple[int, int]:
    """Return (cylinders, heads) at 63 sectors a track, by the usual LBA-assist translation."""
    heads = next((each for each in (16, 32, 64, 128) if sectors <= _CYLINDERS * each * SECTORS_PER_TRACK), 255)
    return max(1, min(_CYLINDERS, sectors // (heads * SECTORS_PER_TRACK))), heads


class DiskServices:
    """The services of INT 13h for the drive booted from."""

    def __init__(self, disk: VerifiedDisk, plan: BootPlan) -> None:
        self._disk, self._plan = disk, plan
        self._size = plan.sector_size
        self._sectors = disk.size // self._size
        self._cylinders, self._heads = geometry(self._sectors)
        self._cd = plan.drive == CDROM
        both: dict[int, Callable[[Call], int]] = {
            0x41: self._extensions,
            0x42: lambda call: self._packet(call, self._read),
            0x43: lambda call: self._packet(call, self._write),
            0x44: lambda call: self._packet(call, self._verify),
            0x47: lambda call: self._packet(call, self._verify),
            0x48: self._parameters,
        }
        disk_only: dict[int, Callable[[Call], int]] = {
            0x02: lambda call: self._chs(call, self._read),
            0x03: lambda call: self._chs(call, self._write),
            0x04: lambda call: self._chs(call, self._verify),
            0x08: self._geometry,
            0x15: self._kind,
        }
        self._services = both | ({0x4B: self._emulation} if self._cd else disk_only)
        for harmless in (0x00, 0x0C, 0x0D, 0x10, 0x11):
            self._services[harmless] = lambda _call: OK

    def serve(self, call: Call) -> bool:
        """Serve one call; False when the function is unknown (the guest is told so too)."""
        function, drive = call.ah, call.dx & 0xFF
        if function == 0x01:
            status = call.ram.get(BiosData.DISK_STATUS, 1)
            call.ah = status
            call.carry(status != OK)
            return True
        service = self._services.get(function) if drive == self._plan.drive or function == 0 else None
        status = BAD_COMMAND if service is None else service(call)
        if not (function == 0x15 and status == OK):
            call.ah = status
        if function == 0x41 and status == OK:
            call.ah = 0x30  # version 3.0
        call.ram.put(BiosData.DISK_STATUS, 1, status)
        call.carry(status != OK)
        return service is not None or drive != self._plan.drive

    # --- moving sectors -----------------------------------------------------------------------------------------------

    def _read(self, call: Call, lba: int, count: int, buffer: int) -> int:
        if not call.ram.writable(buffer, count * self._size):
            return DMA_BOUNDARY
        call.ram.write(buffer, self._disk.read(lba * self._size, count * self._size))
        return OK

    def _write(self, call: Call, lba: int, count: int, buffer: int) -> int:
        if self._cd:
            return WRITE_PROTECTED
        if not call.ram.readable(buffer, count * self._size):
            return DMA_BOUNDARY
        try:
            self._disk.write(lba * self._size, call.ram.read(buffer, count * self._size))
        except OverlayFullError:
            return WRITE_FAULT
        return OK

    def _verify(self, _call: Call, _lba: int, _count: int, _buffer: int) -> int:
        return OK

    def _move(self, call: Call, move: Callable[[Call, int, int, int], int], lba: int, count: int, buffer: int) -> int:
        if lba + count > self._sectors:
            return SECTOR_NOT_FOUND
        return move(call, lba, count, buffer)

    def _packet(self, call: Call, move: Callable[[Call, int, int, int], int]) -> int:
        address = call.pointer("ds", "rsi")
        if not call.ram.writable(address, _PACKET.size):
            return BAD_COMMAND
        size, _reserved, count, offset, segment, lba = _PACKET.unpack(call.ram.read(address, _PACKET.size))
        if size < _PACKET.size:
            return BAD_COMMAND
        buffer = (segment << 4) + offset
        if (segment, offset) == (0xFFFF, 0xFFFF) and size >= _PACKET.size + _FLAT_BUFFER.size:
            if not call.ram.readable(address + _PACKET.size, _FLAT_BUFFER.size):
                return BAD_COMMAND
            buffer = _FLAT_BUFFER.unpack(call.ram.read(address + _PACKET.size, _FLAT_BUFFER.size))[0]
        status = self._move(call, move, lba, count, buffer)
        if status != OK:
            call.ram.put(address + 2, 2, 0)  # blocks moved: none
        return status

    def _chs(self, call: Call, move: Callable[[Call, int, int, int], int]) -> int:
        count, cx, head = call.al, call.cx, call.dx >> 8
        cylinder, sector = cx >> 8 | (cx & 0xC0) << 2, cx & 0x3F
        if not count or not sector or head >= self._heads:
            return BAD_COMMAND
        lba = (cylinder * self._heads + head) * SECTORS_PER_TRACK + sector - 1
        status = self._move(call, move, lba, count, call.pointer("es", "rbx"))
        call.al = count if status == OK else 0
        return status

    # --- telling about the drive --------------------------------------------------------------------------------------

    def _extensions(self, call: Call) -> int:
        if call.bx != 0x55AA:
            return BAD_COMMAND
        call.bx, call.cx = 0xAA55, 0x0001  # packet access
        return OK

    def _geometry(self, call: Call) -> int:
        last = self._cylinders - 1
        call.cx = (last & 0xFF) << 8 | (last >> 2 & 0xC0) | SECTORS_PER_TRACK
        call.dx = (self._heads - 1) << 8 | 1
        call.al = 0
        return OK

    def _kind(self, call: Call) -> int:
        call.ah = 0x03  # fixed disk
        call.cx, call.dx = self._sectors >> 16, self._sectors
        return OK

    def _parameters(self, call: Call) -> int:
        address = call.pointer("ds", "rsi")
        if not call.ram.writable(address, _PARAMETERS.size) or call.ram.get(address, 2) < _PARAMETERS.size:
            return BAD_COMMAND
        if self._cd:
            shape = (_CD_FLAGS, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        else:
            cylinders = self._sectors // (self._heads * SECTORS_PER_TRACK) or 1
            shape = (2, min(cylinders, 0xFFFFFFFF), self._heads, SECTORS_PER_TRACK)
        call.ram.write(address, _PARAMETERS.pack(_PARAMETERS.size, *shape, self._sectors, self._size))
        return OK

    def _emulation(self, call: Call) -> int:
        """El Torito AH=4Bh: tell (AL=01h), or end (AL=00h), the emulation that there is none of."""
        address = call.pointer("ds", "rsi")
        if call.al > 1 or not call.ram.writable(address, _SPECIFICATION.size):
            return BAD_COMMAND
        plan = self._plan
        start, segment, sectors = plan.source_offset // self._size, plan.address >> 4, plan.size // 512
        values = (_SPECIFICATION.size, plan.media, plan.drive, 0, start, 0, 0, segment, sectors, 0, 0, 0)
        call.ram.write(address, _SPECIFICATION.pack(*values))
        return OK
