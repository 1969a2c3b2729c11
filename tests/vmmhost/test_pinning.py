"""``run --pin``: guest and workers on one processor, and the caller back on those it had."""

import os

import pytest

from vmgraft.errors import UsageError
from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.layer.proxy import ExtensionProxy
from vmgraft.vmmhost.plan import RunOptions


def test_host_and_worker_stay_where_they_are_put(studio, monkeypatch: pytest.MonkeyPatch) -> None:
    studio.graft(studio.wat(studio.ONES))
    before, seen, real = os.sched_getaffinity(0), [], ExtensionProxy.pio_read

    def look(self: ExtensionProxy, port: int, size: int) -> int:
        assert self.pid is not None
        seen.append((os.sched_getaffinity(0), os.sched_getaffinity(self.pid)))
        return real(self, port, size)

    monkeypatch.setattr(ExtensionProxy, "pio_read", look)
    chosen = max(before)
    report = Launcher(studio.image, studio.policy, RunOptions(cpu="soft", timeout=60, pin=chosen)).run()
    assert report.error is None
    assert seen
    assert set(map(repr, seen)) == {repr(({chosen}, {chosen}))}
    assert os.sched_getaffinity(0) == before


def test_a_processor_that_is_not_there(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    before = os.sched_getaffinity(0)
    with pytest.raises(UsageError, match="processor 4095"):
        Launcher(studio.image, studio.policy, RunOptions(cpu="soft", pin=4095)).run()
    assert os.sched_getaffinity(0) == before
