"""Malformed archives, and those that programs read in different ways: one clear error, in bounded time and memory."""

import struct
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagefmt_helpers import attach
from zip_testkit import MARK, archive, by_hand, central, end, end64, local, noise

from vmgraft.errors import FileError, MalformedImageError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.contract import Opening, Placement
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.imagefmt.locator import MAGIC
from vmgraft.imagefmt.zip import _layout as layout

ZIP = Opening(format="zip")
NAME, DATA = b"entry.txt", b"data" * 10
BODY = local(NAME, DATA)
ENTRY = central(NAME, DATA, 0)
AT, LONG = len(BODY), len(ENTRY)


def with_end(record):
    return BODY + ENTRY + record


def with_directory(directory, entries=1):
    return BODY + directory + end(entries, len(directory), AT)


def wide(*, entries=1, size=LONG, offset=AT, at=AT + LONG, short=(0xFFFF, MARK, MARK), **options):
    return with_end(end64(entries, size, offset, at, **options) + end(*short))


MALFORMED, UNSUPPORTED = MalformedImageError, UnsupportedError
#: Found when the archive is opened.
CASES = {
    "cut": (archive()[:-1], "was cut", MALFORMED),
    "cut in the directory": (archive()[:-60], "was cut", MALFORMED),
    "cut in the entries": (archive()[:200], "was cut", MALFORMED),
    "bytes appended": (archive() + b"\0", "appended", MALFORMED),
    "64 KiB appended": (archive() + bytes(70_000), "appended", MALFORMED),
    "comment cut": (with_end(end(1, LONG, AT, comment=b"x", stated=2)), "was cut", MALFORMED),
    "second end record in the comment": (with_end(end(1, LONG, AT, comment=end(0, 0, 0))), "second end", MALFORMED),
    "its signature in the comment": (with_end(end(1, LONG, AT, comment=b"see PK\5\6")), "second end", MALFORMED),
    "several disks": (with_end(end(1, LONG, AT, disk=1)), "several files", UNSUPPORTED),
    "entries on other disks": (with_end(end(2, LONG, AT, here=1)), "several files", UNSUPPORTED),
    "directory longer than the file": (with_end(end(1, 1 << 20, AT)), "longer than the file", MALFORMED),
    "directory shorter": (with_end(end(1, LONG - 1, AT)), "no central directory|is at", MALFORMED),
    "directory offset behind": (with_end(end(1, LONG, AT + 1)), "is at", MALFORMED),
    "directory not there": (BODY + bytes(LONG) + end(1, LONG, AT), "no central directory", MALFORMED),
    "too many entries": (with_end(end(2, LONG, AT)), "does not hold 2", MALFORMED),
    "65535 entries": (with_end(end(0xFFFF, LONG, AT)), "does not hold", MALFORMED),
    "entries without a count": (with_end(end(0, LONG, AT)), "does not hold 0", MALFORMED),
    "marks without ZIP64": (with_end(end(1, LONG, MARK)), "not there", MALFORMED),
    "size mark without ZIP64": (with_end(end(1, MARK, AT)), "not there", MALFORMED),
    "two directories": (
        BODY + ENTRY + BODY + ENTRY + end(1, LONG, AT),
        "two central directories",
        MALFORMED,
    ),
    "ZIP64 record elsewhere": (wide(at=AT + LONG + 1), "ZIP64 end record is at|no ZIP64", MALFORMED),
    "ZIP64 record far away": (
        with_end(b"x" * 56 + struct.pack("<IIQI", 0x07064B50, 0, 1 << 63, 1) + end(0xFFFF, MARK, MARK)),
        "no ZIP64 end",
        MALFORMED,
    ),
    "ZIP64 locator first": (
        struct.pack("<IIQI", 0x07064B50, 0, 0, 1) + end(0, 0, 0),
        "no ZIP64 end",
        MALFORMED,
    ),
    "ZIP64 says another size": (wide(short=(1, LONG - 1, MARK)), "programs see different", MALFORMED),
    "ZIP64 says another count": (wide(short=(2, MARK, MARK)), "programs see different", MALFORMED),
    "ZIP64 says another offset": (wide(short=(1, LONG, AT - 1)), "programs see different", MALFORMED),
    "ZIP64 count of 2^64": (wide(entries=(1 << 64) - 1), "does not hold", MALFORMED),
    "ZIP64 size of 2^64": (wide(size=(1 << 64) - 1), "longer than the file", MALFORMED),
    "ZIP64 offset of 2^64": (wide(offset=(1 << 64) - 1), "is at", MALFORMED),
    "ZIP64 on several disks": (wide(disks=2), "several files", UNSUPPORTED),
    "ZIP64 on another disk": (wide(disk=1), "several files", UNSUPPORTED),
    "nothing": (b"PK\3\4", "was cut", MALFORMED),
    "thousands of signatures": (b"PK\3\4" + b"PK\5\6" * 30_000, "was cut|second end", MALFORMED),
}


@pytest.mark.parametrize("case", CASES)
def test_malformed(tmp_path, case):
    data, message, kind = CASES[case]
    path = tmp_path / "a.zip"
    path.write_bytes(data)
    began = time.process_time()
    with pytest.raises(kind, match=message) as caught:
        open_image(path, ZIP)
    assert time.process_time() - began < 2
    assert caught.value.file == str(path)
    assert caught.value.field
    assert 0 <= caught.value.offset <= len(data)


#: Found before a graft is written: the directory itself is not read before.
DIRECTORIES = {
    "no entry": (with_directory(ENTRY + b"x" * LONG, 2), "entry 1 is none", MALFORMED),
    "entry cut": (with_directory(ENTRY + ENTRY[:30]), "entry 1 is none", MALFORMED),
    "fewer entries": (with_directory(ENTRY + ENTRY), "holds 2 entries", MALFORMED),
    "name over the end": (
        with_directory(ENTRY[:28] + b"\xff\xff" + ENTRY[30:]),
        "holds 1 entries in",
        MALFORMED,
    ),
    "entry behind the directory": (with_directory(central(NAME, DATA, AT + 200)), "behind all entries", MALFORMED),
    "entry in the directory": (with_directory(central(NAME, DATA, AT)), "behind all entries", MALFORMED),
    "ZIP64 entry far away": (
        with_directory(central(NAME, DATA, MARK, extra=struct.pack("<HHQ", 1, 8, 1 << 40))),
        "behind all entries",
        MALFORMED,
    ),
    "ZIP64 offset not there": (with_directory(central(NAME, DATA, MARK)), "behind all entries", MALFORMED),
    "entry on another disk": (with_directory(central(NAME, DATA, 0, disk=2)), "several files", UNSUPPORTED),
    "ZIP64 entry on another disk": (
        with_directory(central(NAME, DATA, 0, disk=0xFFFF, extra=struct.pack("<HHI", 1, 4, 7))),
        "several files",
        UNSUPPORTED,
    ),
    "APK Signing Block": (by_hand(gap=bytes(100) + b"APK Sig Block 42"), "APK Signing Block", UNSUPPORTED),
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_archives_that_are_not_grafted(tmp_path, case):
    data, message, kind = DIRECTORIES[case]
    path = tmp_path / "a.zip"
    path.write_bytes(data)
    with open_image(path) as image:
        assert image.read(0, 1 << 20) == data
    with pytest.raises(kind, match=message) as caught:
        attach(path, Placement.AUTO)
    assert caught.value.field
    assert path.read_bytes() == data


def test_an_entry_that_would_lie_in_the_record_is_refused(tmp_path):
    """A directory that already points to where a graft is going to be: it would come to life."""
    path = tmp_path / "a.zip"
    path.write_bytes(with_directory(ENTRY + central(b"evil", b"", 1024), 2))
    with pytest.raises(MalformedImageError, match="behind all entries"):
        attach(path, Placement.AUTO)


def test_a_directory_of_the_greatest_length(tmp_path):
    """Entries as short as they can be, and so as many as there can be."""
    path, count = tmp_path / "a.zip", layout.MAX_DIRECTORY // 46
    for entries, state in ((count, "entry 0 lies at 4294967294"), (count + 1, "at most")):
        records = end64(entries, entries * 46, AT, AT + entries * 46) + end(0xFFFF, MARK, MARK)
        bad = central(b"", b"", MARK - 1)
        path.write_bytes(BODY + central(b"", b"", 0) * (entries - 1) + bad + records)
        began = time.process_time()
        with pytest.raises(FileError, match=state.replace("entry 0", f"entry {entries - 1}")):
            attach(path, Placement.AUTO)
        assert time.process_time() - began < 2


def test_thousands_of_false_locators_are_looked_at_in_bounded_time(tmp_path):
    path = tmp_path / "a.zip"
    for filler in (MAGIC.ljust(512, b"x"), MAGIC * 64):
        path.write_bytes(archive() + filler * (40 << 11))
        began = time.process_time()
        with pytest.raises(MalformedImageError):
            open_image(path)
        assert time.process_time() - began < 2


def grafted(folder):
    path = folder / "start.zip"
    path.write_bytes(archive())
    attach(path, Placement.INLINE)
    return path.read_bytes()


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("starts")
    return [by_hand(), by_hand(wide=True), by_hand(prefix=b"#!x\n"), grafted(folder)]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(1, 1200), st.integers(0, 255)), max_size=5),
    st.integers(-100, 100),
    st.binary(max_size=40),
)
def test_any_damage(tmp_path, starts, number, changes, cut, tail):
    data = bytearray(starts[number])
    for back, value in changes:
        data[-min(back, len(data))] = value
    path = tmp_path / "a.zip"
    path.write_bytes(bytes(data[: len(data) + min(cut, 0)]) + (tail if cut > 80 else b""))
    began = time.process_time()
    try:
        with open_image(path, ZIP) as image:
            image.metadata()
            assert len(image.read(0, 1 << 20)) == image.virtual_size
            assert sum(extent.length for extent in image.extents()) == image.virtual_size
            open_graft(image).format_problem()
        attach(path, Placement.AUTO)
    except VmgraftError as problem:
        assert str(problem)
    assert time.process_time() - began < 2


def test_not_an_archive_at_all(tmp_path):
    path = tmp_path / "a.zip"
    for data in (b"", b"x", noise(100), noise(100_000)):
        path.write_bytes(data)
        with pytest.raises(FileError):
            open_image(path, ZIP)
