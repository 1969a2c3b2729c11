"""Raw images that look like something else, or claim what is not there."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

from corpus_model import Case, Content, Expect, Fifo, Folder, Link, Sparse, harmless

SECTOR = 512


def _case(name: str, what: str, data: Callable[[], Content], expect: Expect, file: str = "disk.img") -> Case:
    return Case(f"raw/{name}", what, lambda: {file: data()}, expect)


def mbr(*entries: tuple[int, int, int]) -> bytes:
    """A boot record; entries are (type, first sector, sectors)."""
    table = b"".join(
        struct.pack("<BBBBBBBBII", 0, 0, 0, 0, kind, 0, 0, 0, first, count) for kind, first, count in entries
    )
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def gpt(
    *,
    entries: int = 128,
    entry_size: int = 128,
    entries_lba: int = 2,
    alternate: int = 63,
    my_lba: int = 1,
    first: int = 34,
    last: int = 30,
    header_size: int = 92,
    table: bytes = b"",
    crc: int | None = None,
    table_crc: int | None = None,
) -> bytes:
    """A GPT header with sound checksums, after UEFI 2.10, 5.3.2."""
    sum_of_table = zlib.crc32(table.ljust(16384, b"\0")) if table_crc is None else table_crc

    def header(check: int) -> bytes:
        return struct.pack(
            "<8sIIIIQQQQ16sQIII",
            b"EFI PART",
            0x10000,
            header_size,
            check,
            0,
            my_lba,
            alternate,
            first,
            last,
            bytes(range(16)),
            entries_lba,
            entries,
            entry_size,
            sum_of_table,
        )

    return header(zlib.crc32(header(0)) if crc is None else crc).ljust(SECTOR, b"\0")


def disk(*sectors: bytes, size: int = 64 * SECTOR) -> bytes:
    return b"".join(sectors).ljust(size, b"\0")


PROTECTIVE = mbr((0xEE, 1, 0xFFFFFFFF))


def samples() -> dict[str, bytes]:
    """A well-formed image."""
    return {"disk.img": disk(mbr((0x83, 1, 20)))}


def cases() -> Iterator[Case]:
    """All of them."""
    yield _case("empty", "no bytes", lambda: b"", Expect("open", "UnsupportedError", None, "empty"))
    yield _case("one-byte", "one byte", lambda: b"x", harmless())
    yield _case(
        "firmware-name",
        "a firmware image by its name",
        lambda: bytes(4096),
        Expect("open", "UnsupportedError", None, "firmware"),
        "OVMF.fd",
    )
    yield _case(
        "firmware-volume",
        "a firmware image by its signature",
        lambda: bytes(40) + b"_FVH" + bytes(4096),
        Expect("open", "UnsupportedError", None, "firmware"),
    )
    not_file = Expect("open", "FileError", None, "neither a regular file")
    yield _case("fifo", "a named pipe", Fifo, not_file)
    yield _case("folder", "a folder", Folder, not_file)
    yield _case("device", "a character device through a link", lambda: Link("/dev/zero"), not_file)
    yield _case(
        "link-to-nothing", "a dangling link", lambda: Link("gone"), Expect("open", "FileError", None, "cannot be")
    )
    yield _case("link-to-itself", "a link to itself", lambda: Link("disk.img"), Expect("open", "FileError", None, ""))
    yield _case(
        "8-eib", "the largest file there is, all hole", lambda: Sparse((1 << 43) + 5, {1 << 42: b"x"}), harmless()
    )
    yield _case(
        "luks",
        "LUKS",
        lambda: b"LUKS\xba\xbe\0\2".ljust(4096, b"\0"),
        Expect("open", "UnsupportedError", "magic", "LUKS"),
    )
    yield _case("qed", "QED", lambda: b"QED\0".ljust(65536, b"\0"), Expect("open", "UnsupportedError", "magic", "QED"))
    yield _case(
        "qcow-1",
        "the first qcow",
        lambda: b"QFI\xfb\0\0\0\1".ljust(4096, b"\0"),
        Expect("open", "UnsupportedError", "magic", "qcow"),
    )
    for name, alternate in (("0", 0), ("behind", 1 << 40), ("max", (1 << 64) - 1)):
        yield _case(
            f"gpt-alternate-{name}",
            f"a GPT whose other header is at {alternate}",
            lambda alternate=alternate: disk(PROTECTIVE, gpt(alternate=alternate)),
            harmless(),
        )
    yield _case(
        "gpt-entries-2-32", "a GPT of 2^32-1 entries", lambda: disk(PROTECTIVE, gpt(entries=0xFFFFFFFF)), harmless()
    )
    yield _case("gpt-entry-size-0", "entries of no bytes", lambda: disk(PROTECTIVE, gpt(entry_size=0)), harmless())
    yield _case("gpt-entry-2-gib", "entries of 2 GiB", lambda: disk(PROTECTIVE, gpt(entry_size=1 << 31)), harmless())
    yield _case("gpt-table-outside", "a table at 2^63", lambda: disk(PROTECTIVE, gpt(entries_lba=1 << 63)), harmless())
    yield _case(
        "gpt-header-size", "a header of 4 GiB", lambda: disk(PROTECTIVE, gpt(header_size=0xFFFFFFFF)), harmless()
    )
    yield _case("gpt-crc", "a wrong checksum", lambda: disk(PROTECTIVE, gpt(crc=1)), harmless())
    names = struct.pack("<16s16sQQQ", bytes(range(1, 17)), bytes(16), 40, 20, 0) + b"\x00\xd8" * 36
    yield _case(
        "gpt-names",
        "a partition that ends before it begins, named in half surrogates",
        lambda: disk(PROTECTIVE, gpt(table=names), names),
        harmless(),
    )
    yield _case(
        "mbr-outside", "partitions behind the disk", lambda: disk(mbr(*[(0x83, 1 << 31, 0xFFFFFFFF)] * 4)), harmless()
    )
    yield _case("mbr-overlap", "partitions on each other", lambda: disk(mbr(*[(0x83, 0, 64)] * 4)), harmless())
    loop = disk(mbr((5, 1, 60)), mbr((0x83, 1, 1), (5, 0, 60)))
    yield _case("ebr-loop", "an extended partition that is its own next one", lambda: loop, harmless())
    two = disk(mbr((5, 1, 60)), mbr((0x83, 1, 1), (5, 1, 60)), mbr((0x83, 1, 1), (5, 0, 60)))
    yield _case("ebr-circle", "two extended boot records in a circle", lambda: two, harmless())
    many = disk(mbr((5, 1, 9000)), *[mbr((0x83, 1, 1), (5, n, 60)) for n in range(1, 9000)], size=9001 * SECTOR)
    yield _case("ebr-9000", "a chain of 9000 logical partitions", lambda: many, harmless())
    yield _case(
        "ebr-four",
        "an extended record of four extended partitions",
        lambda: disk(mbr((5, 1, 60)), mbr((5, 0, 60), (15, 1, 60), (0x85, 2, 60), (5, 3, 60))),
        harmless(),
    )
