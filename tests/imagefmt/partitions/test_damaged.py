"""Damaged and hostile partition tables: reported, bounded, never raised."""

import struct
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from imagefmt_helpers import tool

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.partitions import describe, describe_disk
from vmgraft.imagefmt.partitions._layout import MAX_CHAIN, MAX_LISTED

SECTOR = 512
SIZE = 4 << 20
LAST = SIZE // SECTOR - 1


def shown(data):
    return describe_disk(lambda offset, length: bytes(data[offset : offset + length]), len(data))


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt") / "disk.img"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    tool("sgdisk", "-n", "1:2048:+1M", "-c", "1:first", "-n", "2:0:+512K", path)
    return path.read_bytes()


def header_changed(data, lba, **fields):
    """A copy in which fields of a GPT header differ, its CRC made right again."""
    places = {
        "header_size": ("<I", 12), "my_lba": ("<Q", 24), "alternate_lba": ("<Q", 32), "first_usable": ("<Q", 40),
        "last_usable": ("<Q", 48), "entries_lba": ("<Q", 72), "entry_count": ("<I", 80), "entry_size": ("<I", 84),
        "revision": ("<I", 8), "entries_crc": ("<I", 88),
    }  # fmt: skip
    image = bytearray(data)
    start = lba * SECTOR
    for name, value in fields.items():
        struct.pack_into(places[name][0], image, start + places[name][1], value)
    struct.pack_into("<I", image, start + 16, 0)
    struct.pack_into("<I", image, start + 16, crc32(image[start : start + 92]))
    return image


def entry_changed(data, number, **fields):
    """A copy in which an entry of the primary array differs, both CRCs made right again; the backup is gone."""
    image = bytearray(data)
    image[-33 * SECTOR :] = bytes(33 * SECTOR)
    for name, value in fields.items():
        start = 2 * SECTOR + (number - 1) * 128 + {"first": 32, "last": 40, "unique": 16, "name": 56}[name]
        image[start : start + len(value)] = value
    return header_changed(image, 1, entries_crc=crc32(image[1024 : 1024 + 128 * 128]))


def zeroed(data, start, end):
    image = bytearray(data)
    image[start:end] = bytes(end - start)
    return image


def flipped(data, offset):
    image = bytearray(data)
    image[offset] ^= 1
    return image


COPIES = {
    "primary header lost": (lambda d: zeroed(d, 512, 1024), "the primary GPT is missing"),
    "primary header damaged": (lambda d: flipped(d, 512 + 60), "the primary GPT has a wrong CRC"),
    "primary entries damaged": (lambda d: flipped(d, 1024 + 300), "the primary GPT has entries with a wrong CRC"),
    "primary and MBR lost": (lambda d: zeroed(d, 0, 34 * 512), "the protective MBR is missing"),
    "backup header lost": (lambda d: zeroed(d, LAST * 512, SIZE), "the backup GPT is missing"),
    "backup header damaged": (lambda d: flipped(d, LAST * 512 + 60), "the backup GPT has a wrong CRC"),
    "backup entries damaged": (lambda d: flipped(d, (LAST - 32) * 512), "the backup GPT has entries with a wrong CRC"),
    "protective MBR lost": (lambda d: zeroed(d, 0, 512), "the protective MBR is missing"),
    "copies differ": (lambda d: header_changed(d, LAST, last_usable=8000), "the two copies of the GPT differ"),
    "grown": (lambda d: d + bytes(1 << 20), "the backup GPT lies 1048576 bytes before the end of the disk"),
    "protective too short": (lambda d: d + bytes(1 << 20), "the protective MBR covers 8191 of 10239 sectors"),
    "cut": (lambda d: d[: -(1 << 20)], "the disk is 1048576 bytes shorter than its GPT says"),
}


@pytest.mark.parametrize("case", COPIES)
def test_one_copy_is_enough(gpt, case):
    change, problem = COPIES[case]
    report = shown(change(gpt))
    assert problem in report["problems"]
    assert report["scheme"] == "gpt"
    assert [item["name"] for item in report["partitions"]] == ["first", ""]
    assert report["diskId"] == shown(gpt)["diskId"] != ""
    assert shown(gpt)["problems"] == []


def test_the_backup_moved_by_sgdisk(gpt, tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(gpt + bytes(1 << 20))
    tool("sgdisk", "-e", path)
    assert shown(path.read_bytes())["problems"] == []
    moved_back = path.read_bytes()[:SIZE]
    assert "the disk is 1048576 bytes shorter than its GPT says" in shown(moved_back)["problems"]


HEADERS = {
    "header too long": ({"header_size": 513}, "states a length of 513 bytes"),
    "header too short": ({"header_size": 91}, "states a length of 91 bytes"),
    "other revision": ({"revision": 0x20000}, "has the unknown revision 0x00020000"),
    "elsewhere": ({"my_lba": 2}, "says that it is at LBA 2"),
    "entries too many": ({"entry_count": 0xFFFFFFFF}, "too many to read"),
    "entries too long": ({"entry_size": 8192}, "states entries of 8192 bytes"),
    "entries too short": ({"entry_size": 8}, "states entries of 8 bytes"),
    "entries far away": ({"entries_lba": 1 << 63}, "outside the disk"),
    "entries at the end": ({"entries_lba": LAST}, "has entries with a wrong CRC"),
    "alternate far away": ({"alternate_lba": (1 << 64) - 1}, "bytes shorter than its GPT says"),
    "usable range backwards": ({"first_usable": 4000, "last_usable": 3000}, "before it begins"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies(gpt, case):
    fields, problem = HEADERS[case]
    report = shown(header_changed(zeroed(gpt, LAST * 512, SIZE), 1, **fields))
    assert any(problem in item for item in report["problems"]), report["problems"]
    assert report["scheme"] == "gpt"


ENTRIES = {
    "backwards": (1, {"first": struct.pack("<Q", 5000), "last": struct.pack("<Q", 4000)}, "ends before it begins"),
    "outside": (1, {"last": struct.pack("<Q", LAST)}, "reaches out of the usable range"),
    "behind the end": (2, {"last": b"\xff" * 8}, "partition 2 reaches behind the end of the disk"),
    "overlapping": (2, {"first": struct.pack("<Q", 2048)}, "overlap"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries_that_lie(gpt, case):
    number, fields, problem = ENTRIES[case]
    report = shown(entry_changed(gpt, number, **fields))
    assert any(problem in item for item in report["problems"]), report["problems"]
    assert len(report["partitions"]) == 2


def test_names_are_made_fit_to_show(gpt):
    report = shown(entry_changed(gpt, 1, name="a\x1b[31m\u202eb".encode("utf-16-le") + b"\0\xd8\0\0"))
    assert report["partitions"][0]["name"] == "a?[31m?b\ufffd"
    twins = shown(entry_changed(gpt, 2, unique=gpt[1024 + 16 : 1024 + 32]))
    assert "partition 2 has the GUID of another one" in twins["problems"]


def test_thousands_of_partitions_are_counted(gpt):
    entry = gpt[1024 : 1024 + 128]
    array = b"".join(entry[:16] + number.to_bytes(16, "big") + entry[32:] for number in range(8192))
    image = bytearray(SIZE)
    image[:1024] = gpt[:1024]
    image[1024 : 1024 + len(array)] = array
    report = shown(header_changed(image, 1, entry_count=8192, entries_crc=crc32(array)))
    assert len(report["partitions"]) == MAX_LISTED
    assert len(report["problems"]) == MAX_LISTED


# --- MBR ---


def mbr(*entries, size=SECTOR):
    """A boot record of (type, start, count)."""
    raw = b"".join(struct.pack("<B3sB3sII", 0, b"", kind, b"", start, count) for kind, start, count in entries)
    return (bytes(446) + raw.ljust(64, b"\0") + b"\x55\xaa").ljust(size, b"\0")


def disk(records, sectors=8192):
    image = bytearray(sectors * SECTOR)
    for place, record in records.items():
        image[place * SECTOR : (place + 1) * SECTOR] = record
    return image


CHAINS = {
    "to itself": ({0: mbr((5, 100, 1000)), 100: mbr((0x83, 1, 10), (5, 0, 5))}, 1, None),
    "in a circle": (
        {0: mbr((5, 100, 1000)), 100: mbr((0x83, 1, 10), (5, 50, 5)), 150: mbr((0x83, 1, 10), (5, 50, 5))},
        2, "comes back to sector 150",
    ),
    "to the first": (
        {0: mbr((5, 100, 1000), (5, 150, 900)), 100: mbr((0x83, 1, 10), (5, 50, 5)), 150: mbr((0x83, 1, 10))},
        2, "comes back to sector 150",
    ),
    "to nothing": ({0: mbr((0x0F, 100, 1000)), 100: mbr((0x83, 1, 10), (5, 50, 5))}, 1, "should hold"),
    "out of the disk": ({0: mbr((0x85, 100, 1000)), 100: mbr((0x83, 1, 10), (5, 0xFFFFFF00, 5))}, 1, "should hold"),
    "out of the extended partition": (
        {0: mbr((5, 100, 1000)), 100: mbr((0x83, 1, 5000))}, 1, "partition 5 reaches out of extended partition 1",
    ),
    "out of the disk itself": ({0: mbr((5, 100, 1000)), 100: mbr((0x83, 1, 0xFFFFFFFF))}, 1, "behind the end"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_chains_of_extended_records(case):
    records, logical, problem = CHAINS[case]
    report = shown(disk(records))
    assert sum(item["number"] >= 5 for item in report["partitions"]) == logical
    if problem is None:
        assert report["problems"] == []
    else:
        assert any(problem in item for item in report["problems"]), report["problems"]


def test_a_long_chain_is_bounded():
    records = {0: mbr((5, 100, 8000))}
    records |= {100 + 2 * n: mbr((0x83, 1, 1), (5, 2 * n + 2, 2)) for n in range(MAX_CHAIN + 40)}
    reads = []
    image = disk(records)

    def read(offset, length):
        reads.append(offset)
        return bytes(image[offset : offset + length])

    report = describe_disk(read, len(image))
    assert sum(item["number"] >= 5 for item in report["partitions"]) == MAX_CHAIN
    assert any("the rest is not followed" in item for item in report["problems"])
    assert len(reads) < MAX_CHAIN + 40


def test_overlapping_primaries_and_entries_that_are_none():
    report = shown(disk({0: mbr((0x83, 100, 200), (0x83, 150, 10), (0, 0, 0), (7, 8000, 900))}))
    assert report["problems"] == [
        "partitions 1 and 2 overlap",
        "partition 4 reaches behind the end of the disk",
    ]
    noise = bytearray(mbr((0x83, 100, 200)))
    noise[446] = 0x42
    assert shown(disk({0: bytes(noise)}))["scheme"] == "none"


def test_a_disk_partitioned_anew(gpt):
    """What a GPT has left behind does not count beside an MBR that does not announce it."""
    image = zeroed(gpt, 0, 34 * 512)
    image[:512] = mbr((0x83, 2048, 2048))
    report = shown(image)
    assert (report["scheme"], len(report["partitions"])) == ("mbr", 1)
    assert report["problems"] == ["parts of an earlier GPT are there too"]


def test_unreadable_content_is_a_problem_not_an_error():
    class Broken:
        virtual_size = SIZE

        @staticmethod
        def read(offset, length):
            raise MalformedImageError("the table points astray", file="disk.qcow2", offset=offset)

    report = describe(Broken())
    assert report["scheme"] == "none"
    assert "the table points astray" in report["problems"][0]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes(gpt, data):
    image = bytearray(gpt)
    places = st.one_of(st.integers(0, 40 * SECTOR), st.integers(SIZE - 33 * SECTOR, SIZE - 1))
    for offset, change in data.draw(st.lists(st.tuples(places, st.binary(min_size=1, max_size=24)), max_size=6)):
        image[offset : offset + len(change)] = change
    image = image[: data.draw(st.sampled_from([SIZE, SIZE - 512, 1 << 20, 1000, 512, 511, 0]))]
    if data.draw(st.booleans()) and len(image) >= 1024:
        image = header_changed(image, 1)
    check(shown(image), len(image))


records = st.lists(
    st.tuples(st.sampled_from([0, 5, 15, 0x83, 0x85, 0xEE]), st.integers(0, 64), st.integers(0, 100)), max_size=4
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(0, 63), records, max_size=12), records)
def test_any_chain(chain, first):
    image = disk({place: mbr(*entries) for place, entries in chain.items()} | {0: mbr(*first)}, sectors=64)
    check(shown(image), len(image))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000), st.sampled_from([b"", b"ER\2\0", b"\x55\xaa"]), st.sampled_from([512, 1024, 2048]))
def test_any_apple_map(noise, head, place):
    image = bytearray(8192)
    image[: len(head)] = head
    image[place : place + len(noise)] = b"PM\0\0" + noise
    image[place + 48 : place + 67] = b"Apple_partition_map"
    check(shown(bytes(image[:8192])), 8192)


def check(report, size):
    assert report["scheme"] in ("none", "mbr", "gpt", "hybrid", "apm")
    assert all(isinstance(item, str) and item.isprintable() for item in report["problems"])
    for table in (report, report.get("mbr"), report.get("apm")):
        for item in table["partitions"] if table else ():
            assert item["start"] >= 0 and item["size"] >= 0
            assert item["name"].isprintable() and item["type"].isprintable()
