"""The writers of new images: what they write is read by QEMU, and holds exactly the content."""

import itertools
import json
import random
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import FileError, MalformedImageError, UnsupportedError, UsageError
from vmgraft.imagefmt.commit import Writer, atomic_output
from vmgraft.imagefmt.contract import Extent, Image, Kind
from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.tree import digest_content
from vmgraft.imagefmt.write import format_of_name, get_writer, writable_formats
from vmgraft.imagefmt.write.base import NO_CHOICES, PAGE, Table, WriteOptions, nonzero_runs
from vmgraft.imagefmt.write.copy import write_content
from vmgraft.imagefmt.write.vhd import geometry

MIB = 1 << 20
QEMU_NAMES = {"vhd": "vpc", "iso9660": "raw"}
DISKS = [name for name in writable_formats() if name != "iso9660"]
CASES = {
    "raw": ("raw", NO_CHOICES),
    "iso9660": ("iso9660", NO_CHOICES),
    "qcow2": ("qcow2", NO_CHOICES),
    "qcow2 512": ("qcow2", WriteOptions(cluster_size=512)),
    "qcow2 2M": ("qcow2", WriteOptions(cluster_size=2 * MIB)),
    "qcow2 compressed": ("qcow2", WriteOptions(compress=True)),
    "qcow2 512 compressed": ("qcow2", WriteOptions(512, compress=True)),
    "qcow2 2M compressed": ("qcow2", WriteOptions(2 * MIB, compress=True)),
    "vhdx": ("vhdx", NO_CHOICES),
    "vmdk": ("vmdk", NO_CHOICES),
    "vhd": ("vhd", NO_CHOICES),
    "vdi": ("vdi", NO_CHOICES),
}


class Holes(Image):
    """A disk without any data."""

    format_name = "holes"

    def __init__(self, size: int, runs: list[Extent] | None = None) -> None:
        self.path = Path("holes")
        self.virtual_size = size
        self.runs = [Extent(0, size, Kind.HOLE)] if runs is None else runs

    def read(self, offset, length):
        return bytes(length)

    def extents(self):
        return iter(self.runs)

    metadata = locate = room = attach = detach = close = None


Holes.__abstractmethods__ = frozenset()


def qemu_img(*args: str | Path) -> str:
    done = subprocess.run(["qemu-img", *map(str, args)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
    return done.stdout


def compare(raw: Path, path: Path, name: str) -> None:
    """Let QEMU compare content and size."""
    qemu_img("compare", "-f", "raw", "-F", name, raw, path)
    assert json.loads(qemu_img("info", "-f", name, "--output=json", path))["virtual-size"] == raw.stat().st_size


def write(source: Image, path: Path, name: str, options: WriteOptions = NO_CHOICES):
    with atomic_output(path) as fd:
        writer = get_writer(name)(Writer(fd, file=path), source.virtual_size, options, path.name)
        return write_content(source, writer)


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    """Data at the edges of everything, holes, explicit zeros, text that compresses, and a tail of seven sectors."""
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    noise = random.Random(3)
    size = 37 * MIB + 7 * 512
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in (
            (0, 1000), (2 * MIB - 100, 200), (4 * MIB, 3 * MIB), (8 * MIB + PAGE, PAGE), (9 * MIB + 65536 - 1, 2),
            (32 * MIB - 1, 1), (33 * MIB + 512, 512), (size - 100, 100),
        ):  # fmt: skip
            file.seek(offset)
            file.write(noise.randbytes(length))
        file.seek(12 * MIB)
        file.write(bytes(MIB))
        file.seek(16 * MIB)
        file.write(b"compressible " * 150_000)
    return path


@pytest.mark.parametrize("case", CASES)
def test_qemu_reads_what_was_written(disk: Path, tmp_path: Path, case: str) -> None:
    name, options = CASES[case]
    path = tmp_path / f"out.{name}"
    with open_image(disk) as source:
        tree = write(source, path, name, options)
        assert digest_content(source, flat="never").root_hash == tree.root_hash
    other = QEMU_NAMES.get(name, name)
    compare(disk, path, other)
    if other not in ("raw", "vpc"):
        assert "No errors" in qemu_img("check", "-f", other, path)
    assert path.stat().st_blocks * 512 < 7.5 * MIB  # the 5 MiB of data, and no zeros


class Marked(Holes):
    """Every MiB of data holds its number."""

    def readinto(self, offset, buffer):
        for start in range(0, len(buffer), 65536):
            number = 1 + (offset + start) // MIB % 255
            buffer[start : start + 65536] = bytes([number]) * len(buffer[start : start + 65536])
        return len(buffer)


@pytest.mark.parametrize("name", DISKS)
def test_little_data_in_a_large_disk(tmp_path: Path, name: str) -> None:
    """Far places need far tables: VHDX's sector bitmaps, VMDK's directories, several L2 tables."""
    path, size = tmp_path / "out", 10 << 30
    places = [0, 513 * MIB, 4095 * MIB, 4096 * MIB, 5001 * MIB, 8193 * MIB, size - MIB]
    runs, done = [], 0
    for place in places:
        runs += [Extent(done, place - done, Kind.HOLE)] if place > done else []
        runs.append(Extent(place, MIB, Kind.DATA))
        done = place + MIB
    write(Marked(size, runs), path, name)
    other = QEMU_NAMES.get(name, name)
    reads = [f"read -P {1 + place // MIB % 255} {place} 1M" for place in places]
    reads += [f"read -P 0 {place} 1M" for place in (MIB, 4097 * MIB, 9000 * MIB)]
    arguments = [argument for read in reads for argument in ("-c", read)]
    done = subprocess.run(["qemu-io", "-r", "-f", other, *arguments, path], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("read 1048576/1048576") == len(reads)
    assert "verification failed" not in done.stdout
    if other not in ("raw", "vpc"):
        assert "No errors" in qemu_img("check", "-f", other, path)
    assert path.stat().st_blocks * 512 < 9 * MIB


@pytest.mark.parametrize("seed", range(6))
def test_deflated_clusters_share_clusters(tmp_path: Path, seed: int) -> None:
    noise = random.Random(seed)
    raw, path = tmp_path / "raw", tmp_path / "out.qcow2"
    with raw.open("wb") as file:  # clusters that deflate to anything between nothing and more than themselves
        for _ in range(60):
            length = noise.choice([0, 1, 700, 30_000, 65_000, 65536])
            file.write(noise.randbytes(length).ljust(65536, noise.choice([b"\0", b"x"])))
    with open_image(raw) as source:
        write(source, path, "qcow2", WriteOptions(noise.choice([4096, 65536, 1 << 20]), compress=True))
    assert "No errors" in qemu_img("check", path)
    compare(raw, path, "qcow2")


@pytest.mark.parametrize(
    ("name", "size", "options", "said"),
    [
        ("vhd", (2040 << 30) + 512, NO_CHOICES, "2040 GiB"),
        ("vhdx", (64 << 40) + 512, NO_CHOICES, "64 TiB"),
        ("vmdk", 2 << 40, NO_CHOICES, "2 TiB"),
        ("vdi", (64 << 40) + 512, NO_CHOICES, "MiB"),
        ("qcow2", 256 << 30, WriteOptions(cluster_size=512), "bigger clusters"),
        ("qcow2", MIB, WriteOptions(cluster_size=65537), "a cluster of 65537 bytes"),
        ("qcow2", MIB, WriteOptions(cluster_size=0), "a cluster of 0 bytes"),
        ("vdi", MIB, WriteOptions(compress=True), "options of qcow2"),
        ("raw", MIB, WriteOptions(cluster_size=65536), "options of qcow2"),
        ("raw", 1000, NO_CHOICES, "whole number of 512-byte sectors"),
        ("qcow2", 0, NO_CHOICES, "whole number"),
        ("iso9660", 0, NO_CHOICES, "whole number"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str, size: int, options: WriteOptions, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said) as caught:
        write(Holes(size), tmp_path / "out", name, options)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_largest_that_fit(tmp_path: Path) -> None:
    for name, size in (("vhd", 2040 << 30), ("vhdx", 64 << 40), ("vmdk", (2 << 40) - (1 << 30))):
        path = tmp_path / name
        write(Holes(size, [Extent(0, size - 4096, Kind.HOLE), Extent(size - 4096, 4096, Kind.DATA)]), path, name)
        assert f"({size} bytes)" in qemu_img("info", path)


def test_extents_that_lie_end_in_one_error(tmp_path: Path) -> None:
    class Short(Holes):
        def readinto(self, offset, buffer):
            return 0

    with pytest.raises(FileError, match="ends early"):
        write(Short(MIB, [Extent(0, MIB, Kind.DATA)]), tmp_path / "out", "qcow2")
    with pytest.raises(MalformedImageError, match="do not cover"):
        write(Holes(2 * MIB, [Extent(0, MIB, Kind.HOLE)]), tmp_path / "out", "qcow2")
    assert list(tmp_path.iterdir()) == []


def test_names_and_suffixes() -> None:
    assert format_of_name(Path("a.b/Disk.QCOW2")) == "qcow2"
    assert {format_of_name(Path(f"x.{name}")) for name in ("raw", "img", "vmdk", "vdi", "vhd", "vhdx", "iso")} == {
        "raw", "vmdk", "vdi", "vhd", "vhdx", "iso9660"
    }  # fmt: skip
    with pytest.raises(UsageError, match="suffix"):
        format_of_name(Path("disk"))
    with pytest.raises(UsageError, match="cannot be made"):
        get_writer("zip")


def test_the_descriptor_names_the_file(tmp_path: Path) -> None:
    for name, noted in (("disk 1.vmdk", "disk 1.vmdk"), ('a"b.vmdk', "disk.vmdk"), ("ä.vmdk", "disk.vmdk")):
        write(Holes(MIB), tmp_path / name, "vmdk")
        assert f'RW 2048 SPARSE "{noted}"\n'.encode() in (tmp_path / name).read_bytes()


def test_geometry() -> None:
    assert geometry((2040 << 30) // 512) == (65535, 16, 255)
    for sectors in (1, 2048, 200_000, 5_000_000, 1 << 28, 1 << 32):
        cylinders, heads, per_track = geometry(sectors)
        assert cylinders * heads * per_track <= sectors
        assert 4 <= heads <= 16
        assert cylinders <= 65535


@given(st.lists(st.booleans(), min_size=1, max_size=48), st.data())
def test_nonzero_runs(used: list[bool], data: st.DataObject) -> None:
    content = bytearray(len(used) * PAGE)
    for number, set_ in enumerate(used):
        if set_:
            content[number * PAGE + data.draw(st.integers(0, PAGE - 1))] = 1
    found = {page for start, end in nonzero_runs(memoryview(content)) for page in range(start // PAGE, end // PAGE)}
    assert found == {number for number, set_ in enumerate(used) if set_}
    runs = nonzero_runs(memoryview(content))
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(runs))


@given(
    st.sampled_from([0, 0xFFFFFFFF, 7]),
    st.integers(1, 40_000),
    st.lists(st.integers(0, 39_999), max_size=20),
    st.data(),
)
def test_tables(tmp_path_factory, empty: int, count: int, indexes: list[int], data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "table"
    indexes = sorted({index for index in indexes if index < count})
    with path.open("wb") as file:
        table = Table(Writer(file.fileno(), file=path), 100, count, ">u4", empty)
        for index in indexes:
            table[index] = index + 1
        table.finish()
    stored = path.read_bytes()[100:].ljust(4 * count, b"\0")
    assert len(stored) == 4 * count
    wanted = [index + 1 if index in set(indexes) else empty for index in range(count)]
    assert list(struct.unpack(f">{count}I", stored)) == wanted


def test_the_first_failure_is_the_one_reported(tmp_path: Path) -> None:
    """A part that cannot be read ends the copy with its own error, whichever thread meets it, and at once."""

    class Broken(Holes):
        def readinto(self, offset, buffer):
            if offset >= 20 * MIB:
                raise FileError(f"broken at {offset // MIB}", file=self.path)
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    for _ in range(5):
        with pytest.raises(FileError, match="broken at 20"):
            write(Broken(64 * MIB, [Extent(0, 64 * MIB, Kind.DATA)]), tmp_path / "out", "qcow2")
    assert list(tmp_path.iterdir()) == []


def test_the_same_content_gives_the_same_file(disk: Path, tmp_path: Path) -> None:
    for name in ("qcow2", "raw"):  # other formats have random identifiers
        files = []
        for number in range(2):
            with open_image(disk) as source:
                write(source, tmp_path / f"{number}.{name}", name)
            files.append((tmp_path / f"{number}.{name}").read_bytes())
        assert files[0] == files[1]
