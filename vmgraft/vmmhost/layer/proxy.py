"""One extension as the privileged core sees it: a device that always answers, whatever becomes of its worker."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from vmgraft.errors import ExtensionFaultError, VmgraftError
from vmgraft.vmmhost.core.contract import GuestMemory
from vmgraft.vmmhost.layer.abi import MASK32, MASK64, MIN_TICK_NS, Event, Hook
from vmgraft.vmmhost.layer.faults import FaultKind, WorkerFaultError
from vmgraft.vmmhost.layer.link import LinkEvents, Ready, WorkerLink, check_isolation, printable
from vmgraft.vmmhost.layer.protocol import Kind
from vmgraft.vmmhost.layer.spec import ExtensionSpec, FaultAction
from vmgraft.vmmhost.layer.wasmcheck import check_bounds
from vmgraft.vmmhost.layer.zygote import Zygote

#: Calls that may come at once before `callsPerSecond` slows them down, as a share of a second.
_BURST_SECONDS: Final = 0.1
_LONGEST_DELAY: Final = 1.0

Audit = Callable[[str, dict[str, Any]], None]


class State(StrEnum):
    """What an extension's device is doing, or was doing at the end of the run."""

    NEW = "new"
    RUNNING = "running"
    DETACHED = "detached"  #: gone by a forgiven fault
    STOPPED = "stopped"  #: gone by a fault that stopped the guest


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every extension of a machine shares.

    Attributes:
        memory: Guest RAM.
        audit: Takes (event, fields) for the audit log.
        stop: Asks the machine to stop, with a reason.
        clock: Virtual nanoseconds since boot.
        seed: None for real randomness; bytes for runs that can be repeated.
        start_seconds: Wall-clock time for a worker to get ready.
        compile_cpu_seconds: CPU time of it that compiling may use.
        time_left: Wall-clock seconds until the machine is stopped anyway.
        cpu: Processor to keep the workers on, or None. On the vCPU thread's own a call takes a third of the time.
    """

    memory: GuestMemory
    audit: Audit
    stop: Callable[[str], None]
    clock: Callable[[], int]
    seed: bytes | None = None
    start_seconds: float = 15.0
    compile_cpu_seconds: int = 10
    time_left: Callable[[], float] = lambda: math.inf
    cpu: int | None = None


@dataclass(slots=True)
class Counters:
    """What happened during a run, for the summary."""

    calls: int = 0
    refused_writes: int = 0
    faults: int = 0
    restarts: int = 0
    delayed_seconds: float = field(default=0.0)
    log_lines: int = 0


class ExtensionProxy:
    """Stands between the core's bus and one worker. Every method answers; a broken extension reads as all ones.

    Args:
        spec: The extension.
        zygote: Where workers come from.
        around: Guest memory, audit log, stop switch and clock.
    """

    def __init__(self, spec: ExtensionSpec, zygote: Zygote, around: Surroundings) -> None:
        self.spec, self._zygote, self._around = spec, zygote, around
        self.state = State.NEW
        self.ready: Ready | None = None
        self.counters = Counters()
        self._hooks = Hook(0)
        self._link: WorkerLink | None = None
        self._events = LinkEvents(self._log, spec.limits.log_bytes)
        self._interval = 1.0 / spec.limits.calls_per_second
        self._next_call = 0.0
        self._next_tick: int | None = None
        self._stop_asked = self._closed = False
        self._start_by = math.inf

    # --- life ---

    def start(self) -> None:
        """Start the worker and call ``on_start``.

        Raises:
            GraftFormatError: the module is malformed or breaks the ABI.
            CapabilityError: the module imports what is not granted.
            HostError: no worker can be started, or its isolation is below what the policy demands.
            ExtensionFaultError: the extension failed at the start and ``on_fault`` does not forgive it.
        """
        check_bounds(self.spec.module, file=self.spec.id)
        self._start_by = time.monotonic() + self._around.start_seconds
        try:
            self._launch()
        except WorkerFaultError as fault:
            self._handle(fault, starting=True)
        except BaseException as error:
            self._drop_worker()
            self.state = State.STOPPED
            self._record("extension-refused", detail=str(error))
            raise
        finally:
            self._start_by = math.inf

    def close(self) -> None:
        """Kill the worker and write the summary; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._drop_worker()
        if self.state is not State.NEW:
            self._record("extension-end", state=self.state.value, **self.summary())

    def summary(self) -> dict[str, Any]:
        """Return the counters: calls, refused writes, faults, restarts, delays and log lines."""
        count = self.counters
        return {
            "calls": count.calls,
            "refusedWrites": count.refused_writes,
            "faults": count.faults,
            "restarts": count.restarts,
            "delayedMs": round(count.delayed_seconds * 1000),
            "logLines": count.log_lines,
        }

    @property
    def pid(self) -> int | None:
        """PID of the worker, or None when there is none."""
        return None if self._link is None else self._link.pid

    def _launch(self) -> None:
        around = self._around
        began, seconds = time.monotonic(), min(around.start_seconds, around.time_left())
        process = self._zygote.spawn(self.spec.limits.memory_mib, seconds)
        if around.cpu is not None:
            with contextlib.suppress(OSError):  # a processor that is not ours to use only costs time
                os.sched_setaffinity(process.pid, {around.cpu})
        self._events.tick_ns, self._events.stop_asked, self._next_tick = None, False, None
        link = self._link = WorkerLink(self.spec, process, self._zygote, around.memory, self._events)
        ready = link.start(self._seed(), seconds, around.compile_cpu_seconds)
        check_isolation(self.spec, ready)
        self.ready, self._hooks = ready, ready.hooks
        self._record(
            "extension-start", pid=link.pid, isolation=ready.level, mechanisms=ready.mechanisms.names(),
            hooks=[hook.name.lower() for hook in Hook if hook in ready.hooks and hook.name],
            fastCalls=ready.fast, startMs=round((time.monotonic() - began) * 1000, 1),
        )  # fmt: skip
        self.state = State.RUNNING
        if Hook.START in ready.hooks:
            status = link.call(Kind.CALL_START, around.clock(), value=len(self.spec.config))
            if status & MASK32:
                raise WorkerFaultError(FaultKind.START, f"on_start returned {status & MASK32}")
            self._after_call()

    def _seed(self) -> bytes:
        if self._around.seed is None:
            return secrets.token_bytes(32)
        identity = f"{self.spec.id} {self.counters.restarts}".encode()
        return hashlib.sha256(b"vmgraft worker seed\0" + self._around.seed + b"\0" + identity).digest()

    # --- what the guest does ---

    def pio_read(self, port: int, size: int) -> int:
        """Answer a read of ``size`` bytes from an absolute port."""
        ones = (1 << 8 * size) - 1
        value = self._call(Hook.PIO_READ, Kind.CALL_PIO_READ, address=port, size=size)
        return ones if value is None else value & ones

    def pio_write(self, port: int, size: int, value: int) -> None:
        """Take a write to an absolute port."""
        self._write(self._call(Hook.PIO_WRITE, Kind.CALL_PIO_WRITE, address=port, size=size, value=value))

    def mmio_read(self, gpa: int, size: int) -> int:
        """Answer a read of ``size`` bytes at a guest-physical address."""
        ones = (1 << 8 * size) - 1
        value = self._call(Hook.MMIO_READ, Kind.CALL_MMIO_READ, address=gpa, size=size)
        return ones if value is None else value & ones

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """Take a write to a guest-physical address."""
        self._write(self._call(Hook.MMIO_WRITE, Kind.CALL_MMIO_WRITE, address=gpa, size=size, value=value))

    def hypercall(self, number: int, args: tuple[int, int, int, int]) -> int:
        """Answer a hypercall; all ones where nobody does."""
        value = self._call(Hook.HYPERCALL, Kind.CALL_HYPERCALL, address=number, args=args)
        return MASK64 if value is None else value

    def tick(self, now: int) -> None:
        """Call ``on_tick`` if the module asked for it and its time has come; ``now`` in virtual nanoseconds."""
        if self._next_tick is None or now < self._next_tick:
            return
        self._next_tick = now + max(self._events.tick_ns or MIN_TICK_NS, MIN_TICK_NS)
        self._call(Hook.TICK, Kind.CALL_TICK, value=now)

    def event(self, event: Event) -> None:
        """Tell the module what happens to the machine."""
        self._call(Hook.EVENT, Kind.CALL_EVENT, value=event)

    def _write(self, status: int | None) -> None:
        if status:
            self.counters.refused_writes += 1

    def _call(
        self, hook: Hook, kind: Kind, *, address: int = 0, size: int = 0, value: int = 0,
        args: tuple[int, int, int, int] = (0, 0, 0, 0),
    ) -> int | None:  # fmt: skip
        link = self._link
        if link is None or self.state is not State.RUNNING or hook not in self._hooks:
            return None
        self._throttle()
        self.counters.calls += 1
        try:
            result = link.call(kind, self._around.clock(), address=address, size=size, value=value, args=args)
        except WorkerFaultError as fault:
            self._handle(fault, starting=False)
            return None
        except BaseException:
            # Interrupted between question and answer: the two sides no longer agree on whose turn it is.
            self._drop_worker()
            self.state = State.DETACHED
            raise
        self._after_call()
        return result

    def _throttle(self) -> None:
        """Delay a call that comes before its time: a device under load is slow, it does not lose accesses."""
        now = time.monotonic()
        early = self._next_call - now
        self._next_call = max(self._next_call, now) + self._interval
        if early > _BURST_SECONDS:
            if not self.counters.delayed_seconds:
                self._record("quota", quota="callsPerSecond", limit=self.spec.limits.calls_per_second, action="delay")
            delay = min(early - _BURST_SECONDS, _LONGEST_DELAY)
            self.counters.delayed_seconds += delay
            time.sleep(delay)

    def _after_call(self) -> None:
        events = self._events
        if events.tick_ns is not None:
            if events.tick_ns == 0:
                self._next_tick = None
            elif self._next_tick is None:
                self._next_tick = self._around.clock() + max(events.tick_ns, MIN_TICK_NS)
        if events.stop_asked:
            events.stop_asked = False
            if not self._stop_asked:  # one record, however often a module asks
                self._stop_asked = True
                self._record("stop-request")
            self._around.stop(f"extension {self.spec.id} asked to stop the guest")

    def _log(self, line: bytes, over: bool) -> None:
        self.counters.log_lines += 1
        self._record("log", text=printable(line))
        if over:
            self._record("quota", quota="logBytes", limit=self.spec.limits.log_bytes, action="drop")

    # --- faults ---

    def _handle(self, fault: WorkerFaultError, *, starting: bool) -> None:
        while True:
            pid = self.pid
            self._drop_worker()
            self.counters.faults += 1
            action = self._action()
            self._record("fault", kind=fault.kind.value, detail=fault.message, action=action.value, pid=pid)
            if action is FaultAction.DETACH:
                self.state = State.DETACHED
                return
            if action is FaultAction.STOP:
                self.state = State.STOPPED
                self._stop(fault, starting=starting)
                return
            self.counters.restarts += 1
            try:
                self._launch()
            except WorkerFaultError as again:
                fault = again
            except VmgraftError as error:
                if starting:
                    raise
                fault = WorkerFaultError(FaultKind.START, error.message)  # the core's loop is no place for it
            else:
                return

    def _action(self) -> FaultAction:
        wish = self.spec.fault
        if wish.action is not FaultAction.RESTART:
            return wish.action
        late = self._around.time_left() <= 0 or time.monotonic() >= self._start_by
        return FaultAction.STOP if late or self.counters.restarts >= wish.restarts else FaultAction.RESTART

    def _stop(self, fault: WorkerFaultError, *, starting: bool) -> None:
        detail = f"extension {self.spec.id}: {fault.kind.value}: {fault.message}"
        if starting:
            raise ExtensionFaultError(
                detail, file=self.spec.id, hint="the audit log has the record; on_fault is " + self.spec.on_fault
            ) from fault
        self._around.stop(detail)

    def _drop_worker(self) -> None:
        link, self._link = self._link, None
        self._hooks, self._next_tick = Hook(0), None
        if link is not None and not link.kill():
            self._record("fault", kind=FaultKind.DEADLINE.value, detail="the worker outlives SIGKILL", action="leave")

    def _record(self, event: str, **fields: Any) -> None:
        self._around.audit(event, {"id": self.spec.id, "version": self.spec.version, **fields})


@dataclass(frozen=True, slots=True)
class PioView:
    """One claimed port range of an extension, seen by offsets (core contract ``PioHandler``)."""

    proxy: ExtensionProxy
    first: int

    def pio_read(self, offset: int, size: int) -> int:
        """Answer a read."""
        return self.proxy.pio_read(self.first + offset, size)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        """Take a write."""
        self.proxy.pio_write(self.first + offset, size, value)


@dataclass(frozen=True, slots=True)
class MmioView:
    """One claimed address range of an extension, seen by offsets (core contract ``MmioHandler``)."""

    proxy: ExtensionProxy
    base: int

    def mmio_read(self, offset: int, size: int) -> int:
        """Answer a read."""
        return self.proxy.mmio_read(self.base + offset, size)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """Take a write."""
        self.proxy.mmio_write(self.base + offset, size, value)
