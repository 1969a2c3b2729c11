"""Internal snapshots: their contents against qemu-img, their table against hostile numbers."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qcow2_testkit import MIB, attach, make, open_qcow2, pattern, qemu_io, raw_base, raw_bytes, run

from vmgraft.errors import MalformedImageError, UsageError, VmgraftError
from vmgraft.imagefmt.contract import Image, Opening, OpenOptions
from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.qcow2 import FORMAT

ENTRY = struct.Struct(">QIHHIIQII")


def open_snapshot(path: Path, name: str) -> Image:
    return FORMAT.open(path, OpenOptions(snapshot=name))


def snapshot_bytes(path: Path, name: str) -> bytes:
    with open_snapshot(path, name) as image:
        data = image.read(0, image.virtual_size)
        assert len(data) == image.virtual_size == sum(extent.length for extent in image.extents())
        return data


def qemu_bytes(path: Path, parameter: str) -> bytes:
    """What QEMU says a snapshot holds."""
    out = path.with_suffix(".snapshot")
    run("qemu-img", "convert", "-f", "qcow2", "-l", parameter, "-O", "raw", path, out)
    data = out.read_bytes()
    out.unlink()
    return data


def snap(path: Path, name: str) -> Path:
    run("qemu-img", "snapshot", "-q", "-c", name, path)
    return path


def table(path: Path) -> int:
    return int(struct.unpack(">Q", path.read_bytes()[64:72])[0])


@pytest.mark.parametrize(
    ("version", "cluster", "backed"),
    [(2, 512, False), (2, 65536, True), (2, 2 * MIB, False), (3, 512, True), (3, 65536, False), (3, 2 * MIB, True)],
)
def test_contents(tmp_path: Path, version: int, cluster: int, backed: bool) -> None:
    raw_base(tmp_path)
    path = make(tmp_path / "x.qcow2", version=version, cluster=cluster, backing="base.raw" if backed else None)
    snap(pattern(path, zeros=version == 3), "one")
    qemu_io(path, "write -P 4 0 256k", "discard 1M 128k")
    snap(path, "two words, ü")
    qemu_io(path, "write -P 5 3M 64k")
    for name, number in (("one", "1"), ("two words, ü", "2")):
        expected = qemu_bytes(path, f"snapshot.id={number}")
        assert snapshot_bytes(path, name) == snapshot_bytes(path, number) == expected
    attach(path)
    assert snapshot_bytes(path, "one") == qemu_bytes(path, "snapshot.name=one")
    with open_qcow2(path) as image:
        assert image.read(0, image.virtual_size) == raw_bytes(path)


@pytest.mark.parametrize("options", ["extended_l2=on", "compression_type=zstd"])
def test_features_within_snapshots(tmp_path: Path, options: str) -> None:
    path = make(tmp_path / "x.qcow2", options=options)
    if "zstd" in options:
        qemu_io(path, "write -c -P 5 64k 64k")
    qemu_io(path, "write -P 1 66k 2k", "write -z 70k 4k")
    snap(path, "one")
    qemu_io(path, "write -P 2 0 1M")
    assert snapshot_bytes(path, "one") == qemu_bytes(path, "snapshot.name=one")


@pytest.mark.parametrize("later", ["12M", "4M"])
def test_a_snapshot_has_the_size_of_its_day(tmp_path: Path, later: str) -> None:
    """`qemu-img convert -l` shows it in today's size; going back to it is the oracle here."""
    path = pattern(make(tmp_path / "x.qcow2"))
    content = raw_bytes(snap(path, "one"))
    run("qemu-img", "resize", "-q", "--shrink", path, later)
    copy = Path(shutil.copy(path, tmp_path / "copy.qcow2"))
    run("qemu-img", "snapshot", "-q", "-a", "one", copy)
    assert snapshot_bytes(path, "one") == raw_bytes(copy) == content
    with open_qcow2(path) as image:
        assert image.metadata()["snapshots"][0]["virtualSize"] == 8 * MIB
        assert image.virtual_size == int(later[:-1]) * MIB


def test_what_is_listed(tmp_path: Path) -> None:
    path = snap(snap(make(tmp_path / "x.qcow2"), "one"), "two")
    rows = json.loads(run("qemu-img", "info", "--output=json", path).stdout)["snapshots"]
    with open_qcow2(path) as image:
        facts = image.metadata()
    assert facts["snapshotCount"] == 2
    assert facts["snapshotProblem"] is None
    for ours, theirs in zip(facts["snapshots"], rows, strict=True):
        assert (ours["id"], ours["name"]) == (theirs["id"], theirs["name"])
        assert (ours["vmStateSize"], ours["vmClock"]) == (theirs["vm-state-size"], 0)
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(theirs["date-sec"]))
        assert ours["date"] == f"{moment}.{theirs['date-nsec'] // 1000:06}+00:00"


def test_a_snapshot_of_a_running_machine(tmp_path: Path) -> None:
    """Machine state lies behind the disk's end in the snapshot's tables; it is no content."""
    path = pattern(make(tmp_path / "x.qcow2"))
    machine = ["qemu-system-x86_64", "-display", "none", "-S", "-m", "16", "-monitor", "stdio"]
    done = subprocess.run(
        [*machine, "-drive", f"file={path},format=qcow2,if=ide"],
        check=False, input="savevm live\nquit\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    qemu_io(path, "write -P 4 0 256k")
    with open_qcow2(path) as image:
        (found,) = image.metadata()["snapshots"]
    (row,) = json.loads(run("qemu-img", "info", "--output=json", path).stdout)["snapshots"]
    assert found["vmStateSize"] == row["vm-state-size"] > 100_000
    assert snapshot_bytes(path, "live") == qemu_bytes(path, "live")


def _edit(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_machine_state_and_short_extra_data(tmp_path: Path) -> None:
    """Version 2 images of old have no extra data: the state's size is in the entry, the disk's in the header."""
    path = snap(make(tmp_path / "x.qcow2", version=2), "one")
    at = table(path)
    fields = list(ENTRY.unpack(path.read_bytes()[at : at + ENTRY.size]))
    fields[6:9] = [1_500_000_000, 4096, 0]
    _edit(path, at, (ENTRY.pack(*fields) + b"1one").ljust(80, b"\0"))
    with open_qcow2(path) as image:
        (found,) = image.metadata()["snapshots"]
    assert found["vmStateSize"] == 4096
    assert found["vmClock"] == 1.5
    assert found["virtualSize"] == 8 * MIB
    assert snapshot_bytes(path, "one") == bytes(8 * MIB)


def test_names_and_identifiers(tmp_path: Path) -> None:
    """The identifier goes first, as in QEMU; a name that two share is refused."""
    path = pattern(make(tmp_path / "x.qcow2"))
    snap(path, "2")
    qemu_io(path, "write -P 4 0 256k")
    snap(snap(path, "same"), "same")
    assert snapshot_bytes(path, "2") == qemu_bytes(path, "snapshot.id=2") != qemu_bytes(path, "snapshot.id=1")
    with pytest.raises(UsageError, match="2 snapshots") as caught:
        open_snapshot(path, "same")
    assert "2, 3" in str(caught.value.hint)
    with pytest.raises(UsageError, match="no internal snapshot") as caught:
        open_snapshot(path, "nil")
    assert "there are 3" in str(caught.value.hint)


def test_what_has_no_snapshots(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_snapshot(make(tmp_path / "x.qcow2"), "one")
    assert "there are none" in str(caught.value.hint)
    raw_base(tmp_path)
    with pytest.raises(UsageError, match="raw images have no internal snapshots"):
        open_image(tmp_path / "base.raw", Opening(snapshot="one"))
    with pytest.raises(UsageError, match="reading only"):
        open_image(tmp_path / "x.qcow2", Opening(snapshot="one"), writable=True)


BAD = {
    "extra data too long": (36, struct.pack(">I", 1025), "extra_data_size"),
    "extra data of 4 GiB": (36, b"\xff" * 4, "extra_data_size"),
    "more than a second": (20, struct.pack(">I", 1_000_000_000), "date_nsec"),
    "no disk": (48, bytes(8), "disk_size"),
    "disk of 2^63": (48, b"\x80" + bytes(7), "disk_size"),
    "L1 table in the header": (0, bytes(8), "l1_table_offset"),
    "L1 table behind the file": (0, struct.pack(">Q", 1 << 40), "l1_table_offset"),
    "L1 table not aligned": (0, struct.pack(">Q", 65536 * 3 + 512), "l1_table_offset"),
    "L1 table too short": (8, bytes(4), "l1_size"),
    "L1 table too long": (8, b"\xff" * 4, "l1_size"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_entries(tmp_path: Path, case: str) -> None:
    path = snap(pattern(make(tmp_path / "x.qcow2")), "one")
    offset, data, field = BAD[case]
    _edit(path, table(path) + offset, data)
    with pytest.raises(MalformedImageError) as caught:
        open_snapshot(path, "one")
    assert caught.value.field == f"snapshot.{field}"
    assert caught.value.offset is not None
    with open_qcow2(path) as image:
        facts = image.metadata()
        assert facts["snapshotCount"] == 1
        assert (facts["snapshotProblem"] is None) is field.startswith("l1")
        assert image.read(64 << 10, 2) == b"\7\7"  # the current content does not depend on it


def test_a_table_cut_short(tmp_path: Path) -> None:
    path = snap(make(tmp_path / "x.qcow2"), "one")
    path.write_bytes(path.read_bytes()[: table(path) + 60])
    with pytest.raises(MalformedImageError, match="ends behind the file"):
        open_snapshot(path, "one")


def test_snapshot_data_on_the_tables_of_the_image(tmp_path: Path) -> None:
    """A snapshot's cluster may not be the image's own L1 table, which its header does not speak of."""
    path = pattern(make(tmp_path / "x.qcow2"))
    snap(path, "one")
    data = path.read_bytes()
    (l1,) = struct.unpack_from(">Q", data, 40)
    (l2,) = struct.unpack_from(">Q", data, struct.unpack_from(">Q", data, table(path))[0])
    _edit(path, (l2 & 0x00FFFFFFFFFFFE00) + 8, struct.pack(">Q", l1))
    with open_snapshot(path, "one") as image, pytest.raises(MalformedImageError, match="own metadata"):
        image.read(0, MIB)


def test_the_largest_table_is_read_in_time_and_memory(tmp_path: Path) -> None:
    """65,536 entries with names of 200 bytes that are no text."""
    path = make(tmp_path / "x.qcow2")
    entry = ENTRY.pack(3 * 65536, 1, 8, 192, 1, 2, 3, 4, 0) + b"\xff" * 200
    at = -(-path.stat().st_size // 65536) * 65536
    with path.open("r+b") as file:
        file.seek(60)
        file.write(struct.pack(">IQ", 65536, at))
        file.seek(at)
        file.write(entry.ljust(240, b"\0") * 65536)
    started = time.monotonic()
    with open_qcow2(path) as image:
        assert len(image.metadata()["snapshots"]) == 65536
    assert time.monotonic() - started < 10


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 120), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3))
def test_mutated_tables(tmp_path: Path, edits: list[tuple[int, bytes]]) -> None:
    path = tmp_path / "x.qcow2"
    if not path.exists():
        snap(pattern(make(path, cluster=4096, size=MIB // 2 * 15)), "one")
    at, sound = table(path), path.read_bytes()
    for offset, piece in edits:
        _edit(path, at + offset, piece)
    try:
        with open_qcow2(path) as image:
            image.metadata()
        with open_snapshot(path, "1") as image:
            image.read(0, 65536)
    except VmgraftError as error:
        assert error.message
    path.write_bytes(sound)
