"""The read-ahead example: what it hints at, what it refuses, and a boot with it."""

import hashlib
import threading
import tomllib
from pathlib import Path

import pytest

from vmgraft.vmmhost.core.bus import Bus
from vmgraft.vmmhost.core.disk import BLOCK, VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.layer.spec import ExtensionSpec, ServiceUse

ISO = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")


@pytest.fixture
def readahead(examples):
    """Give ``readahead(config)``: the example with an order; its own by default."""

    def spec(config=None):
        own = tomllib.loads((examples / "readahead/manifest.toml").read_text())["config"]
        module = (examples / "readahead/module.wasm").read_bytes()
        return ExtensionSpec(
            "org.vmgraft.readahead", "1.0.0", module, (own if config is None else config).encode(), on_fault="detach",
            metric=True, services=(ServiceUse("disk", chain=True),),
        )  # fmt: skip

    return spec


@pytest.fixture
def ask(bench, readahead):
    """Give ``ask(config)``, which gives ``read(block)``: the hints at a read of that block, in blocks."""

    def start(config):
        bus, host = Bus(1 << 24), bench.host(readahead(config))
        host.claim(bus)

        def read(block, drive=0, write=False):
            allowed, ranges = bus.services.disk(block * 128 + 5, 8, write=write, drive=drive)
            assert allowed
            return [(first // 128, count // 128) for first, count in ranges]

        return read

    return start


def test_hints_are_what_comes_next(bench, ask):
    read = ask("0+2 2b+2\n3d+1")
    assert read(0) == [(1, 1), (0x2B, 2), (0x3D, 1)]
    assert [read(block) for block in (1, 0x2B, 0x2C, 0x3D)] == [[]] * 4
    assert bench.hosts[0].summary()[0]["metrics"] == {"asked": 4}
    assert bench.records("fault") == []


def test_hints_stay_a_stretch_ahead_of_the_guest(ask):
    read = ask("100+400")
    asked = {}
    for block in range(0x100, 0x500):
        for first, count in read(block):
            assert first == max([block, *asked]) + 1  # no block twice, and none left out
            assert count <= 64
            asked.update(dict.fromkeys(range(first, first + count), block))
    assert sorted(asked) == list(range(0x101, 0x500))
    assert all(0 < block - when <= 64 for block, when in asked.items())


def test_a_guest_that_jumps_is_followed(ask):
    read = ask("0+10 20+10 40+100")
    assert read(0)[0] == (1, 15)
    assert read(0x80) == [(0x81, 63)]
    assert read(0x2F) == []  # what follows was asked for
    assert read(0x5FF) == read(7, drive=1) == read(7, write=True) == read(0xFFFFFFFFFF) == []


@pytest.mark.parametrize("config", ["", " ", "0", "0+", "+1", "0+0", "x+1", "0+1 1+", "0+1,2+1", "0+1 " * 513])
def test_an_order_that_says_nothing_is_refused(bench, readahead, config):
    assert bench.host(readahead(config)).proxies[0].state.value == "detached"
    assert [record["kind"] for record in bench.records("fault")] == ["start"]


class Counted:
    """Content that notes which thread reads which blocks."""

    sector_size = 2048

    def __init__(self, data):
        self.data, self.virtual_size, self.reads = data, len(data), []

    def read(self, offset, length):
        blocks = range(offset // BLOCK, (offset + length + BLOCK - 1) // BLOCK)
        self.reads += [(block, threading.current_thread().name) for block in blocks]
        return self.data[offset : offset + length]


def test_a_boot_reads_what_it_always_reads_and_mostly_need_not_wait(bench, readahead):
    data = ISO.read_bytes()
    hashes = [hashlib.sha256(data[at : at + BLOCK]).digest() for at in range(0, len(data), BLOCK)]
    content, spec = Counted(data), readahead()
    disk = VerifiedDisk(content, lambda index, block: hashlib.sha256(block).digest() == hashes[index])
    with Machine(Engine.SOFT, disk, until="GNU GRUB", timeout=60, rtc_epoch=0) as machine:
        bench.ram = machine.memory
        host = bench.host(spec)
        host.claim(machine.bus)
        result = machine.run()
        machine.disk.settle()
    assert result.until_seen
    assert bench.records("fault") == []
    order = [pair.split("+") for pair in spec.config.decode().split()]
    alone = sum(int(count, 16) for _first, count in order)
    here = [block for block, thread in content.reads if thread == threading.current_thread().name]
    assert {block for block, _thread in content.reads} == {
        int(first, 16) + number for first, count in order for number in range(int(count, 16))
    }
    assert len(here) < alone / 2
