"""Which CPU engines work on this computer, found out by trying, in well under a second."""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from ctypes import addressof, c_char
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from vmgraft.errors import EngineUnavailableError, VmgraftError
from vmgraft.vmmhost.core.cpu import Cpu
from vmgraft.vmmhost.core.kvm import FailedExit, HaltExit, Kvm, Vcpu
from vmgraft.vmmhost.core.memory import GuestRam

#: A guest loop this long takes microseconds on a native CPU, and about 0.1 s where KVM emulates guest code.
PROBE_ITERATIONS: Final = 100_000
#: Above this rate instructions are run by hardware, even with milliseconds lost on entering the guest for the first
#: time; emulation inside KVM does a tenth of it, or less.
NATIVE_RATE: Final = 50_000_000
#: mov ecx, PROBE_ITERATIONS / dec ecx / jnz back / hlt, 16-bit code.
_PROBE_CODE: Final = b"\x66\xb9" + struct.pack("<I", PROBE_ITERATIONS) + b"\x66\x49\x75\xfc\xf4"
_PROBE_AT: Final = 0x1000


class Engine(StrEnum):
    """What the caller may ask for."""

    AUTO = "auto"
    KVM = "kvm"
    SOFT = "soft"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a probe found.

    Attributes:
        name: ``kvm`` or ``soft``.
        usable: Whether a guest can run on it.
        emulated: Whether guest instructions are emulated; None when not usable.
        reason: Why, in words for people.
        rate: Measured guest instructions per second, 0 when not measured.
    """

    name: str
    usable: bool
    emulated: bool | None
    reason: str
    rate: int = 0


def detect() -> list[EngineInfo]:
    """Probe every engine; never raises for one that is missing."""
    return [probe_kvm(), probe_soft()]


def probe_kvm() -> EngineInfo:
    """Run a counted loop on KVM and tell native from emulating by its speed."""
    try:
        seconds = _timed_loop()
    except VmgraftError as error:
        return EngineInfo("kvm", usable=False, emulated=None, reason=str(error))
    rate = int(2 * PROBE_ITERATIONS / max(seconds, 1e-9))
    if rate < NATIVE_RATE:
        reason = f"works, but emulates guest code ({rate / 1e6:.1f} million instructions a second)"
        return EngineInfo("kvm", usable=True, emulated=True, reason=reason, rate=rate)
    return EngineInfo("kvm", usable=True, emulated=False, reason="works, native speed", rate=rate)


def _timed_loop() -> float:
    memory = mmap.mmap(-1, 0x10000)
    try:
        memory[_PROBE_AT : _PROBE_AT + len(_PROBE_CODE)] = _PROBE_CODE
        with Kvm() as kvm, kvm.create_vm() as vm:
            vm.place_helpers(0xFFFBD000, 0xFFFBC000)
            vm.set_memory(0, 0, len(memory), addressof(c_char.from_buffer(memory)))
            with vm.create_vcpu() as vcpu:
                return _run_loop(vcpu)
    finally:
        memory.close()


def _run_loop(vcpu: Vcpu) -> float:
    sregs = vcpu.get_sregs()
    struct.pack_into("<QIH", sregs, 0, 0, 0xFFFF, 0)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(rip=_PROBE_AT, rsp=0x800, rflags=2)
    start = time.perf_counter()
    leave = vcpu.run()
    seconds = time.perf_counter() - start
    if isinstance(leave, HaltExit):
        return seconds
    detail = leave.detail if isinstance(leave, FailedExit) else f"unexpected {type(leave).__name__}"
    raise EngineUnavailableError(f"a test guest did not run: {detail}", file="/dev/kvm")


def probe_soft() -> EngineInfo:
    """Whether Unicorn can be imported."""
    from vmgraft.vmmhost.core.softcpu import INSTALL_HINT, load_unicorn

    try:
        engine, _names = load_unicorn()
    except EngineUnavailableError as error:
        return EngineInfo("soft", usable=False, emulated=None, reason=f"{error.message} ({INSTALL_HINT})")
    return EngineInfo("soft", usable=True, emulated=True, reason=f"Unicorn {engine.__version__}")


def _open_kvm(ram: GuestRam, info: EngineInfo | None = None) -> Cpu:
    from vmgraft.vmmhost.core.kvmcpu import KvmCpu, require_main_thread

    require_main_thread()
    info = info or probe_kvm()
    if not info.usable:
        raise EngineUnavailableError(info.reason, hint="choose --cpu soft")  # the reason names the device
    cpu = KvmCpu(ram)
    cpu.emulated, cpu.why = info.emulated, f"KVM {info.reason}"
    return cpu


def _open_soft(ram: GuestRam) -> Cpu:
    from vmgraft.vmmhost.core.softcpu import SoftCpu

    return SoftCpu(ram)


def open_cpu(engine: Engine, ram: GuestRam) -> Cpu:
    """Return a CPU; its ``why`` says why it is this one.

    ``AUTO`` takes KVM where it runs guest code natively; else the software CPU, which is many times faster than a KVM
    that emulates; and such a KVM where the software CPU is not installed.

    Raises:
        EngineUnavailableError: when the engine asked for, or every engine, does not work here.
    """
    if engine is Engine.KVM:
        return _open_kvm(ram)
    if engine is Engine.SOFT:
        return _asked_for(_open_soft(ram))
    return _open_best(ram)


def _asked_for(cpu: Cpu) -> Cpu:
    cpu.why = "asked for"
    return cpu


def _open_best(ram: GuestRam) -> Cpu:
    info, refusals = probe_kvm(), []
    attempts: tuple[Callable[[], Cpu], ...] = (lambda: _open_kvm(ram, info), lambda: _open_soft(ram))
    if info.emulated:
        attempts = attempts[::-1]
    for attempt in attempts:
        try:
            cpu = attempt()
        except EngineUnavailableError as error:
            refusals.append(error)
            continue
        if cpu.engine == "soft":
            cpu.why = f"KVM {info.reason}" if info.usable and not refusals else f"no KVM: {refusals[0]}"
        return cpu
    message = "; ".join(str(error) for error in refusals)
    raise EngineUnavailableError(f"no CPU engine works here: {message}", hint=refusals[-1].hint)
