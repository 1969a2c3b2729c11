"""Malformed VMDK images; a sound one is laid out after VMware's "Virtual Disk Format 5.0"."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

import corpus_graft as lay
from corpus_model import Case, Content, Expect, Sparse, graft, harmless, poke, refused, unreadable

SECTOR = 512
GRAIN = 8
CAPACITY = 64
#: Sectors: descriptor, redundant and first grain directory with their tables, first grain.
DESCRIPTOR, RGD, RGT, GD, GT, OVERHEAD = 1, 3, 4, 8, 9, 16
FIELDS = {
    "version": (4, "<I"),
    "flags": (8, "<I"),
    "capacity": (12, "<Q"),
    "grain_size": (20, "<Q"),
    "descriptor_offset": (28, "<Q"),
    "descriptor_size": (36, "<Q"),
    "gtes_per_gt": (44, "<I"),
    "rgd_offset": (48, "<Q"),
    "gd_offset": (56, "<Q"),
    "overhead": (64, "<Q"),
    "unclean_shutdown": (72, "<B"),
    "compression": (77, "<H"),
}
MAX64 = (1 << 64) - 1
UNSUPPORTED = "UnsupportedError"


def descriptor(
    kind: bytes = b"monolithicSparse",
    extent: bytes = b'RW 64 SPARSE "disk.vmdk"',
    parent: bytes = b"ffffffff",
    more: bytes = b"",
    title: bytes = b"# Disk DescriptorFile",
) -> bytes:
    return title + b'\nversion=1\nCID=12345678\nparentCID=%s\ncreateType="%s"\n\n%s\n\n%s' % (
        parent,
        kind,
        extent,
        more,
    )


def image(text: bytes | None = None, grains: tuple[int, ...] = (OVERHEAD, 0, OVERHEAD + GRAIN), **fields: int) -> bytes:
    """Eight grains of 4 KiB, of which the first and the third are stored."""
    data = bytearray((OVERHEAD + 2 * GRAIN) * SECTOR)
    data[:4] = b"KDMV"
    defaults = {
        "version": 1,
        "flags": 3,
        "capacity": CAPACITY,
        "grain_size": GRAIN,
        "descriptor_offset": DESCRIPTOR,
        "descriptor_size": 2,
        "gtes_per_gt": 512,
        "rgd_offset": RGD,
        "gd_offset": GD,
        "overhead": OVERHEAD,
    }
    for name, value in (defaults | fields).items():
        struct.pack_into(FIELDS[name][1], data, FIELDS[name][0], value)
    data[73:77] = b"\n \r\n"
    body = descriptor() if text is None else text
    data[SECTOR : SECTOR + len(body)] = body
    for directory, table in ((RGD, RGT), (GD, GT)):
        struct.pack_into("<I", data, directory * SECTOR, table)
        struct.pack_into(f"<{len(grains)}I", data, table * SECTOR, *grains)
    data[OVERHEAD * SECTOR :] = bytes(range(256)) * (2 * GRAIN * SECTOR // 256)
    return bytes(data)


def stream(packed: bytes | None = None, lba: int = 0, size: int | None = None, **fields: int) -> bytes:
    """A streamOptimized image with one grain; the tables stand at the beginning."""
    text = descriptor(b"streamOptimized")
    data = bytearray(image(text, (OVERHEAD,), **{"version": 3, "flags": 0x30003, "compression": 1} | fields))
    body = zlib.compress(bytes(range(256)) * 16) if packed is None else packed
    marker = struct.pack("<QI", lba, len(body) if size is None else size) + body
    data[OVERHEAD * SECTOR :] = marker.ljust(2 * GRAIN * SECTOR, b"\0")
    return bytes(data)


def samples() -> dict[str, bytes]:
    """Well-formed images."""
    return {"disk.vmdk": image(), "stream.vmdk": stream()}


def _case(name: str, what: str, data: Callable[[], Content], expect: Expect) -> Case:
    return Case(f"vmdk/{name}", what, lambda: {"disk.vmdk": data()}, expect)


def _field(name: str, what: str, expect: Expect, **fields: int) -> Case:
    return _case(name, what, lambda: image(**fields), expect)


def _text(name: str, what: str, expect: Expect, text: bytes) -> Case:
    return _case(f"text-{name}", what, lambda: image(text), expect)


def headers() -> Iterator[Case]:
    """The sparse extent header."""
    yield _case("cut-in-header", "the file ends in the header", lambda: image()[:60], refused("VMDK header", ""))
    yield _case("cut-in-sector", "the header and no more", lambda: image()[:400], refused("VMDK header", "ends inside"))
    yield _field("version-4", "version 4", refused("version", "version 4", UNSUPPORTED), version=4)
    yield _field("flags", "unknown flags", refused("flags", "0x100", UNSUPPORTED), flags=0x103)
    yield _case("as-text", "a transfer as text", lambda: poke(image(), (75, b"\n\n")), refused("newlines", "transfer"))
    yield _field("compression-7", "compression 7", refused("compression", "method 7", UNSUPPORTED), compression=7)
    yield _field(
        "compression-without-flag", "deflate without its flag", refused("compression", "contradicts"), compression=1
    )
    yield _field("markers-only", "markers without compression", refused("flags", "", UNSUPPORTED), flags=0x20003)
    yield _field("capacity-0", "a descriptor only", refused("capacity", "descriptor only", UNSUPPORTED), capacity=0)
    yield _field("capacity-max", "2^64-1 sectors", refused("capacity", "need over"), capacity=MAX64)
    for size in (0, 1, 7, 12, 1 << 16, MAX64):
        yield _field(
            f"grain-{size}", f"grains of {size} sectors", refused("grain_size", f"grains of {size}"), grain_size=size
        )
    yield _field("gtes-0", "tables of no entries", refused("gtes_per_gt", "", UNSUPPORTED), gtes_per_gt=0)
    yield _field(
        "gtes-max", "tables of 2^32-1 entries", refused("gtes_per_gt", "", UNSUPPORTED), gtes_per_gt=0xFFFFFFFF
    )
    yield _field(
        "no-descriptor",
        "an extent of a split image",
        refused("descriptor_offset", "", UNSUPPORTED),
        descriptor_offset=0,
    )
    yield _field(
        "descriptor-huge",
        "a descriptor of 2^63 sectors",
        refused("descriptor_size", "at most"),
        descriptor_size=1 << 63,
    )
    yield _field("descriptor-behind", "a descriptor behind the file", refused(None, ""), descriptor_offset=1 << 40)
    yield _field("descriptor-negative", "a descriptor at -1", refused(None, ""), descriptor_offset=MAX64)
    yield _field("overhead-0", "no metadata", refused("overhead", ""), overhead=0)
    yield _field("overhead-max", "2^64-1 sectors of metadata", refused("overhead", ""), overhead=MAX64)
    yield _field("gd-on-header", "a directory on the header", refused(None, "used twice"), gd_offset=0)
    yield _field("gd-on-descriptor", "a directory on the descriptor", refused(None, "used twice"), gd_offset=DESCRIPTOR)
    yield _field("gd-behind", "a directory at 2^50", refused("gd_offset", "behind the file"), gd_offset=1 << 50)
    yield _field("gd-twice", "both directories in one place", refused(None, "used twice"), rgd_offset=GD)
    yield _field("gd-at-end", "a footer that is not there", refused("footer", ""), gd_offset=MAX64)
    yield _case(
        "footer-of-itself",
        "a footer that refers to a footer",
        lambda: _with_footer(image(gd_offset=MAX64)[:SECTOR]),
        refused("gd_offset", ""),
    )
    yield _case(
        "footer-disagrees",
        "a footer of another size",
        lambda: _with_footer(image(capacity=CAPACITY - 8)[:SECTOR]),
        refused("capacity", "the footer says"),
    )
    yield _field("unclean", "not closed", unreadable("unclean_shutdown", "not closed", UNSUPPORTED), unclean_shutdown=1)


def _with_footer(footer: bytes) -> bytes:
    marker = struct.pack("<QII", 1, 0, 3).ljust(SECTOR, b"\0")
    return image(gd_offset=MAX64) + marker + footer + bytes(SECTOR)


def descriptors() -> Iterator[Case]:
    """The embedded text."""
    yield _text("empty", "no text", refused("descriptor", ""), b"\0" * 900)
    yield _text("title", "another first line", refused("descriptor", ""), descriptor(title=b"# Disk Description"))
    yield _text("binary", "bytes that are no text", refused("descriptor", ""), bytes(range(128, 256)) * 4)
    lines = descriptor(more=b"\n" * 700)
    yield _case(
        "text-5000-lines", "5000 lines", lambda: _long(descriptor(more=b"a=1\n" * 5000)), refused("descriptor", "lines")
    )
    yield _text("700-lines", "700 empty lines", harmless(), lines)
    yield _text("cid-twice", "a CID twice", refused("CID", "twice"), descriptor(more=b"CID=1\n"))
    yield _text(
        "cid-rubbish",
        "a CID that is none",
        refused("CID", "hexadecimal"),
        descriptor().replace(b"12345678", b"xyzxyzxy"),
    )
    yield _text(
        "version-9", "version 9", refused("version", "", UNSUPPORTED), descriptor().replace(b"version=1", b"version=9")
    )
    for kind in (b"monolithicFlat", b"twoGbMaxExtentSparse", b"vmfs", b"fullDevice", b"\x1b[2J\xff"):
        yield _text(
            f"type-{kind.decode('ascii', 'replace').strip(chr(27)).strip('[').replace(chr(0xFFFD), '')}",
            "content in other files",
            refused("createType", "", UNSUPPORTED),
            descriptor(kind),
        )
    field = "extent"
    for name, line, message in (
        ("none", b"", "0 lines"),
        ("two", b'RW 64 SPARSE "a"\nRW 64 SPARSE "b"', "2 lines"),
        ("words", b"RW many SPARSE", "no extent"),
        ("size", b'RW 63 SPARSE "disk.vmdk"', "the header says 64"),
        ("huge", b'RW 9999999999999999999 SPARSE "x"', "9999"),
        ("absolute", b'RW 64 SPARSE "/etc/passwd"', "leads away"),
        ("parent", b'RW 64 SPARSE ".."', "leads away"),
        ("windows", b'RW 64 SPARSE "C:\\\\x"', "leads away"),
        ("url", b'RW 64 SPARSE "http://x"', "leads away"),
        ("digits", b"RW " + b"9" * 300 + b' SPARSE "x"', "no extent"),
    ):
        yield _text(f"extent-{name}", f"an extent line: {name}", refused(field, message), descriptor(extent=line))
    yield _text("extent-flat", "a flat extent", refused(field, "", UNSUPPORTED), descriptor(extent=b'RW 64 FLAT "x" 0'))
    parent = unreadable("parentCID", "delta disk", UNSUPPORTED)
    yield _text(
        "parent", "a delta disk", parent, descriptor(parent=b"1234abcd", more=b'parentFileNameHint="/etc/passwd"\n')
    )
    locator = lay.locator(bytes(300), offset=600, file_size=len(image()))
    for name, value, state in (
        ("rubbish", b"zz" * 40, "damaged"),
        ("odd", b"123", "damaged"),
        ("short", locator.hex().encode()[:-2], "damaged"),
        ("check", (locator[:-1] + b"!").hex().encode(), "damaged"),
        ("elsewhere", locator.hex().encode(), "damaged"),
    ):
        yield _text(
            f"line-{name}",
            f"a line of ours: {name}",
            graft(state),
            descriptor(more=b'ddb.vmgraft = "' + value + b'"\n'),
        )
    twice = b'ddb.vmgraft = "' + locator.hex().encode() + b'"\n'
    yield _text("line-twice", "two lines of ours", graft("damaged"), descriptor(more=twice * 2))


def _long(text: bytes) -> bytes:
    """The image with a descriptor of many sectors, everything else moved behind it."""
    sectors = -(-len(text) // SECTOR)
    data = bytearray(
        image(descriptor_offset=OVERHEAD, descriptor_size=sectors, overhead=OVERHEAD + sectors)[: OVERHEAD * SECTOR]
    )
    data[GT * SECTOR : GT * SECTOR + 12] = bytes(12)
    return bytes(data) + text.ljust(sectors * SECTOR, b"\0")


def tables() -> Iterator[Case]:
    """Grain directories, grain tables and compressed grains."""
    directory, table = "grain directory", "grain table"
    gd = GD * SECTOR

    def entry(name: str, what: str, value: int, message: str) -> Case:
        return _case(name, what, lambda: poke(image(), (gd, struct.pack("<I", value))), unreadable(directory, message))

    yield entry("gt-behind", "a grain table behind the file", 1 << 20, "behind the end")
    yield entry("gt-max", "a grain table at 2^32-1", 0xFFFFFFFF, "behind the end")
    yield entry("gt-on-descriptor", "a grain table on the descriptor", DESCRIPTOR, "other metadata")
    yield entry("gt-shared", "one grain table for both directories", RGT, "other metadata")

    def grain(name: str, what: str, message: str, *grains: int) -> Case:
        return _case(name, what, lambda: image(grains=grains), unreadable(table, message))

    yield grain("grain-in-metadata", "a grain in the metadata", "metadata", GT)
    yield grain("grain-behind", "a grain behind the file", "behind the end", 1 << 20)
    yield grain("grain-max", "a grain at 2^32-1", "behind the end", 0xFFFFFFFF)
    yield grain("grain-twice", "a grain used twice", "used twice", OVERHEAD, OVERHEAD)
    yield grain("grain-half-over", "grains that overlap", "used twice", OVERHEAD, OVERHEAD + 4)
    yield grain("grain-1-not-zeroed", "grain 1 without the flag for zeros", "metadata", 1)
    lba = unreadable("grain.lba", "the marker says")
    yield _case("marker-lba", "a marker of another grain", lambda: stream(lba=8), lba)
    size = "grain.size"
    yield _case("marker-0", "a marker of no bytes", lambda: stream(size=0), unreadable(size, "0 compressed"))
    yield _case("marker-max", "a marker of 4 GiB", lambda: stream(size=0xFFFFFFFF), unreadable(size, "4294967295"))
    data = "grain.data"
    yield _case(
        "packed-garbage", "a grain that is no deflate", lambda: stream(b"garbage" * 9), unreadable(data, "inflated")
    )
    yield _case("packed-cut", "half a grain", lambda: stream(zlib.compress(bytes(4096))[:12]), unreadable(data, ""))
    yield _case(
        "packed-short",
        "a grain that yields 100 bytes",
        lambda: stream(zlib.compress(bytes(100))),
        unreadable(data, "100 bytes"),
    )
    bomb = zlib.compress(bytes(8 << 20))
    yield _case(
        "packed-bomb",
        "8 MiB of zeros in a grain of 4 KiB",
        lambda: stream(bomb),
        unreadable(data, "") if len(bomb) <= 8192 else unreadable(size, ""),
    )
    count = 1 << 21
    big = image(
        descriptor().replace(b"RW 64", b"RW %d" % (count * 4096)),
        capacity=count * 4096,
        flags=1,
        gd_offset=OVERHEAD,
        overhead=OVERHEAD + count * 4 // SECTOR,
    )[: OVERHEAD * SECTOR]
    yield _case(
        "4-tib-of-hole",
        "a directory of 8 MiB, all of it a hole",
        lambda: Sparse(OVERHEAD * SECTOR + 4 * count, {0: big}),
        harmless(),
    )
    yield _case(
        "directory-rubbish",
        "a directory of 8 MiB whose last table is astray",
        lambda: Sparse(OVERHEAD * SECTOR + 4 * count, {0: big, OVERHEAD * SECTOR + 4 * count - 4: b"\xff" * 4}),
        unreadable(directory, "behind the end"),
    )


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (headers, descriptors, tables):
        yield from group()
