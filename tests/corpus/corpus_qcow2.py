"""Malformed qcow2 images."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import corpus_qcow2_base as base
from corpus_model import Case, Content, Expect, Link, Sparse, graft, harmless, poke, refused, unreadable
from corpus_qcow2_base import CLUSTER, COPIED, DATA, L1, L2, PACKED, REFBLOCK, REFTABLE, SIZE, changed, extension, image

UNSUPPORTED, FILE = "UnsupportedError", "FileError"


def _case(name: str, what: str, data: Callable[[], Content], expect: Expect, **beside: Content) -> Case:
    files = {key.replace("_", "."): value for key, value in beside.items()}
    return Case(f"qcow2/{name}", what, lambda: {"disk.qcow2": data(), **files}, expect)


def _field(name: str, expect: Expect, what: str, **fields: int) -> Case:
    return _case(name, what, lambda: image(**fields), expect)


def _ext(name: str, what: str, expect: Expect, *exts: bytes, **more: object) -> Case:
    return _case(name, what, lambda: image(extensions=b"".join(exts), **more), expect)  # type: ignore[arg-type]


def _numbers(name: str, what: str, expect: Expect, *edits: tuple[int, int]) -> Case:
    return _case(name, what, lambda: changed(*edits), expect)


def header() -> Iterator[Case]:
    """Fields that contradict the specification, the file or a limit."""
    yield _case("version-0", "version 0", lambda: poke(image(), (7, b"\0")), refused("version", "only 2 and 3"))
    yield _case("version-4", "version 4", lambda: poke(image(), (7, b"\4")), refused("version", "only 2 and 3"))
    huge = "version 4294967295"
    yield _case("version-max", huge, lambda: poke(image(), (4, b"\xff" * 4)), refused("version", huge))
    yield _case(
        "cut-in-magic", "a file of the magic alone", lambda: bytes(image()[:4]), refused("header", "ends inside")
    )
    yield _case("cut-in-header", "the file ends in the header", lambda: bytes(image()[:90]), refused("header", "ends"))
    yield _case(
        "cut-in-cluster", "a header and no more", lambda: bytes(image()[:512]), refused("cluster_bits", "shorter")
    )
    for bits in (0, 8, 22, 31, 64, 0xFFFFFFFF):
        what, expect = f"clusters of 2^{bits} bytes", refused("cluster_bits", f"{bits} is not within 9..21")
        yield _field(f"cluster-bits-{bits}", expect, what, cluster_bits=bits)
    for length in (0, 72, 96, 103, 106, 4104, 0xFFFFFFF8):
        what, expect = f"a header of {length} bytes", refused("header_length", f"{length} is not a multiple of 8")
        yield _field(f"header-length-{length}", expect, what, header_length=length)
    yield _field("size-0", refused("size", "virtual size 0"), "a disk of nothing", size=0)
    yield _field("size-2-63", refused("size", "not within"), "a disk of 2^63 bytes", size=1 << 63)
    yield _field("size-max", refused("size", "not within"), "a negative size", size=(1 << 64) - 512)
    yield _field("size-odd", harmless(), "half a sector at the end: not shown, as in QEMU", size=SIZE + 256)
    yield _field("size-511", refused("size", "511 is not within"), "a disk of less than a sector", size=511)
    yield _field("crypt-3", refused("crypt_method", "unknown"), "an unknown encryption method", crypt_method=3)
    yield _field(
        "refcount-order-7", refused("refcount_order", "7 is above 6"), "refcounts of 128 bits", refcount_order=7
    )
    limit = "are above the limit"
    yield _field("l1-33-mib", refused("l1_size", limit), "an L1 table of over 32 MiB", l1_size=(32 << 17) + 1)
    yield _field("l1-32-gib", refused("l1_size", limit), "an L1 table of 32 GiB", l1_size=0xFFFFFFFF)
    yield _field("l1-0", refused("l1_size", "too few"), "no L1 table", l1_size=0)
    yield _field("l1-too-short", refused("l1_size", "too few"), "1 EiB in one L1 entry", size=1 << 60)
    yield _field("l1-unaligned", refused("l1_table_offset", "multiple"), "L1 off its cluster", l1_table_offset=L1 + 512)
    yield _field("l1-in-header", refused("l1_table_offset", "header's cluster"), "L1 in the header", l1_table_offset=0)
    yield _field("l1-behind-file", refused("l1_table_offset", "behind the file"), "L1 outside", l1_table_offset=1 << 40)
    wraps = (1 << 64) - CLUSTER
    yield _field("l1-wraps", refused("l1_table_offset", "behind the file"), "L1 at -1 cluster", l1_table_offset=wraps)
    longer = refused("l1_table_offset", "ends behind the file")
    yield _field("l1-longer-than-file", longer, "an L1 table that runs out of the file", l1_size=1 << 20)
    clusters = refused("refcount_table_clusters", "not within")
    yield _field("reftable-0", clusters, "no refcount table", refcount_table_clusters=0)
    yield _field("reftable-huge", clusters, "a refcount table of 2^32 clusters", refcount_table_clusters=0xFFFFFFFF)
    table = "refcount_table_offset"
    yield _field(
        "reftable-unaligned", refused(table, "multiple"), "off its cluster", refcount_table_offset=REFTABLE + 8
    )
    yield _field("reftable-behind", refused(table, "behind the file"), "outside", refcount_table_offset=1 << 62)
    yield _field("reftable-in-header", refused(table, "header's cluster"), "in the header", refcount_table_offset=0)


def features() -> Iterator[Case]:
    """Bits and what they promise."""
    field = "incompatible_features"
    yield _field("bit-40", refused(field, "bit 40", UNSUPPORTED), "an unknown incompatible bit", incompatible=1 << 40)
    every = (1 << 64) - 1
    yield _field("all-bits", refused(field, "and 55 more", UNSUPPORTED), "every incompatible bit", incompatible=every)
    yield _ext(
        "bit-with-evil-name",
        "an unknown bit whose name is terminal control",
        refused(field, "bit 41", UNSUPPORTED),
        extension(base.EXT_FEATURES, b"\0\x29" + b"\x1b[2J\x07\xff\n".ljust(46, b"\0")),
        incompatible=1 << 41,
    )
    yield _field("dirty", unreadable(field, "dirty bit", UNSUPPORTED), "the dirty bit", incompatible=1)
    yield _field("corrupt", unreadable(field, "marked corrupt", UNSUPPORTED), "the corrupt bit", incompatible=2)
    yield _field("aes", unreadable("crypt_method", "encrypted (AES)", UNSUPPORTED), "AES", crypt_method=1)
    yield _field("luks", unreadable("crypt_method", "encrypted (LUKS)", UNSUPPORTED), "LUKS", crypt_method=2)
    kind = "compression_type"
    yield _field("zstd-without-bit", refused(kind, "contradicts"), "zstd without its feature bit", compression=1)
    yield _field("bit-without-zstd", refused(kind, "contradicts"), "the bit without zstd", incompatible=8)
    both = refused(kind, "neither zlib", UNSUPPORTED)
    yield _field("compression-200", both, "an unknown compression", incompatible=8, compression=200)
    few = refused("cluster_bits", "extended L2")
    yield _field("extended-l2-in-small-clusters", few, "extended L2 with 4 KiB clusters", incompatible=16)
    missing = unreadable(field, "external data file is not named", UNSUPPORTED)
    yield _field("data-file-unnamed", missing, "an external data file without name", incompatible=4)
    for name, value in (("absolute", b"/etc/passwd"), ("json", b"json:{}"), ("parent", b"../" * 40 + b"etc/passwd")):
        expect = unreadable("data_file_name", "data_file_name", UNSUPPORTED)
        yield _ext(
            f"data-file-{name}",
            f"an external data file that is {name}",
            expect,
            extension(base.EXT_DATA_FILE, value),
            incompatible=4,
        )

    for name, value, message in (("nul", b"a\0b", "NUL"), ("long", b"n" * 3000, "cannot be found")):
        expect = unreadable("data_file_name", message, "MalformedImageError" if name == "nul" else FILE)
        exts = extension(base.EXT_DATA_FILE, value)
        yield _ext(f"data-file-{name}", f"an external data file with a bad name: {name}", expect, exts, incompatible=4)


def extensions() -> Iterator[Case]:
    """The chain of header extensions."""
    field = "header_extension"
    out = refused(field, "runs out of the header area")
    yield _ext("ext-4-gib", "an extension of 4 GiB", out, extension(0x12345678, b"", 0xFFFFFFFF))
    yield _ext("ext-over-the-cluster", "one that leaves the cluster", out, extension(0x12345678, b"", CLUSTER))
    many = b"".join(extension(0x1000 + n, b"") for n in range(65))
    yield _ext("ext-65", "65 extensions", refused(field, "more than 64"), many)
    yield _ext("ext-64", "64 extensions: all that are read, so none can be added", harmless(), many[: 64 * 8])
    no_end = b"".join(extension(0x2000 + n, b"") for n in range((CLUSTER - 112) // 8))
    yield _ext("ext-fills-the-cluster", "extensions up to the last byte", refused(field, "more than 64"), no_end)
    twice = extension(base.EXT_GRAFT, bytes(136)) * 2
    yield _ext("two-grafts", "two extensions of ours", refused(field, "stands there twice"), twice)
    yield _ext(
        "graft-empty",
        "an extension of ours without data",
        graft("damaged", "8 zero bytes"),
        extension(base.EXT_GRAFT, b""),
    )
    yield _ext(
        "graft-of-zeros", "an extension of ours full of zeros", graft("damaged"), extension(base.EXT_GRAFT, bytes(200))
    )
    yield _ext("feature-table-cut", "half a feature name", harmless(), extension(base.EXT_FEATURES, bytes(47)))
    yield _case(
        "ext-into-name",
        "an extension that runs into the backing name",
        lambda: image(extensions=extension(0x77, b"name" * 10, 64), backing_file_offset=144, backing_file_size=4),
        out,
    )


def backing() -> Iterator[Case]:
    """What stands below."""
    at, size, name = "backing_file_offset", "backing_file_size", "backing_file_name"
    yield _field(
        "backing-behind-cluster",
        refused(at, "first cluster"),
        "a name behind the first cluster",
        backing_file_offset=CLUSTER + 8,
        backing_file_size=4,
    )
    yield _field(
        "backing-negative",
        refused(at, "first cluster"),
        "a name at -8",
        backing_file_offset=(1 << 64) - 8,
        backing_file_size=4,
    )
    yield _field(
        "backing-in-header",
        refused(at, "not behind the header"),
        "a name in the header",
        backing_file_offset=8,
        backing_file_size=4,
    )
    yield _field(
        "backing-1024",
        refused(size, "do not fit"),
        "a name of 1024 bytes",
        backing_file_offset=1024,
        backing_file_size=1024,
    )
    yield _field(
        "backing-4-gib",
        refused(size, "do not fit"),
        "a name of 4 GiB",
        backing_file_offset=1024,
        backing_file_size=0xFFFFFFFF,
    )
    yield _field(
        "backing-over-cluster",
        refused(size, "do not fit"),
        "a name over the cluster's end",
        backing_file_offset=CLUSTER - 2,
        backing_file_size=9,
    )
    nameless = harmless()
    yield _field("backing-of-no-bytes", nameless, "a place for a name of no bytes", backing_file_offset=176)
    yield _case("backing-nul", "NUL in the name", lambda: image(backing=b"a\0b"), refused(name, "NUL"))
    raw = extension(base.EXT_BACKING_FORMAT, b"raw")
    for label, value, message in (
        ("absolute", b"/etc/passwd", "absolute"),
        ("json", b'json:{"driver":"null-co"}', "protocol"),
        ("url", b"http://127.0.0.1/x", "protocol"),
        ("nbd", b"nbd:unix:/x", "protocol"),
        ("dev", b"/dev/zero", "absolute"),
    ):
        yield _case(
            f"backing-{label}",
            f"the backing file {value.decode()}",
            lambda value=value: image(backing=value, extensions=raw),
            unreadable(name, message, UNSUPPORTED),
        )
    gone = unreadable(name, "cannot be found", FILE)
    yield _case("backing-missing", "no such file", lambda: image(backing=b"gone", extensions=raw), gone)
    rubbish = lambda: image(backing=b"\xff\xfe\x80\n\x1b", extensions=raw)  # noqa: E731 - as the others
    yield _case("backing-not-utf8", "a name that is no UTF-8", rubbish, gone)
    own = extension(base.EXT_BACKING_FORMAT, b"qcow2")
    loop = unreadable(name, "leads back to this file")
    yield _case(
        "backing-itself",
        "the image is its own backing file",
        lambda: image(backing=b"disk.qcow2", extensions=own),
        loop,
    )
    yield _case(
        "backing-through-link",
        "its own backing file through a symbolic link",
        lambda: image(backing=b"link", extensions=own),
        loop,
        link=Link("disk.qcow2"),
    )
    yield _case(
        "backing-two",
        "two images that are each other's backing file",
        lambda: image(backing=b"b.qcow2", extensions=own),
        loop,
        b_qcow2=image(backing=b"disk.qcow2", extensions=own),
    )
    links = unreadable(name, "cannot be found", FILE)
    yield _case(
        "backing-link-loop",
        "symbolic links in a circle",
        lambda: image(backing=b"l1", extensions=own),
        links,
        l1=Link("l2"),
        l2=Link("l1"),
    )
    guess = unreadable("backing_format", "does not say which format", UNSUPPORTED)
    yield _case(
        "backing-format-unsaid",
        "a backing file of unsaid format",
        lambda: image(backing=b"base.raw"),
        guess,
        base_raw=bytes(CLUSTER),
    )
    yield _case(
        "backing-not-what-is-said",
        "said to be qcow2, and is not",
        lambda: image(backing=b"base.raw", extensions=own),
        unreadable("magic", "not a qcow2 file"),
        base_raw=bytes(CLUSTER),
    )
    yield Case(
        "qcow2/backing-chain-of-70", "a chain of 70 files", lambda: _chain(70), unreadable(name, "deeper than 64")
    )
    yield _case(
        "backing-malformed",
        "a backing file with a bad L1 table",
        lambda: image(backing=b"below.qcow2", extensions=own),
        unreadable("l1_entry", "points astray"),
        below_qcow2=changed((L1, COPIED | 1 << 50)),
    )


def _chain(length: int, **fields: int) -> dict[str, Content]:
    """A chain of images; each is as long as its L1 table needs."""
    own = extension(base.EXT_BACKING_FORMAT, b"qcow2")
    names = ["disk.qcow2", *(f"b{n}.qcow2" for n in range(1, length))]
    files: dict[str, Content] = {}
    for name, below in zip(names, [*names[1:], ""], strict=True):
        data = image(backing=below.encode(), extensions=own, **fields) if below else image(**fields)
        end = fields.get("l1_table_offset", 0) + 8 * fields.get("l1_size", 0)
        files[name] = Sparse(max(len(data), end), {0: bytes(data)})
    return files


def tables() -> Iterator[Case]:
    """L1, L2 and refcount tables."""
    one = "l1_entry"
    yield _numbers("l1-entry-behind", "an L2 table behind the file", unreadable(one, "astray"), (L1, COPIED | 1 << 40))
    yield _numbers("l1-entry-2-55", "an L2 table at 2^55", unreadable(one, "astray"), (L1, COPIED | 1 << 55))
    yield _numbers("l1-entry-reserved", "reserved bits", unreadable(one, "reserved"), (L1, 1 << 60 | L2))
    yield _numbers(
        "l1-entry-unaligned", "an L2 table off its cluster", unreadable(one, "astray"), (L1, COPIED | L2 + 512)
    )
    meta = unreadable(one, "other metadata")
    yield _numbers("l2-on-l1", "the L1 table is its own L2 table", meta, (L1, COPIED | L1))
    yield _numbers("l2-on-reftable", "L2 on the refcount table", meta, (L1, COPIED | REFTABLE))
    yield _numbers("l2-on-refblock", "L2 on a refcount block", meta, (L1, COPIED | REFBLOCK))
    shared = unreadable(one, "share one L2 table")
    yield _case(
        "l2-shared",
        "one L2 table for two L1 entries",
        lambda: changed((L1 + 8, COPIED | L2), base=image(l1_size=2, size=3 << 20)),
        shared,
    )
    two = "l2_entry"
    yield _numbers("data-behind", "data behind the file", unreadable(two, "behind the end"), (L2, COPIED | 1 << 50))
    yield _numbers("data-unaligned", "data off its cluster", unreadable(two, "aligned"), (L2, COPIED | DATA + 512))
    yield _numbers("data-reserved", "reserved bits", unreadable(two, "reserved bits"), (L2, 1 << 58 | DATA))
    yield _numbers("data-bit-1", "reserved bit 1", unreadable(two, "reserved bits"), (L2, COPIED | DATA | 2))
    own = unreadable(two, "own metadata")
    for name, place in (("l1", L1), ("l2", L2), ("reftable", REFTABLE), ("refblock", REFBLOCK)):
        yield _numbers(f"data-on-{name}", f"guest data on the {name}", own, (L2, COPIED | place))
    yield _case(
        "zero-flag-v2",
        "the zero flag in version 2",
        lambda: changed((L2 + 40, 1), base=image(version=2)),
        unreadable(two, "reserved bits"),
    )
    packed = "compressed_cluster"
    entry = L2 + 24
    yield _numbers(
        "packed-behind",
        "compressed behind the file",
        unreadable(packed, "outside"),
        (entry, base.descriptor(1 << 40, 512)),
    )
    yield _numbers(
        "packed-in-header", "compressed in the header", unreadable(packed, "outside"), (entry, base.descriptor(64, 512))
    )
    yield _numbers(
        "packed-garbage",
        "compressed garbage",
        unreadable(packed, "inflate"),
        (entry, base.descriptor(DATA + CLUSTER + 7, 900)),
    )
    yield _numbers(
        "packed-cut",
        "one sector of a compressed cluster is missing",
        unreadable(packed, "inflate"),
        (entry, base.descriptor(PACKED + 4, 512)),
    )
    short = base.packed(bytes(100))
    yield _case(
        "packed-short",
        "a compressed cluster that yields 100 bytes",
        lambda: poke(image(), (PACKED, short)),
        unreadable(packed, "inflate"),
    )
    yield _case(
        "packed-bomb",
        "2 MiB of zeros in one compressed cluster: read up to a cluster",
        lambda: poke(image(), (PACKED, base.packed(bytes(2 << 20)))),
        harmless(),
    )
    yield _case(
        "packed-zstd-window",
        "a zstd frame that asks for a window of 2 GiB",
        lambda: poke(image(incompatible=8, compression=1), (PACKED, b"\x28\xb5\x2f\xfd\0\xa8" + bytes(500))),
        unreadable(packed, "decompress"),
    )


def _bomb(packed: bool) -> Sparse:
    """Clusters of 2 MiB; one L2 table maps one of them 262144 times: 512 GiB of guest data in a file of 12 MiB."""
    bits, cluster = 21, 2 << 20
    head = image(cluster_bits=bits, size=512 << 30, l1_table_offset=3 * cluster, refcount_table_offset=cluster)
    entry = base.descriptor(5 * cluster, 4096, bits) if packed else COPIED | 5 * cluster
    pieces = {
        0: bytes(head[:CLUSTER]),
        cluster: struct.pack(">Q", 2 * cluster),
        3 * cluster: struct.pack(">Q", COPIED | 4 * cluster),
        4 * cluster: struct.pack(">Q", entry) * (cluster // 8),
        5 * cluster: base.packed(bytes(cluster)),
    }
    return Sparse(6 * cluster, pieces)


def snapshots() -> Iterator[Case]:
    """Internal snapshots: listed as far as they go, refused one by one when they are read."""

    def case(label: str, what: str, expect: Expect, count: int = 1, **lies: object) -> Case:
        entry = base.snapshot(**({"l1_offset": 10 * CLUSTER} | lies))  # type: ignore[arg-type]
        table = bytes(image(snapshots=entry, more=[base.pattern(9)] * 2, nb_snapshots=count))
        own = poke(table, (10 * CLUSTER, struct.pack(">QQ", COPIED | L2, 0)))
        return _case(f"snapshot-{label}", what, lambda: own, expect)

    yield _field("snapshots-65537", refused("nb_snapshots", "above the limit"), "65537 snapshots", nb_snapshots=65537)
    yield _field(
        "snapshots-in-header",
        refused("snapshots_offset", "header's cluster"),
        "snapshots in the header",
        nb_snapshots=1,
    )
    yield case("count", "65000 snapshots where one is", refused("snapshots_offset", "behind the file"), 65000)
    yield case(
        "sizes",
        "an identifier and a name of 65535 bytes",
        harmless("ends behind the file"),
        id_size=65535,
        name_size=65535,
    )
    yield case("extra-4-gib", "extra data of 4 GiB", harmless("above the limit of 1024"), extra_size=0xFFFFFFFF)
    yield case("extra-1-mib", "extra data of 1 MiB", harmless("above the limit of 1024"), extra_size=1 << 20)
    rubbish = b"\x1b[2J\xff\xfe\n"
    yield case("name", "a name of rubbish and terminal control", harmless("snap"), identity=b"snap", name=rubbish)
    yield case("l1-behind", "an L1 table behind the file", harmless(snapshot="MalformedImageError"), l1_offset=1 << 40)
    yield case(
        "l1-unaligned", "an L1 table off its cluster", harmless(snapshot="MalformedImageError"), l1_offset=L1 + 8
    )
    yield case("l1-0", "no L1 table", harmless(snapshot="snapshot.l1_size"), l1_size=0)
    yield case("l1-max", "an L1 table of 32 GiB", harmless(snapshot="snapshot.l1_size"), l1_size=0xFFFFFFFF)
    yield case("l1-on-header", "an L1 table on the header", harmless(snapshot="MalformedImageError"), l1_offset=0)
    big = struct.pack(">QQ", 0, 1 << 62)
    yield case("size-4-eib", "a disk of 4 EiB", harmless(snapshot="snapshot.l1_size"), extra=big)
    yield case(
        "size-max", "a disk of 2^64-1 bytes", harmless("is not within"), extra=struct.pack(">QQ", 0, (1 << 64) - 1)
    )
    bitmaps = extension(base.EXT_BITMAPS, struct.pack(">IIQQ", 0xFFFFFFFF, 0, 1 << 60, 1 << 62))
    yield _ext("bitmaps-astray", "2^32-1 bitmaps at 2^62: never followed", harmless(), bitmaps, autoclear=1)


def bombs() -> Iterator[Case]:
    """Claims that would keep a reader busy."""
    often = unreadable("l2_entry", "used many times")
    yield _case("mapped-262144-times", "one cluster mapped 262144 times", lambda: _bomb(packed=False), often)
    yield _case("packed-262144-times", "the same with a compressed one", lambda: _bomb(packed=True), often)
    entries = (32 << 20) // 8
    size = entries * 512 * CLUSTER
    at = 9 * CLUSTER
    big = image(l1_size=entries, l1_table_offset=at, size=size)
    yield _case(
        "8-pib-of-hole",
        "an L1 table of 32 MiB, all of it unmapped",
        lambda: Sparse(at + (32 << 20), {0: bytes(big)}),
        harmless(),
    )
    yield _case(
        "l1-full-of-rubbish",
        "an L1 table of 32 MiB that points astray in its last entry",
        lambda: Sparse(at + (32 << 20), {0: bytes(big), at + (32 << 20) - 8: b"\xff" * 8}),
        unreadable("l1_entry", "astray"),
    )
    yield Case(
        "qcow2/chain-of-32-mib-tables",
        "a chain of 16 files, each with an L1 table of 32 MiB",
        lambda: _chain(16, l1_size=entries, l1_table_offset=at, size=size),
        unreadable("l1_size", "of the backing chain", UNSUPPORTED),
    )
    yield _case(
        "refblocks-everywhere",
        "a refcount table full of blocks at 2^56",
        lambda: poke(image(), (REFTABLE, struct.pack(">Q", 1 << 56) * (CLUSTER // 8))),
        harmless(),
    )


def samples() -> dict[str, bytes]:
    """A well-formed image."""
    return {"disk.qcow2": bytes(image())}


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (header, features, extensions, backing, tables, snapshots, bombs):
        yield from group()
