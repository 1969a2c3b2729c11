"""What lives longer than a call or a worker: keys and values, metrics, states; and changes of a running machine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vmgraft.errors import (
    CapabilityError,
    ExtensionFaultError,
    GraftFormatError,
    PayloadMismatchError,
    UsageError,
    VmgraftError,
)
from vmgraft.vmmhost.core.bus import DISCOVERY_MAGIC, DOORBELL_PORT, Bus
from vmgraft.vmmhost.layer.proxy import State
from vmgraft.vmmhost.layer.spec import ExtensionSpec, HypercallRange, MmioRange, PioRange, ServiceUse
from vmgraft.vmmhost.layer.store import KvStore

PORT = {"pio": (PioRange(0x510, 0x513),)}
READ = '(func (export "on_pio_read") (param $p i32) (param $s i32) (result i64) {})'
WRITE = '(func (export "on_pio_write") (param $p i32) (param $s i32) (param $v i32) (result i32) {})'
START = '(func (export "on_start") (param i32) (result i32) {})'
KV = """(import "vmgraft" "kv_get" (func $get (param i32 i32 i32 i32) (result i32)))
    (import "vmgraft" "kv_put" (func $put (param i32 i32 i32 i32) (result i32)))"""
BUFFER = """(import "vmgraft" "get_buffer" (func $load (param i32 i32 i32) (result i32)))
    (import "vmgraft" "set_buffer" (func $set (param i32 i32)))"""
METRIC = '(import "vmgraft" "metric" (func $metric (param i32 i32 i64)))'
ONES = 0xFFFFFFFF


def constant(value):
    return READ.format(f"(i64.const {value})")


def extension(wat, body, number=1, imports="", version="1", **fields):
    return ExtensionSpec(f"org.example.ext{number}", version, wat(body, imports), **PORT | fields)


#: Keeps a number in memory that port writes set, reads show, and states carry.
KEEPER = (
    READ.format("(i64.load (i32.const 0))")
    + WRITE.format("(i64.store (i32.const 0) (i64.extend_i32_u (local.get $v))) (i32.const 0)")
    + '(func (export "on_snapshot") (result i32) (call $set (i32.const 0) (i32.const 8)) (i32.const 8))'
    + """(func (export "on_restore") (param i32) (result i32)
        (i32.ne (call $load (i32.const 0) (i32.const 0) (local.get 0)) (i32.const 8)))"""
)


def keeper(wat, extra="", **fields):
    return extension(wat, KEEPER + extra, imports=BUFFER, **fields)


@pytest.fixture
def machine(bench):
    """A host on a real bus, without a guest."""

    def build(*specs, **options):
        bus = Bus(1 << 24)
        levels = []
        bus.irq_driver = lambda line, level: levels.append((line, level))
        host = bench.host(*specs, **options)
        host.claim(bus)
        bus.levels = levels
        return host, bus

    return build


# --- keys, values, metrics ------------------------------------------------------------------------------------------

COUNT = """(drop (call $get (i32.const 64) (i32.const 3) (i32.const 0) (i32.const 8)))
    (i64.store (i32.const 0) (i64.add (i64.load (i32.const 0)) (i64.const 1)))
    (drop (call $put (i32.const 64) (i32.const 3) (i32.const 0) (i32.const 8)))"""


def test_a_value_survives_the_worker(bench, wat):
    body = READ.format(
        COUNT + "(if (i32.eq (local.get $p) (i32.const 0x513)) (then unreachable)) (i64.load (i32.const 0))"
    )
    proxy = bench.one(wat(body, KV), kv=True, on_fault="restart(3)")
    assert [proxy.pio_read(0x510, 4) for _ in range(3)] == [1, 2, 3]
    assert proxy.pio_read(0x513, 1) == 0xFF  # counts, then traps
    assert proxy.pio_read(0x510, 4) == 5
    assert proxy.store.items() == {bytes(3): (5).to_bytes(8, "little")}


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        ("(call $get (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 8))", ONES),
        ("(call $put (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 4001))", ONES),
        ("(call $put (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 0))", 0),
        ("(call $put (i32.const 0) (i32.const 64) (i32.const 0) (i32.const 4000))", 0),
        ("""(drop (call $put (i32.const 0) (i32.const 1) (i32.const 8) (i32.const 9)))
            (call $get (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 2))""", 9),
    ],
)  # fmt: skip
def test_what_kv_returns(bench, wat, body, answer):
    assert bench.one(wat(READ.format(f"(i64.extend_i32_u {body})"), KV), kv=True).pio_read(0x510, 4) == answer
    assert bench.records("fault") == []


@pytest.mark.parametrize(
    "body",
    [
        "(call $get (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 8))",
        "(call $get (i32.const 0) (i32.const 65) (i32.const 0) (i32.const 8))",
        "(call $get (i32.const 65530) (i32.const 8) (i32.const 0) (i32.const 8))",
        "(call $put (i32.const 0) (i32.const 8) (i32.const 65530) (i32.const 8))",
        "(call $put (i32.const -1) (i32.const 8) (i32.const 0) (i32.const 8))",
    ],
)
def test_kv_with_nonsense_traps(bench, wat, body):
    proxy = bench.one(wat(READ.format(f"(i64.extend_i32_u {body})"), KV), kv=True, on_fault="detach")
    assert proxy.pio_read(0x510, 4) == ONES
    assert bench.fault()["kind"] == "trap"


def test_a_value_over_the_end_of_memory_traps(bench, wat):
    body = """(drop (call $put (i32.const 0) (i32.const 1) (i32.const 8) (i32.const 9)))
        (i64.extend_i32_u (call $get (i32.const 0) (i32.const 1) (i32.const 65530) (i32.const 9)))"""
    assert bench.one(wat(READ.format(body), KV), kv=True, on_fault="detach").pio_read(0x510, 4) == ONES
    assert bench.fault()["kind"] == "trap"


def test_the_store_is_bounded():
    store = KvStore()
    assert all(store.put(bytes((n,)), bytes(3999)) for n in range(1, 17))
    assert not store.put(b"one more", bytes(4000))
    assert store.get(b"one more") is None
    assert store.put(b"\x01", b"shorter")
    assert store.put(b"one more", bytes(3000))
    assert store.put(b"\x02", b"")
    assert store.get(b"\x02") is None
    many = KvStore()
    assert [many.put(n.to_bytes(2, "big"), b"x") for n in range(1025)] == [True] * 1024 + [False]
    for bad in ({b"": b"x"}, {bytes(65): b"x"}, {b"x": bytes(4001)}, {b"x": b""}):
        assert not many.replace(bad)
    assert not many.replace({n.to_bytes(2, "big"): bytes(100) for n in range(700)})
    assert len(many.items()) == 1024


def test_metrics_come_with_the_summary(bench, wat):
    body = START.format("(call $metric (i32.const 0) (i32.const 4) (i64.const -5)) (i32.const 0)")
    proxy = bench.one(wat(body + '(data (i32.const 0) "lo\\1bg")', METRIC), metric=True)
    assert proxy.summary()["metrics"] == {"lo\\x1bg": -5}


def test_too_many_metrics_are_recorded_once(bench, wat):
    body = READ.format("""(local $n i32) (loop $again (i32.store8 (i32.const 0) (local.get $n))
        (call $metric (i32.const 0) (i32.const 1) (i64.const 1))
        (br_if $again (i32.lt_u (local.tee $n (i32.add (local.get $n) (i32.const 1))) (i32.const 100))))
        (i64.const 1)""")
    proxy = bench.one(wat(body, METRIC), metric=True)
    assert [proxy.pio_read(0x510, 1), proxy.pio_read(0x510, 1)] == [1, 1]
    assert len(proxy.summary()["metrics"]) == 64
    assert [record["quota"] for record in bench.records("quota")] == ["metrics"]


@pytest.mark.parametrize(("imports", "capability"), [(KV, "kv"), (METRIC, "metric")])
def test_imports_need_their_capability(bench, wat, imports, capability):
    with pytest.raises(CapabilityError, match=f"needs the capability {capability}"):
        bench.one(wat("", imports))


def test_a_buffer_where_there_is_none_traps(bench, wat):
    for body in ("(call $set (i32.const 0) (i32.const 1)) (i64.const 0)",):
        assert bench.one(wat(READ.format(body), BUFFER), on_fault="detach").pio_read(0x510, 1) == 0xFF
    assert bench.fault()["kind"] == "trap"
    empty = READ.format("(i64.extend_i32_u (call $load (i32.const 0) (i32.const 0) (i32.const 9)))")
    assert bench.one(wat(empty, BUFFER)).pio_read(0x510, 1) == 0


# --- changes ----------------------------------------------------------------------------------------------------------


def test_load_and_unload(bench, machine, wat):
    host, bus = machine()
    assert bus.pio_read(0x510, 4) == ONES
    host.load(extension(wat, constant(7)))
    assert bus.pio_read(0x510, 4) == 7
    assert bus.owners() == ("org.example.ext1",)
    host.unload("org.example.ext1")
    assert bus.pio_read(0x510, 4) == ONES
    assert bus.owners() == ()
    assert host.proxies == ()
    changes = [(record["id"], record["action"]) for record in bench.records("extension-change")]
    assert changes == [("org.example.ext1", "load"), ("org.example.ext1", "unload")]
    assert [record["state"] for record in bench.records("extension-end")] == ["running"]


def test_everything_that_was_claimed_is_free_again(machine, wat):
    everything = {
        "mmio": (MmioRange(0xD0000, 16),), "hypercalls": (HypercallRange(16, 17),), "irqs": (5,),
        "services": (ServiceUse("rtc"), ServiceUse("console", chain=True)),
    }  # fmt: skip
    irq = '(import "vmgraft" "irq" (func $irq (param i32 i32)))'
    start = START.format("(call $irq (i32.const 5) (i32.const 1)) (i32.const 0)")
    host, bus = machine(extension(wat, start + constant(1), imports=irq, **everything))
    assert bus.hypercall(0, (0, 0, 0, 0)) == DISCOVERY_MAGIC | 1 << 32
    assert bus.levels == [(5, True)]
    host.unload("org.example.ext1")
    assert bus.levels == [(5, True), (5, False)]
    assert DOORBELL_PORT not in bus._ports
    assert not bus.services.owners()
    other = extension(wat, constant(2), 2, **everything)
    host.load(other)
    assert bus.pio_read(0x510, 4) == 2


def test_what_cannot_be_loaded_leaves_nothing(bench, machine, wat):
    host, bus = machine(extension(wat, constant(1)))
    trap = START.format("unreachable")
    bad = [
        (CapabilityError, extension(wat, constant(2), 2, mmio=(MmioRange(0xD0000, 16),))),  # the ports clash
        (UsageError, extension(wat, constant(2))),
        (GraftFormatError, ExtensionSpec("org.example.ext3", "1", b"\0asm\1\0\0\0junk")),
        (ExtensionFaultError, extension(wat, trap, 4, pio=())),
        (ExtensionFaultError, extension(wat, trap, 5, pio=(), on_fault="detach")),
        (CapabilityError, extension(wat, "", 6, imports=KV, pio=())),
    ]
    for error, wrong in bad:
        with pytest.raises(error):
            host.load(wrong)
    assert bus.pio_read(0x510, 4) == 1
    assert bus.mmio_read(0xD0000, 1) == 0xFF
    assert bus.owners() == ("org.example.ext1",)
    assert len(host.proxies) == 1
    assert bench.records("extension-change") == []


def test_replace_keeps_state_store_and_place(machine, wat):
    host, bus = machine(keeper(wat, kv=True))
    bus.pio_write(0x510, 4, 1234)
    host.proxies[0].store.put(b"key", b"value")
    host.replace(keeper(wat, '(func (export "on_tick") (param i64))', version="2", kv=True))
    assert bus.pio_read(0x510, 4) == 1234
    assert host.proxies[0].spec.version == "2"
    assert host.proxies[0].store.items() == {b"key": b"value"}
    assert bus.descriptions() == ("org.example.ext1 2",)


def test_replace_by_one_that_takes_no_state(machine, wat):
    host, bus = machine(keeper(wat))
    host.replace(extension(wat, constant(8), pio=(PioRange(0x512, 0x515),)))
    assert (bus.pio_read(0x510, 1), bus.pio_read(0x512, 4)) == (0xFF, 8)


REFUSES = '(func (export "on_restore") (param i32) (result i32) (i32.const 9))'


@pytest.mark.parametrize("on_fault", ["stop", "detach", "restart(2)"])
def test_the_old_one_stays_when_the_new_one_fails(bench, machine, wat, on_fault):
    other = extension(wat, constant(2), 2, pio=(PioRange(0x520, 0x520),))
    host, bus = machine(keeper(wat, irqs=(5,)), other)
    old = host.proxies[0]
    bus.pio_write(0x510, 4, 77)
    fails = [
        extension(wat, START.format("unreachable"), on_fault=on_fault),
        extension(wat, START.format("(i32.const 3)"), on_fault=on_fault),
        extension(wat, REFUSES + constant(1), on_fault=on_fault),
        extension(wat, '(func (export "on_restore") (param i32) (result i32) unreachable)', on_fault=on_fault),
        extension(wat, constant(1), pio=(PioRange(0x510, 0x510), PioRange(0x520, 0x520)), on_fault=on_fault),
        extension(wat, constant(1), pio=(PioRange(0x564, 0x564),), on_fault=on_fault),
        ExtensionSpec("org.example.ext1", "9", b"nothing"),
        extension(wat, constant(1), imports=KV),
    ]
    for wrong in fails:
        with pytest.raises(VmgraftError):
            host.replace(wrong)
        assert (bus.pio_read(0x510, 4), bus.pio_read(0x520, 1)) == (77, 2)
        assert host.proxies[0] is old
    assert bus.owners() == ("org.example.ext1", "org.example.ext2")
    with pytest.raises(CapabilityError, match=r"org\.example\.ext1 holds"):
        bus.claim_irq(5, "org.example.else")
    assert bench.records("extension-change") == []


def open_files():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


def test_many_changes_leave_nothing_behind(machine, wat):
    host, _bus = machine(keeper(wat))
    one, two = extension(wat, constant(1), 2, pio=()), keeper(wat, version="2")

    def round_trip():
        host.load(one)
        host.replace(two)
        host.unload(one.id)

    round_trip()
    before = open_files()
    for _ in range(10):
        round_trip()
    assert open_files() == before
    assert len(host.proxies) == 1


def test_ids_that_are_not_there(bench, machine, wat):
    host, _bus = machine()
    for change in (lambda: host.unload("org.example.no"), lambda: host.replace(extension(wat, ""))):
        with pytest.raises(UsageError, match="no extension"):
            change()
    unplugged = bench.host()
    with pytest.raises(UsageError, match="once the machine is built"):
        unplugged.load(extension(wat, ""))


def test_a_chain_keeps_its_place_when_it_is_replaced(machine, wat):
    def chain(number, seconds, **fields):
        body = f'(func (export "on_service") (param i32 i64 i64) (result i64) (i64.const {seconds}))'
        return extension(wat, body, number, pio=(), services=(ServiceUse("rtc", chain=True),), **fields)

    host, bus = machine(chain(1, 10), chain(2, 20))
    assert bus.services.rtc(0) == 10
    host.replace(chain(1, 11, version="2"))
    assert bus.services.rtc(0) == 11
    host.unload("org.example.ext1")
    assert bus.services.rtc(0) == 20
    host.load(chain(1, 12))
    assert bus.services.rtc(0) == 20


# --- states -----------------------------------------------------------------------------------------------------------


def test_a_machine_is_saved_and_restored(machine, wat):
    specs = (keeper(wat, kv=True), extension(wat, constant(2), 2, pio=()))
    host, bus = machine(*specs)
    bus.pio_write(0x510, 4, 4711)
    host.proxies[0].store.put(b"key", b"value")
    states = host.snapshot()
    assert [(state.id, state.state is None) for state in states] == [
        ("org.example.ext1", False),
        ("org.example.ext2", True),
    ]
    again, other = machine(*specs)
    again.restore(states)
    assert other.pio_read(0x510, 4) == 4711
    assert again.proxies[0].store.items() == {b"key": b"value"}


def test_interrupt_lines_come_back(machine, wat):
    body = WRITE.format("(call $irq (i32.const 5) (local.get $v)) (i32.const 0)")
    spec = extension(wat, body, imports='(import "vmgraft" "irq" (func $irq (param i32 i32)))', irqs=(5,))
    host, bus = machine(spec)
    bus.pio_write(0x510, 4, 1)
    again, other = machine(spec)
    again.restore(host.snapshot())
    assert other.levels == [(5, True)]


def test_states_that_do_not_fit(machine, wat):
    host, bus = machine(keeper(wat))
    bus.pio_write(0x510, 4, 5)
    (state,) = host.snapshot()
    wrong = [
        (UsageError, dataclasses.replace(state, id="org.example.no")),
        (PayloadMismatchError, dataclasses.replace(state, module_sha256="0" * 64)),
        (ExtensionFaultError, dataclasses.replace(state, store={b"": b"x"})),
        (ExtensionFaultError, dataclasses.replace(state, state=bytes(65537))),
        (ExtensionFaultError, dataclasses.replace(state, state=b"short")),
    ]
    for error, bad in wrong:
        with pytest.raises(error):
            host.restore([bad])
    host.restore([dataclasses.replace(state, irqs=frozenset({5, 99}))])
    assert bus.levels == []  # no line that it was not granted
    assert bus.pio_read(0x510, 4) == 5


def test_a_state_of_64_kib_goes_both_ways(machine, wat):
    body = (
        READ.format("(i64.load32_u (i32.const 65532))")
        + START.format("(i32.store (i32.const 65532) (i32.const 42)) (i32.const 0)")
        + '(func (export "on_snapshot") (result i32) (call $set (i32.const 0) (i32.const 65536)) (i32.const 65536))'
        + """(func (export "on_restore") (param i32) (result i32) (i32.store (i32.const 65532) (i32.const 0))
            (i32.ne (call $load (i32.const 0) (i32.const 0) (local.get 0)) (i32.const 65536)))"""
    )
    host, bus = machine(extension(wat, body, imports=BUFFER))
    (state,) = host.snapshot()
    assert len(state.state) == 65536
    host.restore([state])
    assert bus.pio_read(0x510, 4) == 42


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("(call $set (i32.const 0) (i32.const 8)) (i32.const 7)", "answer"),
        ("(i32.const 8)", "answer"),
        ("(call $set (i32.const 0) (i32.const 65537)) (i32.const 0)", "trap"),
        ("(call $set (i32.const 65530) (i32.const 8)) (i32.const 8)", "trap"),
        ("unreachable", "trap"),
    ],
)
def test_snapshots_that_break_a_rule(bench, machine, wat, body, kind):
    text = f'(func (export "on_snapshot") (result i32) {body})'
    host, bus = machine(extension(wat, text + constant(1), imports=BUFFER, on_fault="detach"))
    with pytest.raises(ExtensionFaultError):
        host.snapshot()
    assert [record["kind"] for record in bench.records("fault")] == [kind]
    assert bus.pio_read(0x510, 4) == ONES


def test_an_extension_may_say_not_now(bench, machine, wat):
    host, bus = machine(extension(wat, '(func (export "on_snapshot") (result i32) (i32.const -1))' + constant(1)))
    for change in (host.snapshot, lambda: host.replace(extension(wat, constant(2)))):
        with pytest.raises(ExtensionFaultError, match="cannot be saved now"):
            change()
    assert bus.pio_read(0x510, 4) == 1
    assert host.proxies[0].state is State.RUNNING
    assert bench.records("fault") == []
