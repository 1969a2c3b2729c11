"""Keeping a run on one processor: guest and extension hand over to each other there without waking another one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vmgraft.errors import UsageError


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Keep this thread, and every process that it starts meanwhile, on a processor; None changes nothing.

    Raises:
        UsageError: it is not there, or not this process's to use.
    """
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    if cpu not in before:
        usable = ", ".join(map(str, sorted(before)))
        raise UsageError(f"processor {cpu} cannot be used", field="pin", hint=f"this process may use {usable}")
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        with suppress(OSError):  # the others were taken away meanwhile
            os.sched_setaffinity(0, before)
