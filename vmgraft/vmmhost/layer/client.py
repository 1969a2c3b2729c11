"""All extensions of one machine, from the host's side: start them, plug them into the bus, tick them, end them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self

from vmgraft.errors import UsageError
from vmgraft.vmmhost.core.contract import GuestMemory, HypercallHandler, MmioHandler, PioHandler
from vmgraft.vmmhost.layer.abi import Event
from vmgraft.vmmhost.layer.proxy import Audit, ExtensionProxy, MmioView, PioView, Surroundings
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.layer.zygote import Zygote


class ClaimBus(Protocol):
    """The part of the core's bus that claims go to."""

    def claim_pio(self, first: int, last: int, handler: PioHandler, owner: str) -> None: ...  # noqa: D102
    def claim_mmio(self, base: int, size: int, handler: MmioHandler, owner: str) -> None: ...  # noqa: D102
    def claim_hypercall(self, first: int, last: int, handler: HypercallHandler, owner: str) -> None: ...  # noqa: D102


class ExtensionHost:
    """Runs the extensions of one machine, each in a worker of its own; a context manager.

    Args:
        specs: The extensions, verified and cut down to what the policy grants.
        memory: Guest RAM; reached only through the specs' windows.
        audit: Takes (event, fields) for the audit log: ``extension-start``, ``extension-refused``, ``fault``,
            ``quota``, ``log``, ``stop-request``, ``extension-end``.
        stop: Asks the machine to stop after a fault or a module's request, with the reason.
        clock: Virtual nanoseconds since boot.
        deterministic_seed: Makes ``random`` repeatable, for tests and recordings; None for real randomness.
        zygote: One that was started earlier; it stays the caller's to close. None to start one here.
        start_seconds: Wall-clock limit for one worker to get ready.
        compile_cpu_seconds: CPU limit for compiling one module.
        time_left: Wall-clock seconds until the guest is stopped anyway; no worker is waited for beyond.
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
    ) -> None:
        ids = [spec.id for spec in specs]
        for name in ids:
            if ids.count(name) > 1:
                raise UsageError(f"extension {name} is there twice", field="id")
        self._specs = tuple(specs)
        self._around = Surroundings(
            memory, audit, stop, clock, deterministic_seed, start_seconds, compile_cpu_seconds, time_left, cpu
        )
        self._zygote = zygote
        self._own_zygote: Zygote | None = None
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
            zygote = self._zygote
            if zygote is None:
                zygote = self._own_zygote = Zygote.start()
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
        for proxy in self.proxies:
            spec = proxy.spec
            for ports in spec.pio:
                bus.claim_pio(ports.first, ports.last, PioView(proxy, ports.first), spec.id)
            for area in spec.mmio:
                bus.claim_mmio(area.base, area.size, MmioView(proxy, area.base), spec.id)
            for numbers in spec.hypercalls:
                bus.claim_hypercall(numbers.first, numbers.last, proxy, spec.id)

    def tick(self, now: int) -> None:
        """Pass on the core's tick; ``now`` in virtual nanoseconds (core contract ``TickHandler``)."""
        for proxy in self.proxies:
            proxy.tick(now)

    def event(self, event: Event) -> None:
        """Tell every extension what happens to the machine."""
        for proxy in self.proxies:
            proxy.event(event)

    def summary(self) -> list[dict[str, Any]]:
        """Return one object per extension: id, version, state, isolation, mechanisms and counters."""
        return [
            {
                "id": proxy.spec.id,
                "version": proxy.spec.version,
                "state": proxy.state.value,
                "isolation": None if proxy.ready is None else proxy.ready.level,
                "mechanisms": [] if proxy.ready is None else proxy.ready.mechanisms.names(),
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
