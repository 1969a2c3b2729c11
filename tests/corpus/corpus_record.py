"""Malformed records, undos and locators, each in an otherwise sound raw trailer or sidecar."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import corpus_graft as lay
from corpus_graft import CRITICAL, ENVELOPE_PART, MANIFEST_PART, SIDECAR, UNDO, ZSTD, Part
from corpus_model import Case, Content, Expect, Fifo, Folder, Link, Sparse, graft, poke

DISK = bytes(range(256)) * 50
SIZE = len(DISK)
HEAD = -(-SIZE // 4096) * 4096
UNDO_PART = Part(UNDO, lay.undo(SIZE))
PARTS = (UNDO_PART, ENVELOPE_PART, MANIFEST_PART)
RECORD_SIZE = len(lay.record(PARTS))


def trailer(record: bytes, head: bytes | None = None, tail: bytes | None = None) -> bytes:
    """A raw image with a trailer around ``record``."""
    sound = lay.locator(record, offset=HEAD + 128, file_size=SIZE)
    first, last = sound if head is None else head, sound if tail is None else tail
    end = -(-(HEAD + 128 + len(record) + 20480) // 4096) * 4096
    body = DISK.ljust(HEAD, b"\0") + first + record
    return body.ljust(end - 128, b"\0") + last


def sidecar(record: bytes, **lies: object) -> bytes:
    """A sidecar of a raw image."""
    return lay.locator(record, flags=SIDECAR, file_size=SIZE, **lies) + record  # type: ignore[arg-type]


def _record(name: str, what: str, make: Callable[[], bytes], problem: str) -> Case:
    """A record whose own digest in the locator is right: only the record is to blame."""
    return Case(f"record/{name}", what, lambda: {"disk.img": trailer(make())}, graft("ok", "", problem))


def _head(name: str, what: str, problem: str, **lies: object) -> Case:
    return _record(name, what, lambda: lay.record(PARTS, **lies), problem)  # type: ignore[arg-type]


def _part(name: str, what: str, problem: str, **lies: object) -> Case:
    return _record(name, what, lambda: lay.record([UNDO_PART, ENVELOPE_PART.but(**lies), MANIFEST_PART]), problem)


def records() -> Iterator[Case]:
    """Header and section table."""
    yield _record("not-a-record", "500 other bytes", lambda: b"R" * 500, "record.magic")
    yield _record("magic-only", "the magic and zeros", lambda: lay.MAGIC.ljust(64, b"\0"), "version 0.0")
    yield _head("magic-broken", "another magic", "record.magic", magic=b"VMGRAFT\1")
    yield _head("major-2", "format version 2.0", "version 2.0", major=2)
    yield _head("major-0", "format version 0.9", "version 0.9", major=0, minor=9)
    yield _head("header-63", "a header of 63 bytes", "header size 63", header_size=63, record_size=RECORD_SIZE)
    yield _head("header-80-in-1.0", "a longer header in version 1.0", "does not fit version 1.0", header_size=80)
    yield _head(
        "header-4-gib", "a header of 4 GiB", "outside the limits", header_size=0xFFFFFFFF, record_size=RECORD_SIZE
    )
    yield _head("header-past-4096", "a header of 4104 bytes", "outside the limits", header_size=4104, minor=1)
    yield _head("size-too-large", "a record size beyond what is there", "does not match", record_size=1 << 20)
    yield _head("size-2-gib", "a record of 2 GiB", "does not match", record_size=2 << 30)
    yield _head("size-0", "a record of nothing", "does not match", record_size=0)
    yield _head("flags", "unknown flags", "unknown record flags 0x80000000", flags=1 << 31)
    yield _head("count-0", "no sections", "0 sections", count=0)
    yield _head("count-257", "257 sections", "257 sections", count=257)
    yield _head("count-2-32", "4294967295 sections", "4294967295 sections", count=0xFFFFFFFF)
    yield _head("count-256", "a table that does not fit", "does not fit into the record", count=256)
    yield _head("digest", "a wrong digest of header and table", "do not match their digest", table_sha256=bytes(32))
    yield _head("bytes-behind", "bytes behind the last section", "the sections end at", tail=b"more")
    yield _part("kind-unknown", "an unknown critical section", "critical section of unknown kind 99", kind=99)
    yield _part("kind-max", "kind 2^32-1", "unknown kind 4294967295", kind=0xFFFFFFFF)
    yield _part("section-flags", "unknown section flags", "unknown section flags 0x11", flags=17)
    yield _part("offset-0", "a section on the header", "not at", offset=0)
    yield _part("offset-gap", "a gap before a section", "not at", offset=800)
    yield _part("offset-2-63", "a section at 2^63", "not at", offset=1 << 63)
    yield _part("offset-negative", "a section at -1", "not at", offset=-1)
    yield _part("stored-too-long", "a section longer than the record", "beyond the record", stored_size=1 << 40)
    yield _part("stored-negative", "a stored size of -8", "beyond the record", stored_size=-8)
    yield _part("raw-65-mib", "a raw size over 64 MiB", "is over 67108864", flags=CRITICAL | ZSTD, raw_size=65 << 20)
    yield _part("raw-max", "a raw size of 2^64-1", "is over 67108864", flags=CRITICAL | ZSTD, raw_size=-1)
    yield _part("raw-differs", "sizes that differ without compression", "uncompressed section differ", raw_size=7)
    ratio = "is over 1000 times the stored size"
    yield _part("ratio", "one byte that claims 1001", ratio, data=b"x", flags=CRITICAL | ZSTD, raw_size=1001)
    yield _part("ratio-0", "no byte that claims one", ratio, data=b"", flags=CRITICAL | ZSTD, raw_size=1)
    yield _record("two-undos", "two UNDO sections", lambda: lay.record([UNDO_PART, *PARTS]), "2 UNDO sections")
    many = [UNDO_PART, ENVELOPE_PART, *(Part(lay.MANIFEST, bytes([n])) for n in range(65))]
    yield _record("65-manifests", "65 extensions", lambda: lay.record(many), "65 extensions")
    yield _total()


def _total() -> Case:
    """Seventeen sections within their limits, too much in all; only a sidecar has the room for it."""
    big = Part(lay.MODULE, bytes(68000), CRITICAL | ZSTD, raw_size=64 << 20)
    return Case(
        "record/total-over-1-gib",
        "17 sections of 64 MiB each, compressed a thousandfold",
        lambda: {"disk.img": DISK, "disk.img.vmgraft": sidecar(lay.record([UNDO_PART, *[big] * 17]))},
        graft("ok", "", "all sections together"),
    )


def sections() -> Iterator[Case]:
    """What the sections hold."""
    frame = b"\x28\xb5\x2f\xfd"
    packed = "section.zstd"
    yield _hints(
        "stored-digest", "a wrong digest of stored bytes", "stored bytes do not match", stored_sha256=b"x" * 32
    )
    yield _hints("raw-digest", "a wrong digest of raw bytes", "raw bytes do not match", raw_sha256=b"x" * 32)
    zstd = {"flags": ZSTD, "raw_size": 100}
    yield _hints("zstd-garbage", "no zstd frame", packed, data=b"no frame at all", **zstd)
    yield _hints("zstd-empty", "an empty frame", packed, data=frame, **zstd)
    sized = frame + b"\x60" + struct.pack("<H", 100 - 256 & 0xFFFF)
    yield _hints("zstd-other-size", "a frame of another size", "states another size", data=sized + bytes(9), **zstd)
    yield _hints(
        "zstd-no-size", "a frame without size", "states another size", data=frame + b"\0\x58" + bytes(9), **zstd
    )
    stated = frame + b"\x20\x64"
    yield _hints("zstd-cut", "a frame that ends early", packed, data=stated, **zstd)
    yield _hints("zstd-reserved", "a block of the reserved type", packed, data=stated + b"\xff\xff\xff", **zstd)
    rle = stated + struct.pack("<I", 1 | 1 << 1 | 100 << 3)[:3] + b"Z"
    yield _hints("zstd-trailing", "bytes behind the frame", packed, data=rle + b"more", **zstd)
    window = frame + b"\x80\xb0" + struct.pack("<I", 100)
    yield _hints("zstd-window", "a window of 4 GiB", packed, data=window + b"\1\0\0", **zstd)


def _hints(name: str, what: str, problem: str, **lies: object) -> Case:
    hints = Part(lay.HINTS, b'{"tool":"x"}', 0).but(**lies)
    return _record(f"section-{name}", what, lambda: lay.record([*PARTS, hints]), problem)


def files() -> Iterator[Case]:
    """Pieces of an extension's files: sections like others, but for what the manifest says is in them."""
    piece = Part(lay.FILES, b"one file after the other")

    def case(name: str, what: str, problem: str, **lies: object) -> Case:
        return _record(f"files-{name}", what, lambda: lay.record([*PARTS, piece.but(**lies)]), problem)

    yield case("65-mib", "a piece of 65 MiB", "is over 67108864", flags=CRITICAL | ZSTD, raw_size=65 << 20)
    yield case("differ", "a piece of two sizes", "uncompressed section differ", raw_size=5)
    yield case("ratio", "a byte that unpacks to 1001", "is over 1000 times", data=b"x", flags=3, raw_size=1001)
    yield case("past-end", "a piece behind the record's end", "beyond the record", stored_size=1 << 20)
    yield case("flags", "a flag that files do not have", "unknown section flags 0x5", flags=5)
    many = [*PARTS, *(piece.but(data=bytes([index])) for index in range(254))]
    yield _record("files-257-sections", "254 pieces, one section too many", lambda: lay.record(many), "257 sections")


def undos() -> Iterator[Case]:
    """UNDO sections; they are read to show what detach would do, and by detach."""

    def case(name: str, what: str, data: bytes, problem: str) -> Case:
        parts = [Part(UNDO, data), ENVELOPE_PART, MANIFEST_PART]
        return Case(f"undo/{name}", what, lambda: {"disk.img": trailer(lay.record(parts))}, graft("ok", "", problem))

    sound = lay.undo(SIZE)
    yield case("empty", "no bytes", b"", "undo")
    yield case("cut", "half a header", sound[:13], "ends too early")
    yield case("version", "version 2", lay.undo(SIZE, version=2), "unknown undo version 2")
    yield case("reserved", "reserved bytes set", lay.undo(SIZE, reserved=1), "reserved bytes")
    yield case("reserved-2", "other reserved bytes set", lay.undo(SIZE, reserved2=9), "reserved bytes")
    yield case("facts-65", "65 facts", lay.undo(SIZE, fact_count=65), "65 facts")
    yield case("facts-2-32", "4294967295 facts", lay.undo(SIZE, fact_count=0xFFFFFFFF), "4294967295 facts")
    yield case("patches-2-32", "4294967295 patches", lay.undo(SIZE, patch_count=0xFFFFFFFF), "4294967295 patches")
    yield case("facts-missing", "a fact that is not there", lay.undo(SIZE, fact_count=1), "ends too early")
    yield case("patches-missing", "4096 patches, none there", lay.undo(SIZE, patch_count=4096), "ends too early")
    yield case("size-negative", "a file of -1 bytes", lay.undo(-1), "outside the limits")
    yield case("fact-no-name", "a fact without name", lay.undo(SIZE, [(b"", 1)]), "no name for a fact")
    yield case("fact-not-ascii", "a name in UTF-8", lay.undo(SIZE, [(b"gr\xc3\xb6\xc3\x9fe", 1)]), "undo")
    yield case("fact-control", "a name with a newline", lay.undo(SIZE, [(b"a\nb", 1)]), "no name for a fact")
    yield case("fact-long", "a name of 65 bytes", lay.undo(SIZE, [(b"a" * 65, 1)]), "no name for a fact")
    yield case("facts-twice", "a fact twice", lay.undo(SIZE, [(b"a", 1), (b"a", 2)]), "canonical")
    yield case("facts-unsorted", "facts out of order", lay.undo(SIZE, [(b"b", 1), (b"a", 2)]), "canonical")
    order = "empty, out of order, overlapping"
    yield case("patch-empty", "an empty patch", lay.undo(SIZE, (), [(5, b"")]), order)
    yield case("patch-overlap", "patches that overlap", lay.undo(SIZE, (), [(0, b"abcd"), (2, b"x")]), order)
    yield case("patch-order", "patches out of order", lay.undo(SIZE, (), [(9, b"a"), (2, b"x")]), order)
    yield case("patch-2-64", "a patch at 2^64-1", lay.undo(SIZE, (), [(-1, b"evil")]), order)
    yield case("trailing", "bytes behind it", sound + b"\0", "canonical")
    long = sound[:8] + struct.pack("<I", 1) + sound[12:] + struct.pack("<QI", 0, 0xFFFFFFFF) + b"x"
    yield case("patch-4-gib", "a patch of 4 GiB in one byte", long, "ends too early")
    yield Case(
        "undo/other-size",
        "UNDO speaks of another file size than the locator",
        lambda: {"disk.img": trailer(lay.record([Part(UNDO, lay.undo(5)), ENVELOPE_PART]))},
        graft("ok"),
    )
    yield Case(
        "undo/patch-in-raw",
        "UNDO of a raw image that would change its first bytes",
        lambda: {"disk.img": trailer(lay.record([Part(UNDO, lay.undo(SIZE, (), [(0, b"evil")])), ENVELOPE_PART]))},
        graft("ok"),
    )


def locators() -> Iterator[Case]:
    """Locators at both ends of a raw trailer."""
    record = lay.record(PARTS)

    def case(name: str, what: str, expect: Expect, **lies: object) -> Case:
        fields = {"offset": HEAD + 128, "file_size": SIZE} | lies
        return Case(f"locator/{name}", what, lambda: _both(record, fields), expect)

    damaged = "damaged"
    lost = graft(damaged, "both locators of the trailer were overwritten")
    yield case("check", "a wrong digest of its own", lost, check=bytes(8))
    yield case("major", "version 2", lost, major=2)
    yield case("reserved", "reserved bytes in version 1.0", lost, reserved=b"\1" * 16)
    yield case("flags-0", "neither inline nor sidecar", lost, flags=0)
    yield case("flags-3", "inline and sidecar", lost, flags=3)
    yield case("size-0", "a record of nothing", lost, size=0)
    yield case("size-63", "a record of 63 bytes", lost, size=63)
    yield case("size-over", "a record of 1 GiB and a byte", lost, size=(1 << 30) + 1)
    yield case("size-negative", "a record of -1 bytes", lost, size=-1)
    yield case("offset-2-63", "a record at 2^63", lost, offset=1 << 63)
    yield case("offset-wraps", "a record whose end wraps around", lost, offset=-64)
    yield case("file-2-63", "a file of 2^63 bytes", lost, file_size=1 << 63)
    yield case("file-negative", "a file of -4096 bytes", lost, file_size=-4096)
    yield case("elsewhere", "one that belongs to another place", lost, offset=HEAD)
    yield case("file-0", "an original of nothing", lost, file_size=0)
    yield case("1-gib-inline", "a record of 1 GiB in 16 KiB", lost, size=1 << 30)
    yield case("sidecar-inside", "a sidecar's locator in a trailer", lost, flags=SIDECAR)
    yield case("other-record", "the digest of another record", graft("record-overwritten"), record_sha256=bytes(32))
    sound = trailer(record)
    yield Case(
        "locator/head-lost",
        "zeros over the first locator",
        lambda: {"disk.img": poke(sound, (HEAD, bytes(128)))},
        graft(damaged, "the record is whole"),
    )
    yield Case(
        "locator/tail-lost",
        "zeros over the last locator",
        lambda: {"disk.img": poke(sound, (len(sound) - 128, bytes(128)))},
        graft(damaged, "the record is whole"),
    )
    yield Case(
        "locator/padding",
        "bytes in the padding",
        lambda: {"disk.img": poke(sound, (len(sound) - 200, b"x"))},
        graft(damaged, "padding"),
    )
    yield Case(
        "locator/swarm",
        "256 sound locators, one a page",
        lambda: {"disk.img": (lay.locator(record, offset=7 << 30, file_size=7 << 30).ljust(4096, b"\1")) * 256},
        graft("none"),
    )


def _both(record: bytes, fields: dict[str, object]) -> dict[str, Content]:
    lying = lay.locator(record, **fields)  # type: ignore[arg-type]
    return {"disk.img": trailer(record, lying, lying)}


def sidecars() -> Iterator[Case]:
    """The file beside a raw image."""
    record = lay.record(PARTS)
    side = "disk.img.vmgraft"

    def case(name: str, what: str, beside: Callable[[], Content], expect: Expect, disk: Content = DISK) -> Case:
        return Case(f"sidecar/{name}", what, lambda: {"disk.img": disk, side: beside()}, expect)

    damaged = "damaged"
    yield case("link", "a symbolic link", lambda: Link("/etc/passwd"), graft(damaged, "symbolic link"))
    yield case("link-to-itself", "a link to itself", lambda: Link(side), graft(damaged, "symbolic link"))
    yield case("fifo", "a named pipe", Fifo, graft(damaged, "not a regular file"))
    yield case("folder", "a folder", Folder, graft(damaged, "not a regular file"))
    yield case("empty", "an empty file", lambda: b"", graft(damaged, "empty"))
    yield case("text", "another file", lambda: b"#!/bin/sh\n" * 50, graft(damaged, "locator"))
    yield case("cut-in-locator", "half a locator", lambda: sidecar(record)[:60], graft(damaged, "locator"))
    yield case("no-record", "a locator and no record", lambda: sidecar(record)[:128], graft("record-cut", "0 of"))
    yield case("cut", "a record cut short", lambda: sidecar(record)[:-1], graft("record-cut"))
    yield case(
        "too-long", "bytes behind the record", lambda: sidecar(record) + b"x", graft(damaged, "1 bytes too long")
    )
    yield case(
        "flipped",
        "one byte of the record flipped",
        lambda: poke(sidecar(record), (128 + len(record) - 3, b"#")),
        graft("record-overwritten"),
    )
    yield case(
        "inline-flag",
        "an inline locator in a sidecar",
        lambda: lay.locator(record, file_size=SIZE) + record,
        graft(damaged, "not one of a sidecar"),
    )
    yield case(
        "grown-disk", "a disk that grew", lambda: sidecar(record), graft("file-grown", "grew"), DISK + bytes(512)
    )
    yield case("shrunk-disk", "a disk that shrank", lambda: sidecar(record), graft(damaged, "shrank"), DISK[:512])
    huge = Sparse(1 << 43, {0: lay.locator(record, flags=SIDECAR, file_size=SIZE) + record})
    yield case("8-tib", "8 TiB of hole behind the record", lambda: huge, graft(damaged, "over the size limit"))
    claim = lay.locator(b"", flags=SIDECAR, file_size=SIZE, size=1 << 30, record_sha256=bytes(32))
    yield case(
        "1-gib-of-hole",
        "1 GiB of hole, claimed as record",
        lambda: Sparse((1 << 30) + 128, {0: claim}),
        graft("record-overwritten"),
    )
    yield case(
        "1-gib-claimed", "1 GiB claimed, 100 bytes there", lambda: claim + bytes(100), graft("record-cut", "100 of")
    )


def samples() -> dict[str, bytes]:
    """A well-formed image with a graft."""
    return {"grafted.img": trailer(lay.record(PARTS))}


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (records, sections, files, undos, locators, sidecars):
        yield from group()
