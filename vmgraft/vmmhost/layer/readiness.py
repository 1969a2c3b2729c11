"""What is known of a worker once it is ready, and whether that is enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from vmgraft.errors import HostError
from vmgraft.vmmhost.layer.abi import Hook
from vmgraft.vmmhost.layer.filters import worker_filter
from vmgraft.vmmhost.layer.protocol import Frame
from vmgraft.vmmhost.layer.sandbox import Mechanism, level_of
from vmgraft.vmmhost.layer.sight import NO_VIEW, NOTHING, Sight, View, believed
from vmgraft.vmmhost.layer.spec import ExtensionSpec

_READY_FAST_BIT: Final = 1 << 63
_READY_MECHANISMS_SHIFT: Final = 16


@dataclass(frozen=True, slots=True)
class Ready:
    """What is known of a worker once its module is loaded and its last rights are gone.

    Attributes:
        mechanisms: What confines it, as far as that is believed; ``level`` follows from it.
        views: What of it was looked at from outside.
        unseen: What it says too, but nobody saw.
    """

    level: int
    mechanisms: Mechanism
    hooks: Hook
    fast: bool
    views: View = NO_VIEW
    unseen: Mechanism = NOTHING


def ready_from(reply: Frame, early: Mechanism, namespaces: Mechanism, sight: Sight) -> Ready:
    """Return what is known: what the worker says in its READY packet, held against what was said and seen.

    Raises:
        WorkerFaultError: ISOLATION: it lies.
    """
    told = Mechanism((reply.value & ~_READY_FAST_BIT) >> _READY_MECHANISMS_SHIFT)
    hooks = Hook(reply.value & ((1 << _READY_MECHANISMS_SHIFT) - 1))
    known, fast = believed(told, early, namespaces, sight), bool(reply.value & _READY_FAST_BIT)
    return Ready(level_of(known), known, hooks, fast, sight.views, told & ~known)


def start_fields(ready: Ready, pid: int, start_ms: float, *, replayed: bool) -> dict[str, Any]:
    """Return what the audit log says of a worker that is ready; of one that a recording speaks for, no protection.

    Args:
        ready: What is known of it.
        pid: Its process.
        start_ms: How long that took, in milliseconds.
        replayed: Whether there is no such process.
    """
    hooks = [hook.name.lower() for hook in Hook if hook in ready.hooks and hook.name]
    common = {"hooks": hooks, "startMs": round(start_ms, 1)}
    if replayed:
        return {"replayed": True, "pid": None, "isolation": None, "mechanisms": [], **common}
    return {
        "pid": pid, "isolation": ready.level, "mechanisms": ready.mechanisms.names(), "seen": ready.views.names(),
        "unseen": ready.unseen.names(), "seccomp": worker_filter(), "fastCalls": ready.fast, **common,
    }  # fmt: skip


def check_isolation(spec: ExtensionSpec, ready: Ready) -> None:
    """Hold what was achieved against the policy's minimum: seccomp comes last, after the worker's own check.

    Raises:
        HostError: the level is too low.
    """
    if ready.level < spec.min_isolation:
        raise HostError(
            f"isolation level {ready.level} is below the {spec.min_isolation} that the policy demands",
            file=spec.id,
            hint=f"this kernel gave: {', '.join(ready.mechanisms.names())}; see docs/sandbox.md",
        )
