"""What an ISO image is, compared with isoinfo, xorriso, blkid and udfinfo."""

import re
import struct

import pytest
from imagefmt_helpers import GRUB_ISO, MEMTEST_ISO, SECTOR, attach, iso_bytes, tool
from iso_testkit import make_iso, volume_size, write_at

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.graft import open_image

MEDIA = {
    "none": "no-emulation",
    "fd1.2": "floppy-1.2M",
    "fd1.4": "floppy-1.44M",
    "fd2.8": "floppy-2.88M",
    "hd": "hard-disk",
}
PLATFORMS = {"BIOS": "x86", "PPC": "powerpc", "Mac": "mac", "UEFI": "efi"}


def facts(path):
    with open_image(path) as image:
        return image.metadata()


def xorriso_boot(path):
    """The boot catalogue as ``-report_el_torito plain`` shows it."""
    text = tool("xorriso", "-indev", path, "-report_el_torito", "plain").stdout
    line = r"El Torito boot img : +\d+ +(\S+) +([yn]) +(\S+) +0x(\w+) +0x(\w+) +(\d+) +(\d+)"
    options = dict(re.findall(r"El Torito img opts : +(\d+) +(.*)", text))
    return [
        {
            "platform": PLATFORMS[platform],
            "bootable": bootable == "y",
            "media": MEDIA[media],
            "loadSegment": int(segment, 16),
            "systemType": int(system, 16),
            "count": int(count),
            "sector": int(sector),
            "bootInfoTable": "boot-info-table" in options.get(str(number), ""),
            "grub2BootInfo": "grub2-boot-info" in options.get(str(number), ""),
        }
        for number, (platform, bootable, media, segment, system, count, sector) in enumerate(re.findall(line, text), 1)
    ]


def our_boot(path):
    found = facts(path)["elTorito"]
    assert all(entry["inFile"] for entry in found)
    return [{name: value for name, value in entry.items() if name not in ("id", "inFile")} for entry in found]


@pytest.fixture
def boot_tree(tree):
    for kib in (1200, 1440, 2880):
        (tree / f"floppy-{kib}.img").write_bytes(bytes([kib & 255]) * (kib * 1024))
    disk = tree / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    tool("sfdisk", "-q", disk, stdin="label: dos\nstart=63, size=1900, type=e, bootable\n")
    return tree


BOOT = {
    "1.2 MB floppy": (["-b", "floppy-1200.img"], ["floppy-1.2M"]),
    "1.44 MB floppy": (["-b", "floppy-1440.img"], ["floppy-1.44M"]),
    "2.88 MB floppy": (["-b", "floppy-2880.img"], ["floppy-2.88M"]),
    "hard disk": (["-b", "disk.img", "-hard-disk-boot"], ["hard-disk"]),
    "no emulation": (["-b", "floppy-1440.img", "-no-emul-boot", "-boot-load-size", "4"], ["no-emulation"]),
    "boot info table": (["-b", "floppy-1440.img", "-no-emul-boot", "-boot-info-table"], ["no-emulation"]),
    "load segment": (["-b", "floppy-1440.img", "-no-emul-boot", "-boot-load-seg", "0x7c1"], ["no-emulation"]),
    "not bootable": (["-b", "floppy-1440.img", "-no-emul-boot", "-no-boot"], ["no-emulation"]),
    "two systems": (
        ["-b", "floppy-1440.img", "-eltorito-alt-boot", "-b", "floppy-2880.img", "-no-emul-boot"],
        ["floppy-1.44M", "no-emulation"],
    ),
}


@pytest.mark.parametrize("case", BOOT)
def test_el_torito(tmp_path, boot_tree, case):
    options, media = BOOT[case]
    path = make_iso(tmp_path / "disc.iso", boot_tree, *options, "-c", "boot.cat")
    assert our_boot(path) == xorriso_boot(path)
    assert [entry["media"] for entry in our_boot(path)] == media
    if case == "hard disk":
        assert our_boot(path)[0]["systemType"] == 0x0E
    if case == "not bootable":
        assert our_boot(path)[0]["bootable"] is False
    assert facts(path)["descriptors"] == ["primary", "el-torito", "joliet", "terminator"]


def test_el_torito_for_bios_and_efi(tmp_path, boot_tree):
    options = ["-b", "floppy-1440.img", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    options += ["-eltorito-alt-boot", "-e", "floppy-2880.img", "-no-emul-boot", "-c", "boot.cat"]
    path = make_iso(tmp_path / "disc.iso", boot_tree, *options, maker="xorriso")
    assert our_boot(path) == xorriso_boot(path)
    assert [entry["platform"] for entry in our_boot(path)] == ["x86", "efi"]


@pytest.mark.parametrize("path", [GRUB_ISO, MEMTEST_ISO], ids=["grub", "memtest"])
def test_el_torito_of_real_images(path):
    assert our_boot(path) == xorriso_boot(path) != []


def isoinfo(path):
    text = tool("isoinfo", "-d", "-i", path).stdout
    joliet = re.search(r"Joliet with UCS level (\d)", text)
    return {
        "jolietLevel": int(joliet[1]) if joliet else None,
        "rockRidge": "Rock Ridge signatures" in text,
        "enhanced": "ISO 9660:1999" in text,
        "volumeId": re.search(r"Volume id: (.*)", text)[1].strip(),
        "volumeSize": int(re.search(r"Volume size is: (\d+)", text)[1]) * SECTOR,
    }


EXTENSIONS = {
    "plain": [],
    "rock ridge": ["-R"],
    "joliet 1": ["-J", "-ucs-level", "1"],
    "joliet 2": ["-J", "-ucs-level", "2"],
    "joliet 3": ["-J", "-ucs-level", "3", "-R"],
    "level 4": ["-iso-level", "4"],
    "everything": ["-iso-level", "4", "-J", "-R", "-udf"],
}


@pytest.mark.parametrize("case", EXTENSIONS)
def test_extensions(tmp_path, tree, case):
    path = tmp_path / "disc.iso"
    tool("genisoimage", "-quiet", "-V", "SAMPLE", *EXTENSIONS[case], "-o", path, tree)
    found = facts(path)
    assert {name: found[name] for name in isoinfo(path)} == isoinfo(path)
    assert found["joliet"] is (found["jolietLevel"] is not None)
    assert ("enhanced" in found["descriptors"]) is found["enhanced"]
    assert found["extensions"] == (["RRIP_1991A"] if found["rockRidge"] else [])
    assert found["udf"] is ("-udf" in EXTENSIONS[case])


def test_rock_ridge_by_xorriso(tmp_path, tree):
    """It puts the ER entry into a continuation area."""
    found = facts(make_iso(tmp_path / "disc.iso", tree, maker="xorriso"))
    assert found["rockRidge"] is isoinfo(tmp_path / "disc.iso")["rockRidge"] is True
    assert found["extensions"] == ["RRIP_1991A"]


def test_udf_bridge(tmp_path, tree):
    plain, bridge = make_iso(tmp_path / "plain.iso", tree), make_iso(tmp_path / "bridge.iso", tree, "-udf")
    assert 'TYPE="udf"' in tool("blkid", "-p", bridge).stdout
    assert "blocksize=2048" in tool("udfinfo", bridge).stdout
    assert (facts(bridge)["udf"], facts(bridge)["udfDescriptor"]) == (True, "NSR02")
    assert 'TYPE="udf"' not in tool("blkid", "-p", plain).stdout
    assert (facts(plain)["udf"], facts(plain)["udfDescriptor"]) == (False, None)
    udf = udfinfo(bridge)
    attach(bridge, Placement.INLINE)
    assert udfinfo(bridge) == udf


def udfinfo(path):
    """What it says of the file system, not of the file around it: it looks for a second anchor at the file's end."""
    lines = tool("udfinfo", path).stdout.splitlines()
    return [line for line in lines if not line.startswith(("blocks=", "behindblocks=")) and "ANCHOR" not in line]


def toc(path):
    text = tool("xorriso", "-indev", path, "-toc").stdout
    return [int(start) for start in re.findall(r"ISO session +: +\d+ , +(\d+) ,", text)]


def test_sessions_that_xorriso_added(tmp_path, tree):
    path, extra = tmp_path / "disc.iso", tmp_path / "extra"
    extra.write_bytes(b"extra" * 1000)
    seen = []
    for adding in (["-map", tree, "/"], ["-add", extra, "--"], ["-map", extra, "/again"]):
        tool("xorriso", "-dev", path, *adding)
        seen.append(facts(path)["sessions"])
        assert seen[-1] == toc(path)
    assert [len(sessions) for sessions in seen] == [1, 2, 3]


def add_session(path, folder, extra):
    """What mkisofs -C and a burner do: a session of its own, written behind the ones there are."""
    end = path.stat().st_size // SECTOR
    start = -(-end // 16) * 16
    session = folder / "session.iso"
    options = ["-quiet", "-R", "-J", "-C", f"0,{start}", "-M", path, "-o", session]
    tool("genisoimage", *options, extra)
    write_at(path, start * SECTOR, session.read_bytes())
    return start, session


def test_sessions_that_genisoimage_made(tmp_path, iso):
    extra = tmp_path / "extra"
    extra.write_bytes(b"extra" * 1000)
    assert facts(iso)["sessions"] == [0]
    start, session = add_session(iso, tmp_path, extra)
    assert facts(iso)["sessions"] == [0, start]
    assert facts(iso)["behindVolume"] == iso.stat().st_size - volume_size(iso) > 0
    assert session.stat().st_size > 0
    listing = tool("xorriso", "-load", "sbsector", str(start), "-indev", iso, "-find", "/").stdout
    assert "'/extra'" in listing and "'/hello.txt'" in listing
    attach(iso, Placement.INLINE)
    assert facts(iso)["sessions"] == [0, start]


def test_a_single_later_session_is_no_image(tmp_path, iso):
    """Its volume reaches into sessions that are not there."""
    extra = tmp_path / "extra"
    extra.write_bytes(b"extra" * 1000)
    _, session = add_session(iso, tmp_path, extra)
    data = bytearray(session.read_bytes())
    size = struct.unpack_from("<I", data, 16 * SECTOR + 80)[0] + 10_000
    struct.pack_into("<I", data, 16 * SECTOR + 80, size)
    struct.pack_into(">I", data, 16 * SECTOR + 84, size)
    session.write_bytes(data)
    with pytest.raises(MalformedImageError) as caught:
        open_image(session)
    assert "later session" in caught.value.hint


def test_shorter_and_longer_than_the_volume(iso):
    whole = iso.read_bytes()
    iso.write_bytes(whole[:-SECTOR])
    with pytest.raises(MalformedImageError, match="larger than the file") as caught:
        open_image(iso)
    assert "cut off" in caught.value.hint and caught.value.field == "volume_space_size"
    iso.write_bytes(whole + b"behind")
    assert facts(iso)["behindVolume"] == 6
    assert facts(iso)["contentSize"] == len(whole) + 6


def test_which_hybrids(tmp_path, tree):
    efi = tmp_path / "efi.img"
    efi.write_bytes(bytes(1 << 20))
    makes = {
        "isohybridMbr": ["-partition_offset", "16"],
        "isohybridGpt": ["-append_partition", "2", "0xef", efi, "-appended_part_as_gpt", "-partition_offset", "16"],
        "isohybridApm": ["-hfsplus"],
    }
    for fact, options in makes.items():
        path = make_iso(tmp_path / f"{fact}.iso", tree, *options, maker="xorriso")
        found = facts(path)
        area = tool("xorriso", "-indev", path, "-report_system_area", "plain").stdout
        summary = re.search(r"System area summary: (.*)", area)[1]
        assert found["isohybridGpt"] is ("GPT" in summary)
        assert found["isohybridApm"] is ("APM" in summary)
        assert found[fact] is True


def test_application_use(tmp_path, iso):
    assert facts(iso)["applicationUse"] == "free"
    attach(iso, Placement.INLINE)
    assert facts(iso)["applicationUse"] == "free"
    path = tmp_path / "taken.iso"
    path.write_bytes(iso_bytes(field=b"x" * 512))
    assert facts(path)["applicationUse"] == "taken"


def test_hostile_continuations_and_sessions(tmp_path):
    """Continuation areas and sessions that lead to themselves end somewhere."""
    path = tmp_path / "disc.iso"
    data = bytearray(iso_bytes(64))
    record = b"\0" * 34 + b"SP\7\1\xbe\xef\0" + b"CE\x1c\1" + b"".join(
        struct.pack("<I", value) + struct.pack(">I", value) for value in (18, 41, 28)
    )  # fmt: skip
    data[18 * SECTOR : 18 * SECTOR + len(record)] = bytes([len(record)]) + record[1:]
    for start in (32, 48):
        place = (start + 16) * SECTOR
        if place + SECTOR <= len(data):
            data[place : place + SECTOR] = data[16 * SECTOR : 17 * SECTOR]
            struct.pack_into("<I", data, place + 80, 0)
    path.write_bytes(data)
    found = facts(path)
    assert found["rockRidge"] is True and found["extensions"] == []
    assert len(found["sessions"]) < 5
