"""Modules that misbehave: each ends as docs/extensions.md says, and the audit log names it."""

import os
import signal

import pytest

from vmgraft.errors import CapabilityError, ExtensionFaultError, GraftFormatError, HostError
from vmgraft.vmmhost.layer.proxy import State
from vmgraft.vmmhost.layer.spec import GuestWindow, LayerLimits
from vmgraft.vmmhost.layer.zygote import Zygote

READ = '(func (export "on_pio_read") (param i32 i32) (result i64) {})'
LOOP = READ.format("(loop br 0) unreachable")
TRAP = READ.format("unreachable")
LOG = '(import "vmgraft" "log" (func $log (param i32 i32)))'
GUEST = """(import "vmgraft" "guest_read" (func $gr (param i64 i32 i32) (result i32)))
(import "vmgraft" "guest_write" (func $gw (param i64 i32 i32) (result i32)))"""


def test_infinite_loop_runs_out_of_fuel(bench, wat):
    proxy = bench.one(wat(LOOP))
    assert proxy.pio_read(0x510, 2) == 0xFFFF
    assert bench.fault()["kind"] == "fuel"
    assert bench.fault()["action"] == "stop"
    assert len(bench.stops) == 1
    assert "org.example.test" in bench.stops[0]


def test_infinite_loop_meets_the_deadline(bench, wat):
    proxy = bench.one(wat(LOOP), limits=LayerLimits(call_ms=60, fuel_per_call=1_000_000_000), on_fault="detach")
    assert proxy.pio_read(0x510, 1) == 0xFF
    assert bench.fault()["kind"] == "deadline"
    assert proxy.pid is None
    assert proxy.state is State.DETACHED


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("unreachable", "unreachable"),
        ("(drop (i32.div_u (i32.const 1) (i32.const 0))) i64.const 0", "division"),
        ("(i64.load (i32.const -8))", "out of bounds"),
        ("(call $f (i32.const 0) (i32.const 0))", "stack"),
    ],
)
def test_trap(bench, wat, body, word):
    module = wat(READ.replace("(func ", "(func $f ").format(body))
    bench.one(module, on_fault="detach", limits=LayerLimits(fuel_per_call=100_000_000)).pio_read(0x510, 1)
    assert bench.fault()["kind"] == "trap"
    assert word in bench.fault()["detail"]


def test_memory_bomb_is_refused_by_grow(bench, wat):
    grow = READ.format("""(local $n i64)
      (block $full (loop $more
        (br_if $full (i32.eq (memory.grow (i32.const 1)) (i32.const -1)))
        (local.set $n (i64.add (local.get $n) (i64.const 1)))
        (br $more)))
      (local.get $n)""")
    proxy = bench.one(wat(grow), limits=LayerLimits(memory_mib=2))
    assert proxy.pio_read(0x510, 4) == 31  # 2 MiB are 32 pages, and it began with one
    assert not bench.records("fault")


def test_memory_bomb_by_declaration(bench, wat):
    with pytest.raises(GraftFormatError, match="16384 pages"):
        bench.one(wat("", memory='(memory (export "memory") 16384)'))
    assert bench.records("extension-refused")[0]["id"] == "org.example.test"


def test_unknown_import(bench, wat):
    with pytest.raises(GraftFormatError, match=r"unknown import wasi\.fd_write") as caught:
        bench.one(wat("", '(import "wasi" "fd_write" (func))'))
    assert caught.value.file == "org.example.test"
    assert caught.value.offset is not None


def test_ungranted_import(bench, wat):
    with pytest.raises(CapabilityError, match="log"):
        bench.one(wat("", LOG))
    assert bench.records("extension-start") == []


def test_invalid_instructions_are_the_engines_to_refuse(bench, wat):
    module = bytearray(wat(READ.format("i64.const 5")))
    module[module.rindex(b"\x42\x05")] = 0x41  # i64.const becomes i32.const
    with pytest.raises(GraftFormatError, match="type mismatch"):
        bench.one(bytes(module))


@pytest.mark.parametrize(
    ("call", "windows"),
    [
        ("(call $gr (i64.const 0x2000) (i32.const 0) (i32.const 16))", (GuestWindow(0x1000, 0x1000, True),)),
        ("(call $gr (i64.const 0x1ff8) (i32.const 0) (i32.const 16))", (GuestWindow(0x1000, 0x1000, True),)),
        ("(call $gr (i64.const -8) (i32.const 0) (i32.const 16))", (GuestWindow(0x1000, 0x1000, True),)),
        ("(call $gw (i64.const 0x800) (i32.const 0) (i32.const 16))",
         (GuestWindow(0x800, 0x100), GuestWindow(0x1000, 0x1000, True))),
        ("(call $gr (i64.const 0x800000) (i32.const 0) (i32.const 16))", (GuestWindow(0, 1 << 30, True),)),
    ],
)  # fmt: skip
def test_guest_access_outside_the_windows(bench, wat, call, windows):
    before = bytes(bench.ram.bytes)
    proxy = bench.one(wat(READ.format(f"(drop {call}) i64.const 1"), GUEST), windows=windows, on_fault="detach")
    assert proxy.pio_read(0x510, 1) == 0xFF
    assert bench.fault()["kind"] == "window"
    assert bytes(bench.ram.bytes) == before


@pytest.mark.parametrize("length", ["65537", "-1"])
def test_copy_over_the_limit_traps(bench, wat, length):
    call = f"(drop (call $gr (i64.const 0) (i32.const 0) (i32.const {length}))) i64.const 1"
    bench.one(wat(READ.format(call), GUEST), windows=(GuestWindow(0, 1 << 20, True),), on_fault="detach").pio_read(1, 1)
    assert bench.fault()["kind"] == "trap"


def test_pointer_outside_the_module_traps(bench, wat):
    module = wat(READ.format("(call $log (i32.const 65530) (i32.const 100)) i64.const 1"), LOG)
    bench.one(module, log=True, on_fault="detach").pio_read(0x510, 1)
    assert bench.fault()["kind"] == "trap"
    assert "outside the module's memory" in bench.fault()["detail"]


def test_log_flood_is_cut_and_recorded_once(bench, wat):
    flood = READ.format("""(local $n i32)
      (loop $more
        (call $log (i32.const 0) (i32.const 100))
        (local.set $n (i32.add (local.get $n) (i32.const 1)))
        (br_if $more (i32.lt_u (local.get $n) (i32.const 5000))))
      i64.const 7""")
    proxy = bench.one(wat(flood, LOG), log=True, limits=LayerLimits(log_bytes=250))
    assert [proxy.pio_read(0x510, 1), proxy.pio_read(0x510, 1)] == [7, 7]
    assert [len(record["text"]) for record in bench.records("log")] == [400, 400, 200]  # NUL is shown as \x00
    (quota,) = bench.records("quota")
    assert (quota["id"], quota["quota"]) == ("org.example.test", "logBytes")
    assert not bench.records("fault")


def test_request_flood_is_a_quota_fault(bench, wat):
    module = wat(READ.format("(loop $x (call $t (i64.const 0)) (br $x)) unreachable"),
                 '(import "vmgraft" "set_tick" (func $t (param i64)))')  # fmt: skip
    limits = LayerLimits(call_ms=10_000, fuel_per_call=1_000_000_000)
    bench.one(module, tick=True, on_fault="detach", limits=limits).pio_read(0x510, 1)
    assert bench.fault()["kind"] == "quota"


def test_log_lines_cannot_forge(bench, wat):
    module = wat(READ.format("(call $log (i32.const 0) (i32.const 9)) i64.const 1")
                 + r'(data (i32.const 0) "a\0a\1b[2J\ffz")', LOG)  # fmt: skip
    bench.one(module, log=True).pio_read(0x510, 1)
    assert bench.records("log")[0]["text"].startswith("a\\x0a\\x1b[2J\ufffd")


def _bomb(wat, functions):
    """Functions near the body limit in which many locals stay alive: hard work for a register allocator."""
    count = 400

    def local(number):
        return f"(local.get {1 + number % count})"

    steps = "".join(
        f"(local.set {1 + i % count} (i32.add (i32.mul {local(i * 7)} {local(i * 13)})"
        f" (i32.rem_s {local(i * 29)} (local.get 0))))"
        for i in range(3500)
    )
    body = f"(func (param i32) {'(local i32)' * count} (loop $l {steps} (br_if $l (local.get 5))))"
    return wat(body * functions)


@pytest.fixture(scope="module")
def bomb(wat):
    return _bomb(wat, 12)


def test_compile_bomb_meets_the_deadline(bench, bomb):
    with pytest.raises(ExtensionFaultError, match="not ready in time"):
        bench.one(bomb, {"start_seconds": 0.5})
    assert bench.fault()["kind"] == "deadline"


def test_compile_bomb_runs_out_of_cpu(bench, bomb):
    proxy = bench.one(bomb, {"compile_cpu_seconds": 1, "start_seconds": 60.0}, on_fault="detach")
    assert proxy.state is State.DETACHED
    assert bench.fault()["kind"] == "died"
    assert "CPU time" in bench.fault()["detail"]


def test_worker_that_dies(bench, wat):
    proxy = bench.one(wat(READ.format("i64.const 5")), on_fault="detach")
    assert proxy.pio_read(0x510, 1) == 5
    os.kill(proxy.pid, signal.SIGKILL)
    assert proxy.pio_read(0x510, 1) == 0xFF
    assert bench.fault() == {
        "id": "org.example.test", "version": "1", "kind": "died", "detail": "the worker was killed by SIGKILL",
        "action": "detach", "pid": bench.records("extension-start")[0]["pid"],
    }  # fmt: skip


def test_detached_device_answers_like_an_empty_bus(bench, wat):
    proxy = bench.one(wat(TRAP), on_fault="detach")
    proxy.pio_read(0x510, 1)
    assert proxy.pio_read(0x510, 4) == 0xFFFFFFFF
    assert proxy.mmio_read(0xD0000, 8) == 0xFFFFFFFFFFFFFFFF
    assert proxy.hypercall(16, (0, 0, 0, 0)) == 0xFFFFFFFFFFFFFFFF
    proxy.pio_write(0x510, 4, 1)
    proxy.mmio_write(0xD0000, 8, 1)
    assert bench.stops == []


def test_restart_gives_a_fresh_worker_then_stops(bench, wat):
    body = READ.format("(if (i32.eq (local.get 0) (i32.const 13)) (then unreachable)) i64.const 5")
    proxy = bench.one(wat(body), on_fault="restart(2)")
    for _ in range(2):
        assert proxy.pio_read(13, 1) == 0xFF
        assert proxy.pio_read(14, 1) == 5
    assert bench.stops == []
    assert proxy.pio_read(13, 1) == 0xFF
    assert proxy.pio_read(14, 1) == 0xFF
    assert [record["action"] for record in bench.records("fault")] == ["restart", "restart", "stop"]
    assert len({record["pid"] for record in bench.records("extension-start")}) == 3
    assert len(bench.stops) == 1


def test_start_that_fails_is_tried_again_as_often_as_allowed(bench, wat):
    module = wat('(func (export "on_start") (param i32) (result i32) i32.const 3)')
    with pytest.raises(ExtensionFaultError, match="on_start returned 3"):
        bench.one(module, on_fault="restart(2)")
    assert [record["action"] for record in bench.records("fault")] == ["restart", "restart", "stop"]


def test_a_start_that_hangs_is_not_tried_for_ever(bench, wat):
    module = wat('(func (export "on_start") (param i32) (result i32) (loop $l (br $l)) i32.const 0)')
    limits = LayerLimits(call_ms=200, fuel_per_call=1_000_000_000)
    with pytest.raises(ExtensionFaultError, match="deadline"):
        bench.one(module, {"start_seconds": 0.7}, on_fault="restart(99)", limits=limits)
    assert 2 <= len(bench.records("fault")) <= 5


def test_nothing_is_restarted_when_the_time_of_the_guest_is_over(bench, wat):
    left = [60.0]
    proxy = bench.one(wat(TRAP), {"time_left": lambda: left[0]}, on_fault="restart(2)")
    proxy.pio_read(0x510, 1)
    left[0] = 0.0
    proxy.pio_read(0x510, 1)
    assert [record["action"] for record in bench.records("fault")] == ["restart", "stop"]
    assert (proxy.counters.restarts, proxy.state, len(bench.stops)) == (1, State.STOPPED, 1)


def test_a_restart_without_a_zygote_stops_the_guest(bench, wat):
    with Zygote.start() as zygote:
        bench.zygote = zygote
        proxy = bench.one(wat(TRAP), on_fault="restart(2)")
        zygote.close()
        assert proxy.pio_read(0x510, 1) == 0xFF
    assert [record["kind"] for record in bench.records("fault")] == ["died", "start", "start"]
    assert len(bench.stops) == 1
    assert proxy.state is State.STOPPED


def test_isolation_below_the_minimum_starts_nothing(bench, wat, monkeypatch):
    monkeypatch.setattr("vmgraft.vmmhost.layer.readiness.level_of", lambda _mechanisms: 2)
    with pytest.raises(HostError, match="isolation level 2"):
        bench.one(wat(""), min_isolation=3)
    assert bench.records("extension-start") == []


def test_interrupt_in_a_call_leaves_no_half_answer(bench, wat):
    class StopError(Exception):
        pass

    def raise_it(*_args):
        raise StopError

    proxy = bench.one(wat(LOOP), limits=LayerLimits(call_ms=5000, fuel_per_call=1_000_000_000))
    old = signal.signal(signal.SIGALRM, raise_it)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(StopError):
            proxy.pio_read(0x510, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert proxy.pid is None
    assert proxy.pio_read(0x510, 1) == 0xFF


def test_signals_do_not_stretch_the_deadline(bench, wat):
    proxy = bench.one(wat(LOOP), limits=LayerLimits(call_ms=150, fuel_per_call=1_000_000_000), on_fault="detach")
    old = signal.signal(signal.SIGALRM, lambda *_args: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
        proxy.pio_read(0x510, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert bench.fault()["kind"] == "deadline"
