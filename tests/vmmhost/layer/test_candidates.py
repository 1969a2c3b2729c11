"""An extension that is refused on a running machine leaves nothing behind there, and cannot end the guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmgraft.errors import CapabilityError, ExtensionFaultError, RollbackError
from vmgraft.vmmhost.core.bus import Bus
from vmgraft.vmmhost.core.memory import GuestRam
from vmgraft.vmmhost.layer.proxy import State
from vmgraft.vmmhost.layer.spec import ExtensionSpec, GuestWindow, MmioRange, PioRange
from vmgraft.vmmhost.setup import LayerLog

ONES = 0xFFFFFFFF
START = '(func (export "on_start") (param i32) (result i32) {})'
BUFFER = """(import "vmgraft" "get_buffer" (func $load (param i32 i32 i32) (result i32)))
    (import "vmgraft" "set_buffer" (func $set (param i32 i32)))"""
#: Keeps a number that port writes set, reads show, and states carry.
KEEPER = """
    (func (export "on_pio_read") (param i32 i32) (result i64) (i64.load (i32.const 0)))
    (func (export "on_pio_write") (param i32 i32 i32) (result i32)
      (i64.store (i32.const 0) (i64.extend_i32_u (local.get 2))) (i32.const 0))
    (func (export "on_snapshot") (result i32) (call $set (i32.const 0) (i32.const 8)) (i32.const 8))
    (func (export "on_restore") (param i32) (result i32)
      (i32.ne (call $load (i32.const 0) (i32.const 0) (local.get 0)) (i32.const 8)))"""
STOP = '(import "vmgraft" "stop" (func $stop))'
ASKS = START.format("(call $stop) (i32.const 0)")
RESTORES = "(i32.ne (call $load"
OWN = (PioRange(0x510, 0x513),)


def extension(wat, body, number=1, imports="", version="1", **fields):
    return ExtensionSpec(f"org.example.ext{number}", version, wat(body, imports), **{"pio": OWN} | fields)


def keeper(wat):
    return extension(wat, KEEPER, imports=BUFFER)


def constant(value):
    return f'(func (export "on_pio_read") (param i32 i32) (result i64) (i64.const {value}))'


@pytest.fixture
def machine(bench):
    """A host on a real bus, without a guest."""

    def build(*specs):
        bus, host = Bus(1 << 24), bench.host(*specs)
        host.claim(bus)
        return host, bus

    return build


def refuse():
    raise RollbackError("a newer one got ready")


def asking(wat, number, **fields):
    ports = (PioRange(0x600, 0x603),) if number == 2 else OWN
    return extension(wat, KEEPER + ASKS, number, imports=BUFFER + STOP, stop=True, pio=ports, version="2", **fields)


@pytest.mark.parametrize("number", [1, 2])
def test_a_stop_that_a_refused_one_asked_for_is_dropped(bench, machine, wat, number):
    host, bus = machine(keeper(wat))
    bus.pio_write(0x510, 4, 77)
    change = host.replace if number == 1 else host.load
    with pytest.raises(RollbackError):
        change(asking(wat, number), refuse)
    assert bench.stops == [] and bench.records("stop-request") == []
    assert bus.pio_read(0x510, 4) == 77 and bus.pio_read(0x600, 4) == ONES
    assert len(host.proxies) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_one_that_is_taken_may_stop_the_guest(bench, machine, wat, number):
    host, _bus = machine(keeper(wat))
    change = host.replace if number == 1 else host.load
    seen = []
    change(asking(wat, number), lambda: seen.append(list(bench.stops)))
    assert seen == [[]], "not before it is in the set"
    assert bench.stops == [f"extension org.example.ext{number} asked to stop the guest"]
    # The record is the last one before the stop, by which the run knows that no penalty is meant (setup.LayerLog).
    assert [event for event, _ in bench.audit][-1] == "stop-request"
    log = LayerLog(lambda _event, _fields: None)
    for event, fields in bench.audit:
        log.write(event, fields)
    assert log.stop_reason().value == "shutdown"


def test_one_that_was_taken_stops_the_guest_by_its_faults(bench, machine, wat):
    host, bus = machine()
    trap = '(func (export "on_pio_read") (param i32 i32) (result i64) unreachable)'
    host.load(extension(wat, trap, on_fault="stop"))
    assert bench.stops == [] and bus.pio_read(0x510, 4) == ONES
    assert len(bench.stops) == 1 and "trap" in bench.stops[0]
    assert bench.records("fault")[-1]["action"] == "stop"


@pytest.mark.parametrize("on_fault", ["stop", "detach", "restart(1)"])
@pytest.mark.parametrize("where", ["on_start", "on_restore"])
def test_a_fault_of_a_candidate_is_its_own_affair(bench, machine, wat, on_fault, where):
    host, bus = machine(keeper(wat))
    bus.pio_write(0x510, 4, 77)
    body = KEEPER + START.format("unreachable")
    if where == "on_restore":
        assert RESTORES in KEEPER
        body = KEEPER.replace(RESTORES, "(unreachable) " + RESTORES)
    with pytest.raises(ExtensionFaultError):
        host.replace(extension(wat, body, imports=BUFFER, version="2", on_fault=on_fault))
    assert bench.stops == []
    assert {record["version"] for record in bench.records("fault")} == {"2"}
    assert "stop" not in {record["action"] for record in bench.records("fault")}
    assert bus.pio_read(0x510, 4) == 77
    assert [proxy.state for proxy in host.proxies] == [State.RUNNING]


def test_a_load_that_fails_half_way_gives_its_claims_back(bench, machine, wat):
    """The ports are claimed before the clash is found."""
    host, bus = machine(extension(wat, constant(1), mmio=(MmioRange(0xE0000000, 4096),)))
    clash = extension(wat, constant(2), 2, pio=(PioRange(0x600, 0x603),), mmio=(MmioRange(0xE0000000, 4096),))
    with pytest.raises(CapabilityError):
        host.load(clash)
    assert bus.pio_read(0x600, 4) == ONES
    host.load(extension(wat, constant(3), 3, pio=(PioRange(0x600, 0x603),)))
    assert (bus.pio_read(0x600, 4), bus.pio_read(0x510, 4)) == (3, 1)
    assert bench.stops == []


WRITE = '(import "vmgraft" "guest_write" (func $write (param i64 i32 i32) (result i32)))'


def files_of_windows():
    """Sizes of this process's open window files."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]  # the folder's own is gone by now
    return sorted(link.stat().st_size for link in links if "vmgraft-window" in str(link.readlink()))


@pytest.fixture
def ram(bench):
    """Guest memory that can be shared."""
    memory = bench.ram = GuestRam(2)
    yield memory
    for host in bench.hosts:
        host.close()
    memory.close()


def writer(wat, number, gpa, size=0x2000, version="1"):
    """Writes five bytes at the start and the end of its window when it starts."""
    places = (gpa, gpa + size - 5)
    start = "".join(f"(drop (call $write (i64.const {at}) (i32.const 0) (i32.const 5)))" for at in places)
    body = '(data (i32.const 0) "hello")' + START.format(start + " (i32.const 0)")
    return extension(
        wat, body, number, WRITE, version, pio=(), windows=(GuestWindow(gpa, size, True), GuestWindow(0x60000, 0x1000))
    )


def test_the_files_of_windows_go_with_the_last_who_had_them(bench, ram, machine, wat):
    before = files_of_windows()
    host, _bus = machine(keeper(wat))
    ram.write(0x11000, b"the guest's own")
    for _ in range(2):
        host.load(writer(wat, 2, 0x10000))
        host.load(writer(wat, 3, 0x20000))
        assert files_of_windows() == sorted([*before, 0x1000, 0x2000, 0x2000])
        host.replace(writer(wat, 2, 0x30000, 0x1000, version="2"))
        assert files_of_windows() == sorted([*before, 0x1000, 0x1000, 0x2000])
        with pytest.raises(RollbackError):
            host.load(writer(wat, 4, 0x40000), refuse)
        with pytest.raises(RollbackError):
            host.replace(writer(wat, 2, 0x50000, version="3"), refuse)
        assert files_of_windows() == sorted([*before, 0x1000, 0x1000, 0x2000])
        host.unload("org.example.ext2")
        host.unload("org.example.ext3")
        assert files_of_windows() == before
    # What stands there is what was written; and guest and host go on writing.
    assert [ram.read(at, 5) for at in (0x10000, 0x11FFB, 0x20000, 0x30FFB)] == [b"hello"] * 4
    assert ram.read(0x11000, 15) == b"the guest's own" and ram.read(0x12000, 16) == bytes(16)
    ram.write(0x10000, b"again")
    assert ram.read(0x10000, 5) == b"again"
    # A stretch that overlaps one of before can be shared now.
    host.load(writer(wat, 5, 0x11000))
    assert files_of_windows() == sorted([*before, 0x1000, 0x2000])
