"""What the extensions of one machine share, as their proxies see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vmgraft.vmmhost.core.contract import GuestMemory

Audit = Callable[[str, dict[str, Any]], None]


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
        min_isolation: Least level of every worker, whatever its own policy demands.
        map_windows: Whether workers may map windows of whole pages; a run that is recorded copies by messages.
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
    min_isolation: int = 0
    map_windows: bool = True
