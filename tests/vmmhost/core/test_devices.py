"""Devices on their own, the controllers of the software CPU among them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.devices import board
from vmgraft.vmmhost.core.devices.cmos import Cmos
from vmgraft.vmmhost.core.devices.serial import Serial
from vmgraft.vmmhost.core.firmware.keyboard import key_code
from vmgraft.vmmhost.core.screen import TEXT_BASE, TextScreen
from vmgraft.vmmhost.core.softint import DeliveryError, walk
from vmgraft.vmmhost.core.softirq import PIT_HZ, LevelControl, PicPair, PicPorts, Pit


@pytest.fixture
def stops():
    """Give a list of stops, and the function that adds to it."""
    seen = []
    return seen, lambda reason, detail: seen.append((reason, detail))


# --- serial ---------------------------------------------------------------------------------------------------------


def test_serial_sends_and_is_always_ready():
    out = bytearray()
    port = Serial(out.extend)
    for char in b"ok":
        assert port.pio_read(5, 1) == 0x60
        port.pio_write(0, 1, char)
    assert out == b"ok"
    assert port.pio_read(2, 1) == 0x01
    port.pio_write(2, 1, 0x01)
    assert port.pio_read(2, 1) == 0xC1
    assert port.pio_read(6, 1) == 0xB0


def test_serial_divisor_hides_data():
    out = bytearray()
    port = Serial(out.extend)
    port.pio_write(3, 1, 0x83)
    port.pio_write(0, 2, 0x0001)
    assert port.pio_read(0, 2) == 0x0001
    port.pio_write(3, 1, 0x03)
    assert out == b""
    assert port.pio_read(0, 1) == 0


def test_serial_loop_back():
    out = bytearray()
    port = Serial(out.extend)
    port.pio_write(4, 1, 0x1A)
    assert port.pio_read(6, 1) == 0x90  # RTS as CTS, OUT2 as DCD
    port.pio_write(0, 1, 0x5A)
    assert port.pio_read(5, 1) == 0x61
    assert (port.pio_read(0, 1), port.pio_read(5, 1), bytes(out)) == (0x5A, 0x60, b"")


# --- board ----------------------------------------------------------------------------------------------------------


def test_keyboard_controller(stops):
    seen, stop = stops
    controller = board.KeyboardController(stop)
    controller.pio_write(4, 1, 0xAA)
    assert controller.pio_read(4, 1) & 1
    assert controller.pio_read(0, 1) == 0x55
    assert not controller.pio_read(4, 1) & 1
    controller.pio_write(4, 1, 0xD1)
    controller.pio_write(0, 1, 0xDD)
    controller.pio_write(4, 1, 0xD0)
    assert controller.pio_read(0, 1) & 2  # A20 stays on
    assert seen == []
    controller.pio_write(4, 1, 0xD1)
    controller.pio_write(0, 1, 0xFE)
    controller.pio_write(4, 1, 0xFE)
    controller.pio_write(4, 1, 0xFF)  # pulses no line
    assert [reason for reason, _ in seen] == [EndReason.RESET, EndReason.RESET]


def test_power_off_ports(stops):
    seen, stop = stops
    power, text = board.PowerControl(stop), board.ShutdownText(stop)
    power.pio_write(0, 1, 0x20)
    power.pio_write(0, 2, 0x0001)
    for char in b"ShutShutdow":
        text.pio_write(0, 1, char)
    assert seen == []
    text.pio_write(0, 1, ord("n"))
    power.pio_write(0, 2, 0x2000)
    assert seen == [(EndReason.SHUTDOWN, "port 0x8900"), (EndReason.SHUTDOWN, "port 0x604")]


def test_fast_reset_and_speaker(stops):
    seen, stop = stops
    control, speaker = board.SystemControl(stop), board.SpeakerPort()
    control.pio_write(0, 1, 0)
    assert control.pio_read(0, 1) == 2
    assert speaker.pio_read(0, 1) ^ speaker.pio_read(0, 1) == 0x30
    assert seen == []
    control.pio_write(0, 1, 3)
    assert seen == [(EndReason.RESET, "port 0x92")]


def test_debug_port_is_bounded():
    sink = bytearray()
    port = board.DebugPort(sink, 0xE9, limit=3)
    for char in b"abcdef":
        port.pio_write(0, 1, char)
    assert sink == b"abc"
    assert port.pio_read(0, 1) == 0xE9


def test_crtc_remembers():
    crtc = board.Crtc()
    crtc.pio_write(0, 2, 0x120E)
    crtc.pio_write(0, 1, 0x0F)
    crtc.pio_write(1, 1, 0x34)
    assert crtc.pio_read(1, 1) == 0x34
    assert crtc.pio_read(0, 2) == 0x340F
    assert crtc.pio_read(6, 1) != crtc.pio_read(6, 1)


def test_clock_counts_virtual_time_in_bcd():
    now = [0]
    cmos = Cmos(lambda: now[0], 1_700_000_000, 64 << 20)

    def register(index: int) -> int:
        cmos.pio_write(0, 1, 0x80 | index)
        return cmos.pio_read(1, 1)

    assert [register(index) for index in (4, 2, 0, 7, 8, 9, 0x32)] == [0x22, 0x13, 0x20, 0x14, 0x11, 0x23, 0x20]
    now[0] = 3_661_000_000_000
    assert [register(index) for index in (4, 2, 0)] == [0x23, 0x14, 0x21]
    cmos.set_time(1, 2, 3)
    assert [register(index) for index in (4, 2, 0)] == [0x01, 0x02, 0x03]
    assert register(0x17) | register(0x18) << 8 == 63 << 10
    assert register(0x34) | register(0x35) << 8 == (48 << 20) >> 16
    cmos.pio_write(0, 1, 0x0D)
    cmos.pio_write(1, 1, 0)
    assert register(0x0D) == 0x80
    cmos.pio_write(0, 2, 0x5A40)
    assert register(0x40) == 0x5A


# --- interrupt controllers and timer of the software CPU ------------------------------------------------------------


def pics() -> tuple[PicPair, PicPorts, PicPorts]:
    pair = PicPair()
    master, slave = PicPorts(pair, slave=False), PicPorts(pair, slave=True)
    for chip, base, cascade in ((master, 0x20, 4), (slave, 0x28, 2)):
        chip.pio_write(0, 1, 0x11)
        for value in (base, cascade, 0x01, 0x00):
            chip.pio_write(1, 1, value)
    return pair, master, slave


def test_priorities_and_end_of_interrupt():
    pair, master, _slave = pics()
    pair.set_line(3, True)
    pair.set_line(1, True)
    assert pair.acknowledge() == 0x21
    assert pair.acknowledge() is None  # line 3 waits for line 1 to end
    master.pio_write(0, 1, 0x0B)
    assert master.pio_read(0, 1) == 0x02
    master.pio_write(0, 1, 0x20)
    assert pair.acknowledge() == 0x23
    master.pio_write(0, 1, 0x63)
    assert not pair.pending()
    pair.set_line(1, True)  # still high: no new edge
    assert not pair.pending()


def test_cascade():
    pair, master, slave = pics()
    pair.set_line(12, True)
    assert pair.acknowledge() == 0x2C
    pair.set_line(9, True)
    slave.pio_write(0, 1, 0x20)
    master.pio_write(0, 1, 0x20)
    assert pair.acknowledge() == 0x29
    slave.pio_write(1, 1, 0xFF)
    assert slave.pio_read(1, 1) == 0xFF
    assert not pair.pending()


def test_masked_lines_wait():
    pair, master, _slave = pics()
    master.pio_write(1, 1, 0xFF)
    pair.set_line(0, True)
    assert not pair.pending()
    master.pio_write(0, 1, 0x0A)
    assert master.pio_read(0, 1) == 1
    master.pio_write(1, 1, 0xFE)
    assert pair.acknowledge() == 0x20


def test_timer_period():
    now = [0]
    pair, master, _slave = pics()
    pit = Pit(pair, lambda: now[0])
    assert pit.due is None
    for offset, value in ((3, 0x34), (0, 0xA9), (0, 0x04)):  # 1193 counts: 1 ms
        pit.pio_write(offset, 1, value)
    assert pit.due == 1193 * 1_000_000_000 // PIT_HZ
    fired = 0
    for now[0] in range(0, 10_000_000, 100_000):
        pit.advance(now[0])
        if pair.pending():
            pair.acknowledge()
            master.pio_write(0, 1, 0x20)
            fired += 1
    assert fired == 9
    pit.pio_write(3, 1, 0x00)  # latch
    low, high = pit.pio_read(0, 1), pit.pio_read(0, 1)
    assert 0 < (low | high << 8) <= 1193


def test_one_shot_timer():
    now = [0]
    pair, _master, _slave = pics()
    pit = Pit(pair, lambda: now[0])
    pit.pio_write(3, 1, 0x10)  # counter 0, low byte, mode 0
    pit.pio_write(0, 1, 119)
    pit.advance(99_000)
    assert not pair.pending()
    pit.advance(101_000)
    assert pair.pending()
    assert pit.due is None


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 255)), max_size=60))
def test_any_timer_programming_keeps_going(accesses):
    now = [0]
    pair, _master, _slave = pics()
    pit = Pit(pair, lambda: now[0])
    for offset, write, value in accesses:
        now[0] += value * 10_000
        if write:
            pit.pio_write(offset, 1, value)
        else:
            assert 0 <= pit.pio_read(offset, 1) <= 0xFF
        pit.advance(now[0])
        assert pit.due is None or pit.due > now[0]


# --- page tables, screen, keys ----------------------------------------------------------------------------------------


class Tables:
    """Guest memory that holds page tables only."""

    def __init__(self, size: int, entries: dict[int, int]) -> None:
        self._size, self._entries = size, entries

    def read(self, address: int, size: int) -> bytes:
        assert size == self._size
        return self._entries.get(address, 0).to_bytes(size, "little")


def test_page_walks():
    pse, pae, lma = 1 << 4, 1 << 5, 1 << 10
    legacy = Tables(4, {0x1000: 0x2003, 0x2004: 0x5003, 0x1004: 0x800083})
    assert walk(0x1000, pse, 0, 0x1234, legacy.read) == 0x5234
    assert walk(0x1000, pse, 0, 0x400000 + 0x12345, legacy.read) == 0x812345
    pae_tables = Tables(8, {0x1020: 0x2001, 0x2000: 0x3003, 0x3008: 0x7003, 0x2008: 0x600083})
    assert walk(0x1020, pae, 0, 0x1ABC, pae_tables.read) == 0x7ABC
    assert walk(0x1020, pae, 0, 0x200000 + 0x42, pae_tables.read) == 0x600042
    long_tables = Tables(8, {0x1000: 0x2003, 0x2000: 0x3003, 0x2008: 0x40000083, 0x3000: 0x83})
    assert walk(0x1000, pae, lma, 0x1FFFFF, long_tables.read) == 0x1FFFFF
    assert walk(0x1000, pae, lma, 0x40000000 + 5, long_tables.read) == 0x40000005
    for cr4, efer, tables in ((pse, 0, legacy), (pae, 0, pae_tables), (pae, lma, long_tables)):
        with pytest.raises(DeliveryError, match="no page"):
            walk(0x1000, cr4, efer, 0xBFFFF000, tables.read)


class Cells:
    """A text screen."""

    def __init__(self, text: bytes) -> None:
        self.text = text.ljust(2000)

    def read(self, gpa, length):
        assert (gpa, length) == (TEXT_BASE, 4000)
        return b"".join(bytes((char, 7)) for char in self.text)

    def write(self, gpa, data):
        raise AssertionError


def test_screen_shows_code_page_437():
    screen = TextScreen(Cells(b"\xdaA\xc4\x80\x00\x19\x01\x7f".ljust(80) + b"second"))
    assert screen.lines()[:2] == ["┌A─Ç ↓☺⌂", "second"]
    assert len(screen.lines()) == 25
    assert screen.contains("A─Ç")
    assert not screen.contains("⌂second")
    assert str(screen) == "┌A─Ç ↓☺⌂\nsecond"


@pytest.mark.parametrize(
    ("char", "code"),
    [
        ("a", 0x1E61),
        ("A", 0x1E41),
        ("1", 0x0231),
        ("!", 0x0221),
        ("\n", 0x1C0D),
        (" ", 0x3920),
        ("?", 0x353F),
        ("é", 0x0082),
    ],
)
def test_key_codes(char, code):
    assert key_code(char) == code


def test_lines_triggered_by_level_ask_as_long_as_they_are_up():
    pair, master, slave = pics()
    control = LevelControl(pair)
    control.pio_write(0, 2, 0xFFFF)
    assert control.pio_read(0, 2) == 0xDEF8  # timer, keyboard, cascade, clock and coprocessor stay with edges
    slave.pio_write(1, 1, 0)
    pair.set_line(10, True)
    for _ in range(2):
        assert pair.acknowledge() == 0x2A
        for ports in (slave, master):
            ports.pio_write(0, 1, 0x20)
        assert pair.pending()  # nobody served the device
    pair.set_line(10, False)
    assert not pair.pending()
