"""A specification in the terms of a worker: capability bits, and windows."""

from __future__ import annotations

from collections.abc import Sequence

from vmgraft.vmmhost.layer.abi import Grant
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.layer.windows import Shared, Window


def grant_of(spec: ExtensionSpec) -> Grant:
    """Return the capability bits of a spec."""
    flags = (
        (spec.log, Grant.LOG),
        (spec.now, Grant.NOW),
        (spec.random, Grant.RANDOM),
        (spec.tick, Grant.TICK),
        (spec.stop, Grant.STOP),
        (bool(spec.windows), Grant.GUEST_READ),
        (any(window.writable for window in spec.windows), Grant.GUEST_WRITE),
        (bool(spec.irqs), Grant.IRQ),
        (spec.kv, Grant.KV),
        (spec.metric, Grant.METRIC),
        (spec.virtio is not None, Grant.VIRTIO),
    )
    grant = Grant(0)
    for granted, bit in flags:
        if granted:
            grant |= bit
    return grant


def windows_of(spec: ExtensionSpec) -> tuple[Window, ...]:
    """Return the windows of a spec, in its order."""
    return tuple(Window(window.gpa, window.size, window.writable) for window in spec.windows)


def told_windows(windows: Sequence[Window], shared: Sequence[Shared]) -> tuple[Window, ...]:
    """Return windows as a worker is told them: those with a file are marked, each once."""
    files = {each.window for each in shared}
    told = []
    for window in windows:
        told.append(window._replace(mapped=window in files))
        files.discard(window)
    return tuple(told)
