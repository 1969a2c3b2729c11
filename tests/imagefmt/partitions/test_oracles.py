"""Partition tables as sfdisk, sgdisk, parted and xorriso see them."""

import json
import os
import re

import pytest
from imagefmt_helpers import attach, iso_bytes, tool

from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.partitions import describe

MIB = 1 << 20


def described(path, image_format="raw"):
    from vmgraft.imagefmt.contract import Opening

    with open_image(path, Opening(format=image_format)) as image:
        report = describe(image)
    assert json.loads(json.dumps(report)) == report
    return report


def blank(path, size=64 * MIB):
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def sfdisk_view(path, *options):
    table = json.loads(tool("sfdisk", "--json", *options, path).stdout)["partitiontable"]
    unit = table["sectorsize"]
    listed = [
        (
            int(re.search(r"\d+$", item["node"])[0]),
            item["start"] * unit,
            item["size"] * unit,
            item["type"].upper() if table["label"] == "gpt" else f"0x{int(item['type'], 16):02x}",
            item.get("name", ""),
            item.get("uuid", ""),
        )
        for item in table.get("partitions", [])
    ]
    return {"label": table["label"], "id": table["id"], "unit": unit, "partitions": listed}


def our_view(report):
    label = {"mbr": "dos", "gpt": "gpt", "hybrid": "gpt"}[report["scheme"]]
    listed = [tuple(p[key] for key in ("number", "start", "size", "type", "name", "id")) for p in report["partitions"]]
    return {"label": label, "id": report["diskId"], "unit": report["sectorSize"], "partitions": listed}


DOS = """label: dos
label-id: 0x12345678
size=4M, type=83, bootable
size=4M, type=82
type=f
size=3M, type=83
size=3M, type=7
size=1M, type=83
"""
GPT = """label: gpt
label-id: 01234567-89AB-CDEF-0123-456789ABCDEF
size=1M, type=21686148-6449-6E6F-744E-656564454649, name="boot"
size=9M, type=U, name="EFI System", attrs="LegacyBIOSBootable"
start=40M, size=8M, type=L, name="große Daten", attrs="RequiredPartition GUID:60,63"
size=2M, type=S
"""


def test_mbr_with_logical_partitions(tmp_path):
    path = blank(tmp_path / "disk.img")
    tool("sfdisk", "-q", path, stdin=DOS)
    report = described(path)
    assert our_view(report) == sfdisk_view(path)
    assert [item["number"] for item in report["partitions"]] == [1, 2, 3, 5, 6, 7]
    assert report["partitions"][0]["flags"] == ["active"]
    assert [item["typeName"] for item in report["partitions"]][:3] == ["Linux", "Linux swap", "extended (LBA)"]
    assert report["problems"] == []


def test_gpt(tmp_path):
    path = blank(tmp_path / "disk.img")
    tool("sfdisk", "-q", path, stdin=GPT)
    report = described(path)
    assert our_view(report) == sfdisk_view(path)
    assert report["problems"] == []
    assert report["scheme"] == "gpt" and "mbr" not in report
    names = [item["typeName"] for item in report["partitions"]]
    assert names == ["BIOS boot", "EFI system", "Linux", "Linux swap"]
    flags = [item["flags"] for item in report["partitions"]]
    assert flags == [[], ["legacy-boot"], ["required", "read-only", "no-automount"], []]
    attributes = {
        int(number): int(value, 16)
        for number in "123"
        for value in re.findall(r"Attribute flags: (\w+)", tool("sgdisk", f"--info={number}", path).stdout)
    }
    assert attributes == {1: 0, 2: 4, 3: 1 | 1 << 60 | 1 << 63}


def test_parted_sees_the_same(tmp_path):
    path = blank(tmp_path / "disk.img")
    tool("sfdisk", "-q", path, stdin=GPT)
    lines = tool("parted", "-m", "-s", path, "unit", "B", "print").stdout.splitlines()[2:]
    theirs = [(int(n), int(start[:-1]), int(size[:-1]), name) for n, start, _, size, _, name, _ in
              (line.rstrip(";").split(":") for line in lines)]  # fmt: skip
    ours = [(p["number"], p["start"], p["size"], p["name"]) for p in described(path)["partitions"]]
    assert sorted(theirs) == sorted(ours)


def test_gpt_with_sectors_of_4096_bytes(tmp_path):
    path = blank(tmp_path / "disk.img")
    tool("fdisk", "--sector-size", "4096", path, stdin="g\nn\n1\n\n+8M\nn\n2\n\n+4M\nw\n")
    report = described(path)
    assert report["sectorSize"] == 4096
    listing = tool("fdisk", "--sector-size", "4096", "-l", "-o", "start,sectors", path).stdout
    theirs = [tuple(map(int, line.split())) for line in listing.splitlines() if re.fullmatch(r"\s*\d+\s+\d+", line)]
    assert [(p["start"] // 4096, p["size"] // 4096) for p in report["partitions"]] == theirs
    assert len(theirs) == 2 and report["problems"] == []


def test_hybrid_mbr(tmp_path):
    path = blank(tmp_path / "disk.img")
    tool("sgdisk", "-n", "1:2048:+8M", "-n", "2:0:+4M", "-t", "2:8200", "-h", "1:2:EE", path)
    report = described(path)
    assert report["scheme"] == "hybrid"
    assert our_view(report) == sfdisk_view(path)
    mbr = tool("sfdisk", "--json", "--label-nested", "dos", path).stdout
    nested = [(item["start"] * 512, item["size"] * 512) for item in json.loads(mbr)["partitiontable"]["partitions"]]
    assert sorted((item["start"], item["size"]) for item in report["mbr"]["partitions"]) == sorted(nested)
    assert {item["type"] for item in report["mbr"]["partitions"]} == {"0xee", "0x83", "0x82"}
    assert report["problems"] == []


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "hello").write_text("hello\n" * 1000)
    efi = tmp_path / "efi.img"
    efi.write_bytes(os.urandom(3 * MIB))
    return folder, efi


def test_hybrid_iso_with_an_appended_partition(tmp_path, tree):
    folder, efi = tree
    path = tmp_path / "disc.iso"
    tool(
        "xorriso", "-as", "mkisofs", "-quiet", "-o", path, "-append_partition", "2", "0xef", efi,
        "-appended_part_as_gpt", "-partition_offset", "16", folder,
    )  # fmt: skip
    report = described(path, "iso9660")
    assert our_view(report) == sfdisk_view(path)
    plain = tool("xorriso", "-indev", path, "-report_system_area", "plain").stdout
    theirs = {(int(n), int(a) * 512, int(b) * 512) for n, a, b in
              re.findall(r"GPT start and size\s*:\s*(\d+)\s+(\d+)\s+(\d+)", plain)}  # fmt: skip
    assert theirs == {(item["number"], item["start"], item["size"]) for item in report["partitions"]}
    start = next(item["start"] for item in report["partitions"] if item["number"] == 2)
    with open_image(path) as image:
        assert image.read(start, 3 * MIB) == efi.read_bytes()
    assert report["problems"] == []
    attach(path, Placement.INLINE)
    assert described(path, "iso9660") == report


def test_hybrid_iso_with_an_apple_partition_map(tmp_path, tree):
    folder, _ = tree
    path = tmp_path / "disc.iso"
    tool("xorriso", "-as", "mkisofs", "-quiet", "-hfsplus", "-o", path, folder)
    report = described(path, "iso9660")
    plain = tool("xorriso", "-indev", path, "-report_system_area", "plain").stdout
    assert re.search(r"APM block size\s*:\s*512", plain)
    theirs = [(int(n), int(a) * 512, int(b) * 512) for n, a, b in
              re.findall(r"APM start and size\s*:\s*(\d+)\s+(\d+)\s+(\d+)", plain)]  # fmt: skip
    types = re.findall(r"APM partition type\s*:\s*\d+\s+(\S+)", plain)
    # xorriso does not count the map's entry for itself.
    own, *others = report["partitions"]
    assert (report["scheme"], own["type"], own["number"]) == ("apm", "Apple_partition_map", 1)
    assert theirs == [(item["number"] - 1, item["start"], item["size"]) for item in others]
    assert types == [item["type"] for item in others] and "Apple_HFS" in types


def test_no_table(tmp_path):
    path = blank(tmp_path / "disk.img", 4 * MIB)
    assert described(path)["scheme"] == "none"
    path.write_bytes(iso_bytes())
    assert described(path)["scheme"] == "none"


@pytest.mark.parametrize("maker", [("mkfs.vfat", "-F", "12"), ("mkfs.vfat", "-F", "16"), ("mkfs.vfat", "-F", "32")])
def test_a_boot_sector_is_no_partition_table(tmp_path, maker):
    path = blank(tmp_path / "disk.img", 64 * MIB)
    tool(*maker, path)
    assert path.read_bytes()[510:512] == b"\x55\xaa"
    assert tool("blkid", "-p", "-o", "value", "-s", "PTTYPE", path, check=False).stdout == ""
    assert described(path)["scheme"] == "none"


def test_the_pristine_table_is_shown_in_every_container(tmp_path):
    path, qcow2 = blank(tmp_path / "disk.img"), tmp_path / "disk.qcow2"
    tool("sfdisk", "-q", path, stdin=GPT)
    plain = described(path)
    tool("qemu-img", "convert", "-O", "qcow2", path, qcow2)
    attach(qcow2, Placement.AUTO)
    attach(path, Placement.INLINE)
    assert described(path) == described(qcow2, "qcow2") == plain
    assert plain["problems"] == []
