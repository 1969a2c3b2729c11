"""BIOS services called with whatever a guest may put into registers and memory."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.vmmhost.core.boot import BootPlan, Emulation
from vmgraft.vmmhost.core.bus import Bus
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.cpu import GENERAL, SEGMENTS, Cpu
from vmgraft.vmmhost.core.devices.cmos import Cmos
from vmgraft.vmmhost.core.disk import BLOCK, VerifiedDisk
from vmgraft.vmmhost.core.drives import Drive, DriveKind
from vmgraft.vmmhost.core.firmware.bios import STUBS, TRAP_PORT, Firmware, rom_image
from vmgraft.vmmhost.core.geometry import Geometry
from vmgraft.vmmhost.core.memory import HIGH_BASE, ROM_BASE, GuestRam
from vmgraft.vmmhost.core.screen import TextScreen

DISK = BootPlan(0x80, 512, 0, 512, 0x7C00, 0, 0x7C00)
CD = BootPlan(0xE0, 2048, 0, 2048, 0x7C00, 0, 0x7C00)
FLOPPY = BootPlan(0x00, 512, 0, 512, 0x7C00, 0, 0x7C00)
EMULATED = BootPlan(0x80, 2048, 0, 512, 0x7C00, 0, 0x7C00, 4, Emulation(2 * 2048, 100 * 512, Geometry(2, 2, 25)))
STACK = 0x7000


class PaperCpu(Cpu):
    """Registers without a processor."""

    engine, emulated = "paper", True

    def __init__(self, ram):
        super().__init__(ram)
        self.registers = dict.fromkeys(GENERAL, 0)
        self.selectors = dict.fromkeys(SEGMENTS, 0)

    def get(self, name):
        return self.registers[name]

    def set(self, name, value):
        assert 0 <= value <= 0xFFFFFFFFFFFFFFFF
        self.registers[name] = value

    def segment_base(self, name):
        return self.selectors[name] << 4

    def protected(self):
        return False

    def now_ns(self):
        return 0

    def set_irq(self, line, level):
        raise AssertionError

    def show_cpuid(self, leaves):
        raise AssertionError

    def run(self, dispatcher):
        raise AssertionError

    def state(self):
        raise AssertionError

    def set_state(self, state):
        raise AssertionError

    def close(self):
        return


class SectorNumbers:
    """Content in which every byte is the number of its sector."""

    virtual_size, sector_size = 4 * BLOCK, 512

    def read(self, offset, length):
        return b"".join(bytes((sector & 0xFF,)) * 512 for sector in range(offset >> 9, (offset + length) >> 9))


class Bench:
    """A firmware whose calls the test makes itself."""

    def __init__(self, plan=DISK, keys="", disk=None, drives=()):
        self.stops = []
        self.ram = GuestRam(4)
        self.cpu = PaperCpu(self.ram)
        self.bus = Bus(self.ram.size)
        self.disk = disk or VerifiedDisk(SectorNumbers(), lambda _index, _block: True, overlay_max=2 * BLOCK)
        cmos = Cmos(self.cpu.now_ns, 0, self.ram.size)
        self.firmware = Firmware(
            self.cpu, self.bus, self.disk, plan, cmos, keys=keys, host=self, stop_on_key_wait=False,
            drives=drives,
        )  # fmt: skip

    def stop(self, reason, detail=""):
        self.stops.append((reason, detail))

    def call(self, vector, selectors=None, **registers):
        """Make a BIOS call; return AX and the caller's carry flag."""
        self.cpu.selectors.update({"ss": 0, "ds": 0, "es": 0} | (selectors or {}))
        self.cpu.registers.update({"rsp": STACK} | registers)
        self.cpu.selectors["cs"], self.cpu.registers["rip"] = 0xF000, STUBS - ROM_BASE + vector * 16
        self.bus.pio_write(TRAP_PORT, 1, 0)
        frame = self.cpu.segment_base("ss") + (self.cpu.registers["rsp"] & 0xFFFF) + 4
        flags = self.ram.get(frame, 2) if self.ram.readable(frame, 2) else 0
        return self.cpu.registers["rax"] & 0xFFFF, flags & 1


REGISTER = st.one_of(
    st.integers(0, 0xFFFFFFFF), st.sampled_from([0, 1, 0xFFFF, 0x7C00, 0x534D4150, 0x55AA, 0x80, 0xE0])
)
CALLS = st.tuples(
    st.sampled_from([0x10, 0x11, 0x12, 0x13, 0x15, 0x16, 0x1A, 0x1C, 0x08, 0x40, 0x05]),
    st.integers(0, 255),
    st.dictionaries(st.sampled_from(["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"]), REGISTER),
    st.dictionaries(st.sampled_from(["ds", "es", "ss"]), st.integers(0, 0xFFFF)),
    st.integers(0, 0xFFFF),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(CALLS, min_size=1, max_size=12),
    st.sampled_from([DISK, CD, FLOPPY, EMULATED]),
    st.sampled_from([0x00, 0x01, 0x7F, 0x80, 0x81, 0xE0, 0xE1]),
    st.binary(min_size=64, max_size=64),
)
def test_no_call_can_break_the_host(calls, plan, drive, noise):
    other = VerifiedDisk(SectorNumbers(), lambda _index, _block: True)
    bench = Bench(plan, drives=[Drive(other, kind) for kind in DriveKind])
    bench.ram.write(0x440, noise)  # cursor, screen and disk fields of the BIOS data area
    bench.ram.write(0x8000, noise)
    for vector, function, chosen, selectors, sp in calls:
        registers = {"rsi": 0x8000, "rdi": 0x8000, "rbp": 0x8000} | chosen
        registers["rax"] = registers.get("rax", 0) & 0xFFFF00FF | function << 8
        if vector == 0x13:
            registers["rdx"] = registers.get("rdx", 0) & ~0xFF | drive
        bench.call(vector, selectors, **registers, rsp=sp)
    assert bench.ram.read(ROM_BASE, HIGH_BASE - ROM_BASE) == rom_image()
    assert len(TextScreen(bench.ram).lines()) == 25
    assert all(reason in (EndReason.ERROR, EndReason.SHUTDOWN) for reason, _ in bench.stops)


def test_stack_outside_memory_ends_the_run():
    bench = Bench()
    bench.call(0x10, {"ss": 0xD000}, rsp=0)
    assert bench.stops == [(EndReason.ERROR, "INT 10h with a stack outside RAM at 0xd0000")]


def test_trap_port_is_deaf_to_other_code():
    bench = Bench()
    bench.cpu.registers |= {"rip": 0x7C00, "rax": 0x0E41, "rsp": STACK}
    bench.bus.pio_write(TRAP_PORT, 1, 0)
    assert not bench.firmware.calls
    assert bench.bus.pio_read(TRAP_PORT, 1) == 0xFF


def packet(count=1, offset=0x8000, segment=0, lba=0, size=16):
    return struct.pack("<BBHHHQ", size, 0, count, offset, segment, lba)


@pytest.mark.parametrize(
    ("function", "data", "status"),
    [
        (0x42, packet(), 0x00),
        (0x42, packet(lba=511), 0x00),
        (0x42, packet(lba=511, count=2), 0x04),
        (0x42, packet(lba=(1 << 64) - 1), 0x04),
        (0x42, packet(count=0xFFFF), 0x04),
        (0x42, packet(count=400, segment=0xA000), 0x09),
        (0x42, packet(size=15), 0x01),
        (0x43, packet(), 0x00),
        (0x43, packet(count=300, segment=0x1000), 0xCC),
        (0x43, packet(segment=0xD000), 0x09),
        (0x44, packet(lba=511), 0x00),
        (0x47, packet(lba=512), 0x04),
    ],
)
def test_disk_packets(function, data, status):
    bench = Bench()
    bench.ram.write(0x600, data)
    ax, carry = bench.call(0x13, rax=function << 8, rdx=0x80, rsi=0x600)
    assert (ax >> 8, carry) == (status, status != 0)
    assert bench.call(0x13, rax=0x0100, rdx=0x80) == (status << 8, status != 0)
    if status and data[0] >= 16:
        assert bench.ram.get(0x602, 2) == 0


def test_flat_buffer_of_the_long_packet():
    bench = Bench()
    bench.ram.write(0x600, packet(offset=0xFFFF, segment=0xFFFF, lba=3, size=24) + struct.pack("<Q", 0x200000))
    assert bench.call(0x13, rax=0x4200, rdx=0x80, rsi=0x600) == (0, 0)
    assert bench.ram.read(0x1FFFFF, 514) == b"\0" + b"\3" * 512 + b"\0"


def test_cd_calls():
    bench = Bench(CD)
    bench.ram.write(0x600, packet())
    assert bench.call(0x13, rax=0x4300, rdx=0xE0, rsi=0x600) == (0x0300, 1)  # write-protected
    assert bench.call(0x13, rax=0x0201, rcx=1, rdx=0xE0)[1] == 1  # no CHS
    assert bench.call(0x13, rax=0x4200, rdx=0x80, rsi=0x600)[1] == 1  # no such drive
    bench.ram.write(0x700, struct.pack("<H", 26))
    assert bench.call(0x13, rax=0x4800, rdx=0xE0, rsi=0x700) == (0, 0)
    assert struct.unpack("<QH", bench.ram.read(0x710, 10)) == (128, 2048)
    assert bench.call(0x13, rax=0x4B01, rdx=0xE0, rsi=0x700) == (0x0001, 0)
    packet_bytes = bench.ram.read(0x700, 19)
    assert packet_bytes[:3] == bytes((19, 0, 0xE0))
    assert struct.unpack_from("<HH", packet_bytes, 12) == (0x7C0, 4)


def test_a_disk_of_two_exbibytes_still_has_parameters(monkeypatch):
    monkeypatch.setattr(SectorNumbers, "virtual_size", 1 << 61)
    bench = Bench()
    bench.ram.write(0x700, struct.pack("<H", 26))
    assert bench.call(0x13, rax=0x4800, rdx=0x80, rsi=0x700) == (0, 0)
    assert struct.unpack("<IIIQH", bench.ram.read(0x704, 22)) == (0xFFFFFFFF, 255, 63, 1 << 52, 512)


def test_strings_of_line_feeds_take_no_minute():
    bench = Bench()
    bench.ram.write(0x10000, b"\n" * 0xFFFF)
    began = time.monotonic()
    bench.call(0x10, {"es": 0x1000}, rax=0x1301, rbx=7, rcx=0xFFFF, rbp=0)
    assert time.monotonic() - began < 10


def test_memory_copy_between_descriptors():
    bench = Bench()
    table = bytearray(0x30)
    for at, address in ((0x10, 0x8000), (0x18, 0x180000)):
        table[at : at + 8] = struct.pack("<HHBBBB", 0xFFFF, address & 0xFFFF, address >> 16, 0x93, 0, address >> 24)
    bench.ram.write(0x600, bytes(table))
    bench.ram.write(0x8000, b"copied")
    assert bench.call(0x15, rax=0x8700, rcx=3, rsi=0x600) == (0, 0)
    assert bench.ram.read(0x180000, 6) == b"copied"
    assert bench.call(0x15, rax=0x8700, rcx=0x9000, rsi=0x600) == (0x8600, 1)


def test_power_off_by_apm():
    bench = Bench()
    assert bench.call(0x15, rax=0x5300, rbx=0) == (0x0102, 0)
    assert bench.cpu.registers["rbx"] & 0xFFFF == 0x504D
    assert bench.stops == []
    bench.call(0x15, rax=0x5307, rbx=1, rcx=3)
    assert bench.stops == [(EndReason.SHUTDOWN, "APM power off")]


def test_ticks_roll_over_at_midnight():
    bench = Bench()
    bench.ram.put(0x46C, 4, 0x1800AF)
    bench.call(0x08)
    assert bench.call(0x1A, rax=0) == (1, 0)
    assert (bench.cpu.registers["rcx"], bench.cpu.registers["rdx"]) == (0, 0)
    assert bench.call(0x1A, rax=0) == (0, 0)
    assert bench.call(0x1A, rax=0x7F00)[1] == 1


def test_boot_again_is_a_reset_and_int_18_the_end():
    bench = Bench()
    bench.call(0x19)
    assert struct.unpack("<HHH", bench.ram.read(STACK, 6)) == (0x7C00, 0, 0x202)
    assert bench.cpu.registers["rdx"] & 0xFF == 0x80
    bench.call(0x19)
    bench.call(0x18)
    assert [reason for reason, _ in bench.stops] == [EndReason.RESET, EndReason.HALT]
    assert bench.firmware.unknown == {}


def test_guest_cannot_fill_the_host_with_keys():
    bench = Bench(keys="x")
    results = [bench.call(0x16, rax=0x0500, rcx=0x1E61)[0] & 0xFF for _ in range(40)]
    assert results == [0] * 15 + [1] * 25
    assert [bench.call(0x16, rax=0)[0] for _ in range(2)] == [0x2D78, 0x1E61]


def test_unknown_calls_are_counted():
    bench = Bench()
    assert bench.call(0x15, rax=0xD800) == (0x8600, 1)
    bench.call(0x10, rax=0xFE00)
    assert bench.firmware.unknown == {"15/d8": 1, "10/fe": 1}
