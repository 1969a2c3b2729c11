"""Malformed VHD images; sound ones are laid out after Microsoft's "Virtual Hard Disk Image Format Specification"."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from corpus_model import Case, Content, Expect, Sparse, harmless, poke, refused, unreadable

BLOCK = 1 << 12
BLOCKS = 8
SIZE = BLOCKS * BLOCK
HEADER, TABLE, DATA = 512, 1536, 2048
#: Byte offset and struct code of fields of footer and dynamic header.
FOOTER = {
    "version": (12, ">I"),
    "data_offset": (16, ">Q"),
    "current_size": (48, ">Q"),
    "cylinders": (56, ">H"),
    "heads": (58, ">B"),
    "sectors": (59, ">B"),
    "disk_type": (60, ">I"),
}
DYNAMIC = {"table_offset": (16, ">Q"), "header_version": (24, ">I"), "entries": (28, ">I"), "block_size": (32, ">I")}
UNUSED = 0xFFFFFFFF
UNSUPPORTED = "UnsupportedError"


def _summed(data: bytearray, at: int) -> bytes:
    data[at : at + 4] = bytes(4)
    struct.pack_into(">I", data, at, ~sum(data) & 0xFFFFFFFF)
    return bytes(data)


def footer(creator: bytes = b"win ", **fields: int) -> bytes:
    """A footer with its checksum."""
    data = bytearray(512)
    data[:16] = b"conectix" + struct.pack(">II", 2, 0x10000)
    data[28:32] = creator
    data[36:40] = b"Wi2k"
    data[68:84] = bytes(range(16))
    defaults = {"data_offset": HEADER, "current_size": SIZE, "cylinders": 2, "heads": 4, "sectors": 17, "disk_type": 3}
    for name, value in (defaults | fields).items():
        struct.pack_into(FOOTER[name][1], data, FOOTER[name][0], value)
    struct.pack_into(">Q", data, 40, fields.get("current_size", SIZE))
    return _summed(data, 64)


def dynamic_header(parent: bytes = b"", locators: bytes = b"", checksum: bool = True, **fields: int) -> bytes:
    """A dynamic disk header."""
    data = bytearray(1024)
    data[:16] = b"cxsparse" + b"\xff" * 8
    data[64 : 64 + len(parent)] = parent
    data[576 : 576 + len(locators)] = locators
    defaults = {"table_offset": TABLE, "header_version": 0x10000, "entries": BLOCKS, "block_size": BLOCK}
    for name, value in (defaults | fields).items():
        struct.pack_into(DYNAMIC[name][1], data, DYNAMIC[name][0], value)
    return _summed(data, 36) if checksum else bytes(data)


def image(
    entries: tuple[int, ...] = (4, UNUSED, 13),
    foot: bytes | None = None,
    head: bytes | None = None,
    bitmap: bytes = b"\xff",
    last: bytes | None = None,
) -> bytes:
    """Eight blocks, of which the first and the third are stored."""
    first = footer() if foot is None else foot
    table = struct.pack(f">{len(entries)}I", *entries).ljust(512, b"\xff")
    block = bitmap.ljust(512, b"\0") + bytes(range(256)) * (BLOCK // 256)
    return first + (dynamic_header() if head is None else head) + table + block * 2 + (first if last is None else last)


def fixed(content: bytes = bytes(SIZE), **fields: int) -> bytes:
    """A fixed disk."""
    return content + footer(**{"disk_type": 2, "data_offset": (1 << 64) - 1, **fields})


def samples() -> dict[str, bytes]:
    """A well-formed dynamic disk and a fixed one."""
    return {"disk.vhd": image(), "fixed.vhd": fixed()}


def _case(name: str, what: str, data: Callable[[], Content], expect: Expect) -> Case:
    return Case(f"vhd/{name}", what, lambda: {"disk.vhd": data()}, expect)


def _foot(name: str, what: str, expect: Expect, **fields: int) -> Case:
    return _case(name, what, lambda: image(foot=footer(**fields)), expect)


def _head(name: str, what: str, expect: Expect, **fields: int) -> Case:
    return _case(name, what, lambda: image(head=dynamic_header(**fields)), expect)


def cases() -> Iterator[Case]:
    """All of them."""
    yield _case(
        "checksum",
        "a wrong checksum of the footer",
        lambda: poke(image(), (50, b"\7")),
        refused("checksum", "footer's"),
    )
    yield _case("cut-in-footer", "the file ends in the footer's copy", lambda: image()[:300], refused("footer", "ends"))
    yield _case(
        "cut-in-header", "the file ends in the dynamic header", lambda: image()[:900], refused("data_offset", "")
    )
    yield _case(
        "fixed-checksum",
        "a wrong checksum of a fixed disk",
        lambda: poke(fixed(), (SIZE + 70, b"!")),
        refused("checksum", ""),
    )
    yield _case(
        "fixed-cut",
        "a fixed disk with a sector missing",
        lambda: fixed(bytes(SIZE - 512)),
        refused("current_size", "cut"),
    )
    yield _case(
        "fixed-footer-first",
        "a fixed disk's footer at the beginning",
        lambda: image(foot=footer(disk_type=2)),
        refused("disk_type", "no footer at its beginning"),
    )
    yield _case(
        "copy-lost",
        "a dynamic disk without the copy at the beginning",
        lambda: bytes(512) + image()[512:],
        refused("cookie", "copy at the beginning is missing"),
    )
    yield _case(
        "footers-disagree",
        "two footers of different sizes",
        lambda: image(last=footer(current_size=SIZE - 512)),
        refused("footer", "disagree"),
    )
    yield _foot("version-2", "version 2", refused("footer.version", "2.0", UNSUPPORTED), version=0x20000)
    for kind in (0, 1, 5, UNUSED):
        yield _foot(
            f"type-{kind}", f"disk type {kind}", refused("footer.disk_type", str(kind), UNSUPPORTED), disk_type=kind
        )
    yield _foot(
        "differencing", "a differencing disk", unreadable("footer.disk_type", "parent", UNSUPPORTED), disk_type=4
    )
    yield _case(
        "parent-rubbish",
        "a parent's name of half surrogates and terminal control",
        lambda: image(foot=footer(disk_type=4), head=dynamic_header(parent=b"\xd8\x00\x00\x1b\x00[\x00\n" * 60)),
        unreadable("footer.disk_type", "parent", UNSUPPORTED),
    )
    size = "current_size"
    yield _foot("size-0", "a disk of nothing", refused(size, "0 sectors"), current_size=0)
    yield _foot("size-max", "2^64-1 bytes", refused(size, "allowed"), current_size=(1 << 64) - 1)
    yield _foot("size-over-2-tib", "more than 2040 GiB", refused(size, "allowed"), current_size=3 << 40)
    yield _foot(
        "size-over-blocks",
        "more than the blocks hold",
        refused("max_table_entries", "too few"),
        current_size=SIZE + 512,
    )
    yield _case(
        "geometry-0",
        "a geometry of nothing, from a creator that means it",
        lambda: image(foot=footer(b"vpc ", cylinders=0)),
        refused("geometry", "0 sectors"),
    )
    where = "data_offset"
    yield _foot("header-at-0", "the dynamic header on the footer", refused(where, ""), data_offset=0)
    yield _foot("header-unaligned", "the dynamic header at 513", refused(where, ""), data_offset=513)
    yield _foot("header-behind", "the dynamic header at 2^62", refused(where, ""), data_offset=1 << 62)
    yield _foot("header-max", "the dynamic header at 2^64-1", refused(where, ""), data_offset=(1 << 64) - 1)
    yield _case(
        "header-cookie",
        "no dynamic header there",
        lambda: poke(image(), (HEADER, b"nothing!")),
        refused("dynamic header", ""),
    )
    yield _head(
        "header-version",
        "dynamic header version 9",
        refused("header_version", "9.0", UNSUPPORTED),
        header_version=9 << 16,
    )
    for block in (0, 512, 5000, (1 << 31) + 512):
        yield _head(f"block-{block}", f"blocks of {block} bytes", refused("block_size", f"{block}"), block_size=block)
    yield _head("entries-0", "no blocks", refused("max_table_entries", "too few"), entries=0)
    yield _head("entries-max", "2^32-1 blocks", refused("max_table_entries", "at most", UNSUPPORTED), entries=UNUSED)
    where = "table_offset"
    yield _head("table-behind", "a table behind the file", refused(where, ""), table_offset=1 << 50)
    yield _head("table-wraps", "a table at 2^64-512", refused(where, ""), table_offset=(1 << 64) - 512)
    yield _head("table-unaligned", "a table at 1537", refused(where, ""), table_offset=1537)
    yield _head("table-on-header", "a table on the dynamic header", refused(where, "on a header"), table_offset=1024)
    yield _head("table-longer", "a table that runs out of the file", refused(where, "not in the file"), entries=1 << 20)
    entry = "block allocation table"
    for name, entries, what in (
        ("behind", (4, 1 << 20), "behind the end"),
        ("max", (UNUSED - 1,), "behind the end"),
        ("on-footer", (0,), "metadata"),
        ("on-table", (3,), "metadata"),
        ("twice", (4, 4), "overlaps"),
        ("half-over", (4, 8), "overlaps"),
    ):
        yield _case(
            f"entry-{name}", f"a block that {name}", lambda entries=entries: image(entries), unreadable(entry, what)
        )
    yield _case(
        "bitmap",
        "bytes in a sector that the bitmap calls never written",
        lambda: image(bitmap=b"\x7f"),
        unreadable("sector bitmap", "never written"),
    )
    wide = footer(current_size=1 << 31) + dynamic_header(entries=1, block_size=1 << 31)
    table = struct.pack(">I", 4).ljust(512, b"\xff")
    yield _case(
        "bitmap-of-2-gib",
        "a block of 2 GiB whose bitmap has every other bit, and a byte where it has none",
        lambda: Sparse(
            DATA + (512 << 10) + (1 << 31), {0: wide + table + b"\x55" * (512 << 10), DATA + (512 << 10): b"x"}
        ),
        unreadable("sector bitmap", "sector 0 was never written"),
    )
    yield _case("footer-missing", "no footer at the end", lambda: image()[:-512], harmless("missing"))
    locators = struct.pack(">4sIIIQ", b"Wi2k", UNUSED, UNUSED, 0, (1 << 64) - 8) * 7
    yield _case(
        "locators-astray",
        "parent locators that point to 2^64",
        lambda: image(head=dynamic_header(locators=locators)),
        harmless(),
    )
    count = 1 << 22
    big = footer(current_size=count * (512 << 10) - (1 << 40))
    head = dynamic_header(entries=count, block_size=512 << 10)
    yield _case(
        "table-of-zeros",
        "a table of 16 MiB in a hole: every block is the footer",
        lambda: Sparse(TABLE + 4 * count + 512, {0: big + head, TABLE + 4 * count: big}),
        unreadable(entry, "metadata"),
    )
