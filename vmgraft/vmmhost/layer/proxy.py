"""One extension as the privileged core sees it: a device that always answers, whatever becomes of its worker."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from vmgraft.errors import ExtensionFaultError, VmgraftError
from vmgraft.vmmhost.core.services import ROOM, Answer, Service, problem
from vmgraft.vmmhost.layer.abi import MASK32, MASK64, MIN_TICK_NS, PASS, Event, Hook
from vmgraft.vmmhost.layer.faults import FaultKind, WorkerFaultError
from vmgraft.vmmhost.layer.irqlines import IrqLines
from vmgraft.vmmhost.layer.link import WorkerLink, printable
from vmgraft.vmmhost.layer.linkevents import LinkEvents
from vmgraft.vmmhost.layer.meter import Meter
from vmgraft.vmmhost.layer.protocol import Kind
from vmgraft.vmmhost.layer.readiness import Ready, check_isolation, start_fields
from vmgraft.vmmhost.layer.spec import ExtensionSpec, FaultAction
from vmgraft.vmmhost.layer.store import METRIC_NAMES, KvStore
from vmgraft.vmmhost.layer.surroundings import Surroundings
from vmgraft.vmmhost.layer.wasmcheck import check_bounds
from vmgraft.vmmhost.layer.zygote import Zygote

#: Calls that may come at once before `callsPerSecond` slows them down, as a share of a second.
_BURST_SECONDS: Final = 0.1
_LONGEST_DELAY: Final = 1.0
# Members of an enumeration take long to look up, measured against all else that an access costs here.
_PIO_READ, _CALL_PIO_READ = Hook.PIO_READ, Kind.CALL_PIO_READ
_PIO_WRITE, _CALL_PIO_WRITE = Hook.PIO_WRITE, Kind.CALL_PIO_WRITE
_MMIO_READ, _CALL_MMIO_READ = Hook.MMIO_READ, Kind.CALL_MMIO_READ
_MMIO_WRITE, _CALL_MMIO_WRITE = Hook.MMIO_WRITE, Kind.CALL_MMIO_WRITE


class State(StrEnum):
    """What an extension's device is doing, or was doing at the end of the run."""

    NEW = "new"
    RUNNING = "running"
    DETACHED = "detached"  #: gone by a forgiven fault
    STOPPED = "stopped"  #: gone by a fault that stopped the guest


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
        store: Keys and values to go on with; None for none.
    """

    def __init__(self, spec: ExtensionSpec, zygote: Zygote, around: Surroundings, store: KvStore | None = None) -> None:
        if spec.min_isolation < around.min_isolation:
            spec = replace(spec, min_isolation=around.min_isolation)
        self.spec, self._zygote, self._around = spec, zygote, around
        self.state = State.NEW
        self.ready: Ready | None = None
        self.counters, self.meter = Counters(), Meter()
        self._exports = frozenset[Hook]()
        self._link: WorkerLink | None = None
        #: Its place among those asked before one service.
        self.rank = 0
        self.store = KvStore() if store is None else store
        self.irqs = IrqLines()
        self._events = LinkEvents(
            self._log, spec.limits.log_bytes, on_irq=self.irqs.set, store=self.store,
            on_metrics_full=self._metrics_full, on_fuel=self.meter.burn,
        )  # fmt: skip
        self._metrics_over = False
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
        self._start_by = time.monotonic() + self._around.start_seconds
        try:
            check_bounds(self.spec.module, file=self.spec.id)
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
        """Return the counters: calls, refused writes, faults, restarts, delays and log lines; and what it reported."""
        count = self.counters
        return {
            "calls": count.calls,
            "refusedWrites": count.refused_writes,
            "faults": count.faults,
            "restarts": count.restarts,
            "delayedMs": round(count.delayed_seconds * 1000),
            "logLines": count.log_lines,
            "latencyMicroseconds": self.meter.microseconds(),
            "fuel": self.meter.fuel(),
            "metrics": dict(self._events.metrics.values),
        }

    @property
    def pid(self) -> int | None:
        """PID of the worker, or None when there is none."""
        return None if self._link is None or self.replayed else self._link.pid

    @property
    def replayed(self) -> bool:
        """Whether a recording answers in place of a worker."""
        return self._zygote.replayed

    def has(self, hook: Hook) -> bool:
        """Say whether there is a worker whose module has this export."""
        return self.state is State.RUNNING and hook in self._exports

    def _launch(self) -> None:
        around = self._around
        began, seconds = time.monotonic(), min(around.start_seconds, around.time_left())
        process = self._zygote.spawn(self.spec.limits.memory_mib, seconds)
        if around.cpu is not None:
            with contextlib.suppress(OSError):  # a processor that is not ours to use only costs time
                os.sched_setaffinity(process.pid, {around.cpu})
        self._events.tick_ns, self._events.stop_asked, self._next_tick = None, False, None
        link = self._link = WorkerLink(
            self.spec, process, self._zygote, around.memory, self._events, map_windows=around.map_windows
        )
        ready = link.start(self._seed(), seconds, around.compile_cpu_seconds)
        check_isolation(self.spec, ready)
        self.ready, self._exports = ready, frozenset(ready.hooks)
        spent = (time.monotonic() - began) * 1000
        self._record("extension-start", **start_fields(ready, link.pid, spent, replayed=self.replayed))
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

    # --- services ---

    def serve(self, service: Service, a0: int, a1: int, data: bytes) -> Answer | None:
        """Answer for a default service, or pass with None (core contract ``ServiceHandler``)."""
        reply = self.exchange(
            Hook.SERVICE, Kind.CALL_SERVICE, size=service, address=a0, value=a1, data=data, room=ROOM[service]
        )
        if reply is None or reply[0] == PASS:
            return None
        answer = Answer(*reply)
        wrong = problem(service, a0, answer)
        if wrong is None:
            return answer
        self.broke(wrong)
        return None

    def broke(self, detail: str) -> ExtensionFaultError:
        """Punish an answer out of its range, and return what to raise about it."""
        self._handle(WorkerFaultError(FaultKind.ANSWER, detail), starting=False)
        return ExtensionFaultError(detail, file=self.spec.id)

    # --- what the guest does ---

    def pio_read(self, port: int, size: int) -> int:
        """Answer a read of ``size`` bytes from an absolute port."""
        ones = (1 << 8 * size) - 1
        value = self._call(_PIO_READ, _CALL_PIO_READ, address=port, size=size)
        return ones if value is None else value & ones

    def pio_write(self, port: int, size: int, value: int) -> None:
        """Take a write to an absolute port."""
        self._write(self._call(_PIO_WRITE, _CALL_PIO_WRITE, address=port, size=size, value=value))

    def mmio_read(self, gpa: int, size: int) -> int:
        """Answer a read of ``size`` bytes at a guest-physical address."""
        ones = (1 << 8 * size) - 1
        value = self._call(_MMIO_READ, _CALL_MMIO_READ, address=gpa, size=size)
        return ones if value is None else value & ones

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """Take a write to a guest-physical address."""
        self._write(self._call(_MMIO_WRITE, _CALL_MMIO_WRITE, address=gpa, size=size, value=value))

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
        link = self._admit(hook)
        if link is None:
            return None
        began = time.monotonic_ns()
        try:
            result = link.call(kind, self._around.clock(), address=address, size=size, value=value, args=args)
        except BaseException as error:
            if not self._forgives(error):
                raise
            return None
        self.meter.add(time.monotonic_ns() - began)
        events = self._events
        if events.tick_ns is not None or events.stop_asked:
            self._after_call()
        return result

    def exchange(
        self, hook: Hook, kind: Kind, *, address: int = 0, size: int = 0, value: int = 0, data: bytes = b"",
        room: int = 0,
    ) -> tuple[int, bytes] | None:  # fmt: skip
        """Make a call that carries data; None where nobody answers (`WorkerLink.exchange`)."""
        link = self._admit(hook)
        if link is None:
            return None
        now, began = self._around.clock(), time.monotonic_ns()
        try:
            result = link.exchange(kind, now, address=address, size=size, value=value, data=data, room=room)
        except BaseException as error:
            if not self._forgives(error):
                raise
            return None
        self.meter.add(time.monotonic_ns() - began)
        self._after_call()
        return result

    def _forgives(self, error: BaseException) -> bool:
        """Deal with what came in place of an answer; False for what is no fault of the worker's and goes on up."""
        if isinstance(error, WorkerFaultError):
            self._handle(error, starting=False)
            return True
        # Interrupted between question and answer: the two sides no longer agree on whose turn it is.
        self._drop_worker()
        self.state = State.DETACHED
        return False

    def _admit(self, hook: Hook) -> WorkerLink | None:
        """Return who is to be called, in its time, and count it; None where nobody answers."""
        link = self._link
        if link is None or hook not in self._exports:
            return None
        now, due = time.monotonic(), self._next_call
        if due <= now:
            self._next_call = now + self._interval
        else:
            self._throttle(now, due)
        self.counters.calls += 1
        return link

    def _throttle(self, now: float, due: float) -> None:
        """Delay a call that comes before its time: a device under load is slow, it does not lose accesses."""
        self._next_call, early = due + self._interval, due - now
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

    def _metrics_full(self) -> None:
        if not self._metrics_over:
            self._metrics_over = True
            self._record("quota", quota="metrics", limit=METRIC_NAMES, action="drop")

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
        self._exports, self._next_tick = frozenset(), None
        self.irqs.drop()
        if link is not None and not link.kill():
            self._record("fault", kind=FaultKind.DEADLINE.value, detail="the worker outlives SIGKILL", action="leave")

    def _record(self, event: str, **fields: Any) -> None:
        self._around.audit(event, {"id": self.spec.id, "version": self.spec.version, **fields})
