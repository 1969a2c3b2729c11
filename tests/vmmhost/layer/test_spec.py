"""An ExtensionSpec out of bounds cannot be made."""

import pytest

from vmgraft.errors import UsageError
from vmgraft.vmmhost.layer.spec import (
    ExtensionSpec,
    FaultAction,
    GuestWindow,
    HypercallRange,
    LayerLimits,
    MmioRange,
    OnFault,
    PioRange,
)


def test_fault_actions():
    assert OnFault.parse("stop") == OnFault(FaultAction.STOP)
    assert OnFault.parse("detach") == OnFault(FaultAction.DETACH)
    assert OnFault.parse("restart(99)") == OnFault(FaultAction.RESTART, 99)


@pytest.mark.parametrize("text", ["", "ignore", "restart", "restart(0)", "restart(100)", "stop\n", "restart(1"])
def test_unknown_fault_actions(text):
    with pytest.raises(UsageError, match="unknown fault action"):
        OnFault.parse(text)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PioRange(0x10, 0xF),
        lambda: PioRange(0, 0x10000),
        lambda: PioRange(-1, 5),
        lambda: MmioRange(0, 0),
        lambda: MmioRange(1 << 52, 1),
        lambda: HypercallRange(0, 5),
        lambda: HypercallRange(5, 1 << 32),
        lambda: GuestWindow(0, 0),
        lambda: GuestWindow((1 << 52) - 1, 2),
        lambda: LayerLimits(memory_mib=257),
        lambda: LayerLimits(fuel_per_call=0),
        lambda: LayerLimits(call_ms=0),
        lambda: LayerLimits(calls_per_second=0),
        lambda: LayerLimits(log_bytes=-1),
        lambda: ExtensionSpec("", "1", b""),
        lambda: ExtensionSpec("a.b", "1", b"", config=bytes(4097)),
        lambda: ExtensionSpec("a.b", "1", b"", min_isolation=4),
        lambda: ExtensionSpec("a.b", "1", b"", on_fault="never"),
        lambda: ExtensionSpec("a.b", "1", b"", pio=(PioRange(1, 1),) * 65),
    ],
)
def test_out_of_bounds(make):
    with pytest.raises(UsageError):
        make()


def test_window_covers_whole_accesses_only():
    window = GuestWindow(0x1000, 0x10)
    assert window.covers(0x1000, 16)
    assert not window.covers(0x1000, 17)
    assert not window.covers(0xFFF, 2)
