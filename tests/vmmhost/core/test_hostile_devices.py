"""Devices of the SeaBIOS board under guests that write whatever they like: bounded, and never an exception."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmgraft.errors import ContentMismatchError
from vmgraft.vmmhost.core.boardset import Wiring, build_board
from vmgraft.vmmhost.core.bus import Bus
from vmgraft.vmmhost.core.devices.fwcfg import Fixed, FwCfg
from vmgraft.vmmhost.core.devices.scsicd import ScsiCd
from vmgraft.vmmhost.core.devices.virtioblk import VirtioBlk
from vmgraft.vmmhost.core.devices.virtiopci import REQUEST_MAX
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.drives import Drive, DriveKind
from vmgraft.vmmhost.core.portmap import FirmwareKind, ports
from vmgraft.vmmhost.core.seabios import FirmwareImage, Host, SeaBios
from vmgraft.vmmhost.core.services import ServiceTable
from vmgraft.vmmhost.core.shadow import FLASH_SIZE, ShadowedRam

MIB = 1 << 20
SIZE = 4 * MIB
#: Where the tests put the queue, its used ring, and buffers.
QUEUE, HEADER, DATA, STATUS = 0x10000, 0x20000, 0x30000, 0x40000
USED = QUEUE + 0x1000
ROM = bytes(range(256)) * (FLASH_SIZE // 256)


class FakeCpu:
    """As much of a CPU as a board needs."""

    def __init__(self, ram):
        self.ram, self.levels, self.now = ram, {}, 0

    def now_ns(self):
        self.now += 1000
        return self.now

    def set_irq(self, line, level):
        assert 0 <= line <= 15
        self.levels[line] = level


class Bench:
    """The board without a CPU."""

    def __init__(self, content, **options):
        self.ram = ShadowedRam(4, rom=ROM)
        self.bus, self.cpu, self.stops, self.debug = Bus(self.ram.size, services=ServiceTable()), None, [], bytearray()
        self.cpu = FakeCpu(self.ram)
        self.image = content(bytes(MIB))
        self.disk = VerifiedDisk(self.image, lambda _index, _block: True, **options)
        stop = lambda reason, detail="": self.stops.append((reason, detail))  # noqa: E731
        wiring = Wiring(stop, lambda _data: None, self.debug, 0, FirmwareKind.SEABIOS)
        self.board = build_board(self.cpu, self.bus, wiring)
        self.firmware = SeaBios(
            self.bus, self.ram, FirmwareImage("none", ROM),
            drives=[Drive(self.disk), Drive(self.disk, DriveKind.CDROM), Drive(self.disk, read_only=True)],
            keyboard=self.board.keyboard, keys="", host=Host(stop, self.cpu.set_irq, lambda: True, self.debug),
        )  # fmt: skip

    def config(self, slot, offset, size=4, value=None):
        self.bus.pio_write(0xCF8, 4, 1 << 31 | slot << 11 | offset & 0xFC)
        if value is None:
            return self.bus.pio_read(0xCFC + (offset & 3), size)
        return self.bus.pio_write(0xCFC + (offset & 3), size, value)

    def enable(self, slot=3, base=0xC000):
        for other in (3, 4, 5):
            self.config(other, 4, 2, 4)
        self.config(slot, 0x10, 4, base)
        self.config(slot, 4, 2, 5)
        return base

    def queue(self, descriptors, heads=(0,), slot=3, select=0):
        """Lay out a queue and ring the bell."""
        base = self.enable(slot)
        self.ram.write(QUEUE, b"".join(struct.pack("<QIHH", *each) for each in descriptors).ljust(128 * 16, b"\0"))
        self.ram.write(QUEUE + 2048, struct.pack(f"<HH{len(heads)}H", 0, len(heads) & 0xFFFF, *heads))
        self.ram.write(USED, bytes(0x1000))
        self.bus.pio_write(base + 0x12, 1, 7)
        self.bus.pio_write(base + 0x0E, 2, select)
        self.bus.pio_write(base + 8, 4, QUEUE >> 12)
        self.bus.pio_write(base + 0x10, 2, select)

    def request(self, kind, sector, length, *, slot=3, data=DATA):
        self.ram.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
        self.ram.put(STATUS, 1, 0x55)
        buffer = (data, length, 1 if kind == 1 else 3, 2)
        self.queue([(HEADER, 16, 1, 1), buffer, (STATUS, 1, 2, 0)], slot=slot)
        return self.ram.get(STATUS, 1)

    def used(self):
        return self.ram.get(USED + 2, 2)

    def broken(self, slot=3):
        return bool(self.bus.pio_read(0xC000 + 0x12, 1) & 0x40)


@pytest.fixture
def bench(content):
    made = Bench(content)
    yield made
    made.ram.close()


# --- virtio-blk ------------------------------------------------------------------------------------------------------


def test_reading_and_writing(bench):
    bench.image.data[512:516] = b"disk"
    assert bench.request(0, 1, 1024) == 0
    assert bench.ram.read(DATA, 4) == b"disk"
    assert struct.unpack("<HHII", bench.ram.read(USED, 12)) == (0, 1, 0, 1025)
    bench.ram.write(DATA, b"back" * 128)
    assert bench.request(1, 4, 512) == 0
    assert bench.disk.read(4 * 512, 4) == b"back"
    assert bench.request(8, 0, 20) == 0
    assert bench.ram.read(DATA, 20).rstrip(b"\0") == b"drive0"
    assert bench.request(4, 0, 0) == 0


@pytest.mark.parametrize(
    ("kind", "sector", "length", "data", "status"),
    [
        (0, MIB // 512, 512, DATA, 1),  # behind the end
        (0, (1 << 64) - 1, 512, DATA, 1),
        (0, 0, 511, DATA, 1),  # no whole sector
        (0, 0, 512, SIZE - 511, 1),  # a buffer that leaves RAM
        (0, 0, 512, (1 << 64) - 256, 1),
        (0, 0, REQUEST_MAX + 512, DATA, 1),
        (0, 0, 0xFFFFFFFF, DATA, 1),
        (0, 0, 512, 0xE0000, 1),  # shadow RAM that is read-only
        (1, MIB // 512, 512, DATA, 1),
        (1, 0, 512, SIZE, 1),
        (77, 0, 512, DATA, 2),  # no such request
    ],
)
def test_requests_that_fail_say_so(bench, kind, sector, length, data, status):
    before = bench.ram.read(0xE0000, 512)
    assert bench.request(kind, sector, length, data=data) == status
    assert bench.used() == 1
    assert not bench.broken()
    assert bench.ram.read(0xE0000, 512) == before
    assert bench.disk.blocks_written == 0


def test_a_full_overlay_and_a_read_only_disk(content):
    bench = Bench(content, overlay_max=0)
    assert bench.request(1, 0, 512) == 1
    assert bench.request(1, 0, 512, slot=5) == 1
    assert bench.config(5, 0x2C, 2) == 0x1AF4
    assert bench.bus.pio_read(0xC000, 4) >> 5 & 1  # the feature that says read-only
    bench.ram.close()


@pytest.mark.parametrize(
    ("descriptors", "heads"),
    [
        ([(HEADER, 16, 1, 0)], (0,)),  # a loop
        ([(HEADER, 16, 1, 1), (DATA, 16, 1, 0)], (0,)),
        ([(HEADER, 16, 1, 500)], (0,)),  # outside the table
        ([(HEADER, 16, 0, 0)], (500,)),
        ([(HEADER, 16, 4, 0)], (0,)),  # indirect
        ([(DATA, 16, 3, 1), (HEADER, 16, 0, 0)], (0,)),  # to read behind to write
        ([], tuple(range(129))),  # more than fit
    ],
)
def test_rings_that_make_no_sense_break_the_device_until_it_is_reset(bench, descriptors, heads):
    bench.queue(descriptors, heads)
    assert bench.broken()
    assert bench.used() == 0
    bench.bus.pio_write(0xC010, 2, 0)
    assert bench.used() == 0
    bench.bus.pio_write(0xC012, 1, 0)
    assert not bench.broken()
    assert bench.request(0, 0, 512) == 0


@pytest.mark.parametrize("page", [0, 0xFFFFFFFF, SIZE >> 12, (SIZE >> 12) - 1, 0xE0])
def test_queues_outside_ram(bench, page):
    base = bench.enable()
    bench.bus.pio_write(base + 8, 4, page)
    bench.bus.pio_write(base + 0x10, 2, 0)
    assert bench.broken()


def test_chains_without_room_for_an_answer(bench):
    for descriptors in (
        [(HEADER, 16, 0, 0)],
        [(HEADER, 0, 0, 0)],
        [(DATA, 0, 2, 0)],
        [(HEADER, 8, 1, 1), (STATUS, 1, 2, 0)],
        [((1 << 64) - 1, 1, 2, 0)],
    ):
        bench.queue(descriptors)
        assert bench.used() == 1
        assert not bench.broken()
        bench.bus.pio_write(0xC012, 1, 0)


def test_a_mismatch_is_raised_through(bench):
    disk = VerifiedDisk(bench.image, lambda _index, _block: False)
    device = VirtioBlk(bench.ram, disk, go_on=lambda: True)
    bench.firmware.pci._functions[3, 0] = device
    device.update = bench.firmware.pci.update
    with pytest.raises(ContentMismatchError):
        bench.request(0, 0, 512)


def test_the_end_of_the_run_ends_a_long_queue(bench):
    answers = iter((True, True, False))
    bench.firmware._functions[3, 0]._go_on = lambda: next(answers)
    bench.ram.write(HEADER, struct.pack("<IIQ", 0, 0, 0))
    bench.queue([(HEADER, 16, 1, 1), (DATA, 512, 3, 2), (STATUS, 1, 2, 0)], heads=(0,) * 100)
    assert bench.used() == 3


def test_interrupts_follow_the_bridge(bench):
    bench.config(1, 0x60, 1, 11)
    bench.config(1, 0x62, 1, 10)
    bench.request(0, 0, 512)  # slot 3 is wired to PIRQC#
    assert bench.cpu.levels == {10: True}
    bench.config(3, 4, 2, 0x405)  # held off
    assert bench.cpu.levels == {10: False}
    bench.config(3, 4, 2, 5)
    bench.config(1, 0x62, 1, 11)  # re-routed while up
    assert bench.cpu.levels == {10: False, 11: True}
    assert bench.bus.pio_read(0xC013, 1) == 1
    assert bench.cpu.levels == {10: False, 11: False}


# --- virtio-scsi -----------------------------------------------------------------------------------------------------


def scsi(bench, command, room=2048, lun=b"\x01\x00\x40\x00"):
    bench.ram.write(HEADER, struct.pack("<8sQBBB32s", lun.ljust(8, b"\0"), 1, 0, 0, 0, command))
    bench.queue([(HEADER, 51, 1, 1), (STATUS, 108, 3, 2), (DATA, room, 2, 0)], slot=4, select=2)
    return struct.unpack("<IIHBB96s", bench.ram.read(STATUS, 108))


def test_a_cd_is_read_by_scsi(bench):
    bench.image.data[2048:2050] = b"CD"
    assert scsi(bench, struct.pack(">BBIBH", 0x28, 0, 1, 0, 1))[3:5] == (0, 0)
    assert bench.ram.read(DATA, 2) == b"CD"
    assert scsi(bench, b"\x25" + bytes(9))[3:5] == (0, 0)
    assert struct.unpack(">II", bench.ram.read(DATA, 8)) == (MIB // 2048 - 1, 2048)
    sense_size, _residual, _qualifier, status, response, sense = scsi(bench, b"\x2a" + bytes(15))
    assert (sense_size, status, response, sense[2], sense[12]) == (18, 2, 0, 5, 0x20)
    assert scsi(bench, bytes(6), lun=b"\x01\x05\x40\x00")[4] == 3


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(0, 1 << 22))
def test_no_scsi_command_raises_or_answers_beyond_its_room(command, room):
    class Disc:
        size, sector_size, blocks_checked, blocks_written = 10 * 2048 + 5, 2048, 0, 0

        def read(self, offset, length):
            assert 0 <= offset <= offset + length <= self.size
            return bytes(length)

    answer = ScsiCd(Disc()).execute(command, room)
    assert len(answer.data) <= max(room, 64)
    assert len(answer.sense) <= 96


# --- fw_cfg ----------------------------------------------------------------------------------------------------------


def dma(device, ram, control, length, address, at=0x5000):
    ram.write(at, struct.pack(">IIQ", control, length, address))
    device.pio_write(4, 4, 0)
    device.pio_write(8, 4, int.from_bytes(at.to_bytes(4, "big"), "little"))
    return ram.get(at, 4)


def test_fw_cfg_by_port_and_by_dma(bench):
    device = FwCfg(bench.ram, {"opt/x": Fixed(b"hello")})
    device.pio_write(0, 2, 0)
    assert bytes(device.pio_read(1, 1) for _ in range(6)) == b"QEMU\0\0"
    directory = struct.pack(">IIHH", 1, 5, 0x20, 0) + b"opt/x"
    assert dma(device, bench.ram, 0x19 << 16 | 10, len(directory), 0x6000) == 0
    assert bench.ram.read(0x6000, len(directory)) == directory
    assert dma(device, bench.ram, 0x20 << 16 | 8 | 4, 1, 0) == 0
    assert dma(device, bench.ram, 2, 6, 0x6000) == 0
    assert bench.ram.read(0x6000, 6) == b"ello\0\0"


@pytest.mark.parametrize(
    ("control", "length", "address"),
    [(10, 512, SIZE - 1), (10, 512, (1 << 64) - 1), (10, 0xFFFFFFFF, 0), (10, 512, 0xF0000), (16, 4, 0x6000)],
)
def test_fw_cfg_requests_that_fail_say_so(bench, control, length, address):
    device = FwCfg(bench.ram, {})
    before = bench.ram.read(0xF0000, 512)
    assert int.from_bytes(dma(device, bench.ram, control, length, address).to_bytes(4, "little"), "big") == 1
    assert bench.ram.read(0xF0000, 512) == before


def test_fw_cfg_requests_from_nowhere_are_dropped(bench):
    device = FwCfg(bench.ram, {})
    for at in (SIZE - 8, 0xFFFFFFFF, 0xE0000):
        device.pio_write(8, 4, int.from_bytes(at.to_bytes(4, "big"), "little"))


# --- PCI, shadow, keyboard -------------------------------------------------------------------------------------------


def test_configuration_space_changes_only_where_it_can(bench):
    for slot in (0, 1, 3, 4):
        before = [bench.config(slot, offset) for offset in range(0, 256, 4)]
        for offset in range(0, 256, 4):
            bench.config(slot, offset, 4, 0xFFFFFFFF)
        after = [bench.config(slot, offset) for offset in range(0, 256, 4)]
        assert (before[0], before[2], before[11]) == (after[0], after[2], after[11])
    assert bench.config(3, 0x10) == 0xFFFFFFC1
    assert bench.config(17, 0) == 0xFFFFFFFF


def test_regions_are_found_only_inside_the_window(bench):
    for base, inside in ((0xC000, True), (0xFFC0, True), (0x60, False), (0x510, False), (0xFFFFFFC0, False)):
        bench.enable(base=base)
        if inside:
            assert bench.bus.pio_read(base + 0x0C, 2) == 128
        assert (bench.bus.pio_read(0xC00C, 2) == 128) is (base == 0xC000)
    bench.enable(slot=3, base=0xD000)
    bench.config(4, 0x10, 4, 0xD000)
    bench.config(4, 4, 2, 5)  # two at one place: the first answers, and nothing breaks
    assert bench.bus.pio_read(0xD014, 4) == MIB // 512


def test_shadow_segments_are_writable_as_the_bridge_says(bench):
    assert bench.ram.read(0xFFFF0, 16) == ROM[-16:]
    assert not bench.ram.writable(0xE0000, 1)
    bench.config(0, 0x5E, 1, 0x33)
    assert bench.ram.writable(0xE0000, 0x8000)
    assert not bench.ram.writable(0xE0000, 0x8001)
    assert not bench.ram.writable(0xDFFFF, 2)
    bench.config(0, 0x59, 1, 0x30)
    assert bench.ram.writable(0xF0000, 0x10001)
    bench.config(0, 0x5E, 1, 0x11)
    with pytest.raises(ValueError, match="not RAM"):
        bench.ram.write(0xE0000, b"x")


def test_the_keyboard_answers_as_one_does(bench):
    def command(value):
        bench.bus.pio_write(0x64, 1, value)

    def data(*values):
        for value in values:
            bench.bus.pio_write(0x60, 1, value)

    def answers():
        seen = []
        while bench.bus.pio_read(0x64, 1) & 1:
            seen.append(bench.bus.pio_read(0x60, 1))
        return seen

    command(0xAA)
    command(0xAB)
    assert answers() == [0x55, 0x00]
    data(0xFF, 0xF5, 0xF0, 0x02, 0xF4)
    assert answers() == [0xFA, 0xAA, 0xFA, 0xFA, 0xFA, 0xFA]
    command(0x60)
    data(0x65)
    bench.board.keyboard.type_codes((0x1E, 0x9E))
    assert bench.cpu.levels[1] is True
    assert answers() == [0x1E, 0x9E]
    assert bench.cpu.levels[1] is False
    for _ in range(100):
        command(0x20)
    assert len(answers()) == 16
    command(0xD1)
    data(0xDE)
    assert bench.stops


NAMES = sorted(ports(FirmwareKind.SEABIOS).values())
ACCESS = st.tuples(
    st.one_of(
        st.sampled_from([0xCF8, 0xCFC, 0x510, 0x514, 0x518, *range(0xC000, 0xC020), 0x60, 0x64, 0x3C0, 0x3D4, 0x3D5]),
        st.sampled_from(NAMES).flatmap(lambda each: st.integers(*each)),
        st.integers(0, 0xFFFF),
    ),
    st.sampled_from([1, 2, 4]),
    st.one_of(
        st.none(),
        st.integers(0, 0xFFFFFFFF),
        st.sampled_from([0x80001804, 0x80001810, 0x80000058, 0x8000005C, 5, 0xC001, QUEUE >> 12, 0x50000000]),
    ),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(accesses=st.lists(ACCESS, max_size=60))
def test_no_sequence_of_port_accesses_raises(accesses, content):
    bench = Bench(content)
    try:
        bench.enable()
        for port, size, value in accesses:
            if value is None:
                assert 0 <= bench.bus.pio_read(port, size) < 1 << (8 * size)
            else:
                bench.bus.pio_write(port, size, value)
        bench.firmware.set_state(bench.firmware.state())
    finally:
        bench.ram.close()


DESCRIPTOR = st.tuples(
    st.one_of(st.sampled_from([HEADER, DATA, STATUS, SIZE - 8, 0xE0000, QUEUE, USED]), st.integers(0, (1 << 64) - 1)),
    st.one_of(st.integers(0, 4096), st.integers(0, 0xFFFFFFFF)),
    st.sampled_from([0, 1, 2, 3, 4, 7, 0xFFFF]),
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    descriptors=st.lists(DESCRIPTOR, min_size=1, max_size=8),
    heads=st.lists(st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)), max_size=130),
    slot=st.sampled_from([3, 4, 5]),
    select=st.integers(0, 2),
    header=st.binary(min_size=64, max_size=64),
)
def test_no_ring_raises_or_reaches_outside(descriptors, heads, slot, select, header, content):
    bench = Bench(content)
    try:
        rom = bench.ram.read(0xC0000, 0x40000)
        bench.ram.write(HEADER, header)
        bench.queue(descriptors, tuple(heads), slot=slot, select=select)
        assert bench.ram.read(0xC0000, 0x40000) == rom
        assert bench.disk.blocks_written <= MIB // 65536
        assert bytes(bench.image.data) == bytes(MIB)
    finally:
        bench.ram.close()
