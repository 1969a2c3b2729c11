"""One machine: a CPU, its memory, the core's devices, firmware and a verified disk.

.. code-block:: python

    with Machine(Engine.AUTO, VerifiedDisk(image, check), until="GNU GRUB", timeout=60) as machine:
        result = machine.run()
        print(result.reason, result.screen)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Final, Self

from vmgraft.errors import ContentMismatchError, HostError, UsageError, VmgraftError
from vmgraft.vmmhost.core import snapshot
from vmgraft.vmmhost.core.boardset import Wiring, build_board
from vmgraft.vmmhost.core.boot import BootPlan, BootSource, drive_only, find_boot
from vmgraft.vmmhost.core.bus import Bus
from vmgraft.vmmhost.core.contract import EndReason, TickHandler
from vmgraft.vmmhost.core.cpu import TICK_SECONDS, Cpu
from vmgraft.vmmhost.core.diskhook import HookedDisk
from vmgraft.vmmhost.core.drives import Disk, Drive
from vmgraft.vmmhost.core.endsignals import END_SIGNALS, end_signals
from vmgraft.vmmhost.core.firmware.bios import Firmware
from vmgraft.vmmhost.core.hypercalls import DefaultHypercalls
from vmgraft.vmmhost.core.keeper import Keeper
from vmgraft.vmmhost.core.loaders import DirectBoot, load_kernel
from vmgraft.vmmhost.core.memory import DEFAULT_MIB, GuestRam
from vmgraft.vmmhost.core.portmap import FirmwareKind
from vmgraft.vmmhost.core.probe import Engine, open_cpu
from vmgraft.vmmhost.core.result import DriveUse, MachineResult
from vmgraft.vmmhost.core.screen import TextScreen
from vmgraft.vmmhost.core.seabios import FirmwareImage, Host, SeaBios, load_firmware, offer
from vmgraft.vmmhost.core.services import RTC_END, ServiceTable
from vmgraft.vmmhost.core.shadow import ShadowedRam

__all__ = ["END_SIGNALS", "Machine", "MachineResult"]

#: Seconds between two looks at the screen for the text waited for.
UNTIL_SECONDS: Final = 0.05
#: Bytes of serial and debug output kept for the result; the sink gets all of it.
OUTPUT_KEPT: Final = 4 << 20


class Machine:
    """A PC with one CPU, ready to run once.

    Args:
        engine: Which CPU to use.
        disk: The verified disk or CD to boot from.
        memory_mib: RAM in MiB.
        boot: What to boot.
        keys: Keys typed in advance.
        timeout: Wall-clock seconds after which the guest is stopped; None for no limit.
        until: Stop as soon as this text stands on a line of the screen or was sent to the serial port.
        serial: Gets every byte sent to COM1 as it comes.
        trace: Keep the I/O trace.
        rtc_epoch: Seconds since 1970 (UTC) that the real-time clock shows at boot; None for now.
        stop_on_key_wait: Stop when the guest waits for a key and none is queued; with the trap BIOS only.
        firmware: What the guest finds as its firmware.
        bios: Stock firmware as it was read; None for the distribution's.
        drives: Drives beside the boot medium, in the guest's order.
        direct: A kernel to enter instead of what the disk boots.
        services: The default services and who answers in their place; None for the defaults.

    Raises:
        EngineUnavailableError: when the engine does not work here.
        NotBootableError: when the disk holds nothing to boot.
        ContentMismatchError: when the boot record is not what was verified.
        UsageError: when an option makes no sense.
    """

    def __init__(
        self,
        engine: Engine,
        disk: Disk,
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
        firmware: FirmwareKind = FirmwareKind.TRAP,
        bios: FirmwareImage | None = None,
        drives: Sequence[Drive] = (),
        direct: DirectBoot | None = None,
        services: ServiceTable | None = None,
    ) -> None:
        if (timeout is not None and timeout <= 0) or until == "":
            raise UsageError("a time limit must be positive, and the text waited for not empty")
        if rtc_epoch is not None and not 0 <= rtc_epoch < RTC_END:
            raise UsageError(f"a clock at {rtc_epoch} is outside the years 1970 to 2999")
        if firmware is not FirmwareKind.TRAP and (stop_on_key_wait or direct is not None):
            raise UsageError("only the trap BIOS enters a kernel directly, or tells that the guest waits for a key")
        self.services = ServiceTable() if services is None else services
        self.disk = HookedDisk(disk, self.services, 0)
        self.drives = tuple(
            replace(drive, disk=HookedDisk(drive.disk, self.services, number)) for number, drive in enumerate(drives, 1)
        )
        self._kind, self._direct = firmware, direct
        self.plan = self._find(disk, boot)
        self._timeout, self._until, self._sink = timeout, until, serial
        self._until_bytes = (until or "").encode("cp437", "replace")
        self._serial, self._debug, self._tail = bytearray(), bytearray(), b""
        self._end: tuple[EndReason, str] | None = None
        self._tick_handlers: list[TickHandler] = []
        self._started = self._until_seen = False
        self._at_rest, self._resting = True, list[Callable[[], None]]()
        self._deadline = self._next_look = float("inf")
        image = (bios or load_firmware()) if firmware is FirmwareKind.SEABIOS else None
        self.ram = GuestRam(memory_mib) if image is None else ShadowedRam(memory_mib, rom=image.rom)
        self._cpu: Cpu | None = None
        try:
            self._cpu = open_cpu(engine, self.ram)
            self.bus = Bus(self.ram.size, trace=trace, services=self.services)
            self._build(self._cpu, rtc_epoch)
            self.firmware = self._firmware(self._cpu, keys, stop_on_key_wait, image)
        except BaseException:
            self.close()
            raise

    def _find(self, disk: Disk, boot: BootSource) -> BootPlan:
        """Return what the boot medium is, and what the trap BIOS boots of it."""
        if self._kind is FirmwareKind.SEABIOS:
            return offer(disk, boot)
        return find_boot(disk, boot) if self._direct is None else drive_only(disk, boot)

    def _build(self, cpu: Cpu, rtc_epoch: int | None) -> None:
        bus = self.bus
        bus.registers, bus.poller = cpu, self._poll
        self.screen = TextScreen(self.ram)
        epoch = int(time.time()) if rtc_epoch is None else rtc_epoch
        bus.irq_driver = cpu.set_irq
        self.board = build_board(cpu, bus, Wiring(self.stop, self._serial_out, self._debug, epoch, self._kind))
        bus.defaults = DefaultHypercalls(
            bus.services, self.ram, cpu.now_ns, console=self.board.serial.send, names=bus.descriptions
        )

    def _firmware(self, cpu: Cpu, keys: str, stop_on_key_wait: bool, image: FirmwareImage | None) -> Firmware | SeaBios:
        if image is None or not isinstance(self.ram, ShadowedRam):
            kernel = None if self._direct is None else load_kernel(self._direct, self.ram.e820(), self.ram.size)
            return Firmware(
                cpu, self.bus, self.disk, self.plan, self.board.cmos,
                drives=self.drives, kernel=kernel, keys=keys, host=self, stop_on_key_wait=stop_on_key_wait,
            )  # fmt: skip
        boot = Drive(self.disk, self.plan.medium, name="boot")
        wires = Host(self.stop, cpu.set_irq, self._go_on, self._debug)
        return SeaBios(
            self.bus, self.ram, image,
            drives=(boot, *self.drives), keyboard=self.board.keyboard, keys=keys, host=wires,
        )  # fmt: skip

    def _go_on(self) -> bool:
        """Look around in the midst of a long access; False when the run has ended."""
        self._poll()
        return self._end is None

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

    def uses(self) -> tuple[DriveUse, ...]:
        """Return how much of each drive was read and changed so far, the boot medium first."""
        boot = Drive(self.disk, self.plan.medium, name="boot")
        return tuple(
            DriveUse(drive.name, drive.kind, drive.disk.blocks_checked, drive.disk.blocks_written)
            for drive in (boot, *self.drives)
        )

    def add_tick(self, handler: TickHandler) -> None:
        """Call ``handler`` about every 10 ms of wall-clock time, between guest instructions."""
        self._tick_handlers.append(handler)
        self.bus.poll_seconds = TICK_SECONDS

    def stop(self, reason: EndReason, detail: str = "") -> None:
        """End the run; the first call counts."""
        if self._end is None:
            self._end = (reason, detail)
        self.bus.stopping = True

    # --- keeping ----------------------------------------------------------------------------------------------------

    def at_rest(self, act: Callable[[], None]) -> None:
        """Call ``act`` soon, between two instructions of the guest, when it can be kept; then the guest goes on.

        What ``act`` raises ends the run and comes out as it is.
        """
        self._resting.append(act)
        self.bus.stopping = self.bus.resting = True

    def save(self, bindings: Mapping[str, str], extra: Mapping[str, bytes] | None = None) -> bytes:
        """Return a snapshot: in a call of :meth:`at_rest`, or when the guest has not run yet.

        Args:
            bindings: What must be the same on the way back, name → digest.
            extra: Further sections, for :meth:`load` to return.

        Raises:
            HostError: when the guest is running, or cannot be kept.
        """
        if not self._at_rest:
            raise HostError("a running guest cannot be kept", hint="ask for it to rest first")
        return snapshot.save(Keeper(self), bindings, extra or {})

    def load(self, data: bytes | bytearray | memoryview, bindings: Mapping[str, str]) -> dict[str, bytes]:
        """Bring a snapshot back, before the guest runs; return its further sections.

        Raises:
            HostError: when it is damaged, or does not belong to this machine; the machine must not run then.
        """
        if self._started:
            raise HostError("the guest runs already")
        self._started = True  # until everything is back
        extra = snapshot.load(Keeper(self), data, bindings)
        self._started = False
        return extra

    def _rest(self) -> None:
        self._at_rest, self.bus.stopping, self.bus.resting = True, self._end is not None, False
        acts, self._resting = self._resting, []
        for act in acts:
            act()
        self._at_rest = False

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self) -> MachineResult:
        """Run the guest to its end.

        Raises:
            HostError: when the machine already ran, or KVM is used outside the main thread.

        What ``serial`` raises ends the run and comes out as it is.
        """
        if self._started:
            raise HostError("a machine runs once")
        self._started, self._at_rest = True, False
        cpu, start = self.cpu, time.monotonic()
        self._deadline = start + (self._timeout or float("inf"))
        self._next_look = start
        leaves = self.services.cpuid()
        if leaves:
            cpu.show_cpuid(leaves)
        with end_signals(self.stop):
            try:
                end = cpu.run(self.bus)
                while end is None and self._end is None and self._resting:
                    self._rest()
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
        if reason is EndReason.RESET:
            detail = self.firmware.why() or detail
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
            blocks_checked=sum(use.blocks_checked for use in self.uses()),
            blocks_written=sum(use.blocks_written for use in self.uses()),
            until_seen=self._until_seen,
            why=cpu.why,
            drives=self.uses(),
        )

    def _poll(self) -> None:
        now = time.monotonic()
        for handler in self._tick_handlers:
            handler(self.cpu.now_ns())
        if now >= self._next_look:
            self._next_look = now + UNTIL_SECONDS
            self.firmware.poll()
            self._look()
        if now >= self._deadline:
            self.stop(EndReason.TIMEOUT, f"after {self._timeout:g} s")

    def _look(self) -> None:
        if self._until is not None and self.screen.contains(self._until):
            self._until_seen = True
            self.stop(EndReason.UNTIL, "on the screen")

    def _serial_out(self, data: bytes) -> None:
        self._serial += data[: OUTPUT_KEPT - len(self._serial)]
        if self._sink is not None:
            self._sink(data)
        if not self._until_bytes:
            return
        seen = self._tail + data
        self._tail = seen[len(seen) - min(len(seen), len(self._until_bytes) - 1) :]
        if self._until_bytes in seen:
            self._until_seen = True
            self.stop(EndReason.UNTIL, "on the serial port")

    def close(self) -> None:
        """Release CPU and memory, and end reading ahead; the disk stays the caller's."""
        cpu, self._cpu = self._cpu, None
        for disk in (self.disk, *(drive.disk for drive in self.drives)):
            if isinstance(disk, HookedDisk):
                disk.close()
        if cpu is not None:
            cpu.close()
        self.ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
