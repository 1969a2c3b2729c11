"""Default services in the core alone: who is asked, what an answer may be, and what the defaults do with nonsense."""

from __future__ import annotations

import struct

import pytest

from vmgraft.errors import CapabilityError, ContentMismatchError, FileError
from vmgraft.vmmhost.core import kvm_abi as abi
from vmgraft.vmmhost.core.bus import DISCOVERY_MAGIC, DOORBELL_PORT, Bus
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import AHEAD_BLOCKS, BLOCK, CACHE_BLOCKS, VerifiedDisk
from vmgraft.vmmhost.core.diskhook import AHEAD_MAX, HookedDisk, WriteRefusedError
from vmgraft.vmmhost.core.hypercalls import CONSOLE_MAX, REFUSED, DefaultHypercalls
from vmgraft.vmmhost.core.kvmcpu import with_leaves
from vmgraft.vmmhost.core.services import (
    CPUID_LEAVES,
    DISK_WRITE,
    RTC_END,
    SERVICES,
    TICKS_PER_DAY,
    Answer,
    Service,
    ServiceTable,
    problem,
    repeatable_entropy,
)
from vmgraft.vmmhost.core.softcpu import SoftCpu

RAM_END = 1 << 24
NO_ARGS = (0, 0, 0, 0)


class Handler:
    """Answers always the same, and remembers what it was asked."""

    def __init__(self, answer=None):
        self.answer, self.asked = answer, []

    def serve(self, service, a0, a1, data):
        self.asked.append((service, a0, a1, data))
        return self.answer


def table(service, answer):
    made, handler = ServiceTable(), Handler(answer)
    made.register(service, handler, "x")
    return made, handler


# --- the table -----------------------------------------------------------------------------------------------


def test_every_service_has_a_default():
    bare = ServiceTable()
    assert bare.rtc(5) == 5
    assert bare.ticks(6) == 6
    assert bare.console(b"abc") == b"abc"
    assert bare.entropy() != bare.entropy()
    assert ServiceTable(entropy=lambda count: bytes(range(count))).entropy() == 0x0706050403020100
    assert bare.disk(1, 2, write=True, drive=0) == (True, ())
    assert bare.cpuid() == {}
    assert bare.hypercall(9, NO_ARGS) is None
    assert not any(bare.served(service) for service in Service)
    assert SERVICES == ("rtc", "console", "entropy", "time", "disk", "cpuid", "hypercall")


def test_entropy_that_can_be_repeated():
    one, again, other = (ServiceTable(entropy=repeatable_entropy(seed)) for seed in (b"a", b"a", b"b"))
    values = [one.entropy(), one.entropy()]
    assert [again.entropy(), again.entropy()] == values
    assert len({*values, other.entropy()}) == 3


def test_what_handlers_are_asked():
    made, handler = ServiceTable(), Handler()
    for service in Service:
        made.register(service, handler, "x")
    made.rtc(5)
    made.ticks(6)
    made.console(b"abc")
    made.entropy()
    made.disk(7, 8, write=True, drive=2)
    made.hypercall(9, (1, 2, 3, 0xFFFFFFFF))
    assert handler.asked == [
        (Service.RTC, 5, 0, b""),
        (Service.TIME, 6, 0, b""),
        (Service.CONSOLE, 3, 0, b"abc"),
        (Service.ENTROPY, 8, 0, b""),
        (Service.DISK, 7, 8 | DISK_WRITE | 2 << 40, b""),
        (Service.HYPERCALL, 9, 0, struct.pack("<4I", 1, 2, 3, 0xFFFFFFFF)),
    ]
    handler.asked.clear()
    assert made.cpuid() == {}
    assert [asked[1] for asked in handler.asked] == list(CPUID_LEAVES)


def test_console_output_is_asked_about_in_pieces():
    made, handler = table(Service.CONSOLE, None)
    text = bytes(range(256)) * 40
    assert made.console(text) == text
    assert [asked[1] for asked in handler.asked] == [4096, 4096, 2048]


def test_the_order_of_asking_and_the_way_back():
    made = ServiceTable()
    order = []

    def named(name, answer=None):
        handler = Handler(answer)
        serve = handler.serve
        handler.serve = lambda *args: order.append(name) or serve(*args)
        return handler

    made.register(Service.RTC, named("override", Answer(1)), "a")
    made.register(Service.RTC, named("late"), "b", chain=True, rank=2)
    made.register(Service.RTC, named("early"), "c", chain=True, rank=1)
    assert made.rtc(9) == 1
    assert order == ["early", "late", "override"]
    with pytest.raises(CapabilityError, match="which a has taken over"):
        made.register(Service.RTC, Handler(), "d")
    undo = made.release("a")
    assert made.rtc(9) == 9
    assert made.owners() == {"b", "c"}
    undo()
    assert made.rtc(9) == 1


@pytest.mark.parametrize(
    ("service", "a0", "answer", "good"),
    [
        (Service.RTC, 0, Answer(RTC_END - 1), True),
        (Service.RTC, 0, Answer(RTC_END), False),
        (Service.RTC, 0, Answer(1, b"x"), False),
        (Service.TIME, 0, Answer(TICKS_PER_DAY - 1), True),
        (Service.TIME, 0, Answer(TICKS_PER_DAY), False),
        (Service.TIME, 0, Answer(0, b"x"), False),
        (Service.CONSOLE, 1, Answer(0), True),
        (Service.CONSOLE, 1, Answer(4096, bytes(4096)), True),
        (Service.CONSOLE, 1, Answer(1), False),
        (Service.CONSOLE, 1, Answer(4097, bytes(4097)), False),
        (Service.ENTROPY, 8, Answer(8, bytes(8)), True),
        (Service.ENTROPY, 8, Answer(7, bytes(7)), False),
        (Service.ENTROPY, 8, Answer(8, bytes(7)), False),
        (Service.DISK, 0, Answer(0, bytes(32 * 16)), True),
        (Service.DISK, 0, Answer(1), True),
        (Service.DISK, 0, Answer(2), False),
        (Service.DISK, 0, Answer(0, bytes(15)), False),
        (Service.DISK, 0, Answer(0, bytes(33 * 16)), False),
        (Service.CPUID, 0x40000000, Answer(16, bytes(16)), True),
        (Service.CPUID, 0x40000000, Answer(0), False),
        (Service.HYPERCALL, 9, Answer(8, bytes(8)), True),
        (Service.HYPERCALL, 9, Answer(1 << 63, bytes(8)), False),
    ],
)
def test_what_an_answer_may_be(service, a0, answer, good):
    assert (problem(service, a0, answer) is None) is good


# --- default hypercalls -----------------------------------------------------------------------------------------------


class Ram:
    def __init__(self):
        self.bytes = bytearray(8192)

    def read(self, gpa, length):
        if gpa + length > len(self.bytes):
            raise ValueError("no RAM")
        return bytes(self.bytes[gpa : gpa + length])

    def write(self, gpa, data):
        if gpa + len(data) > len(self.bytes):
            raise ValueError("no RAM")
        self.bytes[gpa : gpa + len(data)] = data


@pytest.fixture
def calls():
    ram, console = Ram(), bytearray()
    made = DefaultHypercalls(
        ServiceTable(entropy=lambda count: b"\xaa" * count), ram, lambda: 0x123456789,
        console=console.extend, names=lambda: ("a 1", "b 2"),
    )  # fmt: skip
    made.ram, made.out = ram, console
    return made


def test_the_default_numbers(calls):
    calls.ram.bytes[:3] = b"abc"
    assert calls.hypercall(1, NO_ARGS) == 0xAAAAAAAAAAAAAAAA
    assert calls.hypercall(2, NO_ARGS) == 0x123456789
    assert calls.hypercall(3, (0, 3, 0, 0)) == 3
    assert bytes(calls.out) == b"abc"
    assert calls.hypercall(4, (1, 100, 64, 0)) == 3
    assert calls.ram.bytes[100:104] == b"b 2\0"
    assert calls.hypercall(4, (0, 200, 1, 0)) == 1
    assert calls.ram.bytes[200:202] == b"a\0"


@pytest.mark.parametrize(
    ("number", "args"),
    [
        (3, (0, CONSOLE_MAX + 1, 0, 0)),
        (3, (8190, 3, 0, 0)),
        (3, (0xFFFFFFFF, 0xFFFFFFFF, 0, 0)),
        (4, (2, 0, 64, 0)),
        (4, (0xFFFFFFFF, 0, 64, 0)),
        (4, (0, 8190, 64, 0)),
        (4, (0, 0xFFFFFFFF, 0xFFFFFFFF, 0)),
        (5, NO_ARGS),
        (15, NO_ARGS),
    ],
)
def test_nonsense_is_answered_with_all_ones(calls, number, args):
    before = bytes(calls.ram.bytes)
    assert calls.hypercall(number, args) == REFUSED
    assert bytes(calls.ram.bytes) == before
    assert not calls.out


# --- the bus -----------------------------------------------------------------------------------------------


class Device:
    def pio_read(self, _offset, _size):
        return 0x11

    def pio_write(self, _offset, _size, _value):
        return None

    def mmio_read(self, _offset, _size):
        return 0x22

    def mmio_write(self, _offset, _size, _value):
        return None

    def hypercall(self, _number, _args):
        return 0x33


def claimed(bus, owner="x"):
    device = Device()
    bus.claim_pio(0x510, 0x511, device, owner)
    bus.claim_mmio(0xD0000, 16, device, owner)
    bus.claim_hypercall(16, 17, device, owner)
    bus.claim_service(Service.RTC, Handler(Answer(5)), owner)
    return bus.claim_irq(5, owner)


def view(bus):
    return (
        bus.pio_read(0x510, 1), bus.mmio_read(0xD0000, 1), bus.hypercall(16, NO_ARGS), bus.services.rtc(1),
        bus.owners(), bus.ports_of("x"), DOORBELL_PORT in bus._ports,
    )  # fmt: skip


def test_release_frees_everything_and_can_be_undone():
    bus, levels = Bus(RAM_END), []
    bus.irq_driver = lambda line, level: levels.append((line, level))
    drive = claimed(bus)
    drive(True)
    held = view(bus)
    assert held == (0x11, 0x22, 0x33, 5, ("x",), ((0x510, 0x511),), True)
    undo = bus.release("x")
    assert view(bus) == (0xFF, 0xFF, (1 << 64) - 1, 1, (), (), False)
    drive(False)  # no longer its line
    assert levels == [(5, True)]
    undo()
    assert view(bus) == held
    drive(False)
    assert levels == [(5, True), (5, False)]
    bus.release("x")
    claimed(bus, "y")
    assert bus.owners() == ("y",)
    with pytest.raises(ValueError, match="core"):
        bus.release("core")


@pytest.mark.parametrize("line", [-1, 16, 0, 1, 2, 4])
def test_lines_that_nobody_gets(line):
    with pytest.raises(CapabilityError, match=f"interrupt line {line}"):
        Bus(RAM_END).claim_irq(line, "x")


def test_a_line_has_one_owner():
    bus = Bus(RAM_END)
    bus.claim_irq(5, "x")
    with pytest.raises(CapabilityError, match="which x holds"):
        bus.claim_irq(5, "y")


@pytest.mark.parametrize("service", list(Service))
def test_the_doorbell_comes_with_what_is_behind_it(service):
    bus = Bus(RAM_END)
    bus.claim_service(service, Handler(), "x", chain=True)
    assert (DOORBELL_PORT in bus._ports) is (service in {Service.HYPERCALL, Service.ENTROPY})
    assert bus.hypercall(0, NO_ARGS) == DISCOVERY_MAGIC | 1 << 32
    bus.describe("x", "x 1.0")
    bus.describe("nobody", "0")
    assert bus.descriptions() == ("x 1.0",)


# --- the disk -----------------------------------------------------------------------------------------------


class Content:
    sector_size = 512

    def __init__(self, size, bad=()):
        self.virtual_size, self.bad, self.reads = size, set(bad), []

    def read(self, offset, length):
        self.reads.append((offset // BLOCK, (length + BLOCK - 1) // BLOCK))
        if "unreadable" in self.bad:
            raise FileError("the medium failed")
        return b"".join(
            bytes((index % 251,)) * min(BLOCK, self.virtual_size - index * BLOCK)
            for index in range(offset // BLOCK, (offset + length + BLOCK - 1) // BLOCK)
        )[:length]


def drive(content):
    return VerifiedDisk(content, lambda index, block: index not in content.bad and set(block) == {index % 251})


def test_reading_ahead_takes_few_reads_and_checks_every_block():
    content = Content(20 * BLOCK + 1000)
    disk = drive(content)
    disk.read(3 * BLOCK, 1)
    disk.write(5 * BLOCK, b"changed")
    content.reads.clear()
    disk.prefetch(0, 100)
    assert content.reads == [(0, 3), (4, 1), (6, 15)]
    checked = disk.blocks_checked
    assert checked == 2 + 19
    content.reads.clear()
    assert disk.read(20 * BLOCK, 1000) == bytes((20,)) * 1000
    assert content.reads == []
    disk.prefetch(0, 100)
    assert content.reads == []


def test_reading_ahead_neither_fails_nor_keeps_what_is_wrong():
    content = Content(8 * BLOCK, bad={2})
    disk = drive(content)
    disk.prefetch(0, 4)
    assert disk.blocks_checked == 3
    with pytest.raises(ContentMismatchError):
        disk.read(2 * BLOCK, 1)
    broken = Content(8 * BLOCK, bad={"unreadable"})
    drive(broken).prefetch(0, 4)
    assert broken.reads == [(0, 4)]
    for first, count in ((8, 4), (100, 1), (-5, 2), (0, 0), (0, -1)):
        drive(content).prefetch(first, count)


def test_reading_ahead_is_bounded():
    content = Content(1000 * BLOCK)
    drive(content).prefetch(0, 1000)
    assert content.reads == [(at, AHEAD_BLOCKS) for at in range(0, CACHE_BLOCKS // 2, AHEAD_BLOCKS)]


def test_hints_come_before_the_read_and_stay_in_their_budget():
    content = Content(1000 * BLOCK)
    ranges = struct.pack("<4Q", 0, 64 * 128, 500 * 128, 1 << 60)
    services, handler = table(Service.DISK, Answer(0, ranges))
    disk = HookedDisk(drive(content), services, 3)
    assert disk.read(512, 1024) == bytes(1024)
    assert handler.asked == [(Service.DISK, 1, 2 | 3 << 40, b"")]
    disk.settle()
    ahead = [*range(64), *range(500, 500 + AHEAD_MAX // BLOCK - 64)]
    fetched = [block for first, count in content.reads for block in range(first, first + count)]
    assert sorted(set(fetched)) == ahead
    assert len(fetched) - len(ahead) <= 1  # the guest was quicker with the first one, or was not
    assert (disk.size, disk.sector_size, disk.blocks_written) == (1000 * BLOCK, 512, 0)
    content.reads.clear()
    assert disk.read(63 * BLOCK, 1) == bytes((63,))
    assert content.reads == []
    disk.close()


@pytest.mark.parametrize("sector", [1 << 63, (1 << 64) - 1, 1000 * 128, 0xFFFFFFFF])
def test_hints_outside_the_drive_do_nothing(sector):
    content = Content(1000 * BLOCK)
    services, _handler = table(Service.DISK, Answer(0, struct.pack("<2Q", sector, (1 << 64) - 1)))
    disk = HookedDisk(drive(content), services, 0)
    assert disk.read(0, 1) == b"\0"
    disk.settle()
    assert content.reads == [(0, 1)]
    disk.close()


def test_a_write_may_be_refused():
    services, handler = table(Service.DISK, Answer(1))
    disk = HookedDisk(drive(Content(4 * BLOCK)), services, 0)
    with pytest.raises(WriteRefusedError):
        disk.write(BLOCK, b"x")
    assert disk.blocks_written == 0
    assert disk.read(0, 1) == b"\0"  # a read is never refused
    handler.answer = Answer(0)
    disk.write(BLOCK, b"x")
    assert disk.blocks_written == 1
    for outside in (lambda: disk.read(-1, 1), lambda: disk.read(4 * BLOCK, 1), lambda: disk.write(4 * BLOCK, b"x")):
        with pytest.raises(ValueError, match="not inside"):
            outside()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (4 * BLOCK, 1), (4 * BLOCK - 1, 2), (BLOCK, -1), (1 << 70, 1)])
def test_nobody_is_asked_about_what_is_not_on_the_drive(offset, length):
    """The numbers of such a read would not even fit into the question."""
    services, handler = table(Service.DISK, Answer(0))
    disk = HookedDisk(drive(Content(4 * BLOCK)), services, 0)
    with pytest.raises(ValueError, match="not inside"):
        disk.read(offset, length)
    assert handler.asked == []
    disk.read(4 * BLOCK - 1, 1)
    assert len(handler.asked) == 1


# --- CPUID -----------------------------------------------------------------------------------------------


def entries(raw):
    count, _zero = abi.CPUID_HEADER.unpack_from(raw)
    assert len(raw) == abi.CPUID_HEADER.size + count * abi.CPUID_ENTRY_SIZE
    return [abi.CPUID_ENTRY.unpack_from(raw, 8 + 40 * index) for index in range(count)]


def kvm_table(*leaves):
    body = b"".join(abi.CPUID_ENTRY.pack(leaf, 0, 0, 9, 9, 9, 9) for leaf in leaves)
    return abi.CPUID_HEADER.pack(len(leaves), 0) + body + bytes(400)


def test_leaves_for_kvm():
    got = entries(
        with_leaves(kvm_table(1, 0x40000000, 0x80000000), {0x40000000: (1, 2, 3, 4), 0x40000001: (5, 6, 7, 8)})
    )
    assert got == [
        (1, 0, 0, 9, 9, 9, 9), (0x80000000, 0, 0, 9, 9, 9, 9), (0x40000000, 0, 0, 1, 2, 3, 4),
        (0x40000001, 0, 0, 5, 6, 7, 8),
    ]  # fmt: skip
    full = entries(with_leaves(kvm_table(*range(256)), {0x40000000: (1, 2, 3, 4)}))
    assert len(full) == 256
    assert full[-1] == (0x40000000, 0, 0, 1, 2, 3, 4)


def test_the_soft_cpu_has_no_hook_without_leaves(make_machine, monkeypatch):
    from vmgraft.vmmhost.core.probe import Engine

    shown = []
    monkeypatch.setattr(SoftCpu, "show_cpuid", lambda _self, leaves: shown.append(leaves))
    make_machine(Engine.SOFT, "halt").run()
    assert shown == []


def test_a_stop_before_the_first_instruction(engine, make_machine):
    """Whoever is asked for CPUID leaves may stop the run: the guest then never runs."""

    class Stopper:
        def serve(self, _service, _a0, _a1, _data):
            machine.stop(EndReason.FAULT, "broken")

    machine = make_machine(engine, "serial")
    machine.bus.claim_service(Service.CPUID, Stopper(), "x")
    result = machine.run()
    assert (result.reason, result.detail, result.serial) == (EndReason.FAULT, "broken", b"")
    assert result.exits.get("pio", 0) == 0
