"""Claims, conflicts, dispatch and the trace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import CapabilityError
from vmgraft.vmmhost.core import bus as bus_module
from vmgraft.vmmhost.core.bus import CORE, DISCOVERY_MAGIC, DOORBELL_PORT, Bus
from vmgraft.vmmhost.core.contract import EndReason, PioEvent
from vmgraft.vmmhost.core.portmap import planning_bus

RAM_END = 16 << 20
ONES = (1 << 64) - 1


class Recorder:
    """A device and hypercall handler that remembers."""

    def __init__(self, value: int = 0) -> None:
        self.value, self.seen = value, []

    def pio_read(self, offset, size):
        self.seen.append(("in", offset, size))
        return self.value

    def pio_write(self, offset, size, value):
        self.seen.append(("out", offset, size, value))

    def mmio_read(self, offset, size):
        self.seen.append(("read", offset, size))
        return self.value

    def mmio_write(self, offset, size, value):
        self.seen.append(("write", offset, size, value))

    def hypercall(self, number, args):
        self.seen.append((number, args))
        return self.value


def test_offsets_are_relative_and_values_masked():
    bus, device = Bus(RAM_END), Recorder(0x1_2345_6789)
    bus.claim_pio(0x510, 0x517, device, "clock")
    bus.claim_mmio(0xD0000, 0x1000, device, "clock")
    assert bus.pio_read(0x514, 4) == 0x23456789
    assert bus.pio_read(0x511, 1) == 0x89
    bus.pio_write(0x510, 2, 7)
    assert bus.mmio_read(0xD0010, 2) == 0x6789
    bus.mmio_write(0xD0FFC, 4, 9)
    assert device.seen == [("in", 4, 4), ("in", 1, 1), ("out", 0, 2, 7), ("read", 0x10, 2), ("write", 0xFFC, 4, 9)]


def test_unclaimed_accesses():
    bus = Bus(RAM_END)
    assert [bus.pio_read(0x1234, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    assert bus.mmio_read(0xD0000, 8) == ONES
    bus.pio_write(0x1234, 4, 1)
    bus.mmio_write(0xE0000000, 8, 1)


def test_wide_access_over_the_edge_is_split():
    bus, device = Bus(RAM_END), Recorder(0x42)
    bus.claim_pio(0x510, 0x511, device, "a")
    assert bus.pio_read(0x511, 4) == 0xFFFFFF42
    assert bus.pio_read(0x50F, 2) == 0x42FF
    bus.pio_write(0x50E, 4, 0x44332211)
    assert device.seen == [("in", 1, 1), ("in", 0, 1), ("out", 0, 1, 0x33), ("out", 1, 1, 0x44)]
    assert bus.mmio_read(0xFFFFFFFF, 8) == ONES


def test_wide_access_at_the_last_port_wraps():
    bus, device = Bus(RAM_END), Recorder(0x24)
    bus.claim_pio(0, 0, device, "a")
    assert bus.pio_read(0xFFFF, 2) == 0x24FF


@pytest.mark.parametrize(("first", "last"), [(0x500, 0x510), (0x517, 0x600), (0x512, 0x513), (0, 0xFFFF)])
def test_overlapping_ports_name_both_owners(first, last):
    bus = Bus(RAM_END)
    bus.claim_pio(0x510, 0x517, Recorder(), "org.example.clock")
    with pytest.raises(CapabilityError, match=r"other claims ports .* (org.example.clock|core)"):
        bus.claim_pio(first, last, Recorder(), "other")
    assert bus.owners() == ("org.example.clock",)


@pytest.mark.parametrize(("first", "last"), [(-1, 5), (5, 4), (0xFFFF, 0x10000)])
def test_ports_that_do_not_exist(first, last):
    with pytest.raises(CapabilityError, match="do not exist"):
        Bus(RAM_END).claim_pio(first, last, Recorder(), "a")


def test_doorbell_and_timer_ports_are_the_cores():
    bus = Bus(RAM_END)
    bus.reserve_irqchip()
    for first, last in (
        (DOORBELL_PORT, DOORBELL_PORT),
        (DOORBELL_PORT + 3, DOORBELL_PORT + 9),
        (0x43, 0x43),
        (0x20, 0x20),
    ):
        with pytest.raises(CapabilityError, match="core"):
            bus.claim_pio(first, last, Recorder(), "a")


@pytest.mark.parametrize(
    ("base", "size"),
    [
        *((0, 0x1000), (0xB8000, 0x1000), (0xBFFFF, 2), (0xEF000, 0x1001), (0xF0000, 16), (RAM_END - 1, 2)),
        *((0xD0000, 0), (0xFEE00000, 0x1000), (0xFFFFF000, 0x1000), (1 << 32, 0x1000), (-4096, 4096)),
    ],
)
def test_mmio_only_where_nothing_is(base, size):
    with pytest.raises(CapabilityError):
        Bus(RAM_END).claim_mmio(base, size, Recorder(), "a")


def test_overlapping_mmio_names_both_owners():
    bus = Bus(RAM_END)
    bus.claim_mmio(0xD0000, 0x1000, Recorder(), "first")
    bus.claim_mmio(0xD1000, 0x1000, Recorder(1), "second")
    bus.claim_mmio(0xC0000, 0x1000, Recorder(2), "third")
    with pytest.raises(CapabilityError, match=r"fourth claims MMIO .* second holds"):
        bus.claim_mmio(0xD1FFF, 1, Recorder(), "fourth")
    assert (bus.mmio_read(0xD1000, 1), bus.mmio_read(0xC0FFF, 1), bus.mmio_read(0xD2000, 1)) == (1, 2, 0xFF)


def test_hypercalls():
    bus, handler = Bus(RAM_END), Recorder(0x1122334455667788)
    with pytest.raises(CapabilityError, match="default hypercalls"):
        bus.claim_hypercall(0, 3, handler, "a")
    bus.claim_hypercall(16, 17, handler, "a")
    bus.claim_mmio(0xD0000, 16, handler, "b")
    with pytest.raises(CapabilityError, match=r"b claims hypercalls .* a holds"):
        bus.claim_hypercall(17, 20, handler, "b")
    assert bus.hypercall(0, (0, 0, 0, 0)) == DISCOVERY_MAGIC | 2 << 32
    assert bus.hypercall(16, (1, 2, 3, 4)) == 0x1122334455667788
    assert bus.hypercall(18, (0, 0, 0, 0)) == ONES
    assert handler.seen == [(16, (1, 2, 3, 4))]


def test_trace_is_bounded(monkeypatch):
    monkeypatch.setattr(bus_module, "TRACE_MAX", 3)
    bus = Bus(RAM_END, trace=True)
    for value in range(5):
        bus.pio_write(0x80, 1, value)
    assert bus.events == [PioEvent(True, 0x80, 1, value) for value in range(3)]
    assert bus.events_dropped == 2


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 64), st.sampled_from("abc")), max_size=30))
def test_every_port_has_at_most_one_owner(claims):
    bus, taken = Bus(RAM_END), dict.fromkeys(range(DOORBELL_PORT, DOORBELL_PORT + 4), CORE)
    for first, length, owner in claims:
        ports = range(first, first + length + 1)
        free = ports[-1] <= 0xFFFF and not any(port in taken for port in ports)
        try:
            bus.claim_pio(first, first + length, Recorder(), owner)
            accepted = True
        except CapabilityError:
            accepted = False
        assert accepted == free
        if accepted:
            taken |= dict.fromkeys(ports, owner)


# --- with a guest -------------------------------------------------------------------------------------------------


def test_guest_reaches_plugged_in_devices(engine, make_machine):
    machine = make_machine(engine, "doorbell")
    handler = Recorder(0xAAAABBBBCCCCDDDD)
    machine.bus.claim_hypercall(16, 16, handler, "x")
    machine.bus.claim_pio(0x510, 0x513, handler, "y")
    machine.bus.claim_mmio(0xD0000, 0x1000, handler, "z")
    result = machine.run()
    words = [int(word, 16) for word in result.serial.decode().split()]
    assert words == [
        *(DISCOVERY_MAGIC, 3),
        *(0xCCCCDDDD, 0xAAAABBBB),
        *(0xFFFFFFFF, 0xFFFFFFFF),
        *(0xCCCCDDDD, 0xCCCCDDDD),
    ]
    assert handler.seen == [
        (16, (0x11111111, 0x22222222, 0x33333333, 0x44444444)),
        *(("out", 0, 4, 0x01020304), ("in", 0, 4)),
        *(("write", 8, 4, 0x55667788), ("read", 8, 4)),
    ]


def test_without_hypercalls_there_is_no_doorbell(engine, run_guest):
    result = run_guest(engine, "doorbell")
    words = [int(word, 16) for word in result.serial.decode().split()]
    # EAX keeps the number that was written, EDX the port
    assert words == [0, 0x564, 16, 0x564, 99, 0x564, 0xFFFFFFFF, 0xFFFFFFFF]


def test_claim_changes_the_trace_nowhere_else(engine, make_machine):
    plain = make_machine(engine, "doorbell", trace=True, rtc_epoch=0).run()
    machine = make_machine(engine, "doorbell", trace=True, rtc_epoch=0)
    machine.bus.claim_pio(0x510, 0x513, Recorder(5), "y")
    plugged = machine.run()

    def elsewhere(result):
        # what the guest prints about the claimed port is not the core's doing
        return [event for event in result.trace if event.port not in (0x510, 0x3F8)]

    assert elsewhere(plain) == elsewhere(plugged)
    assert PioEvent(False, 0x510, 4, 0xFFFFFFFF) in plain.trace
    assert PioEvent(False, 0x510, 4, 5) in plugged.trace


def test_handler_may_stop_the_machine(engine, make_machine):
    machine = make_machine(engine, "doorbell")

    class Stopper(Recorder):
        def pio_write(self, offset, size, value):
            machine.stop(EndReason.FAULT, "x broke a rule")

    machine.bus.claim_pio(0x510, 0x513, Stopper(), "x")
    result = machine.run()
    assert (result.reason, result.detail) == (EndReason.FAULT, "x broke a rule")
    assert len(result.serial.split()) == 6


@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_accesses_of_odd_width_reach_a_device_byte_by_byte(size):
    """KVM cuts an access that crosses a page into pieces of any width; handlers know 1, 2, 4 and 8."""
    seen = []

    class Device:
        def mmio_read(self, offset, size):
            seen.append(size)
            return 0x100 | offset

        def mmio_write(self, offset, size, value):
            seen.append((size, offset, value))

    bus = Bus(RAM_END)
    bus.claim_mmio(0xD0000, 0x10, Device(), "a")
    assert bus.mmio_read(0xD0001, size) == int.from_bytes(range(1, size + 1), "little")
    bus.mmio_write(0xD0001, size, int.from_bytes(range(11, size + 11), "little"))
    assert seen == [1] * size + [(1, index + 1, index + 11) for index in range(size)]
    assert bus.mmio_read(0xD000F, size) >> 8 == (1 << 8 * (size - 1)) - 1  # beyond the claim nobody answers


def test_the_table_of_ports_is_what_a_machine_claims(make_machine, engine):
    assert make_machine(engine, "halt").bus.ports_of("core") == planning_bus(RAM_END).ports_of("core")
