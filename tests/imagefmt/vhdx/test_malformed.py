"""Files that break the specification: one clear error each, at once, and nothing that grows."""

import struct
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imagefmt_helpers import attach
from vhdx_testkit import (
    BAT,
    BAT_AT,
    DISK_ID,
    DISK_SIZE,
    FILE_PARAMETERS,
    HEADERS,
    LOGICAL,
    METADATA,
    METADATA_AT,
    MIB,
    PARENT,
    PHYSICAL,
    TABLES,
    disk,
    entry,
    get,
    header,
    metadata,
    put,
    qemu_content,
    run,
    sealed,
    simple,
    table,
    write_sparse,
)

from vmgraft.errors import MalformedImageError, UnsupportedError, VmgraftError
from vmgraft.imagefmt.contract import Opening, Placement
from vmgraft.imagefmt.graft import detach_image, open_image
from vmgraft.imagefmt.sidecar import sidecar_path
from vmgraft.imagefmt.vhdx.crc32c import checksum

AS_VHDX = Opening(format="vhdx")
SOUND = (BAT, BAT_AT, MIB, 1), (METADATA, METADATA_AT, MIB, 1)


def headers(first, second=None):
    return [(HEADERS[0], first), (HEADERS[1], first if second is None else second)]


def tables(*rows, count=None):
    return [(offset, table(rows, count)) for offset in TABLES]


def facts(**parameters):
    return [(METADATA_AT, metadata(**{"size": 4 * MIB} | parameters))]


def words(*entries):
    return [(BAT_AT, struct.pack(f"<{len(entries)}Q", *entries))]


def item(number, guid, offset, length, flags):
    """Another entry in place of metadata entry ``number``."""
    return [(METADATA_AT + 32 + 32 * number, struct.pack("<16sIII", guid, offset, length, flags))]


#: Name → (what is written over a sound file, class, message). A whole-file size stands for a cut.
CASES = {
    # file identifier and headers
    "signature": ([(0, b"vhdxfilm")], MalformedImageError, "no VHDX"),
    "file of 8 bytes": (8, MalformedImageError, "header section"),
    "file of 1 MiB less 1": (MIB - 1, MalformedImageError, "header section"),
    "no sound header": (headers(bytes(4096)), MalformedImageError, "neither of the two headers"),
    "header checksums": (headers(header()[:100] + b"x" + header()[101:]), MalformedImageError, "neither"),
    "equal sequence numbers": (headers(header(5), header(5, file_guid=b"x" * 16)), MalformedImageError, "neither"),
    "version": (headers(header(9, version=2)), UnsupportedError, "version 2"),
    "log version": (headers(header(9, log_guid=b"L" * 16, log_version=1)), UnsupportedError, "version 1 of the log"),
    "log at an odd place": (headers(header(9, log=(MIB, MIB + 4096))), MalformedImageError, "whole MiB"),
    "log of an odd length": (headers(header(9, log=(4096, MIB))), MalformedImageError, "whole MiB"),
    "log in the header section": (headers(header(9, log=(MIB, 0))), MalformedImageError, "whole MiB"),
    "log behind the end": (headers(header(9, log=(MIB, 900 * MIB))), MalformedImageError, "log .* behind the end"),
    "log at the end of numbers": (headers(header(9, log=(MIB, (1 << 64) - MIB))), MalformedImageError, "log .* behind"),
    "log over the block table": (headers(header(9, log=(2 * MIB, MIB))), MalformedImageError, "overlap"),
    # region tables
    "no region table": ([(offset, bytes(65536)) for offset in TABLES], MalformedImageError, "both copies"),
    "region table checksums": ([(offset + 70, b"x") for offset in TABLES], MalformedImageError, "both copies"),
    "too many regions": (tables(count=2048), MalformedImageError, "both copies"),
    "no block table": (tables(SOUND[1]), MalformedImageError, "0 regions bat"),
    "no metadata": (tables(SOUND[0]), MalformedImageError, "0 regions metadata"),
    "two block tables": (tables(*SOUND, (BAT, 6 * MIB, MIB, 1)), MalformedImageError, "2 regions bat|behind the end"),
    "a region twice": (tables(*SOUND, *[(b"x" * 16, n * MIB, MIB, 0) for n in (8, 9)]), MalformedImageError, "twice"),
    "region that must be understood": (tables(*SOUND, (b"x" * 16, 8 * MIB, MIB, 1)), UnsupportedError, "understood"),
    "region at an odd place": (tables(*SOUND, (b"x" * 16, 8 * MIB + 1, MIB, 0)), MalformedImageError, "whole MiB"),
    "region of an odd length": (tables(*SOUND, (b"x" * 16, 8 * MIB, 99, 0)), MalformedImageError, "whole MiB"),
    "region without length": (tables(*SOUND, (b"x" * 16, 8 * MIB, 0, 0)), MalformedImageError, "whole MiB"),
    "region in the header section": (tables(*SOUND, (b"x" * 16, 0, MIB, 0)), MalformedImageError, "header section"),
    "region over another": (tables(*SOUND, (b"x" * 16, 3 * MIB, MIB, 0)), MalformedImageError, "overlap"),
    "region over the log": (tables(*SOUND, (b"x" * 16, MIB, MIB, 0)), MalformedImageError, "overlap"),
    "region at the end of numbers": (
        tables(*SOUND, (b"x" * 16, (1 << 64) - MIB, MIB, 0)), MalformedImageError, "no file",
    ),
    "block table behind the end": (tables((BAT, 90 * MIB, MIB, 1), SOUND[1]), MalformedImageError, "behind the end"),
    # metadata
    "metadata signature": ([(METADATA_AT, b"metadatb")], MalformedImageError, "metadata table header"),
    "too many items": (facts(count=2048), MalformedImageError, "2048 entries"),
    "more items than there are": (facts(count=2047), MalformedImageError, "twice"),
    **{
        f"without item {number}": (facts(without=(guid,)), MalformedImageError, "lack the")
        for number, guid in enumerate((FILE_PARAMETERS, DISK_SIZE, DISK_ID, LOGICAL, PHYSICAL))
    },
    "item of a wrong length": (item(1, DISK_SIZE, 65544, 4, 6), MalformedImageError, "must be 8"),
    "item without a value": (item(1, DISK_SIZE, 0, 0, 6), MalformedImageError, "must be 8"),
    "item in the table": (item(1, DISK_SIZE, 65000, 8, 6), MalformedImageError, "out of place"),
    "item behind the region": (item(1, DISK_SIZE, MIB - 4, 8, 6), MalformedImageError, "out of place"),
    "item at the end of numbers": (item(1, DISK_SIZE, 0xFFFFFFF8, 8, 6), MalformedImageError, "out of place"),
    "item longer than 1 MiB": (item(2, b"x" * 16, 65552, 0xFFFFFFFF, 0), MalformedImageError, "out of place"),
    "items that overlap": (item(1, DISK_SIZE, 65540, 8, 6), MalformedImageError, "overlap"),
    "item twice": (facts(more=((DISK_SIZE, bytes(8), 6),)), MalformedImageError, "twice"),
    "item that must be understood": (facts(more=((b"x" * 16, b"x", 4),)), UnsupportedError, "understood"),
    "user item that must be understood": (facts(more=((DISK_SIZE, b"x", 5),)), UnsupportedError, "understood"),
    "blocks of 3 MiB": (facts(block=3 * MIB), MalformedImageError, "blocks of"),
    "blocks of 0": (facts(block=0), MalformedImageError, "blocks of"),
    "blocks of 512 KiB": (facts(block=MIB // 2), MalformedImageError, "blocks of"),
    "blocks of 512 MiB": (facts(block=512 * MIB), MalformedImageError, "blocks of"),
    "sectors of 1024": (facts(logical=1024), MalformedImageError, "sectors of 1024"),
    "physical sectors of 0": (facts(physical=0), MalformedImageError, "sectors of 0"),
    "disk of 0": (facts(size=0), MalformedImageError, "disk of 0"),
    "disk over 64 TiB": (facts(size=(64 << 40) + 512), MalformedImageError, "at most 64 TiB"),
    "disk of odd length": (facts(size=4 * MIB + 1), MalformedImageError, "whole sectors"),
    "parent locator of many entries": (
        facts(flags=2, more=((PARENT, b"T" * 16 + b"\0\0\xff\xff", 4),)), MalformedImageError, "65535 entries",
    ),
    "parent locator cut short": (
        facts(flags=2, more=((PARENT, b"T" * 16 + b"\0\0\2\0", 4),)), MalformedImageError, "too early",
    ),
    # block table
    "table too short": (facts(size=1 << 40), MalformedImageError, "room for"),
    "state 4": (words(4), MalformedImageError, "state"),
    "partly present without parent": (words(entry(4 * MIB, 7)), MalformedImageError, "state"),
    "reserved bits": (words(8), MalformedImageError, "reserved"),
    "block behind the end": (words(entry(60 * MIB)), MalformedImageError, "behind the end"),
    "block at the end of numbers": (words(entry((1 << 64) - MIB)), MalformedImageError, "behind the end"),
    "block that ends behind the end": (words(entry(6 * MIB)), MalformedImageError, "behind the end"),
    "block on the headers": (words(entry(0)), MalformedImageError, "own metadata"),
    "block on the log": (words(entry(MIB)), MalformedImageError, "own metadata"),
    "block on the table": (words(entry(2 * MIB)), MalformedImageError, "own metadata"),
    "block on the metadata": (words(entry(3 * MIB)), MalformedImageError, "own metadata"),
    "block used twice": (words(entry(4 * MIB), entry(4 * MIB)), MalformedImageError, "overlaps"),
    "blocks that overlap": (
        [*facts(block=2 * MIB), *words(entry(4 * MIB), entry(5 * MIB)), (7 * MIB - 1, b"\0")],
        MalformedImageError,
        "overlaps",
    ),
}  # fmt: skip


def look_at_everything(path):
    with open_image(path, AS_VHDX) as image:
        image.metadata()
        image.locate()
        image.room()
        image.read(0, 4096)
        image.read(image.virtual_size - 512, 512)
        for _ in image.extents():
            pass


@pytest.mark.parametrize("name", list(CASES))
def test_one_clear_error(tmp_path, name):
    changes, kind, message = CASES[name]
    path = simple(tmp_path / "disk.vhdx")
    if isinstance(changes, int):
        path.open("r+b").truncate(changes)
        changes = []
    for offset, data in changes:
        put(path, offset, data)
    start = time.process_time()
    with pytest.raises(VmgraftError, match=message) as caught:
        look_at_everything(path)
    assert type(caught.value) is kind
    assert caught.value.file == str(path)
    assert caught.value.field
    assert caught.value.offset is not None
    assert time.process_time() - start < 2


def test_the_sound_file_is_sound(tmp_path):
    look_at_everything(simple(tmp_path / "disk.vhdx"))


def test_a_block_on_a_region_of_somebody_else(tmp_path):
    path = simple(tmp_path / "disk.vhdx")
    for offset in TABLES:
        put(path, offset, table((*SOUND, (b"x" * 16, 5 * MIB, MIB, 0))))
    with pytest.raises(MalformedImageError, match="own metadata"):
        look_at_everything(path)


def test_many_regions_and_items_take_no_time(tmp_path):
    path = simple(tmp_path / "disk.vhdx")
    many = [(struct.pack("<QQ", n, 7), (n + 10) * MIB, MIB, 0) for n in range(2045)]
    for offset in TABLES:
        put(path, offset, table((*SOUND, *many)))
    put(path, METADATA_AT, metadata(4 * MIB, more=[(struct.pack("<QQ", n, 7), b"x", 0) for n in range(2042)]))
    start = time.process_time()
    look_at_everything(path)
    assert time.process_time() - start < 2


HUNGRY = r"""
import re, sys, time
from pathlib import Path
from vmgraft.errors import VmgraftError
from vmgraft.imagefmt.contract import Opening
from vmgraft.imagefmt.graft import open_image
start = time.process_time()
try:
    with open_image(sys.argv[1], Opening(format="vhdx")) as image:
        image.read(0, 4096)  # the first access looks through the whole table
    print("fine")
except VmgraftError as problem:
    print(problem)
peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
print(round(time.process_time() - start, 1), peak // 1024)
"""


@pytest.mark.parametrize("kind", ["one place", "all over", "huge file"])
def test_memory_stays_small(tmp_path, kind):
    """A table of 8 MiB, dense: a million blocks of 1 MiB in a file that is nearly all hole."""
    count = 1 << 20
    path = tmp_path / "disk.vhdx"
    rows = [
        entry(0 if kind == "one place" else (n if kind == "all over" else n * 14) << 20) + (32 << 20)
        for n in range(count)
    ]
    disk(path, size=(count - 256) * MIB, places=[(16 * MIB, struct.pack(f"<{count}Q", *rows))])
    for offset in TABLES:
        put(path, offset, table(((BAT, 16 * MIB, 8 * MIB, 1), SOUND[1])))
    path.open("r+b").truncate((15 << 40) if kind == "huge file" else (2 << 40))
    done = subprocess.run([sys.executable, "-c", HUNGRY, path], capture_output=True, text=True, check=True)
    message, numbers = done.stdout.splitlines()
    seconds, peak = numbers.split()
    assert ("overlaps" in message) if kind == "one place" else message == "fine"
    assert float(seconds) < 2
    assert int(peak) < 256


AREAS = [(HEADERS[0], 80, 4096), (HEADERS[1], 80, 4096), *((offset, 160, 65536) for offset in TABLES)]
AREAS += [(BAT_AT, 40, 0), (METADATA_AT, 200, 0), (METADATA_AT + 65536, 48, 0)]
changes_of_an_area = st.sampled_from(AREAS).flatmap(
    lambda area: st.tuples(
        st.just(area),
        st.lists(
            st.tuples(st.integers(0, area[1] - 1), st.sampled_from([0, 1, 2, 4, 6, 7, 8, 16, 127, 128, 255])),
            min_size=1,
            max_size=6,
        ),
        st.booleans(),
    )
)


def mutate(path, changes):
    for (start, _, size), edits, seal in changes:
        for offset, value in edits:
            put(path, start + offset, bytes([value]))
        if seal and size:
            raw = get(path, start, size)
            put(path, start + 4, struct.pack("<I", checksum(raw, 4)))


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(changes_of_an_area, min_size=1, max_size=3))
def test_mutations_raise_nothing_but_our_errors(tmp_path, changes):
    path = simple(tmp_path / "disk.vhdx")
    mutate(path, changes)
    start = time.process_time()
    try:
        look_at_everything(path)
    except VmgraftError as problem:
        assert problem.file == str(path)
    assert time.process_time() - start < 2


words_of_a_table = st.lists(
    st.one_of(
        st.integers(0, 7),
        st.tuples(st.integers(3, 12), st.sampled_from([2, 3, 6, 6, 6])).map(lambda pair: entry(pair[0] * MIB, pair[1])),
    ),
    min_size=4,
    max_size=4,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words_of_a_table)
def test_what_is_read_is_what_qemu_reads(tmp_path, rows):
    path = disk(
        tmp_path / "disk.vhdx", rows, [bytes([65 + n]) * 5000 for n in range(8)], places=[(12 * MIB - 1, b"\0")]
    )
    try:
        with open_image(path) as image:
            content = image.read(0, image.virtual_size)
            look_at_everything(path)
    except VmgraftError:
        return
    assert content == qemu_content(path)


GRAFTED = {}


def grafted(path):
    """A grafted image, made once."""
    if not GRAFTED:
        attach(simple(path), Placement.INLINE)
        GRAFTED["bytes"], GRAFTED["region"] = path.read_bytes(), 6 * MIB
        with open_image(path) as image:
            GRAFTED["content"] = image.read(0, image.virtual_size)
    write_sparse(path, GRAFTED["bytes"])
    return path


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            changes_of_an_area,
            st.tuples(
                st.just((6 * MIB, 20000, 0)),
                st.lists(st.tuples(st.integers(0, 19999), st.integers(0, 255)), min_size=1, max_size=4),
                st.just(False),
            ),
            st.tuples(
                st.just((6 * MIB, 210, 0)),
                st.lists(st.tuples(st.integers(0, 209), st.integers(0, 255)), min_size=1, max_size=4),
                st.just(False),
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 2 * MIB),
)
def test_a_damaged_graft_never_costs_guest_data(tmp_path, changes, cut):
    """Whatever is damaged: locate says so, and if detach does anything the guest content is what it was."""
    path = grafted(tmp_path / "disk.vhdx")
    sidecar_path(path).unlink(missing_ok=True)
    mutate(path, changes)
    if cut < MIB:
        path.open("r+b").truncate(7 * MIB - cut)
    try:
        with open_image(path) as image:
            image.locate()
            before = image.read(0, image.virtual_size)
    except VmgraftError:
        before = None
    try:
        detach_image(path)
    except VmgraftError as problem:
        assert str(problem)
    if before is not None:
        with open_image(path) as image:
            assert image.read(0, image.virtual_size) == before


def test_qemu_agrees_that_the_handmade_file_is_sound(tmp_path):
    path = simple(tmp_path / "disk.vhdx")
    assert "No errors" in run("qemu-img", "check", "-f", "vhdx", path).stdout
    assert sealed(get(path, TABLES[0], 65536)) == table()
