"""One machine: a CPU, its memory, the core's devices, the trap BIOS and a verified disk.

.. code-block:: python

    with Machine(Engine.AUTO, VerifiedDisk(image, check), until="GNU GRUB", timeout=60) as machine:
        result = machine.run()
        print(result.reason, result.screen)
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Final, Self

from vmgraft.errors import ContentMismatchError, HostError, UsageError, VmgraftError
from vmgraft.vmmhost.core.boot import BootSource, find_boot
from vmgraft.vmmhost.core.bus import CORE, Bus
from vmgraft.vmmhost.core.contract import EndReason, PioEvent, PioHandler, TickHandler
from vmgraft.vmmhost.core.cpu import TICK_SECONDS, Cpu
from vmgraft.vmmhost.core.devices import board
from vmgraft.vmmhost.core.devices.cmos import Cmos
from vmgraft.vmmhost.core.devices.serial import Serial
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.firmware.bios import Firmware
from vmgraft.vmmhost.core.memory import DEFAULT_MIB, GuestRam
from vmgraft.vmmhost.core.portmap import CORE_PORTS
from vmgraft.vmmhost.core.probe import Engine, open_cpu
from vmgraft.vmmhost.core.screen import TextScreen

#: Seconds between two looks at the screen for the text waited for.
UNTIL_SECONDS: Final = 0.05
#: Bytes of serial and debug output kept for the result; the sink gets all of it.
OUTPUT_KEPT: Final = 4 << 20
#: Signals that ask a program to end.
END_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: First second of the year 3000, UTC.
RTC_END: Final = 32_503_680_000


@dataclass(frozen=True, slots=True)
class MachineResult:
    """How a run ended and what was seen.

    Attributes:
        reason: Why it ended.
        detail: The same in words; may be empty.
        engine: ``kvm`` or ``soft``.
        emulated: Whether guest instructions were emulated; None when unknown.
        wall_seconds: Duration of the run.
        virtual_ns: Virtual time the guest lived.
        exits: How often the guest left for the host, by kind.
        bios_calls: BIOS calls by "vector/function" in hex.
        unknown_calls: Those of them that nobody served.
        screen: The 25 lines of the text screen.
        serial: What the guest sent to COM1, up to 4 MiB.
        debug: What it sent to the debug ports.
        trace: Port accesses, when tracing was asked for.
        trace_dropped: Accesses that the trace had no room for.
        blocks_checked: 64 KiB blocks read from the image and compared with what was verified.
        blocks_written: 64 KiB blocks that the guest changed in the overlay.
        until_seen: Whether the text waited for was seen, even if the guest ended by itself then.
    """

    reason: EndReason
    detail: str
    engine: str
    emulated: bool | None
    wall_seconds: float
    virtual_ns: int
    exits: dict[str, int]
    bios_calls: dict[str, int]
    unknown_calls: dict[str, int]
    screen: tuple[str, ...]
    serial: bytes
    debug: bytes
    trace: tuple[PioEvent, ...]
    trace_dropped: int
    blocks_checked: int
    blocks_written: int
    until_seen: bool = False


class Machine:
    """A PC with one CPU and one drive, ready to run once.

    Args:
        engine: Which CPU to use.
        disk: The verified disk or CD.
        memory_mib: RAM in MiB.
        boot: What to boot.
        keys: Keys typed in advance.
        timeout: Wall-clock seconds after which the guest is stopped; None for no limit.
        until: Stop as soon as this text stands on a line of the screen or was sent to the serial port.
        serial: Gets every byte sent to COM1 as it comes.
        trace: Keep the I/O trace.
        rtc_epoch: Seconds since 1970 (UTC) that the real-time clock shows at boot; None for now.
        stop_on_key_wait: Stop when the guest waits for a key and none is queued.

    Raises:
        EngineUnavailableError: when the engine does not work here.
        NotBootableError: when the disk holds nothing to boot.
        ContentMismatchError: when the boot record is not what was verified.
        UsageError: when an option makes no sense.
    """

    def __init__(
        self,
        engine: Engine,
        disk: VerifiedDisk,
        *,
        memory_mib: int = DEFAULT_MIB,
        boot: BootSource = BootSource.AUTO,
        keys: str = "",
        timeout: float | None = None,
        until: str | None = None,
        serial: Callable[[bytes], None] | None = None,
        trace: bool = False,
        rtc_epoch: int | None = None,
        stop_on_key_wait: bool = False,
    ) -> None:
        if (timeout is not None and timeout <= 0) or until == "":
            raise UsageError("a time limit must be positive, and the text waited for not empty")
        if rtc_epoch is not None and not 0 <= rtc_epoch < RTC_END:
            raise UsageError(f"a clock at {rtc_epoch} is outside the years 1970 to 2999")
        self.disk = disk
        self.plan = find_boot(disk, boot)
        self._timeout, self._until, self._sink = timeout, until, serial
        self._until_bytes = (until or "").encode("cp437", "replace")
        self._serial, self._debug, self._tail = bytearray(), bytearray(), b""
        self._end: tuple[EndReason, str] | None = None
        self._tick_handlers: list[TickHandler] = []
        self._started = self._until_seen = False
        self._deadline = self._next_look = float("inf")
        self.ram = GuestRam(memory_mib)
        self._cpu: Cpu | None = None
        try:
            self._cpu = open_cpu(engine, self.ram)
            self.bus = Bus(self.ram.size, trace=trace)
            self._build(self._cpu, keys, rtc_epoch, stop_on_key_wait)
        except BaseException:
            self.close()
            raise

    def _build(self, cpu: Cpu, keys: str, rtc_epoch: int | None, stop_on_key_wait: bool) -> None:
        bus = self.bus
        bus.registers, bus.poller = cpu, self._poll
        self.screen = TextScreen(self.ram)
        cmos = Cmos(cpu.now_ns, int(time.time()) if rtc_epoch is None else rtc_epoch, self.ram.size)
        keyboard = board.KeyboardController(self.stop)
        for first, last, handler in getattr(cpu, "ports", ()):
            bus.claim_pio(first, last, handler, CORE, traced=False)
        bus.reserve_irqchip()
        devices: dict[str, PioHandler] = {
            "com1": Serial(self._serial_out),
            "cmos": cmos,
            "keyboard data": keyboard,
            "keyboard command": _Offset(keyboard, 4),
            "speaker": board.SpeakerPort(),
            "system control": board.SystemControl(self.stop),
            "crtc": board.Crtc(),
            "debug 402": board.DebugPort(self._debug, 0xE9),
            "debug e9": board.DebugPort(self._debug, 0xE9),
            "power": board.PowerControl(self.stop),
            "shutdown": board.ShutdownText(self.stop),
        }
        for name, device in devices.items():
            bus.claim_pio(*CORE_PORTS[name], device, CORE)
        self.firmware = Firmware(
            cpu, bus, self.disk, self.plan, cmos, keys=keys, host=self, stop_on_key_wait=stop_on_key_wait
        )

    # --- what devices and whatever is plugged in may use ------------------------------------------------------------

    @property
    def memory(self) -> GuestRam:
        """Guest memory by guest-physical address."""
        return self.ram

    @property
    def cpu(self) -> Cpu:
        """The CPU.

        Raises:
            HostError: after :meth:`close`.
        """
        if self._cpu is None:
            raise HostError("the machine is closed")
        return self._cpu

    def now_ns(self) -> int:
        """Return virtual nanoseconds since boot."""
        return self.cpu.now_ns()

    def set_irq(self, line: int, level: bool) -> None:
        """Drive an ISA interrupt line (0-15).

        Raises:
            ValueError: for another line.
        """
        if not 0 <= line <= 15:
            raise ValueError(f"interrupt line {line} does not exist")
        self.cpu.set_irq(line, level)

    def time_left(self) -> float:
        """Return the wall-clock seconds until the time limit, never below 0; infinite without one."""
        return max(0.0, self._deadline - time.monotonic())

    def add_tick(self, handler: TickHandler) -> None:
        """Call ``handler`` about every 10 ms of wall-clock time, between guest instructions."""
        self._tick_handlers.append(handler)
        self.bus.poll_seconds = TICK_SECONDS

    def stop(self, reason: EndReason, detail: str = "") -> None:
        """End the run; the first call counts."""
        if self._end is None:
            self._end = (reason, detail)
        self.bus.stopping = True

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self) -> MachineResult:
        """Run the guest to its end.

        Raises:
            HostError: when the machine already ran, or KVM is used outside the main thread.

        What ``serial`` raises ends the run and comes out as it is.
        """
        if self._started:
            raise HostError("a machine runs once")
        self._started = True
        cpu, start = self.cpu, time.monotonic()
        self._deadline = start + (self._timeout or float("inf"))
        self._next_look = start
        with _signals(self.stop):
            try:
                end = cpu.run(self.bus)
            except ContentMismatchError as error:
                self.stop(EndReason.DISK, error.message)
            except HostError:
                raise
            except VmgraftError as error:
                self.stop(EndReason.ERROR, str(error))
            else:
                if end is not None:
                    self.stop(end.reason, end.detail)
        self._look()
        return self._result(cpu, time.monotonic() - start)

    def _result(self, cpu: Cpu, seconds: float) -> MachineResult:
        reason, detail = self._end or (EndReason.ERROR, "the CPU stopped without a reason")
        return MachineResult(
            reason=reason,
            detail=detail,
            engine=cpu.engine,
            emulated=cpu.emulated,
            wall_seconds=seconds,
            virtual_ns=cpu.now_ns(),
            exits=dict(cpu.exits),
            bios_calls=dict(self.firmware.calls),
            unknown_calls=dict(self.firmware.unknown),
            screen=tuple(self.screen.lines()),
            serial=bytes(self._serial),
            debug=bytes(self._debug),
            trace=tuple(self.bus.events),
            trace_dropped=self.bus.events_dropped,
            blocks_checked=self.disk.blocks_checked,
            blocks_written=self.disk.blocks_written,
            until_seen=self._until_seen,
        )

    def _poll(self) -> None:
        now = time.monotonic()
        for handler in self._tick_handlers:
            handler(self.cpu.now_ns())
        if now >= self._next_look:
            self._next_look = now + UNTIL_SECONDS
            self._look()
        if now >= self._deadline:
            self.stop(EndReason.TIMEOUT, f"after {self._timeout:g} s")

    def _look(self) -> None:
        if self._until is not None and self.screen.contains(self._until):
            self._until_seen = True
            self.stop(EndReason.UNTIL, "on the screen")

    def _serial_out(self, data: bytes) -> None:
        if len(self._serial) < OUTPUT_KEPT:
            self._serial += data
        if self._sink is not None:
            self._sink(data)
        self._tail = (self._tail + data)[-len(self._until_bytes) :]
        if self._until_bytes and self._tail == self._until_bytes:
            self._until_seen = True
            self.stop(EndReason.UNTIL, "on the serial port")

    def close(self) -> None:
        """Release CPU and memory; the disk stays the caller's."""
        cpu, self._cpu = self._cpu, None
        if cpu is not None:
            cpu.close()
        self.ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class _Offset:
    """Shows a device at a second port as a higher offset."""

    def __init__(self, device: PioHandler, offset: int) -> None:
        self._device, self._offset = device, offset

    def pio_read(self, offset: int, size: int) -> int:
        return self._device.pio_read(offset + self._offset, size)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        self._device.pio_write(offset + self._offset, size, value)


@contextmanager
def _signals(stop: Callable[[EndReason, str], None]) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP end the run in order, not in the midst of it; the old handlers come back.

    A second signal raises KeyboardInterrupt: something, such as a full pipe behind the serial port, holds up the run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    seen: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt(signal.Signals(number).name)
        seen.append(number)
        stop(EndReason.INTERRUPTED, "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    old = {number: signal.getsignal(number) for number in END_SIGNALS}
    taken = {number: handler for number, handler in old.items() if handler not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
