"""Windows of guest memory: mapped into their own worker and nowhere else; by messages where that cannot be."""

import mmap
import os
import re
import signal
import socket
from pathlib import Path

import pytest
from assembling import GUESTS, booting, nasm
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import ExtensionFaultError
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.memory import GuestRam
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.layer import protocol, windows
from vmgraft.vmmhost.layer.proxy import State
from vmgraft.vmmhost.layer.spec import ExtensionSpec, GuestWindow, PioRange
from vmgraft.vmmhost.layer.windows import MAX_MAPPED, GuestView, Window

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root may look at the mappings of another user's process")
IMPORTS = """(import "vmgraft" "guest_read" (func $read (param i64 i32 i32) (result i32)))
  (import "vmgraft" "guest_write" (func $write (param i64 i32 i32) (result i32)))"""
READ_ONLY = '(import "vmgraft" "guest_read" (func $read (param i64 i32 i32) (result i32)))'
#: Port 0: the four bytes of guest memory at the value last written to port 4; writes to port 8 put four bytes there.
PEEK = """(global $at (mut i64) (i64.const 0))
  (func (export "on_pio_read") (param i32 i32) (result i64)
    (drop (call $read (global.get $at) (i32.const 64) (i32.const 4)))
    (i64.load32_u (i32.const 64)))"""
POKE = (
    PEEK
    + """
  (func (export "on_pio_write") (param $port i32) (param i32) (param $value i32) (result i32)
    (if (i32.eq (local.get $port) (i32.const 4))
      (then (global.set $at (i64.extend_i32_u (local.get $value)))) (else
      (i32.store (i32.const 64) (local.get $value))
      (drop (call $write (global.get $at) (i32.const 64) (i32.const 4)))))
    (i32.const 0))"""
)
LOOK = (
    PEEK
    + """
  (func (export "on_pio_write") (param i32 i32) (param $value i32) (result i32)
    (global.set $at (i64.extend_i32_u (local.get $value))) (i32.const 0))"""
)
RW, RO = GuestWindow(0x10000, 0x2000, True), GuestWindow(0x20000, 0x1000)


@pytest.fixture
def ram(bench):
    """Guest memory that can be shared."""
    memory = bench.ram = GuestRam(2)
    yield memory
    for host in bench.hosts:
        host.close()
    memory.close()


class Deaf:
    """Lets a link share memory, but never copy any."""

    def __init__(self, ram):
        self.share, self.refreshed = ram.share, []

    def refresh(self, gpa, length):
        self.refreshed.append((gpa, length))

    def read(self, gpa, length):
        raise ValueError("a message")

    write = read


def maps(pid):
    """The memory files that a process has mapped: access, bytes, inode and name."""
    text = Path(f"/proc/{pid}/maps").read_text()
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ (\d+) +(/memfd:.*)$", text, re.MULTILINE)
    return sorted(
        (access, int(end, 16) - int(start, 16), int(inode), name) for start, end, access, inode, name in found
    )


def inode(ram, window):
    fd = ram.share(window.gpa, window.size, writable=False)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


@ROOT_ONLY
def test_a_worker_maps_its_windows_and_nothing_else_of_the_guest(bench, ram, wat):
    name = "/memfd:vmgraft-window (deleted)"
    both = bench.one(wat(POKE, IMPORTS), windows=(RW, RO))
    other = bench.one(wat(LOOK, READ_ONLY), windows=(RO,))
    none = bench.one(wat(""))
    assert maps(both.pid) == [("r--s", 0x1000, inode(ram, RO), name), ("rw-s", 0x2000, inode(ram, RW), name)]
    assert maps(other.pid) == [("r--s", 0x1000, inode(ram, RO), name)]
    assert maps(none.pid) == []
    for proxy in (both, other):
        links = [str(entry.readlink()) for entry in Path(f"/proc/{proxy.pid}/fd").iterdir()]
        assert [link.split(":")[0] for link in links] == ["socket"]
        assert proxy.ready.mechanisms.names().count("process") == 1


def test_reads_and_writes_cost_no_message(bench, ram, wat):
    deaf = bench.ram = Deaf(ram)
    proxy = bench.one(wat(POKE, IMPORTS), windows=(RW, RO))
    ram.put(0x11FFC, 4, 0x12345678)
    proxy.pio_write(4, 4, 0x11FFC)
    assert proxy.pio_read(0, 4) == 0x12345678
    assert deaf.refreshed == []
    proxy.pio_write(8, 4, 0xCAFEBABE)
    assert ram.get(0x11FFC, 4) == 0xCAFEBABE
    assert deaf.refreshed == [(0x10000, 0x2000)]  # of the window that can be written
    proxy.pio_write(4, 4, 0x20000)
    ram.put(0x20000, 4, 7)
    assert proxy.pio_read(0, 4) == 7
    assert bench.records("fault") == []


def test_two_extensions_see_the_same_window(bench, ram, wat):
    window = (GuestWindow(0x20000, 0x1000),)
    host = bench.host(
        *(ExtensionSpec(f"org.example.n{number}", "1", wat(LOOK, READ_ONLY), windows=window) for number in range(2))
    )
    for proxy, value in zip(host.proxies, (1, 2), strict=True):
        ram.put(0x20010, 4, value)
        proxy.pio_write(4, 4, 0x20010)
        assert proxy.pio_read(0, 4) == value


@pytest.mark.parametrize(
    ("window", "at"),
    [(GuestWindow(0x10001, 0x1000, True), 0x10800), (GuestWindow(0x10000, 0x801, True), 0x107FC)],
    ids=["start", "end"],
)
def test_windows_that_do_not_end_at_pages_go_by_messages(bench, ram, wat, window, at):
    proxy = bench.one(wat(POKE, IMPORTS), windows=(window,))
    if os.geteuid() == 0:
        assert maps(proxy.pid) == []
    proxy.pio_write(4, 4, at)
    proxy.pio_write(8, 4, 0xCAFEBABE)
    assert ram.get(at, 4) == proxy.pio_read(0, 4) == 0xCAFEBABE


def test_where_it_is_asked_for_all_goes_by_messages(bench, ram, wat):
    proxy = bench.one(wat(POKE, IMPORTS), {"map_windows": False}, windows=(RW,))
    if os.geteuid() == 0:
        assert maps(proxy.pid) == []
    proxy.pio_write(4, 4, 0x11FFC)
    proxy.pio_write(8, 4, 0xCAFEBABE)
    assert ram.get(0x11FFC, 4) == proxy.pio_read(0, 4) == 0xCAFEBABE


@pytest.mark.parametrize("at", [0x11FFD, 0x12000, 0xFFFD, 0xFFFFFFFC])
def test_outside_the_windows_is_a_fault(bench, ram, wat, at):
    proxy = bench.one(wat(POKE, IMPORTS), windows=(RW, RO), on_fault="detach")
    proxy.pio_write(4, 4, at)
    assert proxy.pio_read(0, 4) == 0xFFFFFFFF
    assert bench.fault()["kind"] == "window"


def test_a_window_to_read_is_not_written(bench, ram, wat):
    proxy = bench.one(wat(POKE, IMPORTS), windows=(RW, RO), on_fault="detach")
    proxy.pio_write(4, 4, RO.gpa)
    proxy.pio_write(8, 4, 1)
    assert bench.fault()["kind"] == "window"
    assert ram.get(RO.gpa, 4) == 0


def test_the_next_worker_has_the_windows_too(bench, ram, wat):
    proxy = bench.one(wat(POKE, IMPORTS), windows=(RW,), on_fault="restart(1)")
    ram.put(0x10000, 4, 5)
    proxy.pio_write(4, 4, 0x10000)
    os.kill(proxy.pid, signal.SIGKILL)
    assert proxy.pio_read(0, 4) == 0xFFFFFFFF
    proxy.pio_write(4, 4, 0x10000)
    assert proxy.pio_read(0, 4) == 5


def test_a_successor_may_have_more_rights(bench, ram, wat):
    window = GuestWindow(0x20000, 0x1000)
    proxy = bench.one(wat(LOOK, READ_ONLY), windows=(window,))
    (host,) = bench.hosts
    host.claim(_Bus())
    host.replace(
        ExtensionSpec("org.example.test", "2", wat(POKE, IMPORTS), windows=(GuestWindow(0x20000, 0x1000, True),))
    )
    assert proxy.state is State.RUNNING
    (proxy,) = host.proxies
    proxy.pio_write(4, 4, 0x20000)
    proxy.pio_write(8, 4, 9)
    assert ram.get(0x20000, 4) == 9


class _Bus:
    def describe(self, owner, text):
        return

    def release(self, owner):
        return lambda: None


@pytest.fixture
def file(ram):
    """Give ``file(writable)``: a descriptor of a window's file."""
    made = []

    def share(writable):
        made.append(ram.share(0x10000, 0x2000, writable=writable))
        return made[-1]

    yield share
    for fd in made:
        os.close(fd)


def test_the_file_of_a_window_to_read_cannot_be_written(file):
    fd = file(False)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 0x2000, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)


@pytest.mark.parametrize("size", [0, 0x1000, 0x3000])
def test_nobody_cuts_a_window_short(file, size):
    with pytest.raises(PermissionError):
        os.ftruncate(file(True), size)


def test_what_can_be_shared(ram):
    assert ram.share(0x10000, 0x2000, writable=True) is not None
    taken = [ram.share(*args, writable=False) for args in ((0x10000, 0x1000), (0x11000, 0x2000), (0xF000, 0x4000))]
    holes = [ram.share(*args, writable=False) for args in ((0xBF000, 0x2000), (0xF0000, 0x1000), (0x1FF000, 0x2000))]
    crooked = [ram.share(*args, writable=False) for args in ((0x20001, 0x1000), (0x20000, 0x801), (0x20000, 0))]
    assert taken == holes == crooked == [None] * 3


def test_memory_stays_what_it_was_and_leaves_nothing_behind():
    before = len(list(Path("/proc/self/fd").iterdir()))
    ram = GuestRam(2)
    ram.write(0xFFF0, bytes(range(32)))
    os.close(ram.share(0x10000, 0x1000, writable=False))
    assert ram.read(0xFFF0, 32) == bytes(range(32))
    ram.write(0xFFFC, b"12345678")
    assert ram.map[0xFFFC:0x10004] == b"12345678"
    ram.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_only_so_many_are_mapped(ram):
    asked = [Window(0x10000 + 0x1000 * number, 0x1000) for number in range(MAX_MAPPED + 4)]
    shared = windows.share_windows(ram, [*asked, asked[0]])
    windows.close_shared(shared)
    assert [each.window for each in shared] == asked[:MAX_MAPPED]
    assert windows.share_windows(object(), asked) == []


def test_a_file_of_another_size_is_not_mapped(ram):
    fd = ram.share(0x10000, 0x1000, writable=False)
    with pytest.raises(OSError, match="another size"):
        windows.map_window(fd, Window(0x10000, 0x2000))
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_worker_that_gets_no_descriptor_ends(bench, ram, wat, monkeypatch):
    send_fds = socket.send_fds

    def forget(end, packets, fds):
        return end.send(packets[0]) if packets[0][0] == protocol.Kind.WINDOW else send_fds(end, packets, fds)

    monkeypatch.setattr(socket, "send_fds", forget)
    with pytest.raises(ExtensionFaultError):
        bench.one(wat(POKE, IMPORTS), windows=(RW,))
    assert bench.fault()["kind"] == "died"


class Messages:
    def __init__(self):
        self.asked = []

    def read_guest(self, gpa, length):
        self.asked.append((gpa, length))
        return bytes(length)

    def write_guest(self, gpa, data):
        self.asked.append((gpa, data))


def test_a_view_takes_the_mapped_one_of_two():
    messages, area = Messages(), memoryview(bytearray(0x1000))
    view = GuestView([Window(0x800, 0x2000, True), Window(0x1000, 0x1000, True, True)], {1: area}, messages)
    view.write(0x1010, b"abc")
    assert (bytes(area[0x10:0x13]), view.read(0x1010, 3), view.touched, messages.asked) == (b"abc", b"abc", True, [])
    view.touched = False
    view.write(0x2000, b"xyz")
    assert view.read(0x1FFF, 5000) == bytes(5000)
    assert messages.asked == [(0x2000, b"xyz"), (0x1FFF, 4096), (0x2FFF, 904)]
    assert not view.touched
    assert view.covers(0x1000, 0x1000, write=True)
    assert not view.covers(0x2700, 0x200, write=False)


@given(st.binary(max_size=1200))
def test_any_bytes_are_windows_or_none(data):
    try:
        found = windows.unpack_windows(data)
    except ValueError:
        return
    assert len(found) == len(data) // 17


def test_windows_come_back():
    listed = (Window(0, 1), Window(1 << 51, 1 << 40, True), Window(5, 6, False, True))
    assert windows.unpack_windows(windows.pack_windows(listed)) == listed
    protocol.parse_window_packet(protocol.frame(protocol.Kind.WINDOW, 0, 2), 2)
    for packet in (b"", protocol.frame(protocol.Kind.WINDOW, 0, 1), protocol.frame(protocol.Kind.MODULE, 0, 2)):
        with pytest.raises(protocol.ProtocolError):
            protocol.parse_window_packet(packet, 2)


def patched_disk():
    return VerifiedDisk(booting(nasm(GUESTS / "patched.asm")), lambda _index, _data: True)


#: Puts "mov al, 'B'; retf" where its window begins, at a write to a port.
PATCH = """(data (i32.const 0) "\\b0B\\cb") (func (export "on_pio_write") (param i32 i32 i32) (result i32)
  (call $write (i64.const 0x10000) (i32.const 0) (i32.const 3)))"""


@pytest.mark.parametrize("mapped", [True, False])
def test_code_that_an_extension_changes_is_run_as_changed(bench, wat, cpu, mapped):
    spec = ExtensionSpec(
        "org.example.test", "1", wat(PATCH, IMPORTS), windows=(GuestWindow(0x10000, 0x1000, True),),
        pio=(PioRange(0x510, 0x510),),
    )  # fmt: skip
    with Machine(Engine(cpu), patched_disk(), memory_mib=16, timeout=20) as machine:
        bench.ram = machine.memory
        host = bench.host(spec, map_windows=mapped)
        host.claim(machine.bus)
        result = machine.run()
        host.close()
    assert result.serial == b"AB"


def test_a_snapshot_has_the_windows_and_goes_back_into_them(bench, wat):
    disk = patched_disk
    spec = ExtensionSpec("org.example.test", "1", wat(POKE, IMPORTS), windows=(RW,))
    with Machine(Engine.SOFT, disk(), memory_mib=16) as machine, Machine(Engine.SOFT, disk(), memory_mib=16) as again:
        bench.ram = machine.memory
        first = bench.host(spec).proxies[0]
        first.pio_write(4, 4, 0x10FFE)
        first.pio_write(8, 4, 0xCAFEBABE)
        bench.ram = again.memory
        second = bench.host(spec).proxies[0]
        again.load(machine.save({}), {})
        second.pio_write(4, 4, 0x10FFE)
        assert again.memory.get(0x10FFE, 4) == second.pio_read(0, 4) == 0xCAFEBABE
        for host in bench.hosts:
            host.close()
