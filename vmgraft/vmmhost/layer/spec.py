"""What the layer is told about an extension: plain data, checked when it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from vmgraft.errors import UsageError
from vmgraft.vmmhost.core.services import SERVICES
from vmgraft.vmmhost.layer.virtioshape import BLOCK_BYTES, VirtioShape

MIB = 1 << 20
MAX_CONFIG_BYTES = 4096  #: schema ``manifest``, ``config``
MAX_RANGES = 64  #: schema ``manifest``, ``capabilities``
MAX_WINDOW_BYTES = 1 << 40
_ON_FAULT = re.compile(r"(?:(stop)|(detach)|restart\(([1-9][0-9]?)\))")


class FaultAction(StrEnum):
    """What the host does once an extension has broken a rule."""

    STOP = "stop"  #: the guest is stopped
    DETACH = "detach"  #: the guest goes on as if the device were unplugged
    RESTART = "restart"  #: a fresh worker takes over, a limited number of times; then STOP


@dataclass(frozen=True, slots=True)
class OnFault:
    """A parsed ``onFault``; ``restarts`` is 0 unless the action is RESTART."""

    action: FaultAction
    restarts: int = 0

    @classmethod
    def parse(cls, text: str) -> OnFault:
        """Parse ``stop``, ``detach`` or ``restart(n)`` with n from 1 to 99.

        Raises:
            UsageError: the text is none of these.
        """
        match = _ON_FAULT.fullmatch(text)
        if match is None:
            raise UsageError(f"unknown fault action {text!r}", field="onFault", hint="use stop, detach or restart(n)")
        if match[1]:
            return cls(FaultAction.STOP)
        return cls(FaultAction.DETACH) if match[2] else cls(FaultAction.RESTART, int(match[3]))


@dataclass(frozen=True, slots=True)
class LayerLimits:
    """Quotas of one extension.

    Attributes:
        memory_mib: Linear memory of the module, MiB (1 to 256).
        fuel_per_call: wasmtime fuel units, about one per WebAssembly instruction.
        call_ms: Wall-clock milliseconds a single call may take before the worker is killed.
        calls_per_second: Guest accesses beyond this rate are delayed.
        log_bytes: Bytes of log text over the whole run; what goes beyond is dropped.
    """

    memory_mib: int = 16
    fuel_per_call: int = 5_000_000
    call_ms: int = 1000
    calls_per_second: int = 100_000
    log_bytes: int = 65536

    def __post_init__(self) -> None:
        _between("memoryMiB", self.memory_mib, 1, 256)
        _between("fuelPerCall", self.fuel_per_call, 1000, 1_000_000_000)
        _between("callMs", self.call_ms, 1, 10_000)
        _between("callsPerSecond", self.calls_per_second, 1, 1_000_000)
        _between("logBytes", self.log_bytes, 0, MIB)


@dataclass(frozen=True, slots=True)
class PioRange:
    """I/O ports ``first`` to ``last``, both included."""

    first: int
    last: int

    def __post_init__(self) -> None:
        _between("pio", self.first, 0, 0xFFFF)
        _between("pio", self.last, self.first, 0xFFFF)


@dataclass(frozen=True, slots=True)
class MmioRange:
    """``size`` bytes of guest-physical addresses from ``base``."""

    base: int
    size: int

    def __post_init__(self) -> None:
        _between("mmio", self.size, 1, 1 << 40)
        _between("mmio", self.base, 0, (1 << 52) - self.size)


@dataclass(frozen=True, slots=True)
class HypercallRange:
    """Hypercall numbers ``first`` to ``last``, both included; number 0 is the host's discovery leaf."""

    first: int
    last: int

    def __post_init__(self) -> None:
        _between("hypercall", self.first, 1, 0xFFFFFFFF)
        _between("hypercall", self.last, self.first, 0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class GuestWindow:
    """Guest RAM that the extension may read, and write where ``writable``: ``size`` bytes from ``gpa``."""

    gpa: int
    size: int
    writable: bool = False

    def __post_init__(self) -> None:
        _between("guest", self.size, 1, MAX_WINDOW_BYTES)
        _between("guest", self.gpa, 0, (1 << 52) - self.size)

    def covers(self, gpa: int, length: int) -> bool:
        """Say whether ``length`` bytes from ``gpa`` lie wholly inside."""
        return self.gpa <= gpa and gpa + length <= self.gpa + self.size


@dataclass(frozen=True, slots=True)
class ServiceUse:
    """A default service that the extension takes over, or with ``chain`` is asked before; see ``core.services``."""

    name: str
    chain: bool = False

    def __post_init__(self) -> None:
        if self.name not in SERVICES:
            raise UsageError(f"{self.name!r} is no service", field="service", hint=f"there are {', '.join(SERVICES)}")


@dataclass(frozen=True, slots=True)
class ExtensionSpec:
    """One extension as it may run: verified module, effective (declared and granted) claims, limits.

    Attributes:
        config: UTF-8 text from the manifest, at most 4096 bytes.
        on_fault: ``stop``, ``detach`` or ``restart(n)``.
        log, now, random, tick, stop, kv, metric: The capabilities of these names.
        irqs: ISA interrupt lines it may drive.
        services: Default services it serves, each name at most once.
        virtio: The virtio device that it is, inside its own claims; None for none.
        min_isolation: Refuse to start below this level (docs/sandbox.md).

    Raises:
        UsageError: a value is out of its documented bounds.
    """

    id: str
    version: str
    module: bytes
    config: bytes = b""
    limits: LayerLimits = field(default_factory=LayerLimits)
    on_fault: str = "stop"
    pio: tuple[PioRange, ...] = ()
    mmio: tuple[MmioRange, ...] = ()
    hypercalls: tuple[HypercallRange, ...] = ()
    windows: tuple[GuestWindow, ...] = ()
    log: bool = False
    now: bool = False
    random: bool = False
    tick: bool = False
    stop: bool = False
    min_isolation: int = 0
    kv: bool = False
    metric: bool = False
    irqs: tuple[int, ...] = ()
    services: tuple[ServiceUse, ...] = ()
    virtio: VirtioShape | None = None

    def __post_init__(self) -> None:
        _between("id", len(self.id.encode()), 1, 128)
        _between("config", len(self.config), 0, MAX_CONFIG_BYTES)
        claims = (self.pio, self.mmio, self.hypercalls, self.windows, self.irqs, self.services)
        _between("capabilities", sum(map(len, claims)), 0, MAX_RANGES)
        for line in self.irqs:
            _between("irq", line, 0, 15)
        names = [use.name for use in self.services]
        if len(set(names)) < len(names):
            raise UsageError("one service is there twice", field="service")
        _between("isolation", self.min_isolation, 0, 3)
        OnFault.parse(self.on_fault)
        if self.virtio is not None:
            self._check_virtio(self.virtio)

    def _check_virtio(self, shape: VirtioShape) -> None:
        """Hold a virtio device against what the extension may have."""
        problem = shape.problem()
        first, end = shape.base, shape.base + BLOCK_BYTES
        if problem is None and not any(area.base <= first and end <= area.base + area.size for area in self.mmio):
            problem = f"the registers at {first:#x} are not inside a granted MMIO range of {BLOCK_BYTES} bytes"
        if problem is None and shape.irq not in self.irqs:
            problem = f"interrupt line {shape.irq} is not granted"
        if problem is None and not any(window.writable for window in self.windows):
            problem = "there is no writable window of guest memory for its queues"
        if problem is not None:
            raise UsageError(f"virtio: {problem}", file=self.id, field="virtio")

    @property
    def fault(self) -> OnFault:
        """The parsed fault action."""
        return OnFault.parse(self.on_fault)


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{value} is not between {low} and {high}", field=name)
