"""Guest content against `qemu-img convert`, extents against `qemu-img map`, and what the format offers beyond QEMU."""

import json
import struct
import sys
import threading
import time

import pytest
from imagefmt_helpers import content_of
from vhdx_testkit import (
    BAT,
    BAT_AT,
    DATA_AT,
    HEADERS,
    METADATA,
    METADATA_AT,
    MIB,
    PARENT,
    TABLES,
    disk,
    entry,
    get,
    header,
    log_entry,
    make,
    metadata,
    put,
    qemu_check,
    qemu_content,
    qemu_io,
    run,
    sealed,
    set_log_guid,
    simple,
    table,
)

from vmgraft.errors import UnsupportedError
from vmgraft.imagefmt.contract import GraftState, Kind
from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.registry import detect
from vmgraft.imagefmt.tree import digest_content
from vmgraft.imagefmt.vhdx import FORMAT


def check_content(path):
    expected = qemu_content(path)
    with open_image(path) as image:
        assert image.format_name == "vhdx"
        assert image.virtual_size == len(expected)
        assert image.read(0, image.virtual_size) == expected
        for offset, length in ((0, 1), (MIB - 3, 7), (len(expected) - 5, 99), (len(expected), 1)):
            assert image.read(offset, length) == expected[offset : offset + length]
        position = 0
        for extent in image.extents():
            assert extent.start == position
            position += extent.length
            if extent.kind is not Kind.DATA:
                assert not any(expected[extent.start : position])
        assert position == image.virtual_size


def data_of(path):
    """Where the data are, in MiB. `qemu-img map` has nothing to compare with: it calls all of a VHDX disk data."""
    with open_image(path) as image:
        return [(e.start // MIB, e.length // MIB) for e in image.extents() if e.kind is Kind.DATA]


@pytest.mark.parametrize("more", ["block_state_zero=on", "block_state_zero=off", "subformat=fixed", "log_size=3M"])
@pytest.mark.parametrize("block", ["1M", "8M", "256M"])
def test_content(tmp_path, block, more):
    path = make(tmp_path / "disk.vhdx", "20M", f"block_size={block}", more)
    qemu_io(path, "write -P 7 1M 300k", "write -P 9 13M 64k", "write -P 1 20971008 512", "write -z 1100k 64k")
    check_content(path)


@pytest.mark.parametrize(("block", "data"), [("1M", [(1, 1), (33, 3), (60, 1)]), ("16M", [(0, 16), (32, 32)])])
@pytest.mark.parametrize("zero", ["on", "off"])
def test_extents(tmp_path, block, data, zero):
    path = make(tmp_path / "disk.vhdx", "64M", f"block_size={block}", f"block_state_zero={zero}")
    qemu_io(path, "write -P 7 1M 300k", "write -P 9 33M 3M", "write -P 1 60M 1M")
    assert data_of(path) == data
    with open_image(path) as image:
        kinds = {extent.kind for extent in image.extents()}
    assert kinds == {Kind.DATA, Kind.ZERO if zero == "on" else Kind.HOLE}


@pytest.mark.parametrize("size", [512, MIB + 512, 5 * MIB - 1536])
def test_sizes_that_end_inside_a_block(tmp_path, size):
    path = make(tmp_path / "disk.vhdx", size, "block_size=2M")
    qemu_io(path, f"write -P 5 {size - 512} 512")
    check_content(path)


def test_converted_disks_have_the_digest_of_the_raw_one(tmp_path):
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(MIB) + bytes(range(256)) * 9000 + bytes(3 * MIB))
    with raw.open("r+b") as file:
        file.truncate(8 * MIB)
    names = []
    for number, options in enumerate(("subformat=dynamic", "subformat=fixed", "block_size=4M")):
        path = tmp_path / f"{number}.vhdx"
        run("qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", options, raw, path)
        with open_image(path) as image:
            names.append(digest_content(image, flat="always"))
    with open_image(raw) as image:
        assert names == [digest_content(image, flat="always")] * 3


def test_bitmap_entries_between_the_payload_entries(tmp_path):
    """With blocks of 256 MiB every 17th entry is one of a sector bitmap: the disk's last blocks stand behind it."""
    path = make(tmp_path / "disk.vhdx", "9G", "block_size=256M", "block_state_zero=off")
    at = [(4 << 30) - 512, 4 << 30, (8 << 30) + 100 * MIB]
    qemu_io(path, *(f"write -P {7 + number} {offset} 512" for number, offset in enumerate(at)))
    index = [number for number, (word,) in enumerate(struct.iter_unpack("<Q", get(path, BAT_AT, 400))) if word & 7 == 6]
    assert index == [15, 17, 34]
    with open_image(path) as image:
        assert [image.read(offset, 3) for offset in at] == [b"\7\7\7", b"\x08\x08\x08", b"\t\t\t"]
        assert image.read(at[0] + 510, 4) == b"\7\7\x08\x08"
    assert data_of(path) == [(15 * 256, 512), (8192, 256)]
    qemu_check(path)


def test_all_states(tmp_path):
    """Not present, undefined, zero, unmapped, unmapped as version 0.95 had it; a place may be kept."""
    words = (0, 1, entry(5 * MIB, 2), entry(6 * MIB, 3), 5, entry(4 * MIB))
    path = disk(tmp_path / "disk.vhdx", words, [b"x" * MIB, b"old" * 1000, b"older" * 1000], size=6 * MIB)
    check_content(path)
    with open_image(path) as image:
        kinds = [(extent.start // MIB, extent.kind) for extent in image.extents()]
    assert kinds == [(0, Kind.HOLE), (2, Kind.ZERO), (3, Kind.HOLE), (5, Kind.DATA)]


def test_sectors_of_4096_bytes(tmp_path):
    """QEMU does not open these; 7-Zip does. A bitmap entry stands behind 8 times as many payload entries."""
    path = simple(tmp_path / "disk.vhdx", logical=4096)
    run("7z", "x", "-y", f"-o{tmp_path / 'out'}", path)
    (found,) = (tmp_path / "out").iterdir()
    assert content_of(path) == found.read_bytes()
    with open_image(path) as image:
        assert image.sector_size == 4096
    count = (32 << 30) // (256 * MIB)
    words = [0] * count + [entry(0, 0), entry(4 * MIB)]
    path = disk(tmp_path / "long.vhdx", words, [b"behind"], size=(32 << 30) + MIB, block=256 * MIB, logical=4096)
    path.open("r+b").truncate(260 * MIB)
    with open_image(path) as image:
        assert image.read(32 << 30, 6) == b"behind"


# --- which copy counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize("how", ["checksum", "signature", "never written"])
def test_one_header_is_enough(tmp_path, broken, how):
    path = simple(tmp_path / "disk.vhdx")
    put(path, HEADERS[broken], {"checksum": b"head\1", "signature": b"daeh", "never written": bytes(4096)}[how])
    with open_image(path) as image:
        assert image.metadata()["soundHeaders"] == 1
        assert image.metadata()["sequenceNumber"] == (8, 7)[broken]
    check_content(path)


def test_the_greater_sequence_number_counts(tmp_path):
    path = simple(tmp_path / "disk.vhdx")
    for first, second in ((9, 2), (2, 9), ((1 << 64) - 1, 0)):
        put(path, HEADERS[0], header(first))
        put(path, HEADERS[1], header(second))
        with open_image(path) as image:
            assert image.metadata()["sequenceNumber"] == max(first, second)
    put(path, HEADERS[1], header((1 << 64) - 1))  # identical: taken, as QEMU takes them
    check_content(path)


def test_the_second_region_table_steps_in(tmp_path):
    """QEMU reads the first copy only; the specification has two so that one may be lost."""
    path = simple(tmp_path / "disk.vhdx")
    expected = qemu_content(path)
    put(path, TABLES[0] + 20, b"damage")
    assert content_of(path) == expected
    with open_image(path) as image:
        assert image.metadata()["soundRegionTables"] == 1


def test_unknown_regions_and_items_that_need_not_be_understood(tmp_path):
    path = simple(tmp_path / "disk.vhdx", more=((b"user item's guid", b"whatever", 1), (b"s" * 16, b"system", 0)))
    put(path, 7 * MIB - 1, b"\0")
    known = list(struct.iter_unpack("<16sQII", get(path, TABLES[0] + 16, 64)))
    for offset in TABLES:
        put(path, offset, table((*known, (b"unknown region!!", 6 * MIB, MIB, 0))))
    check_content(path)
    with open_image(path) as image:
        names = [region["name"] for region in image.metadata()["regions"]]
    assert names[:2] == ["bat", "metadata"]
    assert len(names[2]) == 36


# --- the log -------------------------------------------------------------------------------------------------------


def dirty(path, guid=b"L" * 16, **parameters):
    set_log_guid(path, b"L" * 16)
    page = bytearray(get(path, BAT_AT, 4096))
    page[8:16] = struct.pack("<Q", entry(6 * MIB))  # allocates block 1
    put(path, 7 * MIB - 1, b"\0")
    put(path, 6 * MIB, b"from the log")
    put(path, *log_entry(guid, page=bytes(page), file_size=path.stat().st_size, **parameters))
    return path


def test_a_log_to_replay_is_refused_and_told(tmp_path):
    path = dirty(simple(tmp_path / "disk.vhdx"))
    assert "needs to be replayed" in run("qemu-img", "info", path, check=False).stderr
    with open_image(path) as image:
        assert image.metadata()["logToReplay"]
        assert image.locate().state is GraftState.NONE
        for access in (lambda: image.read(0, 1), lambda: list(image.extents()), image.backing_chain):
            with pytest.raises(UnsupportedError, match="log") as caught:
                access()
            assert "qemu-img check -r all" in caught.value.hint
    run("qemu-img", "check", "-r", "all", "-f", "vhdx", path)
    check_content(path)
    assert content_of(path)[MIB : MIB + 12] == b"from the log"


@pytest.mark.parametrize("left_over", ["other guid", "torn", "no guid"])
def test_a_log_with_nothing_to_replay_is_none(tmp_path, left_over):
    path = dirty(simple(tmp_path / "disk.vhdx"), guid=b"K" * 16 if left_over == "other guid" else b"L" * 16)
    if left_over == "torn":
        put(path, MIB + 5000, b"torn")
    if left_over == "no guid":
        set_log_guid(path, bytes(16))
    check_content(path)
    assert content_of(path)[MIB : MIB + 12] == bytes(12)


def test_a_log_entry_that_goes_on_at_the_beginning(tmp_path):
    path = simple(tmp_path / "disk.vhdx")
    set_log_guid(path, b"L" * 16)
    _, data = log_entry(b"L" * 16, page=get(path, BAT_AT, 4096))
    tail = sealed(data[:12] + struct.pack("<I", MIB - 4096) + data[16:])
    put(path, 2 * MIB - 4096, tail[:4096])
    put(path, MIB, tail[4096:])
    with pytest.raises(UnsupportedError, match="log"):
        content_of(path)


@pytest.mark.parametrize("kind", ["many", "long"])
def test_a_log_made_to_waste_time_counts_as_dirty(tmp_path, kind):
    path = simple(tmp_path / "disk.vhdx")
    log = (64 * MIB, 16 * MIB) if kind == "many" else (65 * MIB, 16 * MIB)
    put(path, HEADERS[1], header(8, log_guid=b"L" * 16, log=log))
    entry_head = struct.pack("<4sIIIQII16s", b"loge", 1, 4096 * 64, 0, 1, 1, 0, b"L" * 16)
    put(path, 16 * MIB, entry_head.ljust(4096, b"\1") * (256 * 16))
    path.open("r+b").truncate(16 * MIB + log[0])
    start = time.process_time()
    with open_image(path) as image:
        assert image.metadata()["logToReplay"]
    assert time.process_time() - start < 2


# --- parents -------------------------------------------------------------------------------------------------------


def parent_item(entries):
    rows, values, at = b"", b"", 20 + 12 * len(entries)
    for key, value in entries.items():
        key_bytes, value_bytes = key.encode("utf-16-le"), value.encode("utf-16-le")
        rows += struct.pack("<IIHH", at, at + len(key_bytes), len(key_bytes), len(value_bytes))
        values += key_bytes + value_bytes
        at += len(key_bytes) + len(value_bytes)
    return struct.pack("<16sHH", b"T" * 16, 0, len(entries)) + rows + values


def test_differences_to_a_parent_are_refused_by_name(tmp_path):
    entries = {"parent_linkage": "{0}", "relative_path": "..\\base.vhdx", "absolute_win32_path": "C:\\base.vhdx"}
    path = simple(tmp_path / "disk.vhdx", flags=2, more=((PARENT, parent_item(entries), 4),))
    with open_image(path) as image:
        facts = image.metadata()
        assert (facts["type"], facts["parent"]) == ("differencing", entries)
        assert json.dumps(facts)
        for access in (lambda: image.read(0, 1), lambda: list(image.extents()), image.backing_chain):
            with pytest.raises(UnsupportedError, match=r"base\.vhdx"):
                access()


def test_a_parent_that_is_not_named(tmp_path):
    path = simple(tmp_path / "disk.vhdx", flags=2)
    with open_image(path) as image, pytest.raises(UnsupportedError, match="differences"):
        image.read(0, 1)


# --- size and speed ------------------------------------------------------------------------------------------------


def test_the_largest_disk_costs_nothing_and_its_end_is_read(tmp_path):
    """64 TiB in blocks of 1 MiB: a table of 513 MiB, most of it a hole in the file."""
    path = simple(tmp_path / "disk.vhdx", size=64 << 40)
    last = (64 << 20) - 1
    for offset in TABLES:
        put(path, offset, table(((BAT, 16 * MIB, 513 * MIB, 1), (METADATA, METADATA_AT, MIB, 1))))
    for block, word in ((1 << 20, entry(4 * MIB)), (last, entry(5 * MIB))):
        put(path, 16 * MIB + 8 * (block + block // 4096), struct.pack("<Q", word))
    path.open("r+b").truncate(529 * MIB)
    start = time.process_time()
    with open_image(path) as image:
        data = [(extent.start // MIB, extent.length) for extent in image.extents() if extent.kind is Kind.DATA]
        assert data == [(1 << 20, MIB), (last, MIB)]
        assert image.read((1 << 40) - 1, 6) == b"\0third"
        assert image.read(last * MIB, 5) == b"first"
        assert image.read((64 << 40) - 2, 9) == bytes(2)
    assert time.process_time() - start < 2


def test_threads_read_the_same(tmp_path):
    path = make(tmp_path / "disk.vhdx", "16M", "block_size=1M")
    qemu_io(path, *(f"write -P {number + 1} {number * 1300}k 1000k" for number in range(12)))
    expected, wrong = qemu_content(path), []
    with open_image(path) as image:

        def work(seed):
            for at in range(seed * 65536, len(expected), 4 * 65536):
                buffer = bytearray(100_000)
                count = image.readinto(at, memoryview(buffer))
                if buffer[:count] != expected[at : at + 100_000]:
                    wrong.append(at)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_facts(tmp_path):
    path = make(tmp_path / "disk.vhdx", "64M", "subformat=fixed")
    with open_image(path) as image:
        facts = image.metadata()
    assert json.dumps(facts)
    assert facts["creator"].startswith("QEMU")
    assert (facts["type"], facts["virtualSize"], facts["logicalSectorSize"]) == ("fixed", 64 * MIB, 512)
    assert facts["fileSize"] == path.stat().st_size
    info = json.loads(run("qemu-img", "info", "--output=json", path).stdout)
    assert (facts["virtualSize"], facts["blockSize"]) == (info["virtual-size"], info["cluster-size"])


def test_probe_and_lazy_import(tmp_path):
    path = simple(tmp_path / "disk.vhdx")
    assert detect(path).name == FORMAT.name == "vhdx"
    assert not FORMAT.probe(b"vhdxfil", 7)
    heavy = "{'numpy', 'construct', 'zstandard'}"
    code = f"import sys, vmgraft.imagefmt.vhdx; print(sorted({heavy} & set(sys.modules)))"
    assert run(sys.executable, "-c", code).stdout.strip() == "[]"
    code = (
        "import sys; from pathlib import Path; from vmgraft.imagefmt.graft import open_image\n"
        f"open_image(Path({str(path)!r})).locate(); print('zstandard' in sys.modules)"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == "False"


def test_metadata_without_its_region_in_full(tmp_path):
    """The metadata region may be longer than a MiB, and items lie anywhere behind its table."""
    path = simple(tmp_path / "disk.vhdx", places=[(8 * MIB, metadata(4 * MIB)), (10 * MIB - 1, b"\0")])
    rows = list(struct.iter_unpack("<16sQII", get(path, TABLES[0] + 16, 64)))
    moved = (rows[0], (rows[1][0], 8 * MIB, 2 * MIB, 1))
    for offset in TABLES:
        put(path, offset, table(moved))
    put(path, METADATA_AT, bytes(65536))
    assert DATA_AT < 8 * MIB
    check_content(path)
