"""The virtio transport and its queues against drivers that do it right, wrong, and at random."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import UsageError
from vmgraft.vmmhost.layer.spec import ExtensionSpec, GuestWindow, MmioRange
from vmgraft.vmmhost.layer.virtio import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    F_INDIRECT,
    FAILED,
    FEATURES_OK,
    NEEDS_RESET,
    VirtioMmio,
)
from vmgraft.vmmhost.layer.virtioring import MAX_REQUEST, RingError, SplitQueue
from vmgraft.vmmhost.layer.virtioshape import VirtioShape

READY = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
BASE, SIZE = 0x10000, 0x40000
TABLE, AVAILABLE, USED, BUFFERS = BASE, BASE + 0x1000, BASE + 0x2000, BASE + 0x4000
NEXT, WRITE, INDIRECT = 1, 2, 4
SHAPE = VirtioShape(4, 0xD0000, 5, (8, 64), 0b101)


class Memory:
    """One writable window, and a read-only one behind a gap."""

    def __init__(self):
        self.data = bytearray(SIZE)
        self.writes = []

    def covers(self, gpa, length, *, write):
        inside = gpa >= BASE and gpa + length <= BASE + SIZE
        return inside and not (write and gpa + length > BASE + SIZE - 0x1000)

    def read(self, gpa, length):
        assert self.covers(gpa, length, write=False), f"read of {length} at {gpa:#x}"
        return bytes(self.data[gpa - BASE : gpa - BASE + length])

    def write(self, gpa, data):
        assert self.covers(gpa, len(data), write=True), f"write of {len(data)} at {gpa:#x}"
        self.writes.append((gpa, bytes(data)))
        self.data[gpa - BASE : gpa - BASE + len(data)] = data

    def descriptor(self, index, gpa, length, flags=0, following=0, table=TABLE):
        at = table - BASE + 16 * index
        self.data[at : at + 16] = struct.pack("<QIHH", gpa & (1 << 64) - 1, length, flags, following)

    def offer(self, *heads, flags=0, first=0, size=8):
        for number, head in enumerate(heads):
            at = AVAILABLE - BASE + 4 + 2 * ((first + number) % size)
            self.data[at : at + 2] = struct.pack("<H", head)
        self.data[AVAILABLE - BASE : AVAILABLE - BASE + 4] = struct.pack("<HH", flags, (first + len(heads)) & 0xFFFF)

    def used(self, number):
        """The index of the used ring, and one of its elements."""
        at = USED - BASE
        return struct.unpack_from("<H", self.data, at + 2)[0], struct.unpack_from("<II", self.data, at + 4 + 8 * number)


class Echo:
    """A device that answers with what it was sent, backwards."""

    def __init__(self):
        self.asked, self.told, self.later, self.config = [], [], False, bytearray(range(0x100))

    def queue(self, index, request, room):
        assert len(request) <= MAX_REQUEST
        self.asked.append((index, request, room))
        return None if self.later else request[::-1][:room]

    def config_read(self, offset, size):
        return int.from_bytes(self.config[offset : offset + size], "little")

    def config_write(self, offset, size, value):
        self.config[offset : offset + size] = value.to_bytes(size, "little")

    def status(self, status, features):
        self.told.append((status, features))


class Bed:
    """A device with a driver's hands on it."""

    def __init__(self, shape=SHAPE):
        self.memory, self.echo, self.line, self.notes = Memory(), Echo(), [], []
        self.device = VirtioMmio(shape, self.memory, self.echo, self.line.append, self.notes.append)

    def set(self, offset, value):
        self.device.write(offset, 4, value)

    def get(self, offset):
        return self.device.read(offset, 4)

    def negotiate(self, low=0, high=1):
        for offset, value in (
            (0x70, 0),
            (0x70, 1),
            (0x70, 3),
            (0x24, 0),
            (0x20, low),
            (0x24, 1),
            (0x20, high),
            (0x70, 11),
        ):
            self.set(offset, value)
        return self.get(0x70) == 11

    def queue(self, number=0, size=8, addresses=(TABLE, AVAILABLE, USED)):
        self.set(0x30, number)
        self.set(0x38, size)
        for offset, address in zip((0x80, 0x90, 0xA0), addresses, strict=True):
            self.set(offset, address & 0xFFFFFFFF)
            self.set(offset + 4, address >> 32)
        self.set(0x44, 1)

    def up(self, low=0):
        assert self.negotiate(low)
        self.queue()
        self.set(0x70, READY)
        assert self.get(0x70) == READY
        return self

    def broken(self, words):
        assert self.get(0x70) & NEEDS_RESET
        assert len(self.notes) == 1
        assert words in self.notes[0]
        return True


@pytest.fixture
def bed():
    return Bed()


def test_what_the_registers_say(bed):
    assert [bed.get(offset) for offset in (0, 4, 8, 0x70, 0x60, 0xFC, 0xB0, 0xBC)] == [
        0x74726976, 2, 4, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF,
    ]  # fmt: skip
    features = []
    for word in (0, 1, 2, 0xFFFFFFFF):
        bed.set(0x14, word)
        features.append(bed.get(0x10))
    assert features == [0b101 | F_INDIRECT, 1, 0, 0]
    sizes = []
    for number in (0, 1, 2, 0xFFFFFFFF):
        bed.set(0x30, number)
        sizes.append(bed.get(0x34))
    assert sizes == [8, 64, 0, 0]


def test_registers_are_read_whole(bed):
    assert [bed.device.read(0, size) for size in (1, 2, 8)] == [0, 0, 0]
    assert bed.device.read(1, 4) == 0
    bed.device.write(0x70, 1, 1)
    bed.device.write(0x71, 4, 1)
    assert bed.get(0x70) == 0


def test_configuration_has_any_width(bed):
    assert [bed.device.read(0x100 + offset, size) for offset, size in ((0, 1), (2, 2), (8, 8))] == [
        0, 0x0302, 0x0F0E0D0C0B0A0908,
    ]  # fmt: skip
    bed.device.write(0x104, 2, 0xBEEF)
    assert bed.device.read(0x104, 4) == 0x0706BEEF


@pytest.mark.parametrize(
    ("steps", "status"),
    [
        ([DRIVER], 0),
        ([FEATURES_OK], 0),
        ([DRIVER_OK], 0),
        ([1, 3, 7], 3),  # DRIVER_OK before FEATURES_OK
        ([1, 3, 11, 15], 15),
        ([15], 15),  # all at once, in order
        ([1, 3, 11, 3], 11),  # no step back but a reset
        ([1, 3, 11, 0], 0),
        ([1, NEEDS_RESET], 1),  # only the device says so
        ([1, 3, FAILED | 3, 11], FAILED | 3),
    ],
)
def test_the_dance(bed, steps, status):
    bed.set(0x24, 1)
    bed.set(0x20, 1)
    for step in steps:
        bed.set(0x70, step)
    assert bed.get(0x70) == status


@pytest.mark.parametrize(
    ("low", "high", "taken"), [(0, 1, True), (5, 1, True), (0, 0, False), (2, 1, False), (0, 3, False)]
)
def test_features_are_those_offered_with_version_1(bed, low, high, taken):
    assert bed.negotiate(low, high) is taken
    bed.set(0x70, READY)
    assert bool(bed.get(0x70) & DRIVER_OK) is taken
    assert bed.echo.told == [(0, 0), *([(READY, low | high << 32)] if taken else [])]


def test_features_stay_what_they_were_agreed_to_be(bed):
    bed.negotiate(5)
    bed.set(0x20, 0xFFFFFFFF)
    bed.set(0x70, READY)
    assert bed.echo.told[-1] == (READY, 5 | 1 << 32)


def test_a_request_goes_in_and_comes_back(bed):
    bed.up()
    memory = bed.memory
    memory.data[BUFFERS - BASE : BUFFERS - BASE + 6] = b"abcdef"
    memory.descriptor(3, BUFFERS, 4, NEXT, 5)
    memory.descriptor(5, BUFFERS + 4, 2, NEXT, 0)
    memory.descriptor(0, BUFFERS + 0x100, 2, NEXT | WRITE, 1)
    memory.descriptor(1, BUFFERS + 0x200, 100, WRITE)
    memory.offer(3)
    bed.set(0x50, 0)
    assert bed.echo.asked == [(0, b"abcdef", 102)]
    assert memory.used(0) == (1, (3, 6))
    assert memory.read(BUFFERS + 0x100, 2) + memory.read(BUFFERS + 0x200, 4) == b"fedcba"
    assert (bed.get(0x60), bed.line) == (1, [False, True])
    bed.set(0x64, 1)
    assert (bed.get(0x60), bed.line) == (0, [False, True, False])


def test_an_interrupt_that_the_driver_does_not_want(bed):
    bed.up().memory.descriptor(0, BUFFERS, 4, WRITE)
    bed.memory.offer(0, flags=1)
    bed.set(0x50, 0)
    assert bed.memory.used(0) == (1, (0, 0))
    assert (bed.get(0x60), bed.line) == (0, [False])


def test_what_waits_is_served_when_the_device_is_kicked(bed):
    bed.up().memory.descriptor(0, BUFFERS, 4)
    bed.memory.offer(0)
    bed.echo.later = True
    bed.set(0x50, 0)
    assert bed.memory.used(0)[0] == 0
    bed.echo.later = False
    bed.device.settle()
    assert bed.memory.used(0)[0] == 0
    for number in (0, 7):
        bed.device.kick(number)
    bed.device.settle()
    assert bed.memory.used(0) == (1, (0, 0))


def test_the_rings_go_round(bed):
    bed.up().memory.descriptor(0, BUFFERS, 4, WRITE)
    bed.device._queues[0].ring.taken = 0xFFF0
    for first in range(0xFFF0, 0x10020, 8):
        bed.memory.offer(*[0] * 8, first=first)
        bed.set(0x50, 0)
    assert bed.memory.used(0)[0] == 0x20
    assert len(bed.echo.asked) == 0x30
    assert not bed.notes


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: m.descriptor(0, BUFFERS, 4, NEXT, 0), "more descriptors than a queue of 8"),
        (lambda m: m.descriptor(0, BUFFERS, 4, NEXT, 8), "descriptor 8 of 8"),
        (lambda m: m.descriptor(0, 0x1000, 4), "outside"),
        (lambda m: m.descriptor(0, BASE + SIZE - 2, 4), "outside"),
        (lambda m: m.descriptor(0, -2, 4), "outside"),
        (lambda m: m.descriptor(0, BUFFERS, 0xFFFFFFFF), "outside"),
        (lambda m: m.descriptor(0, BUFFERS, 0xFFFFFFFF, WRITE), "outside"),
        (lambda m: m.descriptor(0, BASE + SIZE - 0x800, 4, WRITE), "outside"),  # may be read only
        (lambda m: m.descriptor(0, BUFFERS, MAX_REQUEST + 1), "more than 65536 bytes"),
        (lambda m: (m.descriptor(0, BUFFERS, 4, WRITE | NEXT, 1), m.descriptor(1, BUFFERS, 4)), "behind one to write"),
        (lambda m: m.descriptor(0, BUFFERS, 16, INDIRECT), "not agreed on"),
        (lambda m: m.offer(9), "descriptor 9 of 8"),
        (lambda m: m.offer(*range(8), first=1), "9 requests in a queue of 8"),
        (lambda m: m.offer(0, first=0xFFF0), "requests in a queue of 8"),
    ],
)
def test_a_driver_that_breaks_the_rules_of_a_ring(bed, spoil, words):
    bed.up().memory.descriptor(0, BUFFERS, 4)
    bed.memory.offer(0)
    spoil(bed.memory)
    bed.set(0x50, 0)
    assert bed.broken(words)
    assert (bed.get(0x60), bed.line) == (2, [False, True])
    assert bed.echo.told[-1][0] & NEEDS_RESET
    bed.memory.offer(0)
    bed.set(0x50, 0)  # nothing is served any more
    assert bed.echo.asked == []
    bed.up().memory.descriptor(0, BUFFERS, 4)
    bed.memory.offer(0)
    bed.set(0x50, 0)
    assert bed.echo.asked == [(0, bytes(4), 0)]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ((BUFFERS, 0), "0 bytes"),
        ((BUFFERS, 24), "24 bytes"),
        ((BUFFERS, 9 * 16), "144 bytes"),
        ((0x1000, 16), "outside"),
        ((BUFFERS, 0xFFFFFFF0), "bytes for a queue"),
        ((BUFFERS, 16, INDIRECT | NEXT), "not the last"),
        ((BUFFERS, 16, INDIRECT | WRITE), "inside an indirect table"),
    ],
)
def test_indirect_tables_that_make_no_sense(bed, table, words):
    bed.up(F_INDIRECT)
    gpa, length, *flags = table
    bed.memory.descriptor(0, gpa, length, *(flags or [INDIRECT]))
    bed.memory.descriptor(0, BUFFERS, 16, INDIRECT, table=BUFFERS)
    bed.memory.offer(0)
    bed.set(0x50, 0)
    assert bed.broken(words)


def test_an_indirect_table_behind_a_descriptor(bed):
    bed.up(F_INDIRECT)
    bed.memory.data[BUFFERS - BASE : BUFFERS - BASE + 2] = b"xy"
    bed.memory.descriptor(0, BUFFERS, 2, NEXT, 7)
    bed.memory.descriptor(7, BUFFERS + 0x100, 32, INDIRECT | WRITE)
    bed.memory.descriptor(0, BUFFERS, 2, NEXT, 1, table=BUFFERS + 0x100)
    bed.memory.descriptor(1, BUFFERS + 0x200, 9, WRITE, 0, table=BUFFERS + 0x100)
    bed.memory.offer(0)
    bed.set(0x50, 0)
    assert bed.echo.asked == [(0, b"xyxy", 9)]


@pytest.mark.parametrize(
    ("queue", "words"),
    [
        ({"addresses": (TABLE + 8, AVAILABLE, USED)}, "multiple of 16"),
        ({"addresses": (TABLE, AVAILABLE + 1, USED)}, "multiple of 2"),
        ({"addresses": (TABLE, AVAILABLE, USED + 2)}, "multiple of 4"),
        ({"addresses": (0, AVAILABLE, USED)}, "outside"),
        ({"addresses": (1 << 63, AVAILABLE, USED)}, "outside"),
        ({"addresses": (TABLE, AVAILABLE, BASE + SIZE - 0x1000)}, "outside"),  # a ring that cannot be written
        ({"size": 0}, "0 descriptors"),
        ({"size": 3}, "3 descriptors"),
        ({"size": 16}, "16 descriptors"),
        ({"size": 0xFFFFFFFF}, "descriptors"),
    ],
)
def test_rings_that_cannot_be(bed, queue, words):
    bed.negotiate()
    bed.queue(**queue)
    assert bed.broken(words)
    assert bed.line == [False]
    bed.set(0x70, READY)
    assert bed.get(0x60) == 2  # told as soon as somebody listens


def test_queues_before_their_time(bed):
    bed.queue()
    assert bed.get(0x44) == 0
    bed.negotiate()
    bed.queue()
    assert bed.get(0x44) == 1
    bed.memory.descriptor(0, BUFFERS, 4)
    bed.memory.offer(0)
    bed.set(0x50, 0)
    assert bed.echo.asked == []  # no DRIVER_OK yet
    bed.set(0x38, 4)  # not while it is in use
    bed.set(0x70, READY)
    bed.set(0x50, 5)
    bed.set(0x50, 1)
    bed.set(0x50, 0)
    assert len(bed.echo.asked) == 1
    bed.set(0x44, 0)
    assert bed.get(0x44) == 0
    bed.memory.offer(0, first=1)
    bed.set(0x50, 0)
    assert len(bed.echo.asked) == 1


def test_saved_and_brought_back(bed):
    bed.up(5).memory.descriptor(0, BUFFERS, 4, WRITE)
    bed.memory.offer(0)
    bed.set(0x50, 0)
    other = Bed()
    other.memory.data[:] = bed.memory.data
    assert other.device.load(bed.device.save())
    assert other.device.save() == bed.device.save()
    assert (other.get(0x70), other.get(0x60)) == (READY, 1)
    other.memory.offer(0, first=1)
    other.set(0x50, 0)
    assert len(other.echo.asked) == 1
    assert other.memory.used(1)[0] == 2


def test_a_state_of_another_device_resets(bed):
    state = bed.up().device.save()
    for wrong in (b"", state[:-1], b"XXXX" + state[4:], state + b"x"):
        assert not bed.device.load(wrong)
        assert bed.get(0x70) == 0
    assert not Bed(VirtioShape(5, 0xD0000, 5, (8, 64))).device.load(state)
    assert not Bed(VirtioShape(4, 0xD0000, 5, (8, 64))).device.load(Bed().up(5).device.save())
    lying = bytearray(state)
    lying[-29:] = struct.pack("<HBQQQH", 3, 3, 1, 1, 1, 0)
    assert not bed.device.load(bytes(lying))


@given(
    table=st.lists(st.tuples(
        st.sampled_from([BUFFERS, TABLE, USED, 0, BASE + SIZE - 8, 2**64 - 8]) | st.integers(0, 2**64 - 1),
        st.sampled_from([0, 4, 16, 32, 128, 0x8000, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1),
        st.integers(0, 7), st.integers(0, 9),
    ), min_size=8, max_size=8),
    inner=st.binary(max_size=256), heads=st.lists(st.integers(0, 9), max_size=9),
    first=st.sampled_from([0, 0, 1, 65535]), later=st.booleans(),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_random_rings_never_lead_outside(table, inner, heads, first, later):
    """Memory raises at any access outside the windows; requests and walks are bounded."""
    bed = Bed().up(F_INDIRECT)
    for index, descriptor in enumerate(table):
        bed.memory.descriptor(index, *descriptor)
    bed.memory.data[BUFFERS - BASE : BUFFERS - BASE + len(inner)] = inner
    bed.memory.offer(*heads, first=first)
    bed.echo.later = later
    bed.set(0x50, 0)
    assert len(bed.echo.asked) <= 8
    assert all(len(request) <= MAX_REQUEST and room <= MAX_REQUEST for _index, request, room in bed.echo.asked)
    status = bed.get(0x70)
    assert status & READY == READY
    assert bool(status & NEEDS_RESET) == bool(bed.notes)
    if first == 0 and len(heads) <= 8 and not later:
        assert bed.notes or len(bed.echo.asked) == len(heads)


@given(st.lists(st.tuples(
    st.sampled_from([0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0xA0, 0x100, 0xFC, 0x1FF]),
    st.sampled_from([1, 2, 4, 4, 4, 8]),
    st.sampled_from([0, 1, 2, 3, 8, 11, 15, 64, 128, TABLE, AVAILABLE, USED, 0xFFFFFFFF]) | st.integers(0, 2**32 - 1),
), max_size=40))  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_random_register_writes(writes):
    bed = Bed()
    for offset, size, value in writes:
        bed.device.write(offset, size, value & (1 << 8 * size) - 1)
        assert 0 <= bed.device.read(offset, size) < 1 << 8 * size
    bed.device.settle()
    assert bed.device.load(bed.device.save()) or bed.get(0x70) == 0


def test_one_notification_walks_a_bounded_number_of_descriptors():
    bed = Bed(VirtioShape(4, 0xD0000, 5, (256,)))
    assert bed.negotiate(F_INDIRECT)
    bed.queue(size=256)
    bed.set(0x70, READY)
    memory = bed.memory
    for index in range(256):
        memory.descriptor(index, BUFFERS, 1, NEXT if index < 255 else 0, index + 1)
    memory.offer(*[0] * 256, size=256)
    bed.set(0x50, 0)
    assert bed.broken("more descriptors than a queue of 256")
    assert len(bed.echo.asked) == 16


def test_a_queue_says_what_is_wrong_with_it():
    with pytest.raises(RingError, match="outside"):
        SplitQueue(Memory(), 8, (BASE + SIZE, AVAILABLE, USED), indirect=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": 0}, "device type 0"),
        ({"base": 0xD0002}, "registers"),
        ({"base": 0xD0E04}, "not inside a granted MMIO range"),
        ({"irq": 6}, "line 6 is not granted"),
        ({"irq": 16}, "does not exist"),
        ({"queues": ()}, "0 queues"),
        ({"queues": (8,) * 9}, "9 queues"),
        ({"queues": (512,)}, "queue of 512"),
        ({"features": 1 << 24}, "feature bits"),
    ],
)
def test_a_device_beyond_its_grants_is_refused(change, words):
    fields = {"device": 4, "base": 0xD0000, "irq": 5, "queues": (8,), "features": 1, **change}
    claims = {"mmio": (MmioRange(0xD0000, 0x1000),), "irqs": (5,), "windows": (GuestWindow(0x1000, 0x1000, True),)}
    with pytest.raises(UsageError, match=words):
        ExtensionSpec("org.example.test", "1", b"", virtio=VirtioShape(**fields), **claims)
    shape = VirtioShape(4, 0xD0000, 5, (8,), 1)
    assert VirtioShape.unpack(shape.pack()) == shape
    assert ExtensionSpec("org.example.test", "1", b"", virtio=shape, **claims).virtio == shape
    with pytest.raises(UsageError, match="no writable window"):
        ExtensionSpec("org.example.test", "1", b"", virtio=shape, **{**claims, "windows": (GuestWindow(0, 0x1000),)})


@given(st.binary(max_size=64))
def test_any_bytes_are_a_shape_or_none(data):
    try:
        shape = VirtioShape.unpack(data)
    except ValueError:
        return
    assert shape.problem() is None
