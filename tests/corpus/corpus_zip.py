"""Malformed ZIP archives; sound ones are laid out after PKWARE's APPNOTE.TXT."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

import corpus_graft as lay
from corpus_model import Case, Content, Expect, Sparse, graft, harmless, poke, refused

NAME, DATA = b"hello.txt", b"hello, world\n"
MARK16, MARK32 = 0xFFFF, 0xFFFFFFFF
MAX64 = (1 << 64) - 1
UNSUPPORTED = "UnsupportedError"


def local() -> bytes:
    """One stored entry."""
    return (
        struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(DATA), len(DATA), len(DATA), len(NAME), 0)
        + NAME
        + DATA
    )


def entry(name: bytes = NAME, extra: bytes = b"", offset: int = 0, disk: int = 0, size: int = len(DATA)) -> bytes:
    """A central directory header."""
    head = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        b"PK\1\2",
        20,
        20,
        0,
        0,
        0,
        33,
        zlib.crc32(DATA),
        size,
        size,
        len(name),
        len(extra),
        0,
        disk,
        0,
        0,
        offset,
    )
    return head + name + extra


def end(
    size: int,
    offset: int,
    *,
    entries: int = 1,
    here: int | None = None,
    disk: int = 0,
    comment: bytes = b"",
    comment_size: int | None = None,
) -> bytes:
    return (
        struct.pack(
            "<4sHHHHIIH",
            b"PK\5\6",
            disk,
            0,
            entries if here is None else here,
            entries,
            size,
            offset,
            len(comment) if comment_size is None else comment_size,
        )
        + comment
    )


def end64(size: int, offset: int, *, entries: int = 1, length: int = 44, disk: int = 0) -> bytes:
    return struct.pack("<4sQHHIIQQQQ", b"PK\6\6", length, 45, 45, disk, 0, entries, entries, size, offset)


def locator64(offset: int, disks: int = 1) -> bytes:
    return struct.pack("<4sIQI", b"PK\6\7", 0, offset, disks)


LOCAL = local()
ENTRY = entry()
DIRECTORY = len(LOCAL)
BEHIND = DIRECTORY + len(ENTRY)


def image(tail: bytes | None = None, directory: bytes = ENTRY) -> bytes:
    return LOCAL + directory + (end(len(directory), DIRECTORY) if tail is None else tail)


def zip64(record: bytes | None = None, locator: bytes | None = None, last: bytes | None = None) -> bytes:
    return (
        LOCAL
        + ENTRY
        + (end64(len(ENTRY), DIRECTORY) if record is None else record)
        + (locator64(BEHIND) if locator is None else locator)
        + (end(MARK32, MARK32, entries=MARK16) if last is None else last)
    )


def samples() -> dict[str, bytes]:
    """Well-formed archives."""
    return {"a.zip": image(), "b.zip": zip64()}


def _case(name: str, what: str, data: Callable[[], Content], expect: Expect) -> Case:
    return Case(f"zip/{name}", what, lambda: {"a.zip": data()}, expect)


def _tail(name: str, what: str, expect: Expect, tail: bytes, directory: bytes = ENTRY) -> Case:
    return _case(name, what, lambda: image(tail, directory), expect)


def ends() -> Iterator[Case]:
    """End records and ZIP64."""
    lost = refused("end record", "no end of central directory")
    yield _case("no-end", "an entry and no more", lambda: LOCAL, lost)
    yield _case("cut", "the last byte is missing", lambda: image()[:-1], lost)
    yield _case("appended", "a byte behind the end", lambda: image() + b"x", lost)
    yield _tail("comment-too-long", "a comment that is not there", lost, end(len(ENTRY), DIRECTORY, comment_size=500))
    inner = end(len(ENTRY), DIRECTORY)
    two = refused("comment", "second end of central directory")
    yield _tail("two-ends", "an end record in the comment", two, end(len(ENTRY), DIRECTORY, comment=b"x" * 9 + inner))
    yield _tail(
        "two-sound-ends",
        "two end records that both end with the file",
        two,
        end(len(ENTRY), DIRECTORY, comment=end(0, 0, entries=0)),
    )
    yield _tail("3000-ends", "a comment of 3000 signatures", two, end(len(ENTRY), DIRECTORY, comment=b"PK\5\6" * 3000))
    split = refused("disk number", "several files", UNSUPPORTED)
    yield _tail("disk-1", "the second of two disks", split, end(len(ENTRY), DIRECTORY, disk=1))
    yield _tail("entries-elsewhere", "entries on other disks", split, end(len(ENTRY), DIRECTORY, here=0))
    yield _tail(
        "directory-longer", "a directory longer than the file", refused("directory_size", ""), end(1 << 30, DIRECTORY)
    )
    yield _tail(
        "directory-4-gib", "a directory of 4 GiB - 2", refused("directory_size", ""), end(MARK32 - 1, DIRECTORY)
    )
    yield _tail(
        "directory-elsewhere",
        "a directory that begins elsewhere",
        refused("directory_offset", ""),
        end(len(ENTRY), DIRECTORY + 9),
    )
    yield _tail(
        "directory-shorter",
        "a directory without its first bytes",
        refused("entries", ""),
        end(len(ENTRY) - 10, DIRECTORY + 10),
    )
    yield _tail(
        "entries-65534",
        "65534 entries in 60 bytes",
        refused("entries", "does not hold"),
        end(len(ENTRY), DIRECTORY, entries=65534),
    )
    yield _tail(
        "entries-0",
        "no entries in 60 bytes",
        refused("entries", "does not hold"),
        end(len(ENTRY), DIRECTORY, entries=0),
    )
    yield _tail(
        "zip64-missing", "marks without a ZIP64 record", refused("directory_offset", "not there"), end(MARK32, MARK32)
    )
    yield _case(
        "no-directory",
        "no directory where it should be",
        lambda: poke(image(), (DIRECTORY, b"XX")),
        refused("central directory", "ends where"),
    )
    yield _case(
        "two-directories",
        "two central directories",
        lambda: LOCAL + ENTRY + ENTRY + end(len(ENTRY), DIRECTORY),
        refused("central directory", "two"),
    )


def zip64s() -> Iterator[Case]:
    """ZIP64 records that contradict."""

    def case(name: str, what: str, expect: Expect, **parts: bytes) -> Case:
        return _case(f"zip64-{name}", what, lambda: zip64(**parts), expect)

    place = "zip64_locator.offset"
    yield case(
        "locator-astray", "a locator that points elsewhere", refused(place, "its locator says"), locator=locator64(7)
    )
    yield case("locator-max", "a locator of 2^64-1", refused(place, ""), locator=locator64(MAX64))
    yield case(
        "length-short",
        "a record that ends early",
        refused(place, "no ZIP64"),
        record=end64(len(ENTRY), DIRECTORY, length=43),
    )
    yield case(
        "length-max",
        "a record of 2^64-1 bytes",
        refused(place, "no ZIP64"),
        record=end64(len(ENTRY), DIRECTORY, length=MAX64),
    )
    yield case("no-record", "a locator and no record", refused(place, "no ZIP64"), record=bytes(56))
    yield case("disks", "an archive of 7 disks", refused("disk number", "", UNSUPPORTED), locator=locator64(BEHIND, 7))
    yield case(
        "on-disk-1",
        "a record on disk 1",
        refused("disk number", "", UNSUPPORTED),
        record=end64(len(ENTRY), DIRECTORY, disk=1),
    )
    differ = "programs see different archives"
    yield case("entries", "another number of entries", refused("entries", differ), last=end(MARK32, MARK32, entries=2))
    yield case("size", "another size", refused("directory_size", differ), last=end(7, MARK32, entries=MARK16))
    yield case("offset", "another offset", refused("directory_offset", differ), last=end(MARK32, 7, entries=MARK16))
    yield case(
        "entries-max",
        "2^64-1 entries",
        refused("entries", "does not hold"),
        record=end64(len(ENTRY), DIRECTORY, entries=MAX64),
    )
    yield case("size-max", "a directory of 2^64-1 bytes", refused("directory_size", ""), record=end64(MAX64, DIRECTORY))
    yield case("offset-max", "a directory at 2^64-1", refused("directory_offset", ""), record=end64(len(ENTRY), MAX64))


def directories() -> Iterator[Case]:
    """Central directories: only attach walks them, and refuses."""

    def case(name: str, what: str, directory: bytes, entries: int = 1) -> Case:
        return _tail(f"entry-{name}", what, harmless(), end(len(directory), DIRECTORY, entries=entries), directory)

    yield case("behind", "an entry behind the directory", entry(offset=1 << 30))
    yield case("disk-9", "an entry on another disk", entry(disk=9))
    yield case("name-longer", "a name longer than the directory", poke(ENTRY, (28, b"\xff\xff")))
    yield case("extra-empty", "marks for ZIP64 and no extra field", entry(size=MARK32, offset=MARK32))
    yield case(
        "extra-cut", "a ZIP64 extra field of 3 bytes", entry(extra=struct.pack("<HH", 1, 3) + b"abc", offset=MARK32)
    )
    yield case("extra-loop", "extra fields of no length", entry(extra=bytes(4) * 5000, offset=MARK32))
    yield case("name-rubbish", "a name of rubbish and terminal control", entry(name=b"../../\x1b[2J\xff\xfe\0\n"))
    yield case("second-is-none", "a second entry that is none", ENTRY + b"\0" * len(ENTRY), 2)
    many = ENTRY[:28] + bytes(18)
    yield case("60000", "60000 entries of no name", many * 60000, 60000)
    yield _case(
        "8-gib-of-hole",
        "8 GiB of hole before the directory",
        lambda: Sparse(
            (8 << 30) + len(ENTRY) + 98,
            {
                0: LOCAL,
                8 << 30: ENTRY
                + end64(len(ENTRY), 8 << 30)
                + locator64((8 << 30) + len(ENTRY))
                + end(MARK32, MARK32, entries=MARK16),
            },
        ),
        harmless(),
    )


def grafts() -> Iterator[Case]:
    """Locators that lie, right before the directory."""
    record = lay.record([lay.Part(lay.UNDO, lay.undo(BEHIND + 22)), lay.ENVELOPE_PART])

    def case(name: str, what: str, **lies: object) -> Case:
        fields = {"offset": 512, "file_size": BEHIND + 22} | lies
        front = image().ljust(512, b"\0") + record.ljust(512, b"\0") + lay.locator(record, **fields)  # type: ignore[arg-type]
        data = front + ENTRY + end(len(ENTRY), len(front))
        return _case(f"locator-{name}", what, lambda: data, graft("damaged"))

    yield case("check", "a wrong digest", check=bytes(8))
    yield case("file-0", "an original of nothing", file_size=0)
    yield case("file-2-62", "an original of 2^62 bytes", file_size=1 << 62)
    yield case("1-gib", "a record of 1 GiB", size=1 << 30)
    yield case("into-entries", "a record in the entries", offset=0)
    yield case("flags", "unknown flags", flags=77)


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (ends, zip64s, directories, grafts):
        yield from group()
