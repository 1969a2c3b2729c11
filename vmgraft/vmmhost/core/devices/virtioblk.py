"""A disk as a virtio block device (VIRTIO 1.2, section 5.2, legacy interface)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from vmgraft.vmmhost.core.devices.virtiopci import REQUEST_MAX, VirtioPci
from vmgraft.vmmhost.core.devices.virtqueue import Chain, gather, scatter
from vmgraft.vmmhost.core.disk import OverlayFullError
from vmgraft.vmmhost.core.drives import Disk
from vmgraft.vmmhost.core.memory import GuestRam

SECTOR: Final = 512
#: Request types and status bytes, 5.2.6.
_IN, _OUT, _FLUSH, _GET_ID = 0, 1, 4, 8
OK, IO_ERROR, UNSUPPORTED = 0, 1, 2
#: Feature bits, 5.2.3.
_FEATURE_SEG_MAX: Final = 1 << 2
_FEATURE_READ_ONLY: Final = 1 << 5
_FEATURE_BLOCK_SIZE: Final = 1 << 6
_FEATURE_FLUSH: Final = 1 << 9
#: Type, reserved, sector.
_HEADER: Final = struct.Struct("<IIQ")
#: Configuration, 5.2.4: capacity in sectors, size_max, seg_max, geometry, block size.
_CONFIG: Final = struct.Struct("<QIIHBBI")
#: Data buffers a request may have: the queue less header and status.
_SEGMENTS_MAX: Final = 126
_ID_SIZE: Final = 20


class VirtioBlk(VirtioPci):
    """One disk.

    Args:
        ram: The guest's memory.
        disk: Its content; a mismatch of verified content is raised through, and ends the run.
        read_only: Whether writes are refused.
        name: What the guest is told as serial number; the first 20 ASCII characters count.
        go_on: See :class:`~vmgraft.vmmhost.core.devices.virtiopci.VirtioPci`.
    """

    def __init__(
        self, ram: GuestRam, disk: Disk, *, read_only: bool = False, name: str = "", go_on: Callable[[], bool]
    ) -> None:
        features = _FEATURE_SEG_MAX | _FEATURE_BLOCK_SIZE | _FEATURE_FLUSH | (_FEATURE_READ_ONLY if read_only else 0)
        super().__init__(ram, 0x1001, 2, 0x010000, features=features, go_on=go_on)
        self._disk, self._read_only = disk, read_only
        self._sectors = disk.size // SECTOR
        self._ident = name.encode("ascii", "replace")[:_ID_SIZE].ljust(_ID_SIZE, b"\0")
        self.settings = _CONFIG.pack(self._sectors, 0, _SEGMENTS_MAX, 0, 0, 0, SECTOR)

    def serve(self, queue: int, chain: Chain) -> int:
        """Serve one request; one that has no room for a status byte is dropped."""
        out_size, in_size = chain.sizes()
        if not in_size:
            return 0
        status, data = IO_ERROR, b""
        if out_size <= REQUEST_MAX + _HEADER.size and in_size <= REQUEST_MAX + 1:
            request = gather(self.ram, chain.readable)
            if request is not None and len(request) >= _HEADER.size:
                status, data = self._serve(request, in_size - 1)
        return self._answer(chain, data, in_size, status)

    def _answer(self, chain: Chain, data: bytes, in_size: int, status: int) -> int:
        """Write data and status; the status lies in the last byte of the last buffer."""
        last = next(each for each in reversed(chain.writable) if each.size)
        if not scatter(self.ram, chain.writable, data):
            status, data = IO_ERROR, b""
        if not self.ram.writable(last.gpa + last.size - 1, 1):
            return 0
        self.ram.put(last.gpa + last.size - 1, 1, status)
        return in_size if status == OK else 1

    def _serve(self, request: bytes, room: int) -> tuple[int, bytes]:
        """Return status and data of a request with its header."""
        kind, _reserved, sector = _HEADER.unpack_from(request)
        if kind == _IN:
            if not self._fits(sector, room):
                return IO_ERROR, b""
            return OK, self._disk.read(sector * SECTOR, room)
        if kind == _OUT:
            return self._write(sector, request[_HEADER.size :]), b""
        if kind == _FLUSH:
            return OK, b""
        if kind == _GET_ID:
            return OK, self._ident[:room]
        return UNSUPPORTED, b""

    def _fits(self, sector: int, length: int) -> bool:
        return length % SECTOR == 0 and sector + length // SECTOR <= self._sectors

    def _write(self, sector: int, data: bytes) -> int:
        if self._read_only or not self._fits(sector, len(data)):
            return IO_ERROR
        try:
            self._disk.write(sector * SECTOR, data)
        except OverlayFullError:
            return IO_ERROR
        return OK
