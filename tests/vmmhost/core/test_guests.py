"""Small guests, each on both engines."""

from __future__ import annotations

import random
import time

import pytest

from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.probe import Engine


def words(serial: bytes) -> list[int]:
    return [int(word, 16) for word in serial.decode().split()]


def test_serial_and_power_off(engine, run_guest):
    seen = bytearray()
    result = run_guest(engine, "serial", serial=seen.extend)
    assert (result.reason, result.detail) == (EndReason.SHUTDOWN, "port 0x604")
    assert result.serial == bytes(seen) == b"hello from the guest\n"
    assert result.engine == engine.value
    assert result.emulated is not None
    assert result.wall_seconds < 5


def test_text_screen(engine, run_guest):
    result = run_guest(engine, "screen")
    assert result.reason is EndReason.HALT
    # the scroll moved everything up by one line
    assert result.screen[0] == "seconD"
    assert result.screen[9] == " " * 70 + "─" * 10
    assert result.screen[10] == "─" * 10
    assert result.screen[23].endswith("X")
    assert result.screen[24] == "Y"
    assert result.screen[5] == "  string"
    assert words(result.serial) == [0x0A46, 0x1EC4, 0x5003]


def test_disk_services(engine, run_guest, guest):
    image = guest("disk")
    image.data[1024:1028] = (0xCAFEF00D).to_bytes(4, "little")
    before = bytes(image.data)
    result = run_guest(engine, image)
    assert result.reason is EndReason.SHUTDOWN
    assert words(result.serial) == [
        *(0xAA55, 0x0000, 0xCAFEF00D, 0x0000, 0xCAFEF00D),
        *(0x0000, 0x0000, 0x12345678),
        *(0x0000, 0x013F, 0x0F01),
        *(0x0000, 2048, 0x10400, 0x10900),
    ]
    assert bytes(image.data) == before
    assert result.blocks_written == 1


def test_keys(engine, run_guest):
    result = run_guest(engine, "keyboard", keys="aZ\x1b\n")
    assert result.reason is EndReason.SHUTDOWN
    assert words(result.serial) == [0, 0x1E61, 0x2C5A, 0x011B]


def test_key_wait(engine, run_guest):
    result = run_guest(engine, "keyboard", keys="q", stop_on_key_wait=True)
    assert result.reason is EndReason.KEY_WAIT
    assert words(result.serial) == [0, 0x1071]


def test_blocking_read_sleeps_until_the_time_limit(engine, run_guest):
    cpu_before = time.process_time()
    result = run_guest(engine, "keyboard", timeout=0.6)
    assert result.reason is EndReason.TIMEOUT
    assert words(result.serial) == [0x40]
    assert time.process_time() - cpu_before < 0.5


def test_spinning_guest_is_stopped(engine, run_guest):
    result = run_guest(engine, "spin", timeout=0.5)
    assert result.reason is EndReason.TIMEOUT
    assert result.detail == "after 0.5 s"
    assert result.serial == b"spinning"
    assert 0.4 < result.wall_seconds < 3


def test_until_on_serial(engine, run_guest):
    result = run_guest(engine, "spin", until="spin")
    assert (result.reason, result.detail) == (EndReason.UNTIL, "on the serial port")
    assert result.serial == b"spin"
    assert result.until_seen


def test_until_on_screen_even_if_the_guest_ends_first(engine, run_guest):
    result = run_guest(engine, "screen", until="seconD")
    assert result.until_seen
    assert result.reason in (EndReason.HALT, EndReason.UNTIL)


def test_until_never_seen(engine, run_guest):
    result = run_guest(engine, "serial", until="no such text")
    assert result.reason is EndReason.SHUTDOWN
    assert not result.until_seen


def test_holes_read_as_ones_and_rom_stays(engine, run_guest):
    result = run_guest(engine, "hole")
    assert words(result.serial) == [0xFFFFFFFF, 0xFF, 0xFFFFFFFF, 0xFF, 0xFC]


def test_string_io_is_complete(engine, run_guest):
    result = run_guest(engine, "rep")
    assert result.reason is EndReason.SHUTDOWN
    assert result.serial[:26] == b"abcdefghijklmnopqrstuvwxyz"
    assert words(result.serial[26:]) == [0xFFFFFFFF]
    assert len(result.debug) == 20000


def test_processor_modes_and_timer_interrupts(engine, run_guest):
    result = run_guest(engine, "modes")
    if engine is Engine.KVM and result.emulated and "could not be emulated" in result.detail:
        assert result.serial.startswith(b"RP")
        pytest.skip(f"this KVM emulates guest code and lacks an instruction: {result.detail}")
    assert result.reason is EndReason.SHUTDOWN, result.detail
    assert result.serial == b"RPITL"


def test_time(engine, run_guest):
    epoch = 1_700_000_000  # 2023-11-14 22:13:20 UTC
    result = run_guest(engine, "ticks", rtc_epoch=epoch)
    assert result.serial.startswith(b"ticked ")
    clock, date, century = words(result.serial[7:])
    assert (clock, date, century) == (0x2213, 0x20231114, 0x20)
    # three ticks of 55 ms, the first of which may be under way, and 30 ms up to the next tick
    assert 0.13 < result.virtual_ns / 1e9 < 10
    assert 0.1 < result.wall_seconds < 10


def test_interrupts_come_through_a_narrow_window(engine, run_guest):
    result = run_guest(engine, "window", timeout=20)
    assert (result.reason, result.serial) == (EndReason.SHUTDOWN, b"3")


def test_memory_map(engine, run_guest):
    result = run_guest(engine, "memory", memory_mib=32)
    assert words(result.serial) == [
        *(0, 0x9FC00, 1),
        *(0x9FC00, 0x400, 2),
        *(0xF0000, 0x10000, 2),
        *(0x100000, 31 << 20, 1),
        *(639, (16 << 20) >> 16, 3),
    ]


def test_code_loaded_over_code(engine, run_guest):
    assert run_guest(engine, "overlay").serial == b"ABX"


def test_divide_error_names_the_place(engine, run_guest):
    result = run_guest(engine, "divide")
    assert result.reason is EndReason.ERROR
    assert "divide error in the guest at 0000:7c" in result.detail


def test_reset_line(engine, run_guest):
    assert run_guest(engine, "reset").reason is EndReason.RESET


def test_halt_with_interrupts_off(engine, run_guest):
    result = run_guest(engine, "halt")
    assert result.reason is EndReason.HALT
    assert result.serial == b"before"


def test_a_byte_that_looks_like_hlt_is_not(engine, run_guest):
    result = run_guest(engine, "count")
    assert result.reason is EndReason.SHUTDOWN
    assert words(result.serial) == [400_000]


def test_invalid_instruction_is_the_guests_first(engine, run_guest):
    result = run_guest(engine, "invalid")
    assert result.serial == b"12324"
    assert result.reason is EndReason.ERROR
    assert "invalid instruction in the guest at 0000:7c" in result.detail


def test_triple_fault_is_a_reset(engine, run_guest):
    result = run_guest(engine, "triple")
    if engine is Engine.KVM and result.emulated and result.reason is EndReason.ERROR:
        pytest.skip(f"this KVM emulates guest code and lacks an instruction: {result.detail}")
    assert result.reason is EndReason.RESET
    assert result.detail.startswith("triple fault")


def test_fault_with_error_code_is_beyond_the_soft_engine(run_guest):
    result = run_guest(Engine.SOFT, "fault")
    assert result.reason is EndReason.ERROR
    assert "exception 13 with an error code at 0x0:0x7c" in result.detail


#: Services, port accesses, mode switches, string operations and jumps into the hole, to be strewn into random bytes.
SPICES = (
    "cd10 cd13 cd15 cd16 cd1a fb fa e6ba ec ee ed ef 6e f36e 8ed0 8ec0 9d cf cb f4 0f22c0 0f20c0 0f01 cc cd08"
    " abab f3a4 ea000000d0 e620 e643 e640 e670 ba6405 ba0406"
)


@pytest.mark.parametrize("seed", [3, 14, 27, 133, 160, 220])
def test_random_code_ends_as_documented(engine, run_guest, content, seed):
    chance, code = random.Random(seed), bytearray()
    spices = [bytes.fromhex(spice) for spice in SPICES.split()]
    while len(code) < 510:
        code += chance.choice(spices) if chance.random() < 0.5 else chance.randbytes(chance.randint(1, 3))
    image = content(bytes(code[:510]) + b"\x55\xaa" + bytes(1 << 18))
    before = bytes(image.data)
    result = run_guest(engine, image, timeout=0.2, memory_mib=4)
    assert result.reason in EndReason
    assert result.detail
    assert result.wall_seconds < 10
    assert bytes(image.data) == before


@pytest.mark.parametrize("name", ["serial", "screen", "disk", "hole", "rep", "memory", "overlay", "halt"])
def test_both_engines_show_the_same_trace(kvm, run_guest, name):
    soft, hard = (run_guest(each, name, trace=True, rtc_epoch=0) for each in (Engine.SOFT, kvm))
    assert len(soft.trace) > 4
    assert soft.trace == hard.trace
    assert (soft.screen, soft.serial, soft.reason) == (hard.screen, hard.serial, hard.reason)


def test_soft_engine_repeats_itself(run_guest):
    first, second = (run_guest(Engine.SOFT, "ticks", trace=True, rtc_epoch=0) for _ in range(2))
    assert first.trace == second.trace
    assert first.virtual_ns == second.virtual_ns
    assert first.exits == second.exits
