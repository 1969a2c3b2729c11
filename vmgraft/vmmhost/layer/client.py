"""All extensions of one machine, from the host's side: start them, plug them into the bus, tick them, end them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

from vmgraft.errors import ExtensionFaultError, UsageError
from vmgraft.vmmhost.core.contract import GuestMemory, HypercallHandler, MmioHandler, PioHandler
from vmgraft.vmmhost.core.services import Service, ServiceHandler
from vmgraft.vmmhost.layer.abi import Event, Hook
from vmgraft.vmmhost.layer.candidate import Candidate
from vmgraft.vmmhost.layer.grants import windows_of
from vmgraft.vmmhost.layer.proxy import ExtensionProxy, State
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.layer.states import ExtensionState, restore, save, snapshot
from vmgraft.vmmhost.layer.states import load as load_state
from vmgraft.vmmhost.layer.store import KvStore
from vmgraft.vmmhost.layer.surroundings import Audit, Surroundings
from vmgraft.vmmhost.layer.views import MmioView, PioView
from vmgraft.vmmhost.layer.windows import keep_shared
from vmgraft.vmmhost.layer.zygote import Zygote


class ClaimBus(Protocol):
    """The part of the core's bus that claims go to."""

    def claim_pio(self, first: int, last: int, handler: PioHandler, owner: str) -> None: ...  # noqa: D102
    def claim_mmio(self, base: int, size: int, handler: MmioHandler, owner: str) -> None: ...  # noqa: D102
    def claim_hypercall(self, first: int, last: int, handler: HypercallHandler, owner: str) -> None: ...  # noqa: D102
    def claim_service(  # noqa: D102
        self, service: Service, handler: ServiceHandler, owner: str, *, chain: bool = False, rank: int = 0
    ) -> None: ...
    def claim_irq(self, line: int, owner: str) -> Callable[[bool], None]: ...  # noqa: D102
    def describe(self, owner: str, text: str) -> None: ...  # noqa: D102
    def release(self, owner: str) -> Callable[[], None]: ...  # noqa: D102


class ExtensionHost:
    """Runs the extensions of one machine, each in a worker of its own; a context manager.

    Args:
        specs: The extensions, verified and cut down to what the policy grants.
        memory: Guest RAM; reached only through the specs' windows.
        audit: Takes (event, fields) for the audit log: ``extension-start``, ``extension-refused``, ``fault``,
            ``quota``, ``log``, ``stop-request``, ``extension-change``, ``extension-end``.
        stop: Asks the machine to stop after a fault or a module's request, with the reason.
        clock: Virtual nanoseconds since boot.
        deterministic_seed: Makes ``random`` repeatable, for tests and recordings; None for real randomness.
        zygote: One that was started earlier; it stays the caller's to close. None to start one here.
        start_seconds: Wall-clock limit for one worker to get ready.
        compile_cpu_seconds: CPU limit for compiling one module.
        time_left: Wall-clock seconds until the guest is stopped anyway; no worker is waited for beyond.
        min_isolation: Least isolation level of every worker; a spec may demand more.
        map_windows: Whether workers may map their windows of whole pages; else every copy is a message.
        cpu: Processor to keep the workers on; pays off when it is the one that the vCPU's thread is kept on.

    Raises:
        UsageError: two extensions have one id.
    """

    def __init__(
        self,
        specs: Sequence[ExtensionSpec],
        *,
        memory: GuestMemory,
        audit: Audit,
        stop: Callable[[str], None],
        clock: Callable[[], int],
        deterministic_seed: bytes | None = None,
        zygote: Zygote | None = None,
        start_seconds: float = 15.0,
        compile_cpu_seconds: int = 10,
        time_left: Callable[[], float] = lambda: math.inf,
        cpu: int | None = None,
        min_isolation: int = 0,
        map_windows: bool = True,
    ) -> None:
        ids = [spec.id for spec in specs]
        for name in ids:
            if ids.count(name) > 1:
                raise UsageError(f"extension {name} is there twice", field="id")
        self._specs = tuple(specs)
        self._around = Surroundings(
            memory,
            audit,
            stop,
            clock,
            deterministic_seed,
            start_seconds,
            compile_cpu_seconds,
            time_left,
            cpu,
            min_isolation,
            map_windows,
        )
        self._zygote = zygote
        self._own_zygote: Zygote | None = None
        self._bus: ClaimBus | None = None
        self._last_rank = 0
        self.proxies: tuple[ExtensionProxy, ...] = ()

    def start(self) -> None:
        """Start every worker, in the order of the specs; when one is refused, all are ended.

        Raises:
            GraftFormatError: a module is malformed or breaks the ABI.
            CapabilityError: a module imports what is not granted.
            HostError: no worker can be started, or its isolation is too low.
            ExtensionFaultError: an extension failed at the start and its ``on_fault`` does not forgive it.
        """
        if not self._specs:
            return
        try:
            zygote = self._workers()
            self.proxies = tuple(ExtensionProxy(spec, zygote, self._around) for spec in self._specs)
            for proxy in self.proxies:
                proxy.start()
        except BaseException:
            self.close()
            raise

    def claim(self, bus: ClaimBus) -> None:
        """Register every granted range on the core's bus, owned by the extension's id.

        Raises:
            CapabilityError: from the bus, when a range overlaps a core device or another extension.
        """
        self._bus = bus
        for proxy in self.proxies:
            self._plug(bus, proxy)

    # --- changes of a running machine ---------------------------------------------------------------------------------

    def load(self, spec: ExtensionSpec, ready: Callable[[], None] = lambda: None) -> None:
        """Start one more extension and give it its claims.

        Args:
            spec: The extension.
            ready: Called once it is ready, before it gets a claim; what it raises ends the extension. Guest windows it
                has from its start on, so what forbids it should be asked before this call.

        Raises:
            UsageError: an extension of this id is there already, or there is no machine yet.
            VmgraftError: as `start` and `claim`, and from ``ready``; the set is as it was before then, and nothing that
                the extension did or asked for ends the guest.
        """
        bus = self._running_bus()
        if any(proxy.spec.id == spec.id for proxy in self.proxies):
            raise UsageError(f"extension {spec.id} is loaded already", field="id", hint="replace it")
        candidate = Candidate(self._around)
        proxy = ExtensionProxy(spec, self._workers(), candidate.around)
        try:
            _start_for_good(proxy)
            ready()
            self._plug(bus, proxy)
        except BaseException:
            proxy.close()
            bus.release(spec.id)
            self._tidy()
            raise
        self.proxies = (*self.proxies, proxy)
        self._note("load", spec)
        candidate.admit()

    def unload(self, extension_id: str) -> None:
        """End an extension: its claims are free, its interrupt lines down, its keys and values forgotten.

        Raises:
            UsageError: no such extension, or there is no machine yet.
        """
        bus, proxy = self._running_bus(), self._find(extension_id)
        proxy.irqs.disconnect()
        bus.release(extension_id)
        self.proxies = tuple(other for other in self.proxies if other is not proxy)
        proxy.close()
        self._tidy()
        self._note("unload", proxy.spec)

    def replace(self, spec: ExtensionSpec, ready: Callable[[], None] = lambda: None) -> None:
        """Put another extension in the place of the one of its id; the old one stays until the new one is ready.

        The new one gets the old one's keys and values, and its state where the old one has ``on_snapshot`` and the new
        one ``on_restore``. Between two accesses of the guest the claims change hands all at once.

        Args:
            spec: The new extension.
            ready: Called once it is ready, while the old one still has its claims; what it raises ends the new one.

        Raises:
            UsageError: no such extension, or there is no machine yet.
            VmgraftError: as `start`, `claim` and the saving of states, and from ``ready``; the old one is as it was
                before then.
        """
        bus, old = self._running_bus(), self._find(spec.id)
        state = snapshot(old)
        candidate = Candidate(self._around)
        new = ExtensionProxy(spec, self._workers(), candidate.around, KvStore(old.store.items()))
        try:
            _start_for_good(new)
            if state is not None and new.has(Hook.RESTORE):
                restore(new, state)
            ready()
            self._swap(bus, old, new)
        except BaseException:
            new.close()
            self._tidy()
            raise
        self.proxies = tuple(new if proxy is old else proxy for proxy in self.proxies)
        old.close()
        self._tidy()
        self._note("replace", spec)
        candidate.admit()

    def _swap(self, bus: ClaimBus, old: ExtensionProxy, new: ExtensionProxy) -> None:
        new.rank = old.rank
        drivers = old.irqs.disconnect()
        undo = bus.release(old.spec.id)
        try:
            self._plug(bus, new)
        except BaseException:
            bus.release(new.spec.id)
            undo()
            old.irqs.connect(drivers)
            raise

    def snapshot(self) -> tuple[ExtensionState, ...]:
        """Return the state of every extension that runs, for `restore`.

        Raises:
            ExtensionFaultError: one cannot be saved now, or broke a rule over it.
        """
        return tuple(save(proxy) for proxy in self.proxies if proxy.state is State.RUNNING)

    def restore(self, states: Sequence[ExtensionState]) -> None:
        """Make the extensions what they were when `snapshot` was called, on this machine or another.

        Raises:
            UsageError: a state is of an extension that is not there.
            PayloadMismatchError: a state is of another module.
            ExtensionFaultError: a module refuses its state, or broke a rule over it.
        """
        pairs = [(self._find(saved.id), saved) for saved in states]
        for proxy, saved in pairs:
            load_state(proxy, saved)

    def _find(self, extension_id: str) -> ExtensionProxy:
        for proxy in self.proxies:
            if proxy.spec.id == extension_id:
                return proxy
        names = ", ".join(proxy.spec.id for proxy in self.proxies) or "none"
        raise UsageError(f"no extension {extension_id[:128]!r} is loaded", field="id", hint=f"loaded: {names}")

    def _running_bus(self) -> ClaimBus:
        if self._bus is None:
            raise UsageError("extensions can be changed once the machine is built")
        return self._bus

    def _workers(self) -> Zygote:
        zygote = self._zygote or self._own_zygote
        if zygote is None:
            zygote = self._own_zygote = Zygote.start()
        return zygote

    def _plug(self, bus: ClaimBus, proxy: ExtensionProxy) -> None:
        """Make every claim of an extension; those asked before a service stand in the order in which they came."""
        spec = proxy.spec
        if not proxy.rank:
            self._last_rank += 1
            proxy.rank = self._last_rank
        for ports in spec.pio:
            bus.claim_pio(ports.first, ports.last, PioView(proxy, ports.first), spec.id)
        for area in spec.mmio:
            bus.claim_mmio(area.base, area.size, MmioView(proxy, area.base), spec.id)
        for numbers in spec.hypercalls:
            bus.claim_hypercall(numbers.first, numbers.last, proxy, spec.id)
        for use in spec.services:
            bus.claim_service(Service[use.name.upper()], proxy, spec.id, chain=use.chain, rank=proxy.rank)
        proxy.irqs.connect({line: bus.claim_irq(line, spec.id) for line in spec.irqs})
        bus.describe(spec.id, f"{spec.id} {spec.version}")

    def _tidy(self) -> None:
        """Close the files of windows that nobody has any more."""
        keep_shared(self._around.memory, [window for proxy in self.proxies for window in windows_of(proxy.spec)])

    def _note(self, action: str, spec: ExtensionSpec) -> None:
        self._around.audit("extension-change", {"id": spec.id, "version": spec.version, "action": action})

    # --- the machine's life -------------------------------------------------------------------------------------------

    def tick(self, now: int) -> None:
        """Pass on the core's tick; ``now`` in virtual nanoseconds (core contract ``TickHandler``)."""
        for proxy in self.proxies:
            proxy.tick(now)

    def event(self, event: Event) -> None:
        """Tell every extension what happens to the machine."""
        for proxy in self.proxies:
            proxy.event(event)

    def summary(self) -> list[dict[str, Any]]:
        """Return one object per extension: id, version, state, isolation, mechanisms and counters.

        No isolation is claimed where no worker ran; ``replayed`` says that a recording answered.
        """
        return [
            {
                "id": proxy.spec.id,
                "version": proxy.spec.version,
                "state": proxy.state.value,
                "replayed": proxy.replayed,
                "isolation": None if proxy.ready is None or proxy.replayed else proxy.ready.level,
                "mechanisms": [] if proxy.ready is None or proxy.replayed else proxy.ready.mechanisms.names(),
                **proxy.summary(),
            }
            for proxy in self.proxies
        ]

    def close(self) -> None:
        """Kill and reap every worker, and the zygote if it was started here; may be called twice."""
        for proxy in self.proxies:
            proxy.close()
        if self._own_zygote is not None:
            self._own_zygote.close()
            self._own_zygote = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _start_for_good(proxy: ExtensionProxy) -> None:
    """Start a worker on a running machine, where what ``on_fault`` forgives is no start either."""
    proxy.start()
    if proxy.state is not State.RUNNING:
        message = f"extension {proxy.spec.id} did not start"
        raise ExtensionFaultError(message, file=proxy.spec.id, hint="the audit log has the record")
