"""A CD drive as the only target of a virtio SCSI controller (VIRTIO 1.2, section 5.6, legacy interface).

Firmware starts CDs through ATAPI, AHCI, USB or this; this one needs no emulated controller of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import ClassVar, Final

from vmgraft.vmmhost.core.devices.scsicd import ScsiCd
from vmgraft.vmmhost.core.devices.virtiopci import REQUEST_MAX, VirtioPci
from vmgraft.vmmhost.core.devices.virtqueue import Chain, gather, scatter
from vmgraft.vmmhost.core.drives import Disk
from vmgraft.vmmhost.core.memory import GuestRam

_CDB_SIZE, _SENSE_SIZE = 32, 96
#: Request: LUN, id, task attribute, priority, crn, then the command.
_REQUEST: Final = struct.Struct(f"<8sQBBB{_CDB_SIZE}s")
#: Response: sense length, residual, status qualifier, status, response code, then sense data.
_RESPONSE: Final = struct.Struct(f"<IIHBB{_SENSE_SIZE}s")
#: Queues, seg_max, max_sectors, cmd_per_lun, event_info_size, sense_size, cdb_size, max_channel, max_target, max_lun.
_CONFIG: Final = struct.Struct("<IIIIIIIHHI")
_RESPONSE_OK, _RESPONSE_BAD_TARGET, _RESPONSE_FAILURE = 0, 3, 9
_CONTROL, _EVENT, _COMMANDS = 0, 1, 2
#: What a control request is answered with: function not supported (5.6.6.2).
_CONTROL_REJECTED: Final = b"\x05"


class VirtioScsi(VirtioPci):
    """A controller with a CD drive at target 0, LUN 0.

    Args:
        ram: The guest's memory.
        disk: What lies in the drive.
        go_on: See :class:`~vmgraft.vmmhost.core.devices.virtiopci.VirtioPci`.
    """

    QUEUES: ClassVar[int] = 3

    def __init__(self, ram: GuestRam, disk: Disk, *, go_on: Callable[[], bool]) -> None:
        super().__init__(ram, 0x1004, 8, 0x010000, features=0, go_on=go_on)
        self._drive = ScsiCd(disk)
        sectors = REQUEST_MAX // 512
        self.settings = _CONFIG.pack(1, 126, sectors, 1, 16, _SENSE_SIZE, _CDB_SIZE, 0, 0, 0)

    def serve(self, queue: int, chain: Chain) -> int:
        """Serve one request; the event queue's buffers are kept without an answer's content."""
        out_size, in_size = chain.sizes()
        if queue == _EVENT or out_size > REQUEST_MAX or in_size > REQUEST_MAX + _RESPONSE.size:
            return 0
        if queue == _CONTROL:
            return self._written(chain, _CONTROL_REJECTED) if in_size else 0
        request = gather(self.ram, chain.readable)
        if request is None or len(request) < _REQUEST.size or in_size < _RESPONSE.size:
            return 0
        lun, _ident, _task, _priority, _crn, command = _REQUEST.unpack_from(request)
        return self._written(chain, self._command(lun, command, in_size - _RESPONSE.size))

    def _written(self, chain: Chain, data: bytes) -> int:
        return len(data) if scatter(self.ram, chain.writable, data) else 0

    def _command(self, lun: bytes, command: bytes, room: int) -> bytes:
        """Return response header and data; LUNs are written as 1, target, 0x40 and LUN (5.6.6.1)."""
        if lun[0] != 1 or lun[1] != 0 or lun[2] & 0x3F or lun[3]:
            return _RESPONSE.pack(0, room, 0, 0, _RESPONSE_BAD_TARGET, b"")
        answer = self._drive.execute(command, room)
        data = answer.data[:room]
        return _RESPONSE.pack(len(answer.sense), room - len(data), 0, answer.status, _RESPONSE_OK, answer.sense) + data
