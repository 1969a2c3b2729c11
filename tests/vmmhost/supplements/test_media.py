"""What is made for the guest: volumes, archives, overlaid disks; judged by programs of others."""

import hashlib
import os
import subprocess
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from vmgraft.errors import FileError, UsageError
from vmgraft.imagefmt.blob import SMALL, BytesBlob
from vmgraft.vmmhost.core.disk import OverlayFullError, VerifiedDisk
from vmgraft.vmmhost.supplements import cpio
from vmgraft.vmmhost.supplements.iso import Folder, Link, VolumeFile, build_volume
from vmgraft.vmmhost.supplements.media import OverlaidDisk, ReadOnlyDisk
from vmgraft.vmmhost.supplements.names import volume_names

STAMP = datetime(2026, 11, 22, 15, 4, 5, tzinfo=UTC)
LONG = "a name that is longer than what ISO 9660 or Joliet have room for, but no problem for Rock Ridge.txt"
TREE = {
    "user-data": VolumeFile(BytesBlob(b"#cloud-config\n")),
    "meta-data": VolumeFile(BytesBlob(b"")),
    "User-Data": VolumeFile(BytesBlob(b"another")),
    "bin/hello.sh": VolumeFile(BytesBlob(b"#!/bin/sh\n" * 1000), executable=True),
    "a/b/c/d/e/f/deep": VolumeFile(BytesBlob(b"x" * 2049)),
    LONG: VolumeFile(BytesBlob(b"long")),
    "grün?*.txt": VolumeFile(BytesBlob(b"odd")),
    "link": Link("bin/hello.sh"),
    "empty": Folder(),
}
FILES = {path: node.data.read_all() for path, node in TREE.items() if isinstance(node, VolumeFile)}


def run(*command, data=None, cwd=None):
    done = subprocess.run([str(part) for part in command], capture_output=True, input=data, cwd=cwd, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout!r}{done.stderr!r}"
    return done.stdout


@pytest.fixture
def volume(tmp_path):
    path = tmp_path / "volume.iso"
    path.write_bytes(build_volume("CIDATA", TREE, created=STAMP).read_all())
    return path


# --- volumes --------------------------------------------------------------------------------------------------------


def test_bsdtar_reads_every_file_with_its_name_bytes_and_permissions(volume, tmp_path):
    (tmp_path / "out").mkdir()
    run("bsdtar", "-xpf", volume, "-C", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*")}
    assert {name for name, path in found.items() if path.is_file() and not path.is_symlink()} == FILES.keys()
    assert {name: found[name].read_bytes() for name in FILES} == FILES
    assert found["link"].readlink() == Path("bin/hello.sh")
    assert found["empty"].is_dir()
    assert found["bin/hello.sh"].stat().st_mode & 0o777 == 0o555
    assert found["user-data"].stat().st_mode & 0o777 == 0o444
    assert found["user-data"].stat().st_mtime == STAMP.timestamp()


def test_xorriso_and_isoinfo_find_a_sound_volume(volume):
    told = run("isoinfo", "-d", "-i", volume).decode()
    assert "Volume id: CIDATA\n" in told
    assert "Joliet with UCS level 3 found" in told
    assert "Rock Ridge signatures version 1 found" in told
    assert LONG in run("xorriso", "-indev", volume, "-check_media", "--", "-lsl", "/").decode()


def test_windows_names_are_in_joliet(volume):
    """7z reads Joliet first, as Windows does."""
    names = set(run("7z", "l", "-ba", "-slt", volume).decode().split("\n"))
    paths = {line.removeprefix("Path = ") for line in names if line.startswith("Path = ")}
    assert {"User-Data", "user-data_1", "meta-data", "bin/hello.sh", "a/b/c/d/e/f/deep", "grün__.txt"} <= paths
    assert LONG[:64] in paths


def test_plain_iso_names_are_d_characters(volume):
    names = run("isoinfo", "-f", "-i", volume).decode().split()
    allowed = set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.;/")
    assert names and all(set(name) <= allowed for name in names)
    assert "/USER_DATA.;1" in names and "/USER_DATA_1.;1" in names


def test_the_kernel_s_own_names_of_a_cloud_init_seed(volume):
    """blkid's rules, which udev and so cloud-init go by: LABEL in upper case, files by their Rock Ridge name."""
    told = run("blkid", "-p", "-o", "export", volume).decode()
    assert "LABEL=CIDATA\n" in told
    assert "TYPE=iso9660\n" in told


def test_equal_input_gives_equal_bytes_at_any_time_and_in_any_zone(monkeypatch):
    first = build_volume("CIDATA", TREE, created=STAMP).sha256
    monkeypatch.setattr(time, "time", lambda: 1_000_000_000.0)
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    try:
        elsewhere = STAMP.astimezone(timezone(timedelta(hours=-7)))
        assert build_volume("CIDATA", dict(reversed(TREE.items())), created=elsewhere).sha256 == first
        assert build_volume("CIDATA", TREE, created=STAMP + timedelta(seconds=1)).sha256 != first
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_large_volume_is_written_to_a_file_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    big = os.urandom(SMALL + 5)
    blob = build_volume("BIG", {"big": VolumeFile(BytesBlob(big))}, created=STAMP)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "big.iso").write_bytes(blob.read_all())
    assert run("bsdtar", "-xOf", tmp_path / "big.iso", "big") == big


def test_a_full_disk_is_said(monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/proc")
    with pytest.raises(FileError, match="cannot be written"):
        build_volume("BIG", {"big": VolumeFile(BytesBlob(bytes(SMALL + 5)))}, created=STAMP)


class Claim:
    """Bytes that are fewer than they say."""

    def __init__(self, size, data=b""):
        self.size, self._data = size, data

    def read(self, offset, length):
        return self._data[offset : offset + length]


@pytest.mark.parametrize(
    ("label", "tree", "error"),
    [
        ("cidata", {}, UsageError),
        ("", {}, UsageError),
        ("A" * 17, {}, UsageError),
        ("A", {"a": VolumeFile(Claim(1, b"x")), "a/b": VolumeFile(Claim(1, b"x"))}, UsageError),
        ("A", {"a": VolumeFile(Claim(1 << 32))}, UsageError),
        ("A", {"a": VolumeFile(Claim(100, b"x"))}, FileError),
    ],
)
def test_what_makes_no_volume(label, tree, error):
    with pytest.raises(error):
        build_volume(label, tree, created=STAMP)


def test_names_are_never_given_twice():
    names = [f"{'x' * 70}{number}.config" for number in range(30)] + ["A.B", "a.b", "A_B", "a?b", "a*b", "con", "CON"]
    given = volume_names([(name, False) for name in names] + [("a", True), ("A", True)])
    assert {item.rock_ridge for item in given.values()} == {*names, "a", "A"}
    for kind in ("joliet", "iso"):
        short = [getattr(item, kind).removesuffix(";1").rstrip(".").upper() for item in given.values()]
        assert len(set(short)) == len(short)
    assert max(len(item.joliet) for item in given.values()) <= 64
    assert max(len(item.iso) for item in given.values()) <= 31


# --- archives -------------------------------------------------------------------------------------------------------

MEMBERS = [("etc/app/conf", b"one", False), ("etc/hello.sh", b"#!/bin/sh\n", True), ("x", b"", False)]


def test_cpio_reads_the_archive(tmp_path):
    data = cpio.archive(MEMBERS, mtime=int(STAMP.timestamp()))
    assert len(data) % 512 == 0
    listed = run("cpio", "-itv", "--quiet", data=data).decode().splitlines()
    assert [line.split()[0] + " " + line.split()[-1] for line in listed] == [
        "drwxr-xr-x etc", "drwxr-xr-x etc/app", "-rw-r--r-- etc/app/conf", "-rwxr-xr-x etc/hello.sh", "-rw-r--r-- x",
    ]  # fmt: skip
    run("cpio", "-id", "--quiet", data=data, cwd=tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name, _, _ in MEMBERS} == {name: body for name, body, _ in MEMBERS}


@pytest.mark.parametrize("length", range(5))
def test_an_archive_begins_at_a_multiple_of_four_behind_the_initrd(length):
    added = cpio.archive(MEMBERS, mtime=0)
    whole = cpio.append(b"i" * length, added)
    assert whole.startswith(b"i" * length)
    assert whole.endswith(added)
    assert (len(whole) - len(added)) % 4 == 0
    assert not whole[length : len(whole) - len(added)].strip(b"\0")


def test_equal_members_give_equal_archives():
    assert cpio.archive(MEMBERS, mtime=7) == cpio.archive(iter(MEMBERS), mtime=7)
    assert cpio.archive(MEMBERS, mtime=8) != cpio.archive(MEMBERS, mtime=7)


# --- disks ----------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 1200
BLOCK = 65536


class Content:
    virtual_size, sector_size = len(CONTENT), 512

    def read(self, offset, length):
        return CONTENT[offset : offset + length]


def verified(**more):
    good = {hashlib.sha256(CONTENT[start : start + BLOCK]).digest() for start in range(0, len(CONTENT), BLOCK)}
    return VerifiedDisk(Content(), lambda _index, block: hashlib.sha256(block).digest() in good, **more)


PATCHES = [
    (10, b"A" * 20),
    (30, b"B"),
    (BLOCK - 5, b"C" * 10),
    (2 * BLOCK, b"D" * (BLOCK + 7)),
    (len(CONTENT) - 3, b"EEE"),
]


def model():
    view = bytearray(CONTENT)
    for offset, data in PATCHES:
        view[offset : offset + len(data)] = data
    return view


def test_overlaid_bytes_win_over_the_disk_and_the_guest_over_both():
    import random

    rng, view, disk = random.Random(5), model(), OverlaidDisk(verified(), PATCHES)
    assert disk.read(0, disk.size) == view
    for step in range(400):
        offset = rng.randrange(disk.size)
        length = min(rng.choice([1, 3, 512, 5000, 70000]), disk.size - offset)
        if step % 3 == 0:
            data = rng.randbytes(length)
            disk.write(offset, data)
            view[offset : offset + length] = data
        assert disk.read(offset, length) == view[offset : offset + length]
    assert disk.read(0, disk.size) == view
    assert disk.read(disk.size, 0) == b""


def test_a_write_takes_no_more_of_the_overlay_than_its_own_blocks():
    base = verified()
    disk = OverlaidDisk(base, [(0, b"P" * (4 * BLOCK))])
    disk.write(BLOCK + 5, b"w")
    assert base.blocks_written == disk.blocks_written == 1
    assert disk.read(0, 4 * BLOCK) == b"P" * (BLOCK + 5) + b"w" + b"P" * (3 * BLOCK - 6)


def test_a_write_that_fails_changes_nothing():
    disk = OverlaidDisk(verified(overlay_max=BLOCK), PATCHES)
    before = disk.read(0, disk.size)
    with pytest.raises(OverlayFullError):
        disk.write(BLOCK - 4, b"x" * 8)
    assert disk.read(0, disk.size) == before


def test_blocks_below_an_overlay_are_still_checked():
    from vmgraft.errors import ContentMismatchError

    disk = OverlaidDisk(VerifiedDisk(Content(), lambda index, _block: index != 0), PATCHES)
    assert disk.read(2 * BLOCK, 5) == b"DDDDD"
    assert disk.blocks_checked == 1
    with pytest.raises(ContentMismatchError):
        disk.read(10, 5)


@pytest.mark.parametrize("patches", [[(0, b"")], [(-1, b"xy")], [(len(CONTENT) - 1, b"xy")], [(0, b"ab"), (1, b"c")]])
def test_overlays_that_do_not_fit(patches):
    with pytest.raises(ValueError, match="overlay"):
        OverlaidDisk(verified(), patches)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (len(CONTENT), 1), (1 << 70, 1)])
def test_ranges_outside(offset, length):
    for disk in (OverlaidDisk(verified(), PATCHES), ReadOnlyDisk(BytesBlob(CONTENT))):
        with pytest.raises(ValueError, match="inside"):
            disk.read(offset, length)
    with pytest.raises(ValueError, match="inside"):
        OverlaidDisk(verified(), PATCHES).write(len(CONTENT), b"x")


def test_a_volume_refuses_writes_as_a_full_disk_does():
    disk = ReadOnlyDisk(BytesBlob(CONTENT))
    assert (disk.size, disk.sector_size, disk.read(5, 3)) == (len(CONTENT), 2048, CONTENT[5:8])
    with pytest.raises(OverlayFullError):
        disk.write(0, b"x")
    assert (disk.blocks_checked, disk.blocks_written) == (0, 0)
    with pytest.raises(FileError):
        ReadOnlyDisk(Claim(10, b"abc")).read(0, 5)


def test_thousands_of_names_that_look_alike_are_told_apart_at_once():
    """Every new name tries what is free from where the last one found it, not from the beginning."""
    alike = [("a" * 70 + f"{number:05}", False) for number in range(4000)]
    crossing = [(f"{'b' * 24}{number:04x}{end}", True) for number in range(2000) for end in "-+"]
    started = time.process_time()
    names = volume_names([*alike, *crossing])
    assert time.process_time() - started < 3  # seconds; it took minutes
    assert len({name.iso for name in names.values()}) == len({name.joliet for name in names.values()}) == 8000
    assert names["a" * 70 + "03999"].joliet == "a" * 59 + "_3999"
