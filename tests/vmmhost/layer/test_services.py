"""Default services on the core's machine: overridden, chained, and back when whoever served them is gone."""

from __future__ import annotations

import pytest
from assembling import LAYER_GUESTS, booting, nasm

from vmgraft.errors import CapabilityError, UsageError
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.probe import Engine, probe_kvm
from vmgraft.vmmhost.layer.spec import ExtensionSpec, HypercallRange, PioRange, ServiceUse

SERVE = '(func (export "on_service") (param $s i32) (param $a i64) (param $b i64) (result i64) {})'
SET = '(import "vmgraft" "set_buffer" (func $set (param i32 i32)))'
#: 2000-01-01 12:34:56 UTC
MILLENNIUM = 946_730_096
#: A clock that shows it.
CLOCK = SERVE.format(f"(i64.const {MILLENNIUM})")
PASS = SERVE.format("(i64.const -1)")
#: Answers with the first `n` bytes of its memory.
GIVE = SERVE.format("(call $set (i32.const 0) (i32.const {0})) (i64.const {0})")


def data(text):
    return f'(data (i32.const 0) "{text}")'


def patterned(boot_sector):
    """A disk that begins with a boot sector and has a pattern in sector 2."""
    return booting(boot_sector + bytes(range(256)) * 2)


@pytest.fixture(scope="module")
def guests():
    return {name: nasm(LAYER_GUESTS / f"{name}.asm") for name in ("services", "irq", "poke")}


@pytest.fixture(params=[Engine.SOFT, pytest.param(Engine.KVM, marks=pytest.mark.kvm)], ids=["soft", "kvm"])
def engine(request):
    if request.param is Engine.KVM:
        info = probe_kvm()
        if not info.usable:
            pytest.skip(f"no working /dev/kvm: {info.reason}")
    return request.param


@pytest.fixture
def run(bench, guests):
    """Run a guest with extensions; ``during(host, machine)`` is called at the tenth byte on the serial port."""

    def go(engine, name, *specs, during=None, content=None, **options):
        seen = bytearray()

        def serial(data):
            seen.extend(data)
            if during is not None and len(seen) == 10:
                during(host, machine)

        disk = VerifiedDisk(content or patterned(guests[name]), lambda _index, _data: True)
        machine = Machine(
            engine, disk, timeout=30, trace=True, serial=serial, rtc_epoch=86_399, memory_mib=16, **options
        )
        host = bench.host(*specs)
        host.claim(machine.bus)
        machine.add_tick(host.tick)
        try:
            result = machine.run()
        finally:
            machine.close()
            host.close()
        assert result.reason is EndReason.SHUTDOWN, (result.detail, bytes(seen))
        go.trace = result.trace
        return bytes(seen)

    return go


def spec(wat, body, *services, imports="", number=1, **fields):
    uses = tuple(ServiceUse(*use.split(":")[:1], chain=use.endswith(":chain")) for use in services)
    return ExtensionSpec(f"org.example.ext{number}", "1.5", wat(body, imports), services=uses, **fields)


def words(text):
    """What the guest sent: words in hex, and what it or an extension put between them."""
    return text.decode("latin-1").split()


BELL = {"hypercalls": (HypercallRange(16, 16),)}
FREE = '(func (export "on_hypercall") (param i32 i32 i32 i32 i32) (result i64) (i64.const 0))'


def test_the_defaults_answer_when_nobody_else_does(engine, run, wat):
    alone = words(run(engine, "services"))
    # Without a doorbell EAX stays what it was: 0, 3, 4, 1, 9.
    assert [alone[0], alone[3:]] == [
        "00235959",
        ["00000000", "00000003", "00000004", "00000001", "00000009"] + ["00000000"] * 2,
    ]
    plugged = words(run(engine, "services", spec(wat, FREE, **BELL)))
    assert plugged[0] == "00235959"
    assert plugged[2] == alone[2]
    assert plugged[3:6] == ["56474654", "hi!00000003", f"{len('org.example.ext1 1.5'):08x}"]
    assert plugged[6:8] == ["org.example.ext1", "1.5" + plugged[7][3:]]
    assert plugged[8:] == ["ffffffff", "00000000", "00000000"]


def test_an_extension_takes_the_clock_over(engine, run, wat):
    assert words(run(engine, "services", spec(wat, CLOCK, "rtc")))[0] == "00123456"


def test_an_extension_that_passes_leaves_the_default(engine, run, wat):
    everything = ("rtc", "time", "console", "cpuid", "disk", "entropy:chain", "hypercall:chain")
    passed = words(run(engine, "services", spec(wat, PASS, *everything)))
    plain = words(run(engine, "services", spec(wat, FREE, **BELL)))
    assert (passed[0], passed[2:7], passed[8:]) == (plain[0], plain[2:7], plain[8:])


def test_time_and_cpuid(engine, run, wat):
    ticks = SERVE.format("(i64.const 0x12345)")
    leaf = GIVE.format(16)
    leaves = spec(wat, leaf + data("\\01\\00\\00\\40vmgraftvmgraft"), "cpuid", imports=SET, number=2)
    seen = words(run(engine, "services", spec(wat, ticks, "time"), leaves))
    assert seen[1] == "00012345"
    assert bytes.fromhex(seen[2])[::-1] == b"vmgr"


def test_console_bytes_are_replaced(engine, run, wat):
    """Stars for everything; the guest's own bytes go nowhere."""
    text = run(engine, "services", spec(wat, GIVE.format(1) + data("*"), "console", imports=SET))
    assert set(text) == {ord("*")}
    assert len(text) > 60


def test_console_bytes_are_dropped(run, wat):
    assert run(Engine.SOFT, "services", spec(wat, SERVE.format("(i64.const 0)"), "console")) == b""


def test_entropy_and_the_hypercall_table(engine, run, wat):
    entropy = spec(wat, GIVE.format(8) + data("\\78\\56\\34\\12\\00\\00\\00\\00"), "entropy", imports=SET)
    nine = """(if (i64.ne (local.get $a) (i64.const 9)) (then (return (i64.const -1))))
        (drop (call $get (i32.const 0) (i32.const 8) (i32.const 4))) (i64.store8 (i32.const 9) (i64.const 0x77))
        (call $set (i32.const 8) (i32.const 8)) (i64.const 8)"""
    get = '(import "vmgraft" "get_buffer" (func $get (param i32 i32 i32) (result i32)))'
    table = spec(wat, SERVE.format(nine), "hypercall", imports=SET + get, number=2)
    seen = words(run(engine, "services", entropy, table))
    assert seen[-4:-2] == ["1.512345678", "00007705"]
    assert "hi!00000003" in seen  # the other numbers are still the host's


def test_chains_are_asked_first_and_in_order(run, wat):
    late, early = SERVE.format("(i64.const 3661)"), SERVE.format("(i64.const 7322)")
    override = spec(wat, CLOCK, "rtc", number=1)
    assert words(run(Engine.SOFT, "services", override, spec(wat, late, "rtc:chain", number=2)))[0] == "00010101"
    both = (spec(wat, early, "rtc:chain", number=2), spec(wat, late, "rtc:chain", number=3))
    assert words(run(Engine.SOFT, "services", override, *both))[0] == "00020202"
    passing = spec(wat, PASS, "rtc:chain", number=2)
    assert words(run(Engine.SOFT, "services", override, passing))[0] == "00123456"


def test_two_overrides_of_one_service_are_refused(run, wat):
    with pytest.raises(CapabilityError, match=r"org.example.ext2 takes over the service rtc, which org.example.ext1"):
        run(Engine.SOFT, "services", spec(wat, CLOCK, "rtc"), spec(wat, CLOCK, "rtc", number=2))


@pytest.mark.parametrize(
    "body", ["unreachable", "(loop br 0) unreachable", "(i64.const 99999999999)", "(i64.const -2)"]
)
def test_after_a_fault_the_default_is_back(engine, bench, run, wat, body):
    seen = words(run(engine, "services", spec(wat, SERVE.format(body), "rtc", on_fault="detach")))
    assert seen[0] == "00235959"
    kinds = {record["kind"] for record in bench.records("fault")}
    assert len(kinds) == 1
    assert kinds <= {"trap", "fuel", "answer"}


DISK = """(if (i64.ne (i64.and (local.get $b) (i64.const 0x100000000)) (i64.const 0)) (then (return (i64.const 1))))
    (call $set (i32.const 0) (i32.const 32)) (i64.const 0)"""


def test_the_disk_service_reads_ahead_and_refuses_writes(engine, run, wat, guests):
    #: Sectors 1024-1279 are blocks 8 and 9; the second range lies outside the disk.
    hints = data(
        "\\00\\04\\00\\00\\00\\00\\00\\00\\00\\01\\00\\00\\00\\00\\00\\00\\ff\\ff\\ff\\ff\\ff\\ff\\ff\\ff\\ff\\ff\\ff\\ff\\ff\\ff\\ff\\7f"
    )
    content = patterned(guests["services"])
    seen = words(run(engine, "services", spec(wat, SERVE.format(DISK) + hints, "disk", imports=SET), content=content))
    assert seen[-2:] == ["00000000", "000000cc"]  # read well; write fault
    assert (8 * 65536, 2 * 65536) in content.reads
    assert all(length <= 131072 for _offset, length in content.reads)


@pytest.mark.parametrize("use", ["rtc", "console", "entropy", "time", "disk", "cpuid", "hypercall"])
def test_a_service_changes_no_other_port(run, bench, wat, guests, use):
    """The trace outside what the guest then does otherwise: same ports in the same order, doorbell apart."""

    def ports(*specs):
        traces = []
        machine_run(traces, *specs)
        return [(event.write, event.port, event.size) for event in traces if event.port not in {0x564, 0xE9}]

    def machine_run(traces, *specs):
        disk = VerifiedDisk(patterned(guests["services"]), lambda _index, _data: True)
        with Machine(Engine.SOFT, disk, timeout=30, trace=True, rtc_epoch=0, memory_mib=16) as machine:
            host = bench.host(*specs)
            host.claim(machine.bus)
            traces.extend(machine.run().trace)
            host.close()

    passing = spec(wat, PASS, use)
    without = [event for event in ports() if event[1] != 0x3F8]
    assert [event for event in ports(passing) if event[1] != 0x3F8] == without


IRQ = """(import "vmgraft" "irq" (func $irq (param i32 i32)))"""
LINE = """(func (export "on_pio_write") (param i32 i32 i32) (result i32)
    (call $irq (i32.const 5) (i32.eq (local.get 0) (i32.const 0x510))) (i32.const 0))"""


def line(wat, body=LINE, **fields):
    return ExtensionSpec("org.example.line", "1", wat(body, IRQ), pio=(PioRange(0x510, 0x511),), irqs=(5,), **fields)


def test_an_extension_interrupts_the_guest(engine, run, wat):
    assert run(engine, "irq", line(wat)) == b"three"


def test_a_line_that_is_not_granted(bench, wat):
    body = LINE.replace("i32.const 5)", "i32.const 7)")
    host = bench.host(line(wat, body, on_fault="detach"))
    host.proxies[0].pio_write(0x510, 1, 0)
    fault = bench.records("fault")[0]
    assert (fault["kind"], fault["detail"]) == ("trap", "interrupt line 7 is not granted")


def test_the_line_falls_with_the_worker(bench, wat):
    levels = []
    start = '(func (export "on_start") (param i32) (result i32) (call $irq (i32.const 5) (i32.const 1)) (i32.const 0))'
    trap = '(func (export "on_pio_read") (param i32 i32) (result i64) unreachable)'
    host = bench.host(line(wat, start + trap, on_fault="restart(1)"))
    proxy = host.proxies[0]
    proxy.irqs.connect({5: levels.append})
    assert levels == [True]  # raised before there was a machine
    proxy.pio_read(0x510, 1)
    assert levels == [True, False, True]  # the next worker raised it again
    host.close()
    assert levels == [True, False, True, False]


def test_a_service_that_does_not_exist():
    with pytest.raises(UsageError, match="is no service"):
        ServiceUse("bios")
    with pytest.raises(UsageError, match="twice"):
        ExtensionSpec("org.example.x", "1", b"", services=(ServiceUse("rtc"), ServiceUse("rtc", chain=True)))


# --- changes while a guest runs --------------------------------------------------------------------------------


def poked(wat, value, **fields):
    body = f'(func (export "on_pio_read") (param i32 i32) (result i64) (i64.const {value}))'
    return ExtensionSpec("org.example.poked", "1", wat(body), pio=(PioRange(0x510, 0x517),), **fields)


@pytest.mark.parametrize(
    ("first", "change", "answers"),
    [
        (None, lambda host, wat: host.load(poked(wat, 7)), [0xFFFFFFFF] * 10 + [7] * 6),
        (5, lambda host, wat: host.replace(poked(wat, 7)), [5] * 10 + [7] * 6),
        (5, lambda host, _wat: host.unload("org.example.poked"), [5] * 10 + [0xFFFFFFFF] * 6),
    ],
    ids=["load", "replace", "unload"],
)
def test_extensions_change_under_a_running_guest(engine, run, wat, first, change, answers):
    alone = run(engine, "poke")
    without = [event for event in run.trace if not 0x510 <= event.port <= 0x517]
    specs = [] if first is None else [poked(wat, first)]
    assert run(engine, "poke", *specs, during=lambda host, _machine: change(host, wat)) == alone
    assert [event.value for event in run.trace if event.port == 0x510] == answers
    assert [event for event in run.trace if not 0x510 <= event.port <= 0x517] == without


def test_a_replacement_that_is_refused_goes_unnoticed_by_the_guest(engine, run, wat):
    def attempt(host, _machine):
        with pytest.raises(CapabilityError):
            host.replace(ExtensionSpec("org.example.poked", "2", wat(""), pio=(PioRange(0x60, 0x60),)))

    run(engine, "poke", poked(wat, 5), during=attempt)
    assert [event.value for event in run.trace if event.port == 0x510] == [5] * 16
