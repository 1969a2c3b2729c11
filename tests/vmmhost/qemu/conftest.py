"""Guests that boot in QEMU on TCG, and the promise that nothing of a run stays behind."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.plan import RunOptions


def children() -> dict[int, str]:
    """Return this process's children and their names."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            except OSError:
                continue
            if int(rest.split()[1]) == os.getpid():
                found[int(entry.name)] = name
    return found


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), children()
    yield
    assert (len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), children()) == before


@pytest.fixture
def launch(studio) -> Callable[..., Launcher]:
    """Makes a launcher of the studio's image on QEMU with TCG."""

    def make(*, serial: Any = None, judged: Any = None, **chosen: Any) -> Launcher:
        options = {"engine": "qemu", "cpu": "soft", "timeout": 60, "audit_log": studio.audit_log} | chosen
        return Launcher(studio.image, studio.policy, RunOptions(**options), serial=serial, judged=judged)

    return make
