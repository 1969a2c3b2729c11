"""What a module asked of the host, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmgraft.vmmhost.layer.store import KvStore, Metrics


@dataclass(slots=True)
class LinkEvents:
    """Where a link leaves what a module asked for; shared by the workers that succeed each other for one extension.

    Attributes:
        on_log: Called with each line and whether it used up the quota.
        log_left: Bytes of log text still allowed.
        stop_asked: The module called ``stop``.
        tick_ns: The interval that ``set_tick`` asked for, or None while it was not called.
        on_irq: Called with a line and its new level.
        store: The extension's keys and values.
        metrics: What it reports.
        on_metrics_full: Called when a name of a metric is one too many.
        on_fuel: Called with the fuel that each call used.
    """

    on_log: Callable[[bytes, bool], None]
    log_left: int
    stop_asked: bool = False
    tick_ns: int | None = None
    on_irq: Callable[[int, bool], None] = lambda _line, _level: None
    store: KvStore = field(default_factory=KvStore)
    metrics: Metrics = field(default_factory=Metrics)
    on_metrics_full: Callable[[], None] = lambda: None
    on_fuel: Callable[[int], None] = lambda _units: None
