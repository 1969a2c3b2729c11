"""Guests that try to crash, hang or escape the host, on whole machines with either firmware."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hostile_programs import hostile_image

from vmgraft.errors import HostError
from vmgraft.vmmhost.core.bus import TRACE_MAX
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.drives import Drive, DriveKind
from vmgraft.vmmhost.core.firmware import bios
from vmgraft.vmmhost.core.machine import OUTPUT_KEPT
from vmgraft.vmmhost.core.memory import HIGH_BASE, MIB, ROM_BASE
from vmgraft.vmmhost.core.portmap import FirmwareKind
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.core.result import MachineResult

FIRMWARE = pytest.mark.parametrize("firmware", list(FirmwareKind), ids=[kind.value for kind in FirmwareKind])
#: Blocks that a guest of these tests may change on each disk.
OVERLAY_BLOCKS = 2


def drives(content) -> list[Drive]:
    """One drive of each kind beside the boot medium, and one that is read-only and ends amid a sector."""

    def disk(size: int) -> VerifiedDisk:
        return VerifiedDisk(content(bytes(size)), lambda _index, _block: True, overlay_max=OVERLAY_BLOCKS << 16)

    return [
        Drive(disk(MIB), DriveKind.HARD_DISK, name="second"),
        Drive(disk(MIB), DriveKind.CDROM, name="disc"),
        Drive(disk(1_474_560), DriveKind.FLOPPY, name="floppy"),
        Drive(disk(70_000), DriveKind.HARD_DISK, read_only=True, name="odd"),
    ]


def check(result: MachineResult, seconds: float) -> None:
    """Hold against a result what every run promises."""
    assert result.reason in EndReason
    assert result.detail
    assert result.wall_seconds < seconds + 8  # a slice, and one long BIOS call, on a busy computer
    assert len(result.screen) == 25
    assert len(result.trace) <= TRACE_MAX
    assert max(len(result.bios_calls), len(result.unknown_calls)) <= bios.CALLS_MAX + 1
    assert len(result.serial) <= OUTPUT_KEPT
    assert len(result.debug) <= 1 << 20
    for use in result.drives[1:]:
        assert use.blocks_written <= (0 if use.name in ("disc", "odd") else OVERLAY_BLOCKS)


@FIRMWARE
@pytest.mark.parametrize("seed", range(6))
def test_programs_that_do_anything_end_as_documented(make_machine, content, firmware, seed):
    """And can be kept at any moment: what was kept goes on in another machine."""
    image = content(hostile_image(seed, firmware))
    before, kept = bytes(image.data), []
    seconds = 0.4 if firmware is FirmwareKind.TRAP else 1.0
    options = {"firmware": firmware, "memory_mib": 4, "timeout": seconds, "rtc_epoch": 0}
    machine = make_machine(Engine.SOFT, image, drives=drives(content), trace=seed == 0, **options)
    machine.add_tick(lambda _now: kept or machine.at_rest(lambda: kept.append(machine.save({}))))
    check(machine.run(), seconds)
    assert bytes(image.data) == before
    if firmware is FirmwareKind.TRAP:
        assert machine.ram.read(ROM_BASE, HIGH_BASE - ROM_BASE) == bios.rom_image()
    if kept:
        again = make_machine(Engine.SOFT, image, drives=drives(content), **options | {"timeout": 0.2})
        again.load(kept[0], {})
        check(again.run(), 0.2)


@pytest.mark.parametrize("seed", range(3))
def test_programs_that_do_anything_on_kvm(kvm, make_machine, content, seed):
    image = content(hostile_image(seed, FirmwareKind.TRAP))
    machine = make_machine(kvm, image, drives=drives(content), memory_mib=4, timeout=0.4)
    check(machine.run(), 0.4)
    assert machine.ram.read(ROM_BASE, HIGH_BASE - ROM_BASE) == bios.rom_image()


@FIRMWARE
@pytest.mark.parametrize("engine", [Engine.SOFT], ids=["soft"])
def test_every_port_in_every_width(make_machine, engine, firmware):
    """Twice, with what the first round left behind: no access raises, and reads keep to their width."""
    machine = make_machine(engine, "halt", firmware=firmware, memory_mib=4)
    chance, bus = random.Random(5), machine.bus
    for _ in range(2):
        for port in range(0x10000):
            size = chance.choice((1, 2, 4))
            bus.pio_write(port, size, chance.getrandbits(8 * size))
            assert 0 <= bus.pio_read(port, size) < 1 << (8 * size)
    assert len(machine._serial) <= OUTPUT_KEPT


@FIRMWARE
def test_memory_where_nothing_is(make_machine, firmware):
    machine = make_machine(Engine.SOFT, "halt", firmware=firmware, memory_mib=4)
    for address in (0xC0000, 0xEFFFF, 4 * MIB, 0x80000000, 0xFEC00000, 0xFEE00FFF, 0xFFFFFFFF, 1 << 32, (1 << 52) - 1):
        for size in range(1, 9):
            machine.bus.mmio_write(address, size, (1 << (8 * size)) - 2)
            assert machine.bus.mmio_read(address, size) == (1 << (8 * size)) - 1


# --- single ideas ----------------------------------------------------------------------------------------------------


def test_an_interrupt_whose_frame_falls_into_the_rom(engine, make_machine):
    machine = make_machine(engine, "romstack")
    result = machine.run()
    assert (result.reason, result.detail) == (EndReason.ERROR, "INT 20h with a stack outside RAM at 0xf8ffa")
    assert machine.ram.read(ROM_BASE, HIGH_BASE - ROM_BASE) == bios.rom_image()


def test_paging_hides_neither_the_rom_nor_what_the_host_wrote_over_code(make_machine):
    machine = make_machine(Engine.SOFT, "alias", firmware=FirmwareKind.SEABIOS)
    kept = []
    machine.board.serial._sink = lambda data: kept.append((data, machine.ram.read(0xF5123, 4)))
    result = machine.run()
    assert result.reason is EndReason.SHUTDOWN, result
    assert [data for data, _ in kept] == [b"A", b"B"]
    assert {rom for _, rom in kept} == {machine.firmware.image.rom[-0x10000 + 0x5123 :][:4]}


def test_names_of_calls_are_bounded(run_guest):
    result = run_guest(Engine.SOFT, "calls")
    assert result.reason is EndReason.SHUTDOWN
    assert sum(result.unknown_calls.values()) == 4096
    assert len(result.unknown_calls) == bios.CALLS_MAX + 1
    assert result.unknown_calls[bios.OTHER_CALLS] == 4096 - bios.CALLS_MAX


@pytest.mark.parametrize("name", ["storm", "flood"])
def test_a_timer_storm_in_hlt_is_no_storm_of_ticks(engine, make_machine, name):
    ticks = []
    machine = make_machine(engine, name, timeout=0.6)
    machine.add_tick(ticks.append)
    result = machine.run()
    assert result.reason is EndReason.TIMEOUT
    assert 2 <= len(ticks) <= 70
    assert result.wall_seconds < 4


def test_console_output_is_kept_within_bounds(make_machine):
    for until in (None, "the end"):
        machine = make_machine(Engine.SOFT, "halt", until=until)
        tracemalloc.start()
        for _ in range(3 * OUTPUT_KEPT // 4096):
            machine.board.serial.send(b"x" * 4096)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(machine._serial) == OUTPUT_KEPT
        assert peak < 3 * OUTPUT_KEPT


@pytest.mark.parametrize("pieces", [(b"so the end it is",), (b"th", b"e ", b"end"), (b"xxthe", b" endxx")])
def test_the_text_waited_for_is_found_anywhere_in_the_output(make_machine, pieces):
    machine = make_machine(Engine.SOFT, "halt", until="the end")
    for piece in pieces:
        assert not machine._until_seen
        machine.board.serial.send(piece)
    assert machine._until_seen


class Clock:
    def pio_read(self, offset, size):
        return 0x42

    def pio_write(self, offset, size, value):
        pass


def test_a_pci_region_moved_over_other_ports_takes_none_of_them(make_machine, content):
    machine = make_machine(Engine.SOFT, "halt", firmware=FirmwareKind.SEABIOS, drives=drives(content), memory_mib=4)
    bus = machine.bus
    bus.claim_pio(0x300, 0x33F, Clock(), "a")
    for base in range(0, 0x10000, 0x40):
        bus.pio_write(0xCF8, 4, 1 << 31 | 3 << 11 | 0x10)
        bus.pio_write(0xCFC, 4, base)
        bus.pio_write(0xCF8, 4, 1 << 31 | 3 << 11 | 4)
        bus.pio_write(0xCFC, 2, 5)
        assert bus.pio_read(0x300, 1) == 0x42
        assert bus.pio_read(0x3FD, 1) == 0x60
        assert bus.pio_read(0x514, 4) == int.from_bytes(b"QEMU", "little")
        assert (bus.pio_read(base | 0x0C, 2) == 128) is (base >= 0xC000)


def test_a_snapshot_whose_tables_lie_where_no_memory_is(make_machine, capfd):
    machine = make_machine(Engine.SOFT, "halt", memory_mib=4)
    cpu = machine.cpu
    cpu._uc.reg_write(cpu._names.UC_X86_REG_GDTR, (0, 0xD0000, 0xFFFF, 0))
    cpu._uc.reg_write(cpu._names.UC_X86_REG_CR0, 0x11)
    kept = machine.save({})
    again = make_machine(Engine.SOFT, "halt", memory_mib=4)
    try:
        again.load(kept, {})
    except HostError as error:
        assert error.field == "registers"
    else:
        assert again.run().reason in EndReason
    assert capfd.readouterr().err == ""


# --- what the result tells of drives ---------------------------------------------------------------------------------


def test_all_drives_are_counted(engine, make_machine, content, guest):
    more = drives(content)[:2]
    result = make_machine(engine, guest("drives"), drives=more, timeout=20).run()
    assert [(use.name, use.kind) for use in result.drives] == [
        ("boot", DriveKind.HARD_DISK),
        ("second", DriveKind.HARD_DISK),
        ("disc", DriveKind.CDROM),
    ]
    assert [use.blocks_checked for use in result.drives] == [1, 1, 1]
    assert result.blocks_checked == 3
    assert result.blocks_written == sum(use.blocks_written for use in result.drives)


def cmos(machine, register: int) -> int:
    machine.bus.pio_write(0x70, 1, register)
    return machine.bus.pio_read(0x71, 1)


def test_cmos_tells_of_floppies(make_machine, content):
    def machine(*sizes):
        disks = [VerifiedDisk(content(bytes(size)), lambda _index, _block: True) for size in sizes]
        return make_machine(Engine.SOFT, "halt", drives=[Drive(disk, DriveKind.FLOPPY) for disk in disks])

    for sizes, types, equipment in (((), 0x00, 0x26), ((1_474_560,), 0x40, 0x27), ((368_640, 2_949_120), 0x16, 0x67)):
        built = machine(*sizes)
        assert (cmos(built, 0x10), cmos(built, 0x14)) == (types, equipment)
        checksum = cmos(built, 0x2E) << 8 | cmos(built, 0x2F)
        assert checksum == sum(cmos(built, register) for register in range(0x10, 0x2E))
