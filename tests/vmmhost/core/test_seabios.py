"""Stock SeaBIOS on this machine: it finds its devices, and what it boots runs."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from vmgraft.errors import CapabilityError, HostError, UsageError
from vmgraft.vmmhost.core import seabios
from vmgraft.vmmhost.core.boot import BootSource
from vmgraft.vmmhost.core.claims import Reserved
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.drives import Drive, DriveKind
from vmgraft.vmmhost.core.loaders import DirectBoot
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.memory import MIB
from vmgraft.vmmhost.core.portmap import FirmwareKind, planning_bus
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.core.seabios import load_firmware, scan_codes

GRUB = Path("/usr/lib/grub-rescue")


@pytest.fixture
def boot(make_machine):
    """Give ``boot(engine, content, **options)``: the result of a run under SeaBIOS."""

    def run(engine, what, **options):
        return make_machine(engine, what, **({"firmware": FirmwareKind.SEABIOS} | options)).run()

    return run


@pytest.fixture
def grub(content):
    def read(name):
        data = (GRUB / name).read_bytes()
        return content(data + bytes(-len(data) % 512))

    return read


def test_a_boot_sector_runs_and_the_log_tells_how_it_came_to_it(engine, boot):
    result = boot(engine, "serial")
    assert (result.reason, result.serial) == (EndReason.SHUTDOWN, b"hello from the guest\n")
    log = result.debug.decode()
    for line in (
        "Running on QEMU (i440fx)",
        "QEMU fw_cfg DMA interface supported",
        "qemu/e820: addr 0x0000000000000000 len 0x0000000001000000 [RAM]",
        *(("Using pmtimer, ioport 0xb008",) if engine is Engine.SOFT else ()),  # KVM offers a clock of its own
        "found virtio-blk at 00:03.0",
        "PS2 keyboard initialized",
        "Booting from Hard Disk...",
        "Booting from 0000:7c00",
    ):
        assert line in log, log
    assert result.screen[0].startswith("SeaBIOS (version") or result.screen[1].startswith("SeaBIOS (version")
    assert "Booting from Hard Disk..." in result.screen
    assert "unknown scancode" not in log


def test_the_software_cpu_repeats_itself(boot):
    first, second = (boot(Engine.SOFT, "serial", trace=True, rtc_epoch=0) for _ in range(2))
    assert len(first.trace) > 4000
    assert first.trace == second.trace
    assert (first.virtual_ns, first.exits) == (second.virtual_ns, second.exits)


def test_disk_services_of_the_firmware_write_to_the_overlay(boot, guest):
    image = guest("disk")
    image.data[1024:1028] = (0xCAFEF00D).to_bytes(4, "little")
    before = bytes(image.data)
    result = boot(Engine.SOFT, image)
    assert result.reason is EndReason.SHUTDOWN, result.debug.decode()
    words = [int(word, 16) for word in result.serial.decode().split()]
    assert words[:8] == [0xAA55, 0x0000, 0xCAFEF00D, 0x0000, 0xCAFEF00D, 0x0000, 0x0000, 0x12345678]
    assert bytes(image.data) == before
    assert result.blocks_written == 1


def test_keys_are_typed_on_the_keyboard(boot):
    result = boot(Engine.SOFT, "keyboard", keys="aZ\x1b\n")
    assert result.reason is EndReason.SHUTDOWN
    codes = [int(word, 16) for word in result.serial.decode().split()]
    assert [code for code in codes if code > 0xFF] == [0x1E61, 0x2C5A, 0x011B]


def test_scan_codes():
    assert scan_codes("a") == (0x1E, 0x9E)
    assert scan_codes("A") == (0x2A, 0x1E, 0x9E, 0xAA)
    assert scan_codes("!") == (0x2A, 0x02, 0x82, 0xAA)
    assert scan_codes("é") == ()


def test_grub_from_a_cd(boot, grub):
    result = boot(Engine.SOFT, grub("grub-rescue-cdrom.iso"), until="GNU GRUB", memory_mib=64)
    assert result.until_seen, result.debug.decode()
    assert b"virtio-scsi vendor='VMGRAFT' product='CD-ROM'" in result.debug
    assert b"Booting from DVD/CD..." in result.debug


def test_grub_from_a_hard_disk(boot, grub):
    result = boot(Engine.SOFT, grub("grub-rescue-usb.img"), boot=BootSource.DISK, until="GNU GRUB", memory_mib=64)
    assert result.until_seen, result.debug.decode()
    assert b"Booting from Hard Disk..." in result.debug


def test_grub_from_a_floppy_cut_short(boot, grub):
    image = grub("grub-rescue-floppy.img")
    result = boot(Engine.SOFT, image, boot=BootSource.FLOPPY, until="GNU GRUB", memory_mib=64)
    assert result.until_seen, result.debug.decode()
    assert b"Booting from Floppy..." in result.debug


def test_further_drives_are_found_in_order(boot, content):
    more = [VerifiedDisk(content(bytes(size)), lambda _index, _block: True) for size in (MIB, 2 * MIB, 3 * MIB)]
    kinds = (DriveKind.HARD_DISK, DriveKind.CDROM, DriveKind.HARD_DISK)
    result = boot(Engine.SOFT, "serial", drives=[Drive(disk, kind) for disk, kind in zip(more, kinds, strict=True)])
    assert result.reason is EndReason.SHUTDOWN
    found = re.findall(rb"found virtio-(\w+) at 00:(\d\d)\.0", result.debug)
    assert sorted(found, key=lambda each: each[1]) == [
        (b"blk", b"03"),
        (b"blk", b"04"),
        (b"scsi", b"05"),
        (b"blk", b"06"),
    ]
    order = re.findall(rb"\d: /pci@i0cf8/scsi@(\d)/", result.debug)
    assert order == [b"3", b"4", b"5", b"6"]


def test_nothing_to_boot_is_said_by_the_firmware(boot, content):
    result = boot(Engine.SOFT, content(bytes(MIB)))
    assert (result.reason, result.detail) == (EndReason.RESET, "the firmware found nothing to boot")


def test_content_that_is_not_what_was_verified_ends_the_run(guest):
    answers = iter((True,))  # the look at the boot sector before the machine starts; later the content has changed
    disk = VerifiedDisk(guest("serial"), lambda _index, _block: next(answers, False))
    with Machine(Engine.SOFT, disk, firmware=FirmwareKind.SEABIOS, memory_mib=16, timeout=60) as machine:
        disk._cache.clear()
        result = machine.run()
    assert (result.reason, result.serial) == (EndReason.DISK, b"")
    assert "block 0" in result.detail


def test_a_full_overlay_is_an_error_to_the_guest(guest):
    image = guest("disk")
    disk = VerifiedDisk(image, lambda _index, _block: True, overlay_max=0)
    with Machine(Engine.SOFT, disk, firmware=FirmwareKind.SEABIOS, memory_mib=16, timeout=60) as machine:
        result = machine.run()
    assert result.reason is EndReason.SHUTDOWN
    assert result.blocks_written == 0
    assert result.serial.split()[5] != b"00000000"


# --- finding it, and what it does not go with -----------------------------------------------------------------------


def test_the_firmware_is_named_by_its_digest():
    image = load_firmware()
    assert image.path == "/usr/share/seabios/bios-256k.bin"
    assert image.sha256 == hashlib.sha256(Path(image.path).read_bytes()).hexdigest()
    assert image.to_dict().keys() == {"path", "sha256", "videoSha256"}


def test_without_a_video_bios_there_is_no_screen_and_the_guest_boots_all_the_same(boot):
    found = load_firmware()
    result = boot(Engine.SOFT, "serial", bios=seabios.FirmwareImage(found.path, found.rom))
    assert result.serial == b"hello from the guest\n"
    assert not any(result.screen)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "0 bytes, not 262144"), (bytes(256 << 10), "no jump at the reset vector"), (bytes(300 << 10), "more than")],
)
def test_a_file_that_is_no_firmware(tmp_path, data, message):
    path = tmp_path / "bios.bin"
    path.write_bytes(data)
    with pytest.raises(HostError, match=message) as caught:
        load_firmware(path)
    assert caught.value.file == str(path)


def test_a_missing_firmware_names_the_package(tmp_path, monkeypatch):
    with pytest.raises(HostError, match="cannot be read") as caught:
        load_firmware(tmp_path / "none")
    assert "package seabios" in (caught.value.hint or "")
    with pytest.raises(HostError, match=r"not a file|cannot be read"):
        load_firmware(tmp_path)
    monkeypatch.setattr(seabios, "BIOS_PATHS", (str(tmp_path / "none"),))
    with pytest.raises(HostError, match="SeaBIOS is not installed") as caught:
        load_firmware()
    assert "package seabios" in (caught.value.hint or "")


def test_what_does_not_go_together(make_machine, content):
    empty = VerifiedDisk(content(bytes(MIB)), lambda _index, _block: True)
    floppy = Drive(empty, DriveKind.FLOPPY)
    for options in (
        *({"memory_mib": 2}, {"stop_on_key_wait": True}, {"direct": DirectBoot(b"kernel")}),
        *({"drives": [Drive(empty)] * 24}, {"drives": [floppy, floppy]}),
    ):
        with pytest.raises(UsageError):
            make_machine(Engine.SOFT, "serial", firmware=FirmwareKind.SEABIOS, **options)


# --- claims ----------------------------------------------------------------------------------------------------------


def test_the_table_of_ports_is_what_the_machine_claims(make_machine, engine):
    machine = make_machine(engine, "halt", firmware=FirmwareKind.SEABIOS)
    assert machine.bus.ports_of("core") == planning_bus(16 * MIB, FirmwareKind.SEABIOS).ports_of("core")


@pytest.mark.parametrize("first", [0x510, 0x3C0, 0xCFC, 0xC100, 0xB008])
def test_its_ports_are_taken(first):
    for kind, refused in ((FirmwareKind.SEABIOS, True), (FirmwareKind.TRAP, False)):
        bus = planning_bus(16 * MIB, kind)
        if refused:
            with pytest.raises(CapabilityError, match=r"a claims ports .*, but core holds"):
                bus.claim_pio(first, first, Reserved(), "a")
        else:
            bus.claim_pio(first, first, Reserved(), "a")


class Nothing:
    def mmio_read(self, offset, size):
        return 0

    def mmio_write(self, offset, size, value):
        pass


def test_its_memory_map_leaves_no_hole_below_one_mib():
    bus = planning_bus(16 * MIB, FirmwareKind.SEABIOS)
    for base in (0xC0000, 0xD0000, 0x80000000, 0xE0000000, 0xFEBFF000, 0xFFFC0000):
        with pytest.raises(CapabilityError):
            bus.claim_mmio(base, 0x1000, Nothing(), "a")
    bus.claim_mmio(16 * MIB, 0x1000, Nothing(), "a")
    bus.claim_mmio(0x7FFFF000, 0x1000, Nothing(), "a")
    with pytest.raises(CapabilityError, match="line 10, which core holds"):
        bus.claim_irq(10, "a")
