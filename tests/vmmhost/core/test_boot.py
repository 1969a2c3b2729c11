"""What is bootable, what is not and why, and real boot images."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import NotBootableError
from vmgraft.vmmhost.core.boot import CDROM, HARD_DISK, BootSource, find_boot
from vmgraft.vmmhost.core.contract import EndReason
from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.probe import Engine

GRUB = Path("/usr/lib/grub-rescue")
MEMTEST = Path("/usr/lib/memtest86+/memtest86+x64.iso")
CATALOGUE = 20
PROGRAM = 24
#: A guest that takes longer to GRUB's command line may be so slow that GRUB, which keeps blocks for 2 seconds, reads
#: some of them again.
DAWDLES_SECONDS = 20


def validation(platform: int = 0) -> bytes:
    raw = bytearray(struct.pack("<BBH24sHBB", 1, platform, 0, b"vmgraft", 0, 0x55, 0xAA))
    struct.pack_into("<H", raw, 28, -sum(struct.unpack("<16H", raw)) & 0xFFFF)
    return bytes(raw)


def entry(indicator=0x88, media=0, segment=0, count=4, sector=PROGRAM) -> bytes:
    return struct.pack("<BBHBBHI20x", indicator, media, segment, 0, 0, count, sector)


def iso(
    program: bytes = b"", *, check: bytes | None = None, boot: bytes | None = None, catalogue=CATALOGUE
) -> bytearray:
    image = bytearray(40 * 2048)
    image[16 * 2048 : 16 * 2048 + 7] = b"\x01CD001\x01"
    record = struct.pack("<B5sB32s32sI", 0, b"CD001", 1, b"EL TORITO SPECIFICATION", b"", catalogue)
    image[17 * 2048 : 17 * 2048 + len(record)] = record
    entries = (validation() if check is None else check) + (entry() if boot is None else boot)
    image[CATALOGUE * 2048 : CATALOGUE * 2048 + len(entries)] = entries
    image[PROGRAM * 2048 : PROGRAM * 2048 + len(program)] = program
    return image


def mbr(size: int = 4096) -> bytearray:
    image = bytearray(size)
    image[:2], image[510:512] = b"\xeb\xfe", b"\x55\xaa"
    return image


@pytest.fixture
def find(content):
    """Give ``find(data, source)``: the boot plan of these bytes."""

    def run(data: bytes, source: BootSource = BootSource.AUTO):
        return find_boot(VerifiedDisk(content(bytes(data)), lambda _index, _block: True), source)

    return run


def test_master_boot_record(find):
    plan = find(mbr())
    assert (plan.drive, plan.sector_size, plan.address, plan.size, plan.segment, plan.ip) == (
        *(HARD_DISK, 512, 0x7C00),
        *(512, 0, 0x7C00),
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no boot signature"),
        (bytes(511), "no boot signature"),
        (bytes(4096), "no boot signature"),
        (mbr()[:510] + b"\xaa\x55", "no boot signature"),
        (bytes(510) + b"\x55\xaa", "is empty"),
    ],
    ids=["empty", "short", "zeros", "swapped", "table-only"],
)
def test_disk_that_does_not_boot(find, data, words):
    with pytest.raises(NotBootableError, match=words) as caught:
        find(data)
    assert caught.value.hint
    assert caught.value.field == "MBR"


def test_no_emulation_cd(find):
    plan = find(iso())
    assert (plan.drive, plan.sector_size, plan.address, plan.segment, plan.ip) == (CDROM, 2048, 0x7C00, 0, 0x7C00)
    assert (plan.source_offset, plan.size) == (PROGRAM * 2048, 2048)
    other = find(iso(boot=entry(segment=0x2000, count=64)[:32], catalogue=CATALOGUE))
    assert (other.address, other.segment, other.ip, other.size) == (0x20000, 0x2000, 0, 32768)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (iso(catalogue=0xFFFFFFFF), "outside the image"),
        (iso(catalogue=40), "outside the image"),
        (iso(check=bytes(32)), "validation entry"),
        (iso(check=validation()[:-1] + b"\xab"), "validation entry"),
        (iso(check=validation(platform=0xEF)), "not x86"),
        (iso(boot=entry(indicator=0)), "not bootable"),
        (iso(boot=entry(media=1)), "floppy of 1228800 bytes reaches beyond"),
        (iso(boot=entry(media=2)), "floppy of 1474560 bytes reaches beyond"),
        (iso(boot=entry(media=3)), "floppy of 2949120 bytes reaches beyond"),
        (iso(boot=entry(media=4)), "no usable partition table"),
        (iso(boot=entry(media=5)), "media type 5 is unknown"),
        (iso(boot=entry(count=0)), "conventional memory"),
        (iso(boot=entry(count=0xFFFF)), "conventional memory"),
        (iso(boot=entry(segment=0xFFFF)), "conventional memory"),
        (iso(boot=entry(segment=0x0010)), "conventional memory"),
        (iso(boot=entry(sector=0xFFFFFFFF)), "outside the image"),
        (iso(boot=entry(sector=39, count=5)), "outside the image"),
        (mbr(), "no El Torito"),
        (bytes(17 * 2048 + 5), "no El Torito"),
    ],
)
def test_cd_that_does_not_boot(find, image, words):
    with pytest.raises(NotBootableError, match=words) as caught:
        find(image, BootSource.CDROM)
    assert caught.value.offset is not None
    assert caught.value.field


def test_hybrid_with_a_cd_side_that_does_not_boot_starts_from_disk(find):
    image = iso(boot=entry(media=2))
    with pytest.raises(NotBootableError, match="floppy"):
        find(image)
    image[:512] = mbr()[:512]
    assert find(image).drive == HARD_DISK
    assert find(iso()).drive == CDROM
    image = iso()
    image[:512] = mbr()[:512]
    assert find(image, BootSource.DISK).drive == HARD_DISK


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=64, max_size=64), st.integers(0, 0xFFFFFFFF), st.booleans())
def test_any_catalogue_boots_or_is_refused(entries, catalogue, sane):
    class Reader:
        data = bytes(iso(check=validation() if sane else entries[:32], boot=entries[32:], catalogue=catalogue % 64))
        virtual_size, sector_size = len(data), 2048

        def read(self, offset, length):
            return self.data[offset : offset + length]

    try:
        plan = find_boot(VerifiedDisk(Reader(), lambda _index, _block: True), BootSource.CDROM)
    except NotBootableError:
        return
    assert 0x600 <= plan.address <= plan.address + plan.size <= 0x9FC00
    assert plan.source_offset + plan.size <= Reader.virtual_size


def test_cd_program_runs_with_its_drive(engine, run_guest, content):
    code = bytes.fromhex("8ec1 90 b442 be1d7c cd13 a10080 bae900 ee 88e0 ee ba0406 b80020 ef")
    code = code.ljust(0x1D, b"\x90") + struct.pack("<BBHHHQ", 16, 0, 1, 0x8000, 0, 30)
    image = iso(code)
    image[30 * 2048 : 30 * 2048 + 2] = b"CD"
    result = run_guest(engine, content(bytes(image), 2048))
    assert result.reason is EndReason.SHUTDOWN
    assert result.debug == b"CD"


# --- images as distributions ship them ------------------------------------------------------------------------------


@pytest.fixture
def image_of(content):
    """Give the content of an image file."""

    def build(path: Path):
        return content(path.read_bytes())

    return build


@pytest.mark.parametrize("source", [BootSource.AUTO, BootSource.DISK])
def test_grub_rescue_on_soft(run_guest, image_of, source):
    image = image_of(GRUB / "grub-rescue-cdrom.iso")
    result = run_guest(Engine.SOFT, image, boot=source, until="GNU GRUB  version", memory_mib=64)
    assert result.reason is EndReason.UNTIL, result.detail
    assert any("GNU GRUB  version" in line for line in result.screen)
    assert result.wall_seconds < 15


def test_memtest_starts_in_long_mode(run_guest, image_of):
    result = run_guest(Engine.SOFT, image_of(MEMTEST), until="Memtest86+ v", memory_mib=16, timeout=120)
    assert result.reason is EndReason.UNTIL, result.detail


def to_the_menu_and_off(run_guest, image, engine):
    """Boot to the menu, ask for a command line there, and power off from it: an end at the same place every time."""
    result = run_guest(engine, image, keys="chalt\n", memory_mib=64, timeout=200)
    assert (result.reason, result.detail) == (EndReason.SHUTDOWN, "APM power off")
    assert result.engine == engine.value
    assert "grub> halt" in [line.strip() for line in result.screen]
    return result


@pytest.fixture(scope="module")
def soft_run():
    """What was seen on the soft CPU, for the comparison; a run takes seconds."""
    return []


def test_grub_menu_takes_keys(run_guest, image_of, soft_run):
    result = to_the_menu_and_off(run_guest, image_of(GRUB / "grub-rescue-cdrom.iso"), Engine.SOFT)
    assert result.bios_calls["13/42"] > 50
    assert result.bios_calls["10/09"] > 1000  # the menu was drawn
    soft_run.append(result)


@pytest.mark.slow
@pytest.mark.kvm
def test_grub_rescue_makes_the_same_calls_on_kvm(kvm, run_guest, image_of, soft_run):
    image = image_of(GRUB / "grub-rescue-cdrom.iso")
    soft = soft_run[0] if soft_run else to_the_menu_and_off(run_guest, image, Engine.SOFT)
    result = to_the_menu_and_off(run_guest, image, kvm)
    again = result.bios_calls["13/42"] - soft.bios_calls["13/42"]
    assert again == 0 or (again > 0 and result.wall_seconds > DAWDLES_SECONDS)
    assert result.bios_calls == soft.bios_calls | {"13/42": result.bios_calls["13/42"]}
    assert result.blocks_checked == soft.blocks_checked  # the same content in any case
