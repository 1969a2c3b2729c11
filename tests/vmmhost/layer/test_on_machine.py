"""Extensions on the core's machine: the guest works, and outside the claims its I/O is what it is without them."""

import os
import signal

import pytest
from assembling import LAYER_GUESTS, booting, nasm

from vmgraft.errors import CapabilityError
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.layer.spec import ExtensionSpec, HypercallRange, LayerLimits, MmioRange, PioRange

CLAIMS = {"pio": (PioRange(0x510, 0x517),), "mmio": (MmioRange(0xD0000, 0x1000),)}
READ = '(func (export "on_pio_read") (param i32 i32) (result i64) {})'
COUNT = """(global $n (mut i64) (i64.const 0))
    (func (export "on_pio_read") (param i32 i32) (result i64)
      (global.set $n (i64.add (global.get $n) (i64.const 1))) (global.get $n))
    (func (export "on_mmio_read") (param i64 i32) (result i64) (global.get $n))
    (func (export "on_pio_write") (param i32 i32 i32) (result i32) i32.const 0)
    (func (export "on_mmio_write") (param i64 i32 i64) (result i32) i32.const 0)"""


@pytest.fixture(scope="module")
def poke():
    return nasm(LAYER_GUESTS / "poke.asm")


@pytest.fixture
def run(bench):
    """Run a boot sector with extensions on the deterministic CPU; ``during`` is called at the tenth serial byte."""

    def go(sector, *specs, during=None):
        seen = bytearray()

        def serial(data):
            seen.extend(data)
            if during is not None and len(seen) == 10:
                during(host)

        machine = Machine(
            Engine.SOFT, VerifiedDisk(booting(sector), lambda _index, _data: True),
            timeout=30, trace=True, serial=serial, rtc_epoch=0,
        )  # fmt: skip
        host = bench.host(*specs)
        host.claim(machine.bus)
        machine.add_tick(host.tick)
        try:
            return machine.run()
        finally:
            machine.close()
            host.close()

    return go


def outside(result):
    assert result.reason is EndReason.SHUTDOWN
    return [event for event in result.trace if not 0x510 <= event.port <= 0x517]


def test_the_guest_finds_both_examples(bench, run, examples):
    limits = LayerLimits(memory_mib=1, fuel_per_call=100_000)
    specs = (
        ExtensionSpec("org.vmgraft.clock", "1", (examples / "clock/module.wasm").read_bytes(), limits=limits, log=True,
                      now=True, pio=CLAIMS["pio"], hypercalls=(HypercallRange(16, 17),)),
        ExtensionSpec("org.vmgraft.entropy", "1", (examples / "entropy/module.wasm").read_bytes(), limits=limits,
                      random=True, mmio=CLAIMS["mmio"]),
    )  # fmt: skip
    guest = (examples / "guest/guest.bin").read_bytes()
    bench.now = 0xABC
    text = run(guest, *specs).serial.decode()
    assert "extensions: 2\r\nclock: 0x0000000000000abc ok\r\nentropy: 0x" in text
    assert "extensions: none\r\nclock: absent\r\nentropy: absent\r\ndone" in run(guest).serial.decode()


def test_outside_the_claims_the_io_is_the_same(run, poke, wat):
    alone = run(poke)
    plugged = run(poke, ExtensionSpec("org.example.count", "1", wat(COUNT), **CLAIMS))
    assert outside(plugged) == outside(alone)
    answers = [event.value for event in plugged.trace if event.port == 0x510]
    assert answers == list(range(1, 17))
    assert {event.value for event in alone.trace if event.port == 0x510} == {0xFFFFFFFF}


@pytest.mark.parametrize("body", ["unreachable", "(loop br 0) unreachable"], ids=["trap", "loop"])
def test_a_fault_changes_nothing_outside_the_claims(bench, run, poke, wat, body):
    spec = ExtensionSpec("org.example.test", "1", wat(READ.format(body)), on_fault="detach", **CLAIMS)
    assert outside(run(poke, spec)) == outside(run(poke))
    assert bench.fault()["action"] == "detach"


def test_a_worker_killed_in_the_middle_changes_nothing_outside_the_claims(bench, run, poke, wat):
    spec = ExtensionSpec("org.example.test", "1", wat(COUNT), on_fault="detach", **CLAIMS)
    killed = run(poke, spec, during=lambda host: os.kill(host.proxies[0].pid, signal.SIGKILL))
    assert outside(killed) == outside(run(poke))
    answers = [event.value for event in killed.trace if event.port == 0x510]
    assert answers == [*range(1, 11), *[0xFFFFFFFF] * 6]
    assert bench.fault()["kind"] == "died"


def test_a_claim_on_a_core_device_is_refused(run, poke, wat):
    with pytest.raises(CapabilityError, match="core"):
        run(poke, ExtensionSpec("org.example.greedy", "1", wat(COUNT), pio=(PioRange(0x60, 0x60),)))
