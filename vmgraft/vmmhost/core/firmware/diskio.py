"""INT 13h: floppies by CHS, hard disks by CHS and LBA, CDs by LBA with sectors of 2048 bytes.

Function and status numbers: IBM PC/AT BIOS, Phoenix Enhanced Disk Drive Specification 3.0 and El Torito 1.0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final

from vmgraft.vmmhost.core.bootplan import CDROM, BootPlan
from vmgraft.vmmhost.core.devices.cmos import Cmos
from vmgraft.vmmhost.core.disk import OverlayFullError
from vmgraft.vmmhost.core.drives import Disk, Drive, DriveKind
from vmgraft.vmmhost.core.firmware.call import BiosData, Call
from vmgraft.vmmhost.core.firmware.drivetable import BiosDrive, DriveTable
from vmgraft.vmmhost.core.memory import GuestRam

OK: Final = 0x00
BAD_COMMAND: Final = 0x01
WRITE_PROTECTED: Final = 0x03
SECTOR_NOT_FOUND: Final = 0x04
DMA_BOUNDARY: Final = 0x09
WRITE_FAULT: Final = 0xCC

#: Disk address packet: size, reserved, blocks, offset, segment, block number; then a flat 64-bit buffer address.
_PACKET: Final = struct.Struct("<BBHHHQ")
_FLAT_BUFFER: Final = struct.Struct("<Q")
#: Drive parameters, 26 bytes: size, flags, cylinders, heads, sectors per track, sectors, bytes a sector.
_PARAMETERS: Final = struct.Struct("<HHIIIQH")
_CD_FLAGS: Final = 0x0074  # removable, lockable, change line, geometry not valid
#: El Torito specification packet, 19 bytes: size, media, drive, controller, image LBA, device, buffer segment, load
#: segment, sectors loaded; then cylinder, sector and head as INT 13h AH=08h gives them in CH, CL and DH.
_SPECIFICATION: Final = struct.Struct("<BBBBIHHHHBBB")
_LOAD_SECTOR: Final = 512
#: Drive number that means every drive when an emulation is ended (El Torito 1.0, INT 13h AX=4B00h).
_ALL_DRIVES: Final = 0x7F

Move = Callable[[Call, BiosDrive, int, int, int], int]
Service = Callable[[Call, BiosDrive], int]


def _last_address(drive: BiosDrive) -> tuple[int, int, int]:
    """Return the last cylinder, sector and head as AH=08h gives them in CH, CL and DH."""
    last, track = drive.geometry.cylinders - 1, drive.geometry.sectors
    return last & 0xFF, last >> 2 & 0xC0 | track, drive.geometry.heads - 1


class DiskServices:
    """The services of INT 13h for all drives.

    Args:
        disk: The boot medium.
        plan: What it is.
        drives: Further drives.
        ram: Told how many drives there are.
        cmos: Told which floppies there are.

    Raises:
        UsageError: when there are too many drives.
    """

    def __init__(self, disk: Disk, plan: BootPlan, drives: Sequence[Drive], ram: GuestRam, cmos: Cmos) -> None:
        self.table = DriveTable(disk, plan, drives)
        self.table.describe(ram, cmos)
        self._plan, self._cmos = plan, cmos
        chs: dict[int, Service] = {
            0x02: lambda call, drive: self._chs(call, drive, self._read),
            0x03: lambda call, drive: self._chs(call, drive, self._write),
            0x04: lambda call, drive: self._chs(call, drive, self._verify),
            0x08: self._geometry,
            0x15: self._type,
        }
        packets: dict[int, Service] = {
            0x41: self._extensions,
            0x42: lambda call, drive: self._packet(call, drive, self._read),
            0x43: lambda call, drive: self._packet(call, drive, self._write),
            0x44: lambda call, drive: self._packet(call, drive, self._verify),
            0x47: lambda call, drive: self._packet(call, drive, self._verify),
            0x48: self._parameters,
        }
        harmless: dict[int, Service] = dict.fromkeys((0x00, 0x0C, 0x0D, 0x10, 0x11), lambda _call, _drive: OK)
        self._services: dict[DriveKind, dict[int, Service]] = {
            DriveKind.HARD_DISK: harmless | chs | packets,
            DriveKind.CDROM: harmless | packets,
            # The medium was not changed; and the packet functions are not there, as everybody who asks is told.
            DriveKind.FLOPPY: harmless
            | chs
            | {0x16: lambda _call, _drive: OK, 0x41: lambda _call, _drive: BAD_COMMAND},
        }

    def serve(self, call: Call) -> bool:
        """Serve one call; False when the function is unknown (the guest is told so too)."""
        function, number = call.ah, call.dx & 0xFF
        status_at = BiosData.DISK_STATUS if number & 0x80 else BiosData.FLOPPY_STATUS
        if function == 0x01:
            status = call.ram.get(status_at, 1)
            call.ah = status
            call.carry(status != OK)
            return True
        drive = self.table.find(number)
        if function == 0x4B:
            status, known = self._emulation(call, number), True
        else:
            service = None if drive is None else self._services[drive.kind].get(function)
            known = service is not None or drive is None
            if service is not None and drive is not None:
                status = service(call, drive)
            else:
                status = OK if function == 0 else BAD_COMMAND
        if not (function == 0x15 and status == OK):
            call.ah = status
        if function == 0x41 and status == OK:
            call.ah = 0x30  # version 3.0
        call.ram.put(status_at, 1, status)
        call.carry(status != OK)
        return known

    # --- moving sectors -----------------------------------------------------------------------------------------------

    def _read(self, call: Call, drive: BiosDrive, lba: int, count: int, buffer: int) -> int:
        size = drive.sector_size
        if not call.ram.writable(buffer, count * size):
            return DMA_BOUNDARY
        call.ram.write(buffer, drive.disk.read(lba * size, count * size))
        return OK

    def _write(self, call: Call, drive: BiosDrive, lba: int, count: int, buffer: int) -> int:
        size = drive.sector_size
        if drive.read_only:
            return WRITE_PROTECTED
        if not call.ram.readable(buffer, count * size):
            return DMA_BOUNDARY
        try:
            drive.disk.write(lba * size, call.ram.read(buffer, count * size))
        except OverlayFullError:
            return WRITE_FAULT
        return OK

    def _verify(self, _call: Call, _drive: BiosDrive, _lba: int, _count: int, _buffer: int) -> int:
        return OK

    def _packet(self, call: Call, drive: BiosDrive, move: Move) -> int:
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
        status = SECTOR_NOT_FOUND if lba + count > drive.sectors else move(call, drive, lba, count, buffer)
        if status != OK:
            call.ram.put(address + 2, 2, 0)  # blocks moved: none
        return status

    def _chs(self, call: Call, drive: BiosDrive, move: Move) -> int:
        count, cx, head = call.al, call.cx, call.dx >> 8
        cylinder, sector = cx >> 8 | (cx & 0xC0) << 2, cx & 0x3F
        shape = drive.geometry
        if not count or not sector or head >= shape.heads:
            return BAD_COMMAND
        if sector > shape.sectors:  # how boot programs find out a floppy's format
            call.al = 0
            return SECTOR_NOT_FOUND
        lba = (cylinder * shape.heads + head) * shape.sectors + sector - 1
        beyond = lba + count > drive.sectors
        status = SECTOR_NOT_FOUND if beyond else move(call, drive, lba, count, call.pointer("es", "rbx"))
        call.al = count if status == OK else 0
        return status

    # --- telling about the drive --------------------------------------------------------------------------------------

    def _extensions(self, call: Call, _drive: BiosDrive) -> int:
        if call.bx != 0x55AA:
            return BAD_COMMAND
        call.bx, call.cx = 0xAA55, 0x0001  # packet access
        return OK

    def _geometry(self, call: Call, drive: BiosDrive) -> int:
        cylinder, sector, head = _last_address(drive)
        call.cx = cylinder << 8 | sector
        call.dx = head << 8 | self.table.count(drive.kind)
        call.al = 0
        if drive.kind is DriveKind.FLOPPY:
            call.bx = drive.floppy_type
            call.ram.put(BiosData.POINTER_FLAG, 1, 1)  # the ROM stub loads ES:DI from vector 1Eh
        return OK

    def _type(self, call: Call, drive: BiosDrive) -> int:
        if drive.kind is DriveKind.FLOPPY:
            call.ah = 0x01  # floppy without a change line
            return OK
        call.ah = 0x03  # fixed disk
        call.cx, call.dx = drive.sectors >> 16, drive.sectors
        return OK

    def _parameters(self, call: Call, drive: BiosDrive) -> int:
        address = call.pointer("ds", "rsi")
        if not call.ram.writable(address, _PARAMETERS.size) or call.ram.get(address, 2) < _PARAMETERS.size:
            return BAD_COMMAND
        if drive.kind is DriveKind.CDROM:
            shape = (_CD_FLAGS, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        else:
            heads, track = drive.geometry.heads, drive.geometry.sectors
            shape = (2, min(drive.sectors // (heads * track) or 1, 0xFFFFFFFF), heads, track)
        call.ram.write(address, _PARAMETERS.pack(_PARAMETERS.size, *shape, drive.sectors, drive.sector_size))
        return OK

    # --- El Torito ----------------------------------------------------------------------------------------------------

    def _emulation(self, call: Call, number: int) -> int:
        """AH=4Bh: tell what the boot CD emulates (AL=01h); with AL=00h end that as well."""
        address, plan = call.pointer("ds", "rsi"), self._plan
        ours = number in (CDROM, plan.drive) or (number == _ALL_DRIVES and call.al == 0)
        if plan.medium is not DriveKind.CDROM or not ours:
            return BAD_COMMAND
        if call.al > 1 or not call.ram.writable(address, _SPECIFICATION.size):
            return BAD_COMMAND
        emulated = self.table.emulated
        media, drive, offset = plan.media, plan.drive, plan.source_offset
        if plan.emulated is not None and emulated is None:  # it was ended before
            media, drive = plan.media & 0xF0, CDROM
        shape = (0, 0, 0) if emulated is None else _last_address(emulated)
        values = (offset // 2048, 0, 0, plan.address >> 4, plan.size // _LOAD_SECTOR, *shape)
        call.ram.write(address, _SPECIFICATION.pack(_SPECIFICATION.size, media, drive, 0, *values))
        if call.al == 0 and emulated is not None:
            self.table.end_emulation()
            self.table.describe(call.ram, self._cmos)
        return OK
