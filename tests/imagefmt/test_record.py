"""The record: round trip, limits, bombs, gaps, overlaps, and where damage is laid."""

import struct
from hashlib import sha256

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from imagefmt_helpers import sample_sections

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt.assemble import build_record
from vmgraft.imagefmt.contract import Patch, Undo
from vmgraft.imagefmt.record import Section, SectionKind, parse_record, parse_record_head
from vmgraft.imagefmt.undo import pack_undo, parse_undo

HEADER = struct.Struct("<8sHHIQII32s")
ENTRY = struct.Struct("<IIQQQ32s32s")
UNDO = Undo(1234, (Patch(5, b"five"), Patch(100, b"hundred")), {"end": 7, "name": -1})


def with_undo():
    return [Section(SectionKind.UNDO, pack_undo(UNDO), compress=True), *sample_sections()]


def entry(kind=7, flags=0, offset=None, stored=b"x", raw_size=None, raw=None):
    return {"kind": kind, "flags": flags, "offset": offset, "stored": stored, "raw_size": raw_size, "raw": raw}


def forge(entries, *, major=1, minor=0, header_size=64, size=None, flags=0, count=None, gap=b"", magic=b"VMGRAFT\0"):
    """Build a record whose digests are right and whose numbers are whatever the test wants."""
    count = len(entries) if count is None else count
    position = header_size + ENTRY.size * len(entries)
    table, body = b"", b""
    for item in entries:
        stored = item["stored"]
        raw = stored if item["raw"] is None else item["raw"]
        offset = position if item["offset"] is None else item["offset"]
        raw_size = len(raw) if item["raw_size"] is None else item["raw_size"]
        stored_sha, raw_sha = sha256(stored).digest(), sha256(raw).digest()
        table += ENTRY.pack(item["kind"], item["flags"], offset, len(stored), raw_size, stored_sha, raw_sha)
        position += len(stored)
        body += stored
    body += gap
    size = header_size + len(table) + len(body) if size is None else size

    def header(digest):
        return HEADER.pack(magic, major, minor, header_size, size, flags, count, digest).ljust(header_size, b"\0")

    return header(sha256(header(bytes(32)) + table).digest()) + table + body


def parse(data):
    return parse_record(data, file="x.img", offset=4096)


def test_round_trip():
    record = parse(build_record(with_undo()))
    assert [section.name for section in record.sections] == ["UNDO", "ENVELOPE", "MANIFEST", "MODULE", "HINTS"]
    assert [record.raw(section) for section in record.sections] == [section.raw for section in with_undo()]
    assert record.undo() == UNDO
    assert record.version == (1, 0)
    assert not record.of_kind(SectionKind.HINTS)[0].critical


def test_forge_agrees_with_the_builder():
    plain = [Section(SectionKind.HINTS, b"hello", critical=False), Section(SectionKind.ENVELOPE, b"{}")]
    assert build_record(plain) == forge([entry(7, 0, stored=b"hello"), entry(1, 1, stored=b"{}")])


def test_build_is_deterministic_and_stores_payloads_once():
    twice = [*with_undo(), Section(SectionKind.MODULE, sample_sections()[2].raw, compress=True)]
    assert build_record(twice) == build_record(with_undo())


def test_undo_comes_first_wherever_it_was_given():
    assert build_record([*sample_sections(), with_undo()[0]]) == build_record(with_undo())


def test_incompressible_and_too_compressible_sections_are_stored_plain():
    noise = b"".join(sha256(bytes([number])).digest() for number in range(64))
    record = parse(build_record([Section(SectionKind.MODULE, noise, compress=True)]))
    assert not record.sections[0].compressed
    record = parse(build_record([Section(SectionKind.MODULE, bytes(8 << 20), compress=True)]))
    assert not record.sections[0].compressed
    assert record.raw(record.sections[0]) == bytes(8 << 20)


def test_minor_versions_are_read_major_ones_refused():
    assert parse(forge([entry()], minor=9, header_size=128)).version == (1, 9)
    with pytest.raises(GraftFormatError) as caught:
        parse(forge([entry()], major=2))
    assert caught.value.field == "record.major"


def test_unknown_sections():
    record = parse(forge([entry(kind=99, flags=0xF0, raw_size=1 << 60), entry()]))
    assert record.sections[0].name == "kind 99"
    with pytest.raises(GraftFormatError, match="critical section of unknown kind 99"):
        parse(forge([entry(kind=99, flags=1)]))


MALFORMED = {
    "empty": (b"", "record.magic"),
    "magic": (forge([entry()], magic=b"NOGRAFT\0"), "record.magic"),
    "short header": (forge([entry()])[:40], "record.sha256"),
    "size too large": (forge([entry()], size=(1 << 30) + 1), "record.record_size"),
    "size differs": (forge([entry()], size=100), "record.record_size"),
    "header too small": (
        forge([entry()], header_size=64)[:12] + b"\x20\0\0\0" + forge([entry()])[16:],
        "record.header_size",
    ),
    "header too large": (forge([entry()], minor=1, header_size=4104), "record.header_size"),
    "header size of another version": (forge([entry()], header_size=72), "record.header_size"),
    "flags": (forge([entry()], flags=1), "record.flags"),
    "no sections": (forge([]), "record.section_count"),
    "too many sections": (forge([entry(kind=50)] * 257), "record.section_count"),
    "count beyond the record": (forge([entry()], count=5), "record.section_count"),
    "count of billions": (forge([entry()], count=0xFFFFFFFF), "record.section_count"),
    "gap before": (forge([entry(offset=200)]), "section[0].offset"),
    "gap behind": (forge([entry()], gap=b"gap"), "record.record_size"),
    "overlap": (forge([entry(stored=b"four"), entry(kind=1, offset=258)]), "section[1].offset"),
    "section flags": (forge([entry(flags=4)]), "section[0].flags"),
    "plain sizes differ": (forge([entry(raw_size=5)]), "section[0].raw_size"),
    "ratio": (forge([entry(flags=2, raw_size=1001)]), "section[0].raw_size"),
    "raw too large": (forge([entry(flags=2, stored=b"x" * 70000, raw_size=(64 << 20) + 1)]), "section[0].raw_size"),
    "two undos": (forge([entry(kind=5), entry(kind=5)]), "record.section_count"),
    "65 extensions": (forge([entry(kind=2)] * 65), "record.section_count"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case):
    data, field = MALFORMED[case]
    with pytest.raises(GraftFormatError) as caught:
        parse(data)
    assert caught.value.field == field
    assert caught.value.file == "x.img"
    assert caught.value.offset >= 4096


def test_stored_size_beyond_the_record():
    data = bytearray(forge([entry()]))
    struct.pack_into("<Q", data, 64 + 16, 1 << 40)
    data[32:64] = bytes(32)
    data[32:64] = sha256(bytes(data[:160])).digest()
    with pytest.raises(GraftFormatError) as caught:
        parse(bytes(data))
    assert caught.value.field == "section[0].stored_size"


@pytest.mark.parametrize("position", range(64 + 5 * 96))
def test_every_changed_byte_of_header_and_table_is_noticed(position):
    data = bytearray(build_record(with_undo()))
    data[position] ^= 0x20
    with pytest.raises(GraftFormatError):
        parse(bytes(data))


def test_a_changed_byte_behind_the_table_touches_one_section_only():
    good = build_record(with_undo())
    sections = parse(good).sections
    for section in sections:
        data = bytearray(good)
        data[section.offset + section.stored_size // 2] ^= 1
        record = parse(bytes(data))
        for other in record.sections:
            if other.index != section.index:
                record.raw(other)
                continue
            with pytest.raises(GraftFormatError) as caught:
                record.raw(other)
            assert caught.value.field == f"section[{section.index}].stored_sha256"
            assert caught.value.offset == 4096 + section.offset


def frame(content, **options):
    return zstandard.ZstdCompressor(**options).compress(content)


BOMBS = {
    "states another size": (frame(b"a" * 500), 900, "states another size"),
    "states no size": (frame(b"a" * 500, write_content_size=False), 500, "states another size"),
    "garbage": (b"garbage, not a frame", 500, "cannot be read"),
    "cut": (frame(b"a" * 500)[:-2], 500, "cannot be read"),
    "bytes behind the frame": (frame(b"a" * 500) + b"more", 500, "cannot be read"),
    "second frame": (frame(b"a" * 500) + frame(b"b" * 500), 500, "cannot be read"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_hostile_frames(case):
    stored, raw_size, message = BOMBS[case]
    record = parse(forge([entry(flags=2, stored=stored, raw_size=raw_size, raw=b"a" * 500)]))
    with pytest.raises(GraftFormatError, match=message):
        record.raw(record.sections[0])


def test_frame_that_decompresses_to_something_else():
    record = parse(forge([entry(flags=2, stored=frame(b"a" * 500), raw_size=500, raw=b"b" * 500)]))
    with pytest.raises(GraftFormatError, match="raw bytes do not match"):
        record.raw(record.sections[0])


def test_build_refuses_what_parse_would():
    with pytest.raises(GraftFormatError, match="at most 67108864"):
        build_record([Section(SectionKind.FILES, bytes((64 << 20) + 1))])
    with pytest.raises(GraftFormatError, match="extensions"):
        build_record([Section(SectionKind.MANIFEST, bytes([number])) for number in range(65)])
    with pytest.raises(GraftFormatError, match="sections"):
        build_record([])


def test_a_record_head_gives_the_undo_even_when_the_rest_is_lost():
    data = build_record(with_undo())
    undo = parse(data).sections[0]
    head = parse_record_head(data[: undo.offset + undo.stored_size], file="x", offset=0)
    assert head.undo() == UNDO
    with pytest.raises(GraftFormatError):
        head.raw(head.sections[1])
    with pytest.raises(GraftFormatError):
        parse_record_head(data[: undo.offset - 1], file="x", offset=0)


def test_record_without_undo():
    with pytest.raises(GraftFormatError, match="no UNDO"):
        parse(build_record(sample_sections())).undo()


# --- undo ---

UNDO_HEADER = struct.Struct("<HHIIIQ")
MALFORMED_UNDO = {
    "empty": b"",
    "version": UNDO_HEADER.pack(2, 0, 0, 0, 0, 1),
    "reserved": UNDO_HEADER.pack(1, 1, 0, 0, 0, 1),
    "fact count": UNDO_HEADER.pack(1, 0, 65, 0, 0, 1),
    "patch count": UNDO_HEADER.pack(1, 0, 0, 4097, 0, 1),
    "patch count lies": UNDO_HEADER.pack(1, 0, 0, 3, 0, 1),
    "patch length lies": UNDO_HEADER.pack(1, 0, 0, 1, 0, 1) + struct.pack("<QI", 0, 0xFFFFFFFF),
    "file size": UNDO_HEADER.pack(1, 0, 0, 0, 0, 1 << 63),
    "trailing bytes": UNDO_HEADER.pack(1, 0, 0, 0, 0, 1) + b"x",
    "empty patch": UNDO_HEADER.pack(1, 0, 0, 1, 0, 1) + struct.pack("<QI", 0, 0),
    "patches overlap": UNDO_HEADER.pack(1, 0, 0, 2, 0, 1) + struct.pack("<QI2sQI1s", 0, 2, b"ab", 1, 1, b"c"),
    "patch out of range": UNDO_HEADER.pack(1, 0, 0, 1, 0, 1) + struct.pack("<QI1s", (1 << 64) - 1, 1, b"a"),
    "fact name empty": UNDO_HEADER.pack(1, 0, 1, 0, 0, 1) + b"\0" + bytes(8),
    "fact name not ASCII": UNDO_HEADER.pack(1, 0, 1, 0, 0, 1) + b"\1\xff" + bytes(8),
    "fact twice": UNDO_HEADER.pack(1, 0, 2, 0, 0, 1) + (b"\1a" + bytes(8)) * 2,
    "facts unsorted": UNDO_HEADER.pack(1, 0, 2, 0, 0, 1) + b"\1b" + bytes(8) + b"\1a" + bytes(8),
}


@pytest.mark.parametrize("case", MALFORMED_UNDO)
def test_malformed_undo(case):
    with pytest.raises(GraftFormatError) as caught:
        parse_undo(MALFORMED_UNDO[case], file="x", offset=9)
    assert caught.value.field.startswith("undo")


@given(st.binary(max_size=120))
def test_any_undo(data):
    try:
        undo = parse_undo(data, file="x", offset=0)
    except GraftFormatError:
        return
    assert pack_undo(undo) == data


@given(
    st.integers(0, 1 << 62),
    st.dictionaries(st.text("abc_09", min_size=1, max_size=9), st.integers(-(1 << 63), (1 << 63) - 1), max_size=5),
    st.lists(st.binary(min_size=1, max_size=9), max_size=5),
)
def test_undo_round_trip(size, facts, patches):
    undo = Undo(size, tuple(Patch(number * 10, data) for number, data in enumerate(patches)), facts)
    assert parse_undo(pack_undo(undo), file="x", offset=0) == undo


# --- anything at all ---

GOOD = build_record(with_undo())


@given(st.binary(max_size=400))
def test_any_bytes(data):
    with pytest.raises(GraftFormatError):
        parse(data)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
def test_any_mutation_even_with_a_right_header_digest(changes, reseal):
    data = bytearray(GOOD)
    for position, value in changes:
        data[position] = value
    if reseal:
        table_end = 64 + 96 * 5
        data[32:64] = bytes(32)
        data[32:64] = sha256(bytes(data[:table_end])).digest()
    try:
        record = parse(bytes(data))
        for section in record.sections:
            record.raw(section)
        record.undo()
    except GraftFormatError:
        return
    assert {section.kind for section in record.sections} >= {SectionKind.UNDO}


def test_many_bombs_in_one_record_are_refused_before_any_goes_off():
    stored = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 16))
    bomb = {"kind": 3, "flags": 2, "stored": stored.ljust(70_000, b"\0"), "raw_size": 64 << 20}
    parse(forge([entry(**bomb)] * 16))
    with pytest.raises(GraftFormatError, match="together") as caught:
        parse(forge([entry(**bomb)] * 17))
    assert caught.value.field == "section.raw_size"
