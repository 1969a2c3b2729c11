"""Extensions that behave: the ABI from the guest's side, hook by hook."""

import json
import time
import tomllib

import pytest

from vmgraft.errors import CapabilityError, UsageError
from vmgraft.vmmhost.layer.abi import Event
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.proxy import State
from vmgraft.vmmhost.layer.spec import (
    ExtensionSpec,
    GuestWindow,
    HypercallRange,
    LayerLimits,
    MmioRange,
    PioRange,
)

READ = '(func (export "on_pio_read") (param i32 i32) (result i64) {})'


@pytest.fixture
def clock_spec(examples):
    folder = examples / "clock"
    config = tomllib.loads((folder / "manifest.toml").read_text())["config"]
    return ExtensionSpec(
        "org.vmgraft.clock", "1.0.0", (folder / "module.wasm").read_bytes(), config.encode(),
        pio=(PioRange(0x510, 0x517),), hypercalls=(HypercallRange(16, 17),), log=True, now=True, on_fault="detach",
    )  # fmt: skip


@pytest.fixture
def entropy_spec(examples):
    return ExtensionSpec(
        "org.vmgraft.entropy", "1.0.0", (examples / "entropy/module.wasm").read_bytes(),
        mmio=(MmioRange(0xD0000, 0x1000),), random=True, on_fault="restart(3)",
    )  # fmt: skip


def test_clock(bench, clock_spec):
    (clock,) = bench.host(clock_spec).proxies
    bench.now = 0x1_2345_6789
    assert clock.pio_read(0x510, 4) == 0x2345_6789
    bench.now = 0x9_0000_0000
    assert clock.pio_read(0x514, 4) == 1  # latched
    assert clock.pio_read(0x512, 2) == 0x2345
    assert clock.hypercall(16, (0, 0, 0, 0)) == bench.now
    bench.now = 3_500_000_000
    assert clock.hypercall(17, (0, 0, 0, 0)) == 1767225600 + 3
    assert clock.hypercall(18, (0, 0, 0, 0)) == (1 << 64) - 1
    clock.pio_write(0x510, 4, 1)  # the module has no on_pio_write: nothing happens
    assert bench.records("log") == [{"id": "org.vmgraft.clock", "version": "1.0.0", "text": "clock ready"}]


def test_entropy(bench, entropy_spec):
    host = bench.host(entropy_spec)
    (entropy,) = host.proxies
    assert entropy.mmio_read(0xD0000, 4) == 0x4E454756
    assert entropy.mmio_read(0xD0004, 4) == 1
    words = {entropy.mmio_read(0xD0010, 8) for _ in range(16)}
    assert len(words) == 16
    assert max(words) > 1 << 56
    assert entropy.mmio_read(0xD0010, 1) < 256
    assert entropy.mmio_read(0xD0008, 8) == 16 * 8 + 1
    entropy.mmio_write(0xD0008, 4, 0)
    assert host.summary()[0]["refusedWrites"] == 1


def test_deterministic_seed_repeats_and_differs_by_extension(bench, entropy_spec):
    def words(seed):
        host = bench.host(entropy_spec, deterministic_seed=seed)
        got = [host.proxies[0].mmio_read(0xD0010, 8) for _ in range(4)]
        host.close()
        return got

    assert words(b"a") == words(b"a") != words(b"b")
    assert words(None) != words(None)


class Bus:
    """Keeps claims, and answers as the core's bus would."""

    def __init__(self):
        self.claims, self.texts = [], []

    def claim_pio(self, first, last, handler, owner):
        self.claims.append(("pio", first, last, handler, owner))

    def claim_mmio(self, base, size, handler, owner):
        self.claims.append(("mmio", base, size, handler, owner))

    def claim_hypercall(self, first, last, handler, owner):
        self.claims.append(("hypercall", first, last, handler, owner))

    def describe(self, owner, text):
        self.texts.append((owner, text))


def test_claims_and_offsets(bench, clock_spec, entropy_spec):
    host, bus = bench.host(clock_spec, entropy_spec), Bus()
    host.claim(bus)
    assert [(kind, first, last, owner) for kind, first, last, _handler, owner in bus.claims] == [
        ("pio", 0x510, 0x517, "org.vmgraft.clock"),
        ("hypercall", 16, 17, "org.vmgraft.clock"),
        ("mmio", 0xD0000, 0x1000, "org.vmgraft.entropy"),
    ]
    assert bus.texts == [(name, f"{name} 1.0.0") for name in ("org.vmgraft.clock", "org.vmgraft.entropy")]
    bench.now = 77
    assert bus.claims[0][3].pio_read(0, 4) == 77
    bus.claims[0][3].pio_write(0, 4, 1)
    assert bus.claims[1][3].hypercall(16, (0, 0, 0, 0)) == 77
    assert bus.claims[2][3].mmio_read(0, 4) == 0x4E454756
    bus.claims[2][3].mmio_write(0, 4, 1)


def reading_config(*asked, length):
    """A module that starts where its configuration has this length; reads give what `config_read` put at 0."""
    numbers = " ".join(f"(i32.const {number})" for number in asked)
    body = f"""(func (export "on_start") (param i32) (result i32)
          (drop (call $c {numbers}))
          (i32.sub (local.get 0) (i32.const {length})))"""
    imports = '(import "vmgraft" "config_read" (func $c (param i32 i32 i32) (result i32)))'
    return body + READ.format("(i64.load (i32.const 0))"), imports


def test_on_start_sees_config(bench, wat):
    proxy = bench.one(wat(*reading_config(0, 100, 2, length=6)), config=b"abcdef")
    assert proxy.pio_read(1, 4).to_bytes(4, "little") == b"cdef"


def test_a_config_of_the_greatest_length(bench, wat):
    module = wat(*reading_config(0, 4, 4092, length=4096))
    assert bench.one(module, config=b"x" * 4092 + b"last").pio_read(1, 4).to_bytes(4, "little") == b"last"


def test_hooks_get_what_the_guest_did(bench, wat):
    total = "(i32.add (local.get 0) (i32.add (local.get 1) (local.get 2)))"
    products = "(i32.add (i32.mul (local.get 1) (local.get 2)) (i32.mul (local.get 3) (local.get 4)))"
    module = wat(f"""
        (func (export "on_pio_write") (param i32 i32 i32) (result i32)
          (i64.store (i32.const 0) (i64.extend_i32_u {total})) i32.const 0)
        (func (export "on_mmio_write") (param i64 i32 i64) (result i32)
          (i64.store (i32.const 0) (i64.add (local.get 0) (local.get 2))) i32.const 1)
        (func (export "on_mmio_read") (param i64 i32) (result i64) (i64.load (i32.const 0)))
        (func (export "on_hypercall") (param i32 i32 i32 i32 i32) (result i64)
          (i64.extend_i32_u (i32.add (local.get 0) {products})))""")
    proxy = bench.one(module)
    proxy.pio_write(0x510, 4, 0xF0000000)
    assert proxy.mmio_read(0, 8) == 0xF0000514
    proxy.mmio_write(0xF_FEE0_0000, 8, 0xABCD << 48)
    assert proxy.mmio_read(0, 8) == 0xF_FEE0_0000 + (0xABCD << 48)
    assert proxy.mmio_read(0, 2) == 0
    assert proxy.hypercall(5, (2, 3, 4, 5)) == 31


def test_guest_memory_in_the_windows(bench, wat):
    module = wat(READ.format("""
        (drop (call $gr (i64.const 0x1000) (i32.const 0) (i32.const 10000)))
        (drop (call $gw (i64.const 0x8000) (i32.const 0) (i32.const 10000)))
        (drop (call $gr (i64.const 0x1000) (i32.const 0) (i32.const 0)))
        i64.const 3"""), """(import "vmgraft" "guest_read" (func $gr (param i64 i32 i32) (result i32)))
        (import "vmgraft" "guest_write" (func $gw (param i64 i32 i32) (result i32)))""")  # fmt: skip
    data = bytes(i * 7 & 255 for i in range(10000))
    bench.ram.write(0x1000, data)
    proxy = bench.one(module, windows=(GuestWindow(0x1000, 10000), GuestWindow(0x8000, 10000, True)))
    assert proxy.pio_read(1, 1) == 3
    assert bench.ram.read(0x8000, 10001) == data + b"\0"


def test_tick_and_event(bench, wat):
    module = wat("""(global $n (mut i64) (i64.const 0)) (global $e (mut i64) (i64.const 0))
        (func (export "on_start") (param i32) (result i32) (call $t (i64.const 30000000)) i32.const 0)
        (func (export "on_tick") (param i64) (global.set $n (i64.add (global.get $n) (i64.const 1)))
          (if (i64.eq (global.get $n) (i64.const 3)) (then (call $t (i64.const 0)))))
        (func (export "on_event") (param i32) (global.set $e (i64.extend_i32_u (local.get 0))))
        (func (export "on_pio_read") (param i32 i32) (result i64)
          (i64.add (global.get $n) (i64.mul (global.get $e) (i64.const 16))))""",
        '(import "vmgraft" "set_tick" (func $t (param i64)))')  # fmt: skip
    host = bench.host(ExtensionSpec("org.example.tick", "1", module, tick=True))
    (proxy,) = host.proxies
    counts = []
    for bench.now in range(10_000_000, 200_000_000, 10_000_000):
        host.tick(bench.now)
        counts.append(proxy.pio_read(1, 1))
    assert counts[:2] == [0, 0]
    assert counts[2] == 1
    assert counts[-1] == 3  # it turned itself off
    host.event(Event.SHUTDOWN)
    assert proxy.pio_read(1, 1) == 3 + 2 * 16


def test_stop_request(bench, wat):
    proxy = bench.one(wat(READ.format("(call $s) i64.const 9"), '(import "vmgraft" "stop" (func $s))'), stop=True)
    assert [proxy.pio_read(1, 1), proxy.pio_read(1, 1)] == [9, 9]
    assert set(bench.stops) == {"extension org.example.test asked to stop the guest"}
    assert len(bench.records("stop-request")) == 1  # the guest must not fill the log through a module that asks often


def test_calls_beyond_the_rate_are_delayed_not_lost(bench, wat):
    proxy = bench.one(wat(READ.format("i64.const 5")), limits=LayerLimits(calls_per_second=100))
    began = time.monotonic()
    assert {proxy.pio_read(1, 1) for _ in range(30)} == {5}
    assert time.monotonic() - began > 0.15
    (quota,) = bench.records("quota")
    assert quota["quota"] == "callsPerSecond"
    assert proxy.summary()["delayedMs"] > 100


def test_audit_and_summary(bench, clock_spec):
    host = bench.host(clock_spec)
    host.proxies[0].pio_read(0x510, 1)
    host.close()
    host.close()
    start, end = bench.records("extension-start")[0], bench.records("extension-end")
    assert start["isolation"] in range(4)
    assert "seccomp" in start["mechanisms"]
    assert start["hooks"] == ["start", "pio_read", "hypercall"]
    assert len(end) == 1
    assert (end[0]["state"], end[0]["calls"]) == ("running", 1)
    assert host.summary()[0]["state"] == "running"
    json.dumps([bench.audit, host.summary()])


def test_workers_are_apart(bench, clock_spec, wat):
    """One extension's fault leaves the other's device as it was."""
    broken = ExtensionSpec("org.example.broken", "1", wat(READ.format("unreachable")), on_fault="detach")
    clock, other = bench.host(clock_spec, broken).proxies
    other.pio_read(1, 1)
    bench.now = 5
    assert clock.pio_read(0x510, 1) == 5
    assert (clock.state, other.state) == (State.RUNNING, State.DETACHED)


def test_one_refused_extension_ends_all(bench, clock_spec, wat):
    bad = ExtensionSpec("org.example.bad", "1", wat("", '(import "vmgraft" "stop" (func))'))
    with pytest.raises(CapabilityError):
        bench.host(clock_spec, bad)
    assert bench.hosts[0].proxies[0].pid is None


def test_an_id_twice(bench, clock_spec):
    with pytest.raises(UsageError, match="twice"):
        bench.host(clock_spec, clock_spec)


def test_no_extensions_need_no_zygote(bench):
    with ExtensionHost((), memory=bench.ram, audit=print, stop=print, clock=lambda: 0) as host:
        host.tick(1)
        assert host.summary() == []
