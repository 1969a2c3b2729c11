"""Malformed VHDX images; a sound one is laid out after [MS-VHDX]."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from uuid import UUID

from corpus_model import Case, Content, Expect, Sparse, harmless, refused, unreadable

KIB, MIB = 1 << 10, 1 << 20
HEADERS, TABLES = (64 * KIB, 128 * KIB), (192 * KIB, 256 * KIB)
LOG, METADATA, BAT, BLOCK = MIB, 2 * MIB, 3 * MIB, 4 * MIB
SIZE = 4 * MIB
FULL = 6
MAX64 = (1 << 64) - 1
UNSUPPORTED = "UnsupportedError"


def guid(text: str) -> bytes:
    return UUID(text).bytes_le


BAT_REGION = guid("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION = guid("8b7ca206-4790-4b9a-b8fe-575f050f886e")
OTHER_REGION = guid("00000001-0002-0003-0004-000000000005")
GRAFT_REGION = guid("441a6886-7621-4a2e-baa8-de42ff3059e7")
PARAMETERS = guid("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
DISK_SIZE = guid("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
DISK_ID = guid("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL = guid("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL = guid("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT = guid("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")


def _table() -> list[int]:
    found = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        found.append(crc)
    return found


_CRC = _table()


@lru_cache
def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def sealed(data: bytes) -> bytes:
    """With the CRC-32C of its structure behind the signature of four bytes."""
    return data[:4] + struct.pack("<I", crc32c(data[:4] + bytes(4) + data[8:])) + data[8:]


def header(
    sequence: int = 1,
    *,
    log: bytes = bytes(16),
    version: int = 1,
    log_version: int = 0,
    length: int = MIB,
    offset: int = LOG,
    seal: bool = True,
) -> bytes:
    data = b"head" + bytes(4) + struct.pack("<Q", sequence) + bytes(range(16)) * 2 + log
    data = (data + struct.pack("<HHIQ", log_version, version, length, offset)).ljust(4 * KIB, b"\0")
    return sealed(data) if seal else data


def region(kind: bytes, offset: int, length: int = MIB, flags: int = 1) -> bytes:
    return kind + struct.pack("<QII", offset, length, flags)


REGIONS = (region(BAT_REGION, BAT), region(METADATA_REGION, METADATA))


def table(regions: Sequence[bytes] = REGIONS, count: int | None = None, seal: bool = True) -> bytes:
    data = b"regi" + bytes(4) + struct.pack("<II", len(regions) if count is None else count, 0)
    data = (data + b"".join(regions)).ljust(64 * KIB, b"\0")
    return sealed(data) if seal else data


ITEMS = {
    PARAMETERS: struct.pack("<II", MIB, 0),
    DISK_SIZE: struct.pack("<Q", SIZE),
    DISK_ID: bytes(range(16)),
    LOGICAL: struct.pack("<I", 512),
    PHYSICAL: struct.pack("<I", 4096),
}


def metadata(
    items: dict[bytes, bytes] | None = None,
    *,
    count: int | None = None,
    entry: dict[int, tuple[int, int]] | None = None,
    flags: int = 4,
) -> dict[int, bytes]:
    """The metadata region; ``entry`` replaces (offset, length) of an item by its number."""
    chosen = ITEMS if items is None else items
    out = b"metadata" + struct.pack("<HH", 0, len(chosen) if count is None else count) + bytes(20)
    at, body = 64 * KIB, b""
    for number, (kind, value) in enumerate(chosen.items()):
        offset, length = (entry or {}).get(number, (at + len(body), len(value)))
        out += kind + struct.pack("<IIII", offset % (1 << 32), length % (1 << 32), flags, 0)
        body += value.ljust(-(-len(value) // 8) * 8, b"\0")
    return {METADATA: out, METADATA + 64 * KIB: body}


def image(
    *,
    headers: tuple[bytes, bytes] | None = None,
    tables: tuple[bytes, bytes] | None = None,
    meta: dict[int, bytes] | None = None,
    bat: tuple[int, ...] = (BLOCK | FULL, 0, 0, 2),
    more: dict[int, bytes] | None = None,
    size: int = 5 * MIB,
) -> Sparse:
    """Four blocks of 1 MiB of which the first is stored."""
    heads = (header(1), header(2)) if headers is None else headers
    both = (table(), table()) if tables is None else tables
    pieces = {0: b"vhdxfile" + "corpus".encode("utf-16-le")}
    pieces |= dict(zip(HEADERS, heads, strict=True)) | dict(zip(TABLES, both, strict=True))
    pieces |= metadata() if meta is None else meta
    pieces |= {BAT: struct.pack(f"<{len(bat)}Q", *bat), BLOCK: bytes(range(256)) * 16}
    return Sparse(size, pieces | (more or {}))


def samples() -> dict[str, bytes]:
    """A well-formed image."""
    sparse = image()
    data = bytearray(sparse.size)
    for offset, piece in sparse.pieces.items():
        data[offset : offset + len(piece)] = piece
    return {"disk.vhdx": bytes(data)}


def _case(name: str, what: str, data: Callable[[], Content], expect: Expect) -> Case:
    return Case(f"vhdx/{name}", what, lambda: {"disk.vhdx": data()}, expect)


def _heads(name: str, what: str, expect: Expect, **lies: object) -> Case:
    def make() -> Sparse:
        return image(headers=(header(1, **lies), header(2, **lies)))  # type: ignore[arg-type]

    return _case(name, what, make, expect)


def _regions(name: str, what: str, expect: Expect, *regions: bytes, **lies: object) -> Case:
    def make() -> Sparse:
        one = table(regions or REGIONS, **lies)  # type: ignore[arg-type]
        return image(tables=(one, one))

    return _case(name, what, make, expect)


def _meta(name: str, what: str, expect: Expect, **lies: object) -> Case:
    return _case(name, what, lambda: image(meta=metadata(**lies)), expect)  # type: ignore[arg-type]


def _item(name: str, what: str, expect: Expect, **changes: bytes) -> Case:
    named = {"parameters": PARAMETERS, "disk_size": DISK_SIZE, "logical": LOGICAL, "physical": PHYSICAL}
    items = ITEMS | {named[key]: value for key, value in changes.items()}
    return _case(name, what, lambda: image(meta=metadata(items)), expect)


def headers() -> Iterator[Case]:
    """Identifier, headers and log."""
    yield _case(
        "cut-in-header",
        "the file ends in the header section",
        lambda: Sparse(100_000, {0: b"vhdxfile"}),
        refused("file identifier", "header section"),
    )
    yield _heads("checksums", "both headers with wrong checksums", refused("header", "neither"), seal=False)
    yield _case(
        "sequence",
        "two headers that differ with one sequence number",
        lambda: image(headers=(header(5), header(5, log=b"x" * 16))),
        refused("header", "equal sequence"),
    )
    yield _case("no-headers", "no headers", lambda: image(headers=(bytes(4096), bytes(4096))), refused("header", ""))
    yield _heads("version-2", "version 2", refused("header.version", "version 2", UNSUPPORTED), version=2)
    yield _heads(
        "log-version", "log version 7", refused("header.log_version", "", UNSUPPORTED), log_version=7, log=b"x" * 16
    )
    yield _heads("log-unaligned", "a log at 1 MiB + 1", refused("header.log_offset", ""), offset=MIB + 1)
    yield _heads("log-in-headers", "a log at 0", refused("header.log_offset", ""), offset=0)
    yield _heads("log-behind", "a log behind the file", refused("header.log_length", "behind the end"), offset=1 << 40)
    yield _heads("log-wraps", "a log at 2^64 - 1 MiB", refused("header.log_length", ""), offset=(1 << 64) - MIB)
    yield _heads("log-4-gib", "a log of 4 GiB", refused("header.log_length", ""), length=(1 << 32) - MIB)
    entry = sealed(b"loge" + bytes(4) + struct.pack("<IIQII", 4096, 0, 1, 0, 0) + b"L" * 16 + bytes(4096 - 48))
    marked = header(1, log=b"L" * 16)
    dirty = unreadable(None, "log", UNSUPPORTED)
    yield _case(
        "log-dirty",
        "a log with an entry to replay",
        lambda: image(headers=(marked, header(2, log=b"L" * 16)), more={LOG: entry}),
        dirty,
    )
    swarm = b"".join(entry[:8] + struct.pack("<I", MIB) + entry[12:] for _ in range(256))
    yield _case(
        "log-swarm",
        "256 entries of 1 MiB each with wrong checksums",
        lambda: image(headers=(marked, header(2, log=b"L" * 16)), more={LOG: swarm}),
        dirty,
    )
    yield _case(
        "log-65-mib",
        "a log too long to be looked through",
        lambda: image(headers=(header(2, log=b"L" * 16, length=65 * MIB, offset=8 * MIB),) * 2, size=80 * MIB),
        dirty,
    )
    rubbish = b"vhdxfile" + b"\x00\xd8\x1b\x00[\x00\xff\xff" * 60
    yield _case("creator", "a creator of half surrogates", lambda: image(more={0: rubbish}), harmless())


def regions() -> Iterator[Case]:
    """The region table."""
    field = "region table"
    yield _regions("tables", "both tables with wrong checksums", refused(field, "both copies"), seal=False)
    yield _regions("count-2048", "2048 regions", refused(field, "both copies"), count=2048)
    yield _regions("count-max", "2^32-1 regions", refused(field, "both copies"), count=0xFFFFFFFF)
    yield _regions("count-0", "no regions", refused(field, "0 regions bat"), count=0)
    yield _regions("bat-only", "no metadata", refused(field, "0 regions metadata"), REGIONS[0])
    yield _regions(
        "two-bats", "two tables of blocks", refused(field, "2 regions bat"), *REGIONS, region(BAT_REGION, 4 * MIB)
    )
    yield _regions(
        "unknown-required",
        "an unknown region that must be known",
        refused(field, "must be understood", UNSUPPORTED),
        *REGIONS,
        region(OTHER_REGION, 8 * MIB),
    )
    yield _regions(
        "twice",
        "a region twice",
        refused(field, "twice"),
        *REGIONS,
        region(OTHER_REGION, 8 * MIB, flags=0),
        region(OTHER_REGION, 9 * MIB, flags=0),
    )
    yield _regions(
        "overlap", "regions on each other", refused(field, "overlap"), region(BAT_REGION, METADATA), REGIONS[1]
    )
    yield _regions("on-log", "a region on the log", refused(field, "overlap"), region(BAT_REGION, LOG), REGIONS[1])
    yield _regions(
        "unaligned", "a region at 3 MiB + 512", refused(field, "whole MiB"), region(BAT_REGION, BAT + 512), REGIONS[1]
    )
    yield _regions(
        "length-0", "a region of nothing", refused(field, "whole MiB"), region(BAT_REGION, BAT, 0), REGIONS[1]
    )
    yield _regions("in-headers", "a region at 0", refused(field, "header section"), region(BAT_REGION, 0), REGIONS[1])
    yield _regions(
        "behind", "a region behind the file", refused(field, "behind the end"), region(BAT_REGION, 1 << 40), REGIONS[1]
    )
    yield _regions(
        "wraps", "a region that wraps around", refused(field, ""), region(BAT_REGION, (1 << 64) - MIB), REGIONS[1]
    )
    yield _regions(
        "4-gib", "a region of 4 GiB", refused(field, ""), region(BAT_REGION, BAT, (1 << 32) - MIB), REGIONS[1]
    )


def items() -> Iterator[Case]:
    """The metadata."""
    where, place = "metadata", "metadata.offset"
    yield _case(
        "meta-signature", "no metadata table", lambda: image(meta={METADATA: b"nothing here"}), refused(where, "")
    )
    yield _meta("meta-count", "65535 items", refused("metadata.entry_count", "65535"), count=65535)
    yield _meta("meta-offset-in-table", "an item in the table", refused(place, "out of place"), entry={0: (64, 8)})
    yield _meta("meta-offset-max", "an item at 2^32-8", refused(place, "out of place"), entry={0: (-8, 8)})
    yield _meta("meta-length-max", "an item of 4 GiB", refused(None, ""), entry={0: (64 * KIB, 0xFFFFFFFF)})
    yield _meta("meta-overlap", "items on each other", refused(place, "overlap"), entry={1: (64 * KIB, 8)})
    yield _meta(
        "meta-length", "an item of another size", refused("file parameters", "must be 8"), entry={0: (128 * KIB, 4)}
    )
    yield _meta("meta-empty", "no items", refused("", "lack"), items={})
    yield _meta(
        "meta-unknown",
        "an unknown item that must be known",
        refused(where, "must be understood", UNSUPPORTED),
        items=ITEMS | {OTHER_REGION: bytes(8)},
    )
    yield _case("meta-twice", "an item twice", lambda: image(meta=_twice()), refused(where, "twice"))
    for size in (0, 1, 512 * KIB, 3 * MIB, 512 * MIB, 0xFFFFFFFF):
        yield _item(
            f"block-{size}",
            f"blocks of {size} bytes",
            refused("file parameters", f"{size} bytes"),
            parameters=struct.pack("<II", size, 0),
        )
    for size in (0, 1000, 65 << 40, MAX64):
        yield _item(
            f"disk-{size}",
            f"a disk of {size} bytes",
            refused("virtual disk size", f"{size} bytes"),
            disk_size=struct.pack("<Q", size),
        )
    for size in (0, 1, 1024, 0xFFFFFFFF):
        yield _item(
            f"sector-{size}",
            f"sectors of {size} bytes",
            refused("logical sector size", f"{size} bytes"),
            logical=struct.pack("<I", size),
        )
    yield _item(
        "physical-0", "physical sectors of 0 bytes", refused("physical sector size", "0 bytes"), physical=bytes(4)
    )
    parent = (
        guid("b04aefb7-d19e-4a81-b789-25b8e9445913") + struct.pack("<HH", 0, 1) + struct.pack("<IIHH", 32, 44, 12, 4)
    )
    path = parent + "parent".encode("utf-16-le") + b"\x00\xd8\x1b\x00"
    delta = ITEMS | {PARAMETERS: struct.pack("<II", MIB, 2), PARENT: path}
    yield _case(
        "parent",
        "a differencing disk",
        lambda: image(meta=metadata(delta)),
        unreadable("parent locator", "differences to its parent", UNSUPPORTED),
    )
    many = delta | {PARENT: parent[:18] + b"\xff\xff" + parent[20:]}
    yield _case(
        "parent-65535",
        "a parent locator of 65535 entries",
        lambda: image(meta=metadata(many)),
        refused("parent locator", "65535"),
    )


def _twice() -> dict[int, bytes]:
    pieces = metadata(ITEMS | {OTHER_REGION: bytes(8)})
    pieces[METADATA] = pieces[METADATA].replace(OTHER_REGION, PARAMETERS)
    return pieces


def blocks() -> Iterator[Case]:
    """The block allocation table."""
    entry = "BAT entry 0"

    def case(name: str, what: str, value: int, message: str) -> Case:
        return _case(name, what, lambda: image(bat=(value, 0, 0, 0)), unreadable(entry, message))

    yield case("bat-behind", "a block behind the file", 1 << 43 | FULL, "behind the end")
    yield case("bat-at-end", "a block at the file's end", 5 * MIB | FULL, "behind the end")
    yield case("bat-max", "a block at 2^64", 0xFFFFFFFFFFF00000 | FULL, "behind the end")
    yield case("bat-state-4", "state 4", BLOCK | 4, "state")
    yield case("bat-partial", "a partial block without parent", BLOCK | 7, "state")
    yield case("bat-reserved", "reserved bits", BLOCK | 8 | FULL, "reserved bits")
    for name, place in (("headers", 0), ("log", LOG), ("metadata", METADATA), ("bat", BAT)):
        yield case(f"bat-on-{name}", f"a block on the {name}", place | FULL, "own metadata")
    yield _case(
        "bat-twice",
        "a block used twice",
        lambda: image(bat=(BLOCK | FULL, BLOCK | FULL)),
        unreadable("BAT entry", "overlaps"),
    )
    big = ITEMS | {DISK_SIZE: struct.pack("<Q", 64 << 40)}
    yield _case(
        "bat-too-short",
        "a disk of 64 TiB and a table of 1 MiB",
        lambda: image(meta=metadata(big)),
        unreadable("BAT entry", "room for"),
    )
    length = 513 * MIB
    moved = (region(BAT_REGION, 8 * MIB, length), REGIONS[1])
    wide = table(moved)
    yield _case(
        "64-tib-of-hole",
        "a table of 513 MiB, all of it a hole",
        lambda: image(meta=metadata(big), tables=(wide, wide), size=8 * MIB + length),
        harmless(),
    )
    yield _case(
        "bat-rubbish-at-end",
        "the same with rubbish in the last entry of the disk",
        lambda: image(
            meta=metadata(big),
            tables=(wide, wide),
            size=8 * MIB + length,
            more={8 * MIB + 8 * ((64 << 20) + (64 << 20) // 4096 - 2): b"\xff" * 8},
        ),
        unreadable("BAT entry", ""),
    )
    own = (*REGIONS, region(GRAFT_REGION, 8 * MIB, flags=0))
    yield _case(
        "graft-behind",
        "a region of ours behind the file",
        lambda: image(tables=(table(own),) * 2),
        Expect("sound", state="damaged", detail="behind the end"),
    )
    yield _case(
        "graft-of-zeros",
        "a region of ours full of zeros",
        lambda: image(tables=(table(own),) * 2, size=9 * MIB),
        Expect("sound", state="damaged"),
    )


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (headers, regions, items, blocks):
        yield from group()
