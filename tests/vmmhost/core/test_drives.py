"""Several drives, floppies, and drives that a CD emulates: what INT 13h says of them, and real images that boot so."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_boot import PROGRAM, entry, iso, mbr
from test_firmware import Bench, packet

from vmgraft.errors import NotBootableError, UsageError
from vmgraft.vmmhost.core.boot import FLOPPY, HARD_DISK, BootPlan, BootSource, drive_only, find_boot
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.drives import Drive, DriveKind, PartOfDisk
from vmgraft.vmmhost.core.geometry import (
    FLOPPY_FORMATS,
    Geometry,
    floppy_format,
    hard_disk_geometry,
    is_floppy,
    partitions,
    table_geometry,
)
from vmgraft.vmmhost.core.probe import Engine

GRUB = Path("/usr/lib/grub-rescue")
HD, CD, FD = DriveKind.HARD_DISK, DriveKind.CDROM, DriveKind.FLOPPY
FLOPPY_SIZES = [each.geometry.total * 512 for each in FLOPPY_FORMATS]


@pytest.fixture
def disk(content):
    """Give ``disk(data)``: a trusted disk in memory."""

    def build(data: bytes) -> VerifiedDisk:
        return VerifiedDisk(content(bytes(data)), lambda _index, _block: True)

    return build


def marked(letter: str, size: int = 1 << 20, sector: int = 512) -> bytes:
    """Content whose second sector begins with a letter four times."""
    return bytes(sector) + (letter * 4).encode().ljust(size - sector, b"\0")


def bpb(total: int, track: int, heads: int, size: int) -> bytes:
    raw = bytearray(size)
    raw[0], raw[510:512] = 0xEB, b"\x55\xaa"
    struct.pack_into("<H", raw, 11, 512)
    struct.pack_into("<H", raw, 19, total)
    struct.pack_into("<HH", raw, 24, track, heads)
    return bytes(raw)


# --- formats and geometry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bytes(1474560), (80, 2, 18, 4)),
        (bytes(1228800), (80, 2, 15, 2)),
        (bytes(2949120), (80, 2, 36, 6)),
        (bytes(737280), (80, 2, 9, 3)),
        (bytes(1296384), (80, 2, 18, 4)),
        (bytes(100), (40, 1, 8, 1)),
        (bytes(1720320), (80, 2, 21, 4)),
        (bpb(2400, 15, 2, 1 << 20), (80, 2, 15, 2)),
        (bpb(2880, 18, 2, 737280), (80, 2, 18, 4)),
        (bpb(2880, 17, 2, 737280), (80, 2, 9, 3)),
        (bpb(720, 9, 2, 1474560), (80, 2, 18, 4)),
    ],
)
def test_floppy_formats(disk, data, expected):
    form = floppy_format(disk(data))
    shape = form.geometry
    assert (shape.cylinders, shape.heads, shape.sectors, form.drive_type) == expected


def test_what_looks_like_a_floppy(disk):
    for size in FLOPPY_SIZES:
        assert is_floppy(disk(bpb(size // 512, 18, 2, size)))
    assert not is_floppy(disk(bytes(1 << 20)))
    table = bytearray(1474560)
    struct.pack_into("<B3sB3sII", table, 446, 0x80, b"\0\2\0", 6, b"\1\x12\x4f", 63, 2000)
    assert not is_floppy(disk(table))
    struct.pack_into("<I", table, 446 + 8, 1 << 30)  # code that looks like a table, but not of this disk
    assert is_floppy(disk(table))


def test_geometry_of_hard_disks():
    assert hard_disk_geometry(2048) == Geometry(2, 16, 63)
    assert hard_disk_geometry(0) == Geometry(1, 16, 63)
    assert hard_disk_geometry(1 << 40) == Geometry(1024, 255, 63)
    assert table_geometry(bytes((15, 63, 0)), 1008 * 10 + 1) == Geometry(11, 16, 63)
    assert table_geometry(bytes((255, 63, 0)), 2048) == hard_disk_geometry(2048)
    assert table_geometry(bytes((15, 0xC0, 0)), 2048) == hard_disk_geometry(2048)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=64, max_size=64), st.integers(0, 1 << 40))
def test_any_partition_table(table, total):
    for first, count, last in partitions(bytes(446) + table + b"\x55\xaa", total):
        assert count > 0
        assert first + count <= total
        shape = table_geometry(last, first + count)
        assert 1 <= shape.cylinders <= 1024
        assert 1 <= shape.heads <= 255
        assert 1 <= shape.sectors <= 63


# --- what boots ------------------------------------------------------------------------------------------------------


def test_floppies_boot_by_size_or_when_told(disk):
    image = bpb(2880, 18, 2, 1474560)
    for source in (BootSource.AUTO, BootSource.FLOPPY):
        plan = find_boot(disk(image), source)
        assert (plan.drive, plan.sector_size, plan.medium) == (FLOPPY, 512, FD)
    assert find_boot(disk(image), BootSource.DISK).drive == HARD_DISK
    assert find_boot(disk(mbr(1 << 20)), BootSource.AUTO).drive == HARD_DISK
    assert find_boot(disk(mbr(1 << 20)), BootSource.FLOPPY).drive == FLOPPY


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes(1474560), "no boot signature"),
        (bytes(510) + b"\x55\xaa", "boot sector is empty"),
        (mbr(2949120 + 512), "is no floppy"),
        (b"", "no boot signature"),
    ],
)
def test_floppies_that_do_not_boot(disk, data, words):
    with pytest.raises(NotBootableError, match=words) as caught:
        find_boot(disk(data), BootSource.FLOPPY)
    assert caught.value.hint


def test_what_a_disk_is_when_the_kernel_comes_from_elsewhere(disk):
    kinds = {b"": HD, bytes(512): HD, bytes(1 << 20): HD, bytes(1474560): FD, bytes(iso()): CD}
    for data, kind in kinds.items():
        assert drive_only(disk(data), BootSource.AUTO).medium is kind
    assert drive_only(disk(bytes(iso())), BootSource.DISK).medium is HD


def emulation(media: int, image: bytes, size: int = 0, **fields) -> bytes:
    """An ISO whose boot entry emulates a drive."""
    data = iso(boot=entry(media=media, count=fields.pop("count", 1), **fields))
    data[PROGRAM * 2048 :] = image.ljust(size, b"\0")
    return bytes(data)


def partitioned(sectors: int = 2015, last: bytes = bytes((15, 63, 1)), kind: int = 6) -> bytes:
    image = bytearray(mbr((sectors + 1) * 512))
    struct.pack_into("<B3sB3sII", image, 446, 0x80, b"\1\1\0", kind, last, 1, sectors)
    return bytes(image)


@pytest.mark.parametrize(("media", "size", "kind"), [(1, 1228800, 2), (2, 1474560, 4), (3, 2949120, 6)])
def test_floppy_emulation_is_planned(disk, media, size, kind):
    plan = find_boot(disk(emulation(media, bytes(mbr()), size)), BootSource.AUTO)
    assert (plan.drive, plan.medium, plan.media, plan.address, plan.size) == (FLOPPY, CD, media, 0x7C00, 512)
    assert plan.emulated is not None
    assert (plan.emulated.offset, plan.emulated.size, plan.emulated.floppy_type) == (PROGRAM * 2048, size, kind)


def test_hard_disk_emulation_is_planned(disk):
    plan = find_boot(disk(emulation(4, partitioned())), BootSource.CDROM)
    assert (plan.drive, plan.medium) == (HARD_DISK, CD)
    assert plan.emulated is not None
    assert (plan.emulated.size, plan.emulated.geometry) == (2016 * 512, Geometry(2, 16, 63))


@pytest.mark.parametrize(
    "image",
    [bytes(4096), bytes(mbr(4096)), partitioned()[:-512], partitioned(kind=0), partitioned(sectors=1 << 20)[:9999]],
)
def test_hard_disk_emulation_needs_a_table(disk, image):
    with pytest.raises(NotBootableError, match="partition table"):
        find_boot(disk(emulation(4, image)), BootSource.CDROM)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=66, max_size=66), st.integers(0, 5), st.integers(0, 70000))
def test_any_emulated_disk_is_planned_inside_the_image_or_refused(table, media, tail):
    class Reader:
        data = emulation(media, bytes(446) + table, 512) + bytes(tail)
        virtual_size, sector_size = len(data), 2048

        def read(self, offset, length):
            return self.data[offset : offset + length]

    trusted = VerifiedDisk(Reader(), lambda _index, _block: True)
    try:
        plan = find_boot(trusted, BootSource.CDROM)
    except NotBootableError:
        return
    if plan.emulated is not None:
        assert plan.emulated.offset + plan.emulated.size <= trusted.size
        Bench(plan, disk=trusted).call(0x13, rax=0x0201, rcx=1, rdx=plan.drive, rbx=0x8000)


# --- what INT 13h says -----------------------------------------------------------------------------------------------


def test_numbers_of_many_drives(disk):
    drives = [Drive(disk(marked(letter, sector=2048 if kind is CD else 512)), kind) for letter, kind in (
        ("b", HD), ("c", CD), ("d", FD), ("e", HD), ("f", CD), ("g", FD),
    )]  # fmt: skip
    bench = Bench(drives=drives)
    found = {}
    for number in range(256):
        bench.ram.write(0x600, packet(lba=1))
        if number < 0x80:
            _, carry = bench.call(0x13, rax=0x0201, rcx=2, rdx=number, rbx=0x8000)
        else:
            _, carry = bench.call(0x13, rax=0x4200, rdx=number, rsi=0x600)
        if not carry:
            found[number] = bench.ram.read(0x8000, 1)
    assert found == {0x00: b"d", 0x01: b"g", 0x80: b"\1", 0x81: b"b", 0x82: b"e", 0xE0: b"c", 0xE1: b"f"}
    assert bench.ram.get(0x475, 1) == 3
    assert bench.ram.get(0x410, 2) & 0xC1 == 0x41
    bench.call(0x13, rax=0x0800, rdx=0x82)
    assert bench.cpu.registers["rdx"] & 0xFF == 3


def test_too_many_drives(disk):
    with pytest.raises(UsageError, match="5 drives of kind floppy, but numbers for 4"):
        Bench(drives=[Drive(disk(bytes(1474560)), FD)] * 5)


def test_floppy_services(disk):
    bench = Bench(BootPlan(0, 512, 0, 512, 0x7C00, 0, 0x7C00), disk=disk(marked("x", 1228800)))
    assert bench.call(0x13, rax=0x0800, rdx=0) == (0, 0)
    assert (bench.cpu.registers["rcx"], bench.cpu.registers["rdx"], bench.cpu.registers["rbx"]) == (0x4F0F, 0x0101, 2)
    assert bench.ram.get(0x4AD, 1) == 1
    vector = bench.ram.get(0x78, 4)
    assert bench.ram.get((vector >> 16 << 4) + (vector & 0xFFFF) + 4, 1) == 15
    assert bench.call(0x13, rax=0x1500, rdx=0) == (0x0100, 0)
    assert bench.call(0x13, rax=0x1600, rdx=0) == (0x0000, 0)
    assert bench.call(0x13, rax=0x4100, rbx=0x55AA, rdx=0) == (0x0100, 1)
    assert bench.call(0x13, rax=0x0201, rcx=2, rdx=0, rbx=0x8000) == (0x0001, 0)
    assert bench.ram.read(0x8000, 4) == b"xxxx"
    assert bench.call(0x13, rax=0x0201, rcx=16, rdx=0, rbx=0x8000) == (0x0400, 1)  # a track has 15
    assert bench.call(0x13, rax=0x0100, rdx=0) == (0x0400, 1)
    assert bench.call(0x13, rax=0x0100, rdx=0x80) == (0x0000, 0)  # the others' status is their own
    assert bench.call(0x13, rax=0x0301, rcx=2, rdx=0, rbx=0x8000) == (0x0001, 0)
    assert bench.call(0x13, rax=0x0201, rcx=2, rdx=1, rbx=0x8000)[1] == 1


def test_read_only_drives(disk):
    bench = Bench(drives=[Drive(disk(marked("r")), HD, read_only=True)])
    bench.ram.write(0x600, packet())
    assert bench.call(0x13, rax=0x4300, rdx=0x81, rsi=0x600) == (0x0300, 1)
    assert bench.call(0x13, rax=0x4300, rdx=0x80, rsi=0x600) == (0x0000, 0)


def test_an_emulated_drive_pushes_the_others_up_until_it_ends(disk):
    image = emulation(4, partitioned(), 0)
    trusted = disk(image)
    bench = Bench(find_boot(trusted, BootSource.AUTO), disk=trusted, drives=[Drive(disk(marked("h")), HD)])
    read = {"rax": 0x0201, "rcx": 2, "rbx": 0x8000}
    assert bench.call(0x13, rdx=0x81, **read) == (1, 0)
    assert bench.ram.read(0x8000, 4) == b"hhhh"
    assert bench.call(0x13, rax=0x0301, rcx=2, rbx=0x8000, rdx=0x80) == (0x0300, 1)
    bench.ram.write(0x600, packet(lba=0x10))
    assert bench.call(0x13, rax=0x4200, rdx=0xE0, rsi=0x600) == (0, 0)  # the CD itself can be read as well
    assert bench.ram.read(0x8001, 5) == b"CD001"
    for function in (0x4B01, 0x4B00):
        assert bench.call(0x13, rax=function, rdx=0x80, rsi=0x700)[1] == 0
        specification = struct.unpack("<BBBBIHHHHBBB", bench.ram.read(0x700, 19))
        assert specification == (19, 4, 0x80, 0, PROGRAM, 0, 0, 0x7C0, 1, 1, 63, 15)
    assert bench.call(0x13, rdx=0x80, **read) == (1, 0)
    assert bench.ram.read(0x8000, 4) == b"hhhh"
    assert bench.call(0x13, rdx=0x81, **read)[1] == 1
    assert bench.ram.get(0x475, 1) == 1
    assert bench.call(0x13, rax=0x4B01, rdx=0x7F, rsi=0x700)[1] == 1
    assert bench.call(0x13, rax=0x4B01, rdx=0xE0, rsi=0x700)[1] == 0
    assert bench.ram.read(0x700, 3) == bytes((19, 0, 0xE0))


def test_ending_every_emulation(disk):
    trusted = disk(emulation(2, bytes(mbr()), 1474560))
    bench = Bench(find_boot(trusted, BootSource.AUTO), disk=trusted)
    assert bench.call(0x13, rax=0x4B00, rdx=0x7F, rsi=0x700)[1] == 0
    assert struct.unpack("<BBBBIHHHHBBB", bench.ram.read(0x700, 19))[-3:] == (79, 18, 1)
    assert bench.call(0x13, rax=0x0201, rcx=1, rdx=0, rbx=0x8000)[1] == 1
    assert bench.ram.get(0x410, 2) & 0xC1 == 0


def test_no_emulation_to_end_on_a_hard_disk():
    assert Bench().call(0x13, rax=0x4B01, rdx=0x80, rsi=0x700) == (0x0101, 1)


def test_part_of_a_disk(disk):
    outer = disk(bytes(range(256)) * 512)
    part = PartOfDisk(outer, 1000, 2000)
    part.write(5, b"xyz")
    assert part.read(4, 5) == b"\xecxyz\xf0"
    assert outer.read(1005, 3) == b"xyz"
    for offset, length in ((1999, 2), (-1, 1), (0, -1)):
        with pytest.raises(ValueError, match="not inside"):
            part.read(offset, length)
    with pytest.raises(ValueError, match="not inside"):
        part.write(1999, b"xy")
    with pytest.raises(ValueError, match="not inside"):
        PartOfDisk(outer, 0, outer.size + 1)


# --- a guest that looks around ---------------------------------------------------------------------------------------


def words(result) -> list[str]:
    assert result.reason is EndReason.SHUTDOWN, result.detail
    return result.serial.decode().split()


def test_a_guest_sees_every_drive(engine, run_guest, disk):
    drives = [
        Drive(disk(marked("D", 1228800)), FD),
        Drive(disk(marked("B")), HD),
        Drive(disk(marked("C", 8192, 2048)), CD),
    ]
    found = words(run_guest(engine, "drives", drives=drives))
    assert found == [
        *("00000080", "00004f0f", "00000101", "00000002", "0000000f", "00000002", "00000001"),
        *("44444444", "00000000", "42424242", "43434343"),
    ]


def test_a_guest_on_a_floppy(engine, run_guest, guest):
    found = words(run_guest(engine, guest("drives", 1474560)))
    assert found[:7] == ["00000000", "00004f12", "00000101", "00000004", "00000012", "00000000", "00000001"]


# --- images as distributions ship them -------------------------------------------------------------------------------


@pytest.fixture
def iso_with(tmp_path, content):
    """Give ``iso_with(tool, image, size, *options)``: a CD that emulates the drive whose image it holds."""

    def build(tool: str, image: Path, size: int, *options: str):
        folder = tmp_path / "files"
        folder.mkdir()
        (folder / "boot.img").write_bytes(image.read_bytes())
        os.truncate(folder / "boot.img", size or image.stat().st_size)
        command = {"genisoimage": ["genisoimage", "-quiet"], "xorriso": ["xorriso", "-as", "mkisofs", "-quiet"]}[tool]
        subprocess.run(
            [*command, "-b", "boot.img", "-c", "boot.cat", *options, "-o", tmp_path / "cd.iso", folder],
            check=True,
            capture_output=True,
        )
        return content((tmp_path / "cd.iso").read_bytes(), 2048)

    return build


def reaches_grub(result) -> bool:
    assert result.reason is EndReason.UNTIL, result.detail
    return any("GNU GRUB  version" in line for line in result.screen)


OPTIONS = {"until": "GNU GRUB  version", "memory_mib": 64}


def test_grub_from_its_floppy(run_guest, content):
    image = content((GRUB / "grub-rescue-floppy.img").read_bytes())
    result = run_guest(Engine.SOFT, image, boot=BootSource.FLOPPY, **OPTIONS)
    assert reaches_grub(result)
    assert result.bios_calls["13/02"] > 50
    assert "13/42" not in result.bios_calls


def test_grub_from_an_emulated_floppy(run_guest, iso_with):
    result = run_guest(Engine.SOFT, iso_with("genisoimage", GRUB / "grub-rescue-floppy.img", 1474560), **OPTIONS)
    assert reaches_grub(result)


def test_grub_from_an_emulated_hard_disk(run_guest, iso_with):
    image = iso_with("xorriso", GRUB / "grub-rescue-usb.img", 0, "-hard-disk-boot")
    result = run_guest(Engine.SOFT, image, boot=BootSource.CDROM, **OPTIONS)
    assert reaches_grub(result)
    assert result.bios_calls["13/42"] > 100


def test_grub_from_its_usb_image(run_guest, content):
    image = content((GRUB / "grub-rescue-usb.img").read_bytes())
    assert reaches_grub(run_guest(Engine.SOFT, image, boot=BootSource.DISK, **OPTIONS))
