"""The trap BIOS: from a write to the trap port to the service behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Final, Protocol

from vmgraft.vmmhost.core.bootplan import BootPlan
from vmgraft.vmmhost.core.bus import CORE, Bus
from vmgraft.vmmhost.core.contract import EndReason, PioEvent
from vmgraft.vmmhost.core.cpu import Cpu
from vmgraft.vmmhost.core.devices.cmos import Cmos
from vmgraft.vmmhost.core.drives import Disk, Drive
from vmgraft.vmmhost.core.firmware.call import Call, prepare_memory
from vmgraft.vmmhost.core.firmware.diskio import DiskServices
from vmgraft.vmmhost.core.firmware.keyboard import Keyboard
from vmgraft.vmmhost.core.firmware.system import System
from vmgraft.vmmhost.core.firmware.video import Video
from vmgraft.vmmhost.core.loaders.entry import LoadedKernel, enter
from vmgraft.vmmhost.core.memory import ROM_BASE
from vmgraft.vmmhost.core.portmap import CORE_PORTS

TRAP_PORT: Final = CORE_PORTS["bios trap"][0]
STUBS: Final = ROM_BASE + 0x1000
STUB_SIZE: Final = 16
_TIMER: Final = 0x08
#: Faults that no guest handler took: going on would repeat them for ever.
_FATAL: Final = {0x00: "divide error", 0x06: "invalid instruction", 0x07: "no coprocessor"}
#: Calls counted by name; guests that make up more of them have the others counted together.
CALLS_MAX: Final = 1024
OTHER_CALLS: Final = "other"
_ENTRY_FLAGS: Final = 0x0202  # interrupts on


def rom_image() -> bytes:
    """Return the assembled ROM, 64 KiB."""
    return files("vmgraft.vmmhost").joinpath("data/trapbios.bin").read_bytes()


class Host(Protocol):
    """What the firmware asks of the machine."""

    def stop(self, reason: EndReason, detail: str = "") -> None: ...  # noqa: D102


class Firmware:
    """All BIOS services of one machine; a port device at the trap port.

    Args:
        cpu: The CPU whose registers carry the calls.
        bus: Gets the trap port and, when tracing, one event a call.
        disk: The boot medium.
        plan: What INT 19h loads.
        cmos: The clock behind INT 1Ah.
        keys: Keys typed in advance.
        host: Stopped on power-off, INT 18h and fatal faults.
        stop_on_key_wait: Stop when the guest waits for a key and the queue is empty.
        drives: Drives beside the boot medium.
        kernel: Entered by INT 19h instead of a boot program.

    Raises:
        UsageError: when there are too many drives.
    """

    def __init__(
        self,
        cpu: Cpu,
        bus: Bus,
        disk: Disk,
        plan: BootPlan,
        cmos: Cmos,
        *,
        keys: str,
        host: Host,
        stop_on_key_wait: bool,
        drives: Sequence[Drive] = (),
        kernel: LoadedKernel | None = None,
    ) -> None:
        self._cpu, self._bus, self._disk, self._plan, self._host = cpu, bus, disk, plan, host
        self.kernel = kernel
        self._stop_on_key_wait = stop_on_key_wait
        self._booted = False
        #: Calls by "vector/function", and those nobody served; see CALLS_MAX.
        self.calls: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        cpu.ram.load_rom(rom_image())
        prepare_memory(cpu.ram)
        self.video = Video(cpu.ram)
        self.keyboard = Keyboard(keys)
        self.system = System(cmos, cpu.now_ns, host.stop, bus.services)
        self.system.seed_ticks(cpu.ram)
        self.disk_services = DiskServices(disk, plan, drives, cpu.ram, cmos)
        self._services: dict[int, Callable[[Call], bool]] = {
            0x10: self.video.serve,
            0x11: self.system.serve_11,
            0x12: self.system.serve_12,
            0x13: self.disk_services.serve,
            0x15: self.system.serve_15,
            0x16: self._key,
            0x18: self._no_boot,
            0x19: self._boot,
            0x1A: self.system.serve_1a,
        }
        bus.claim_pio(TRAP_PORT, TRAP_PORT, self, CORE, traced=False)

    def poll(self) -> None:
        """Nothing to do: keys are taken when the guest asks."""

    def why(self) -> str | None:
        """Return nothing: what this firmware ends is explained by itself."""
        return None

    def pio_read(self, offset: int, size: int) -> int:
        """Nothing to read at the trap port."""
        return 0xFF

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Serve the call whose ROM stub wrote; writes from elsewhere are dropped."""
        rip = self._cpu.segment_base("cs") + self._cpu.get("rip")
        if not STUBS <= rip < STUBS + 256 * STUB_SIZE or size != 1:
            return
        vector = (rip - STUBS) // STUB_SIZE
        call = Call(self._cpu, vector)
        if vector == _TIMER:
            self.system.tick(call)
            return
        if not self._cpu.ram.writable(call.frame, 6):
            self._host.stop(EndReason.ERROR, f"INT {vector:02X}h with a stack outside RAM at {call.frame:#x}")
            return
        if self._bus.tracing:
            self._bus.record(PioEvent(True, TRAP_PORT, 1, value))
        self._serve(call, vector)

    def _serve(self, call: Call, vector: int) -> None:
        name = f"{vector:02x}/{call.ah:02x}"
        self.calls[name if name in self.calls or len(self.calls) < CALLS_MAX else OTHER_CALLS] += 1
        if vector in _FATAL:
            ip, cs = call.ram.get(call.frame, 2), call.ram.get(call.frame + 2, 2)
            self._host.stop(EndReason.ERROR, f"{_FATAL[vector]} in the guest at {cs:04x}:{ip:04x}")
            return
        service = self._services.get(vector)
        if service is None or not service(call):
            self.unknown[name if name in self.unknown or len(self.unknown) < CALLS_MAX else OTHER_CALLS] += 1

    def _key(self, call: Call) -> bool:
        served = self.keyboard.serve(call)
        if self.keyboard.waiting and self._stop_on_key_wait:
            self._host.stop(EndReason.KEY_WAIT, "the guest waits for a key")
        return served

    def _no_boot(self, _call: Call) -> bool:
        self._host.stop(EndReason.HALT, "INT 18h: the boot program gave up")
        return True

    def _boot(self, call: Call) -> bool:
        """Load the boot program and let the ROM's IRET enter it."""
        if self._booted:
            self._host.stop(EndReason.RESET, "INT 19h: the guest asked to boot again")
            return True
        self._booted = True
        if self.kernel is not None:
            enter(self.kernel, call)
            return True
        plan = self._plan
        call.ram.write(plan.address, self._disk.read(plan.source_offset, plan.size))
        call.ram.put(call.frame, 2, plan.ip)
        call.ram.put(call.frame + 2, 2, plan.segment)
        call.ram.put(call.frame + 4, 2, _ENTRY_FLAGS)
        call.ax = 0
        call.dx = plan.drive
        return True
