"""Reading ahead in a thread: it hurries nobody, changes nothing, and leaves nothing behind."""

import struct
import threading

import pytest

from vmgraft.errors import ContentMismatchError, FileError
from vmgraft.vmmhost.core.disk import AHEAD_BLOCKS, BLOCK, VerifiedDisk
from vmgraft.vmmhost.core.diskhook import HookedDisk
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.core.readahead import ReadAhead
from vmgraft.vmmhost.core.services import Answer, Service, ServiceTable


class Content:
    """Content whose reads away from the guest's thread wait until they are let through."""

    sector_size = 512

    def __init__(self, blocks, bad=()):
        self.virtual_size, self.bad, self.reads = blocks * BLOCK, bad, []
        self.gate, self.waiting = threading.Event(), threading.Event()

    def read(self, offset, length):
        self.reads.append((offset // BLOCK, length // BLOCK, threading.current_thread().name))
        if threading.current_thread().name == "read-ahead":
            self.waiting.set()
            assert self.gate.wait(10)
            if "unreadable" in self.bad:
                raise FileError("the medium failed")
        return b"".join(bytes((index % 251,)) * BLOCK for index in range(offset // BLOCK, (offset + length) // BLOCK))


class Hints:
    def __init__(self, *ranges):
        self.asked = []
        self.data = struct.pack(f"<{2 * len(ranges)}Q", *(128 * number for pair in ranges for number in pair))

    def serve(self, service, a0, a1, data):
        self.asked.append((a0, a1))
        return Answer(0, self.data)


@pytest.fixture
def hooked():
    made = []

    def build(content, *ranges):
        services = ServiceTable()
        services.register(Service.DISK, Hints(*ranges), "org.example.test")
        disk = VerifiedDisk(content, lambda index, block: index not in content.bad and set(block) == {index % 251})
        made.append((content, HookedDisk(disk, services, 0)))
        return made[-1][1]

    yield build
    for content, disk in made:
        content.gate.set()
        disk.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == "read-ahead"] == []


def test_the_guest_goes_on_meanwhile_and_waits_for_what_comes(hooked):
    content = Content(200)
    disk = hooked(content, (40, 4))
    assert disk.read(0, 1) == b"\0"
    assert content.waiting.wait(10)
    assert disk.read(100 * BLOCK, 1) == bytes((100,))  # while the thread is in the midst of its read
    threading.Timer(0.05, content.gate.set).start()
    assert disk.read(43 * BLOCK, 1) == bytes((43,))
    disk.settle()
    assert [read for read in content.reads if 40 <= read[0] < 44] == [(40, 4, "read-ahead")]
    assert disk.blocks_checked == 6


def test_nobody_waits_for_a_whole_hint(hooked):
    content = Content(200)
    content.gate.set()
    disk = hooked(content, (10, 100))
    disk.read(0, 1)
    disk.settle()
    counts = [count for first, count, _name in content.reads if first]
    assert (sum(counts), max(counts)) == (100, AHEAD_BLOCKS)


def test_what_is_wrong_is_found_when_it_is_used(hooked):
    content = Content(200, bad={42})
    content.gate.set()
    disk = hooked(content, (40, 4))
    disk.read(0, 1)
    disk.settle()
    assert disk.read(41 * BLOCK, 1) == bytes((41,))
    with pytest.raises(ContentMismatchError):
        disk.read(42 * BLOCK, 1)


def test_a_medium_that_fails_ahead_of_time_is_read_again(hooked):
    content = Content(200, bad={"unreadable"})
    content.gate.set()
    disk = hooked(content, (40, 4))
    disk.read(0, 1)
    disk.settle()
    assert disk.read(40 * BLOCK, 1) == bytes((40,))
    assert content.reads[-1] == (40, 1, threading.current_thread().name)


def test_what_the_guest_wrote_is_not_read_ahead(hooked):
    content = Content(200)
    content.gate.set()
    disk = hooked(content, (40, 4))
    disk.write(41 * BLOCK, b"new")
    disk.settle()
    content.reads.clear()
    assert disk.read(41 * BLOCK, 3) == b"new"
    assert disk.read(42 * BLOCK, 1) == bytes((42,))
    assert content.reads == []


def test_a_read_that_goes_on_in_its_block_is_not_asked_about(hooked):
    disk = hooked(Content(200))
    (entry,) = disk._services._lines[Service.DISK]
    asked = entry.handler.asked
    for offset, length in (
        (0, 512),
        (512, 512),
        (BLOCK - 512, 512),
        (BLOCK - 512, 1024),
        (BLOCK, 512),
        (0, 0),
        (BLOCK, 1),
    ):
        disk.read(offset, length)
    disk.write(BLOCK, b"x")
    disk.write(BLOCK, b"x")
    disk.read(BLOCK, 1)
    write = 1 << 32 | 1
    assert asked == [(0, 1), (127, 2), (0, 0), (128, 1), (128, write), (128, write)]


def test_without_a_hint_there_is_no_thread(hooked):
    before = threading.active_count()
    disk = hooked(Content(200))
    disk.read(0, 1)
    assert threading.active_count() == before
    disk.settle()


def test_closing_forgets_what_waits():
    fetched, gate, begun = [], threading.Event(), threading.Event()

    def fetch(first, count):
        fetched.append(first)
        begun.set()
        gate.wait(10)

    reader = ReadAhead(fetch)
    for number in range(5):
        reader.want(number, 1)
    assert begun.wait(10)
    threading.Timer(0.05, gate.set).start()
    reader.close()
    reader.want(9, 1)
    reader.settle()
    reader.close()
    assert fetched == [0]


def test_hints_pile_up_only_so_far():
    gate, begun, fetched = threading.Event(), threading.Event(), []

    def fetch(first, count):
        fetched.append(first)
        begun.set()
        assert gate.wait(10)

    reader = ReadAhead(fetch)
    reader.want(-1, 1)
    assert begun.wait(10)
    for number in range(1000):
        reader.want(number, 1)
    gate.set()
    reader.settle()
    reader.close()
    assert fetched == [-1, *range(1000 - 256, 1000)]


def test_a_machine_ends_its_threads(make_machine):
    services = ServiceTable()
    services.register(Service.DISK, Hints((1, 8)), "org.example.test")
    machine = make_machine(Engine.SOFT, "halt", services=services)
    machine.disk.read(0, 512)
    assert "read-ahead" in [thread.name for thread in threading.enumerate()]
    machine.close()
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]
