"""INT 11h, 12h, 15h, 1Ah and the timer tick: equipment, memory map, waiting, time of day."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.devices.cmos import Cmos, bcd
from vmgraft.vmmhost.core.firmware.call import BiosData, Call
from vmgraft.vmmhost.core.memory import GuestRam
from vmgraft.vmmhost.core.services import TICKS_PER_DAY, ServiceTable

UNSUPPORTED: Final = 0x86
SMAP: Final = 0x534D4150
_E820_ENTRY: Final = struct.Struct("<QQI")
_PROTECTED_MODE_COPY_MAX: Final = 0x8000  # words, INT 15h AH=87h


def _from_bcd(value: int) -> int:
    return (value >> 4) * 10 + (value & 15)


class System:
    """The services that need neither disk nor screen.

    Args:
        cmos: Time of day.
        clock: Virtual nanoseconds since boot.
        stop: Ends the run.
        services: The machine's services, of which ``time`` may show another tick count.
    """

    def __init__(
        self,
        cmos: Cmos,
        clock: Callable[[], int],
        stop: Callable[[EndReason, str], None],
        services: ServiceTable | None = None,
    ) -> None:
        self._services = services or ServiceTable()
        self._cmos, self._clock, self._stop = cmos, clock, stop
        self._deadline: int | None = None

    def seed_ticks(self, ram: GuestRam) -> None:
        """Start the tick counter at the time of day, as a BIOS does."""
        now = self._cmos.now()
        seconds = now.tm_hour * 3600 + now.tm_min * 60 + now.tm_sec
        ram.put(BiosData.TICKS, 4, seconds * TICKS_PER_DAY // 86400)

    def tick(self, call: Call) -> None:
        """Count one timer interrupt."""
        ticks = call.ram.get(BiosData.TICKS, 4) + 1
        if ticks >= TICKS_PER_DAY:
            ticks = 0
            call.ram.put(BiosData.MIDNIGHT, 1, 1)
        call.ram.put(BiosData.TICKS, 4, ticks)

    # --- INT 15h ------------------------------------------------------------------------------------------------------

    def serve_15(self, call: Call) -> bool:
        """Serve INT 15h; False when the function is unknown (the guest is told so too)."""
        if call.ah != UNSUPPORTED:
            self._deadline = None
        call.ram.put(BiosData.WAIT_FLAG, 1, 0)
        if call.ax in (0xE820, 0xE801):
            good = self._e820(call) if call.ax == 0xE820 else self._e801(call)
            call.carry(not good)
            return True
        services = {0x24: self._a20, 0x53: self._apm, 0x86: self._wait, 0x87: self._copy, 0x88: self._extended}
        service = services.get(call.ah)
        good = service is not None and service(call)
        if not good:
            call.ah = UNSUPPORTED
        call.carry(not good)
        return service is not None

    def _e820(self, call: Call) -> bool:
        entries, index = call.ram.e820(), call.extended("ebx")
        address = call.pointer("es", "rdi")
        wanted = call.extended("ecx") >= _E820_ENTRY.size and call.extended("edx") == SMAP
        if index >= len(entries) or not wanted or not call.ram.writable(address, _E820_ENTRY.size):
            return False
        call.ram.write(address, _E820_ENTRY.pack(*entries[index]))
        call.set_extended("eax", SMAP)
        call.set_extended("ecx", _E820_ENTRY.size)
        call.set_extended("ebx", index + 1 if index + 1 < len(entries) else 0)
        return True

    def _e801(self, call: Call) -> bool:
        low = min(15 << 10, (call.ram.size >> 10) - 1024)
        high = max(0, call.ram.size - (16 << 20)) >> 16
        call.ax = call.cx = low
        call.bx = call.dx = high
        return True

    def _extended(self, call: Call) -> bool:
        call.ax = min(0xFFFF, (call.ram.size >> 10) - 1024)
        return True

    def _a20(self, call: Call) -> bool:
        """A20 is always on: enabling works, asking says so, disabling does not work."""
        if call.al == 0 or call.al > 3:
            return False
        if call.al == 2:
            call.al = 1
        elif call.al == 3:
            call.bx = 0x0003
        call.ah = 0
        return True

    def _wait(self, call: Call) -> bool:
        """Sleep CX:DX microseconds: the ROM stub halts and asks again until the time is up."""
        now = self._clock()
        if self._deadline is None:
            self._deadline = now + (call.cx << 16 | call.dx) * 1000
        if now < self._deadline:
            call.ram.put(BiosData.WAIT_FLAG, 1, 1)
        else:
            self._deadline = None
        return True

    def _copy(self, call: Call) -> bool:
        """Copy CX words between addresses given by descriptors at ES:SI + 10h and + 18h."""
        table, size = call.pointer("es", "rsi"), call.cx * 2
        if call.cx > _PROTECTED_MODE_COPY_MAX or not call.ram.readable(table, 0x30):
            return False
        raw = call.ram.read(table, 0x30)
        source, target = (int.from_bytes(raw[at + 2 : at + 5] + raw[at + 7 : at + 8], "little") for at in (0x10, 0x18))
        if not call.ram.readable(source, size) or not call.ram.writable(target, size):
            return False
        call.ram.write(target, call.ram.read(source, size))
        call.ah = 0
        return True

    def _apm(self, call: Call) -> bool:
        """APM 1.2: present, connectable in real mode, and able to power off."""
        function = call.al
        if function == 0x00:
            call.ax, call.bx, call.cx = 0x0102, 0x504D, 0x0000
        elif function == 0x07 and call.cx == 0x0003:
            self._stop(EndReason.SHUTDOWN, "APM power off")
        elif function == 0x0E:
            call.ax = 0x0102
        elif function not in (0x01, 0x04, 0x07, 0x08, 0x0D, 0x0F):
            return False
        return True

    # --- INT 11h, 12h, 1Ah --------------------------------------------------------------------------------------------

    def serve_11(self, call: Call) -> bool:
        """Equipment word."""
        call.ax = call.ram.get(BiosData.EQUIPMENT, 2)
        return True

    def serve_12(self, call: Call) -> bool:
        """KiB of conventional memory."""
        call.ax = call.ram.get(BiosData.MEMORY_KIB, 2)
        return True

    def serve_1a(self, call: Call) -> bool:
        """Serve INT 1Ah: ticks and clock; False when the function is unknown (the guest is told so too)."""
        services = {0x00: self._ticks, 0x01: self._set_ticks, 0x02: self._time, 0x03: self._set_time, 0x04: self._date}
        service = services.get(call.ah)
        if service is not None:
            service(call)
        call.carry(service is None)
        return service is not None

    def _ticks(self, call: Call) -> None:
        ticks = self._services.ticks(call.ram.get(BiosData.TICKS, 4))
        call.cx, call.dx = ticks >> 16, ticks
        call.al = call.ram.get(BiosData.MIDNIGHT, 1)
        call.ram.put(BiosData.MIDNIGHT, 1, 0)

    def _set_ticks(self, call: Call) -> None:
        call.ram.put(BiosData.TICKS, 4, call.cx << 16 | call.dx)

    def _time(self, call: Call) -> None:
        now = self._cmos.now()
        call.cx, call.dx = bcd(now.tm_hour) << 8 | bcd(now.tm_min), bcd(now.tm_sec) << 8

    def _set_time(self, call: Call) -> None:
        hour, minute, second = _from_bcd(call.cx >> 8), _from_bcd(call.cx & 0xFF), _from_bcd(call.dx >> 8)
        if hour < 24 and minute < 60 and second < 60:
            self._cmos.set_time(hour, minute, second)

    def _date(self, call: Call) -> None:
        now = self._cmos.now()
        call.cx = bcd(now.tm_year // 100) << 8 | bcd(now.tm_year)
        call.dx = bcd(now.tm_mon) << 8 | bcd(now.tm_mday)
