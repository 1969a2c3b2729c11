"""Malformed VDI images; a sound one is laid out after VirtualBox's VDICore.h."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import corpus_graft as lay
from corpus_model import Case, Content, Expect, Sparse, graft, harmless, poke, refused, unreadable

#: QEMU insists on 1 MiB.
BLOCK, QEMU_BLOCK = 1 << 12, 1 << 20
BLOCKS = 4
MAP, DATA = 512, 1024
COMMENT = 84
#: Byte offset and struct code of each header field.
FIELDS = {
    "version": (68, "<I"),
    "header_size": (72, "<I"),
    "image_type": (76, "<I"),
    "offset_blocks": (340, "<I"),
    "offset_data": (344, "<I"),
    "sector_size": (360, "<I"),
    "disk_size": (368, "<Q"),
    "block_size": (376, "<I"),
    "block_extra": (380, "<I"),
    "blocks": (384, "<I"),
    "blocks_allocated": (388, "<I"),
}
FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
UNSUPPORTED = "UnsupportedError"


def image(
    entries: tuple[int, ...] = (1, FREE, 0, ZERO), comment: bytes = b"", block: int = BLOCK, **fields: int
) -> bytes:
    """Four blocks of which two are stored."""
    head = bytearray(DATA)
    text = b"<<< QEMU VM Virtual Disk Image >>>\n"
    head[: len(text)] = text
    head[64:68] = b"\x7f\x10\xda\xbe"
    head[COMMENT : COMMENT + len(comment)] = comment
    defaults = {
        "version": 0x10001,
        "header_size": 400,
        "image_type": 1,
        "offset_blocks": MAP,
        "offset_data": DATA,
        "sector_size": 512,
        "disk_size": BLOCKS * block,
        "block_size": block,
        "blocks": BLOCKS,
        "blocks_allocated": 2,
    }
    for name, value in (defaults | fields).items():
        at, code = FIELDS[name]
        struct.pack_into(code, head, at, value)
    head[392:408] = bytes(range(1, 17))
    struct.pack_into(f"<{len(entries)}I", head, MAP, *entries)
    return bytes(head) + (b"first" * 200).ljust(block, b"\0") + (b"third" * 200).ljust(block, b"\0")


def samples() -> dict[str, bytes]:
    """A well-formed image."""
    return {"disk.vdi": image()}


def _case(name: str, what: str, data: Callable[[], Content], expect: Expect) -> Case:
    return Case(f"vdi/{name}", what, lambda: {"disk.vdi": data()}, expect)


def _field(name: str, what: str, expect: Expect, **fields: int) -> Case:
    return _case(name, what, lambda: image(**fields), expect)


def cases() -> Iterator[Case]:
    """All of them."""
    yield _case("cut-in-header", "the file ends in the header", lambda: image()[:200], refused("VDI header", ""))
    yield _case("cut-in-sector", "the header and no more", lambda: image()[:460], refused("VDI header", "ends inside"))
    yield _field("version-2", "version 2.0", refused("version", "version 2.0", UNSUPPORTED), version=0x20000)
    yield _field("type-0", "image type 0", refused("image_type", "type 0"), image_type=0)
    yield _field("type-max", "image type 2^32-1", refused("image_type", "type 4294967295"), image_type=FREE)
    other = unreadable("image_type", "only the changes to another image", UNSUPPORTED)
    yield _field("undo-image", "an undo image", other, image_type=3)
    yield _field("differencing", "a differencing image", other, image_type=4)
    yield _case(
        "linkage",
        "a dynamic image that names another",
        lambda: poke(image(), (424, b"\7" * 16)),
        unreadable("uuid_linkage", "builds on another one", UNSUPPORTED),
    )
    yield _case(
        "parent-without-linkage",
        "a parent's modification and no parent",
        lambda: poke(image(), (440, b"\7" * 16)),
        refused("uuid_parent_modify", "no parent"),
    )
    for size in (0, 100, 5000, FREE):
        yield _field(
            f"header-{size}", f"a header of {size} bytes", refused("header_size", f"{size} bytes"), header_size=size
        )
    for size in (0, 1, 513, 3 << 20, 128 << 20, FREE):
        expect = refused("block_size", f"blocks of {size} bytes")
        yield _field(f"block-{size}", f"blocks of {size} bytes", expect, block_size=size)
    yield _field("sector-4096", "sectors of 4096", refused("sector_size", "4096", UNSUPPORTED), sector_size=4096)
    yield _field("extra", "extra bytes before blocks", refused("block_extra", "extra", UNSUPPORTED), block_extra=512)
    yield _field("blocks-max", "2^32-1 blocks", refused("blocks", "4294967295 blocks"), blocks=FREE)
    yield _field("size-0", "a disk of nothing", refused("disk_size", "0 bytes"), disk_size=0)
    yield _field("size-over-blocks", "more bytes than blocks", refused("disk_size", ""), disk_size=5 * BLOCK)
    yield _field("size-max", "2^64-1 bytes", refused("disk_size", ""), disk_size=(1 << 64) - 1)
    yield _field(
        "allocated-over-blocks", "more stored than there are", refused("blocks_allocated", ""), blocks_allocated=5
    )
    yield _field("map-unaligned", "a map at 513", refused("offset_blocks", "multiple"), offset_blocks=513)
    yield _field("map-in-header", "a map in the header", refused("offset_blocks", "inside the header"), offset_blocks=0)
    yield _field("map-behind-file", "a map behind the file", refused("offset_", ""), offset_blocks=1 << 31)
    yield _field("data-in-map", "data on the map", refused("offset_data", "before the block map ends"), offset_data=512)
    yield _field("data-unaligned", "data at 1025", refused("offset_data", "multiple"), offset_data=1025)
    entry = "block map"
    not_one = unreadable(entry, "not one of the 2 blocks")
    yield _case("entry-not-allocated", "block number 2 of 2", lambda: image((1, 2, 0, ZERO)), not_one)
    yield _case("entry-max", "block number 2^32-3", lambda: image((1, FREE - 2, 0, ZERO)), not_one)
    yield _case("entry-twice", "a block used twice", lambda: image((1, 1, 0, ZERO)), unreadable(entry, "used twice"))
    yield _case(
        "entry-behind-file",
        "a block that was cut off",
        lambda: image()[: DATA + BLOCK],
        unreadable(entry, "behind the end"),
    )
    many = 1 << 26
    big = image(blocks=many, disk_size=many << 20, block_size=1 << 20, offset_data=MAP + 4 * many, blocks_allocated=0)[
        :DATA
    ]
    yield _case(
        "64-tib-of-block-0",
        "a map of 256 MiB whose hole reads as block 0",
        lambda: Sparse(MAP + 4 * many, {0: big[:MAP]}),
        unreadable(entry, "not one of the 0 blocks"),
    )
    yield _case(
        "comment-rubbish",
        "a comment of terminal control and no UTF-8",
        lambda: image(comment=b"\x1b[2J\xff\xfe\n" * 30),
        harmless(),
    )
    yield _case("text-rubbish", "a first line of rubbish", lambda: poke(image(), (0, b"\x1b]0;\xff" * 12)), harmless())
    locator = lay.locator(bytes(300), offset=600, file_size=DATA + 2 * BLOCK)
    damaged = graft("damaged")
    yield _case("locator-check", "a locator with a wrong digest", lambda: image(comment=locator[:-1] + b"!"), damaged)
    yield _case(
        "locator-into-data",
        "a locator that points into blocks",
        lambda: image(comment=lay.locator(bytes(300), offset=DATA + 512, file_size=DATA + 2 * BLOCK)),
        damaged,
    )
    yield _case(
        "locator-1-gib",
        "a locator of 1 GiB",
        lambda: image(comment=lay.locator(b"", size=1 << 30, offset=512, file_size=5)),
        damaged,
    )
    yield _case(
        "locator-lost-sidecar",
        "a locator of a sidecar that is not there",
        lambda: image(comment=lay.locator(bytes(300), flags=lay.SIDECAR, file_size=DATA + 2 * BLOCK)),
        graft("locator-without-record"),
    )
