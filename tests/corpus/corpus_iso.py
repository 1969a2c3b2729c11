"""Malformed ISO 9660 images."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import corpus_graft as lay
from corpus_graft import ENVELOPE_PART, MANIFEST_PART, UNDO, Part
from corpus_model import Case, Content, Expect, Sparse, graft, harmless, poke, refused

SECTOR = 2048
BLOCKS = 24
PVD = 16 * SECTOR
#: File offset of the place of the locator, and sectors of what else is in the image.
FIELD = PVD + 883 + 384
ROOT, CATALOG, FILE = 19, 21, 22
MIB = 1 << 20


def both(number: int, size: int = 4) -> bytes:
    return number.to_bytes(size, "little") + number.to_bytes(size, "big")


def primary(blocks: int = BLOCKS, field: bytes = bytes(512)) -> bytes:
    """A primary volume descriptor as ECMA-119, 8.4 lays it out."""
    root = b"\x22\0" + both(ROOT) + both(SECTOR) + bytes(7) + b"\2\0\0" + both(1, 2) + b"\1\0"
    data = b"\1CD001\1\0" + b"LINUX".ljust(32) + b"CORPUS".ljust(32) + bytes(8) + both(blocks) + bytes(32)
    data += both(1, 2) * 2 + both(SECTOR, 2) + both(10) + struct.pack("<II", 18, 0) + struct.pack(">II", 18, 0) + root
    data += b" " * (4 * 128 + 3 * 37) + (b"2026010100000000\0" + b"0" * 16 + b"\0") * 2 + b"\1\0" + field
    return data.ljust(SECTOR, b"\0")


def boot(catalog: int = CATALOG) -> bytes:
    """An El Torito boot record."""
    return (b"\0CD001\1" + b"EL TORITO SPECIFICATION".ljust(64, b"\0") + struct.pack("<I", catalog)).ljust(
        SECTOR, b"\0"
    )


TERMINATOR = b"\xffCD001\1".ljust(SECTOR, b"\0")
OTHER = b"\2CD001\1".ljust(SECTOR, b"\0")


def validation(platform: int = 0) -> bytes:
    entry = bytearray(b"\1" + bytes([platform]) + bytes(28) + b"\x55\xaa")
    struct.pack_into("<H", entry, 28, -sum(struct.unpack("<16H", entry)) & 0xFFFF)
    return bytes(entry)


def boot_entry(sector: int = FILE, indicator: int = 0x88, media: int = 0, count: int = 4) -> bytes:
    return struct.pack("<BBHBBHI", indicator, media, 0, 0, 0, count, sector).ljust(32, b"\0")


def section(indicator: int, count: int) -> bytes:
    return struct.pack("<BBH", indicator, 0xEF, count).ljust(32, b"\0")


def image(*descriptors: bytes, catalog: bytes = b"", blocks: int = BLOCKS, tail: bytes = b"") -> bytes:
    """An image; without descriptors a sound, bootable one."""
    data = bytearray(blocks * SECTOR)
    chosen = b"".join(descriptors) if descriptors else primary(blocks) + boot() + TERMINATOR
    data[PVD : PVD + len(chosen)] = chosen
    entries = catalog or validation() + boot_entry()
    if PVD + len(chosen) <= CATALOG * SECTOR:
        data[CATALOG * SECTOR : CATALOG * SECTOR + len(entries)] = entries
        data[FILE * SECTOR : (FILE + 1) * SECTOR] = bytes(range(256)) * 8
    return bytes(data) + tail


SIZE = BLOCKS * SECTOR


def grafted(
    facts: tuple[tuple[bytes, int], ...] = ((b"volume_space_size", BLOCKS),),
    patches: tuple[tuple[int, bytes], ...] = ((FIELD, bytes(128)),),
    undo_size: int = SIZE,
    footer: bytes | None = None,
    **lies: object,
) -> bytes:
    """An inline graft as docs/format.md lays it out; ``lies`` go into the locator."""
    record = lay.record([Part(UNDO, lay.undo(undo_size, facts, patches)), ENVELOPE_PART, MANIFEST_PART])
    fields = {"offset": SIZE, "file_size": SIZE} | lies
    locator = lay.locator(record, **fields)  # type: ignore[arg-type]
    data = poke(image(), (FIELD, locator)) + record.ljust(-(-len(record) // SECTOR) * SECTOR, b"\0")
    return data + (locator.ljust(SECTOR, b"\0") if footer is None else footer)


def _case(name: str, what: str, data: Callable[[], Content], expect: Expect) -> Case:
    return Case(f"iso/{name}", what, lambda: {"disc.iso": data()}, expect)


def _poked(name: str, what: str, field: str, message: str, *changes: tuple[int, bytes]) -> Case:
    return _case(name, what, lambda: poke(image(), *changes), refused(field, message))


def descriptors() -> Iterator[Case]:
    """The set of volume descriptors."""
    second = PVD + SECTOR
    yield _case(
        "no-terminator-in-file",
        "the file ends behind the first descriptor",
        lambda: image()[:second],
        refused("volume_space_size", "larger than the file"),
    )
    yield _poked("second-is-garbage", "no CD001 in the second", "volume descriptor", "", (second + 1, b"CDXXX"))
    seventy = lambda: image(primary(120), *[OTHER] * 70, blocks=120)  # noqa: E731 - one line
    yield _case("no-terminator-in-64", "70 descriptors", seventy, refused("type", "no terminator within 64"))
    yield _case(
        "two-primaries",
        "two primary descriptors",
        lambda: image(primary(), primary(), TERMINATOR),
        refused("type", "more than one primary"),
    )
    yield _case(
        "primary-second", "a boot record first", lambda: image(boot(), primary(), TERMINATOR), refused("type", "not 1")
    )
    yield _case("terminator-first", "the terminator first", lambda: image(TERMINATOR), refused("type", "type 255"))
    yield _poked("version-2", "descriptor version 2", "version", "of version 2", (PVD + 6, b"\2"))
    for name, at, field in (
        ("volume-size", 84, "volume_space_size"),
        ("set-size", 120, "volume_set_size"),
        ("sequence", 124, "volume_sequence_number"),
        ("block-size", 128, "logical_block_size"),
        ("path-table", 132, "path_table_size"),
    ):
        yield _poked(
            f"{name}-in-two-orders", f"{field} differs in its two byte orders", field, "differ", (PVD + at, b"\7")
        )
    for size in (0, 512, 1024, 4096):
        yield _poked(
            f"blocks-of-{size}",
            f"logical blocks of {size} bytes",
            "logical_block_size",
            f"blocks of {size}",
            (PVD + 128, both(size, 2)),
        )
    space = "volume_space_size"
    yield _poked("volume-of-0", "a volume of no blocks", space, "cannot hold", (PVD + 80, both(0)))
    yield _poked("volume-of-17", "a volume of 17 blocks", space, "cannot hold", (PVD + 80, both(17)))
    yield _poked("volume-too-large", "one block more than the file", space, "larger", (PVD + 80, both(BLOCKS + 1)))
    yield _poked("volume-of-8-tib", "2^32-1 blocks", space, "larger than the file", (PVD + 80, both(0xFFFFFFFF)))
    yield _case(
        "cut-in-primary", "the file ends in the primary descriptor", lambda: image()[: PVD + 900], refused(None, "")
    )
    yield _case(
        "path-table-of-4-gib",
        "a path table of 4 GiB at the last sector: never walked",
        lambda: poke(image(), (PVD + 132, both(0xFFFFFFFF)), (PVD + 140, b"\xff" * 4)),
        harmless(),
    )
    yield _case(
        "root-outside",
        "a root directory behind the file: never walked",
        lambda: poke(image(), (PVD + 158, both(0xFFFFFFFF))),
        harmless(),
    )
    yield _case(
        "root-is-itself",
        "a root directory that lists itself: never walked",
        lambda: poke(image(), (ROOT * SECTOR, primary()[156:190] * 60)),
        harmless(),
    )
    rubbish = bytes(range(128, 160)) * 2
    yield _case(
        "names-not-ascii",
        "identifiers of rubbish and terminal control",
        lambda: poke(image(), (PVD + 8, rubbish), (PVD + 190, b"\x1b]0;x\x07\n\r" + b"\xff" * 119)),
        harmless(),
    )
    yield _case(
        "date-of-letters",
        "a creation date of letters",
        lambda: poke(image(), (PVD + 813, b"YYYYMMDDhhmmss")),
        harmless(),
    )
    big = Sparse((1 << 32) * SECTOR - SECTOR, {0: poke(image(), (PVD + 80, both(0xFFFFFFFF)))})
    yield _case("8-tib-of-hole", "8 TiB of hole", lambda: big, harmless())


def catalogues() -> Iterator[Case]:
    """El Torito boot catalogues: shown as a problem, never an error, and never followed."""

    def case(name: str, what: str, catalog: bytes, fact: str) -> Case:
        return _case(f"boot-{name}", what, lambda: image(catalog=catalog), harmless(fact))

    for name, sector in (("behind-file", 1 << 20), ("at-2-32", 0xFFFFFFFF)):
        yield _case(
            f"boot-{name}",
            f"a catalogue in sector {sector}",
            lambda sector=sector: image(primary(), boot(sector), TERMINATOR),
            harmless("problem"),
        )
    yield _case(
        "boot-on-itself",
        "the boot record is its own catalogue",
        lambda: image(primary(), boot(17), TERMINATOR),
        harmless("problem"),
    )
    yield case("checksum", "a wrong checksum", poke(validation(), (4, b"\7")) + boot_entry(), "checksum")
    yield case("key", "a wrong key", poke(validation(), (31, b"\0")) + boot_entry(), "problem")
    yield case(
        "sections-for-ever",
        "section headers that all promise more",
        validation() + boot_entry() + section(0x90, 65535) * 62,
        "",
    )
    yield case(
        "entries-outside",
        "boot images behind the end",
        validation() + boot_entry(0xFFFFFFFF, count=65535) * 60,
        "4294967295",
    )
    yield case("media-15", "an unknown emulation", validation(7) + boot_entry(media=0xFF), "0x")
    records = [primary()] + [boot()] * 2 + [TERMINATOR]
    yield _case("boot-twice", "two boot records", lambda: image(*records), harmless())


def grafts() -> Iterator[Case]:
    """Inline grafts that lie."""
    damaged = "damaged"

    def undo(name: str, what: str, **lies: object) -> Case:
        return _case(f"undo-{name}", what, lambda: grafted(**lies), graft(damaged))  # type: ignore[arg-type]

    yield undo("patch-elsewhere", "UNDO would change the boot sector", patches=((0, b"evil"),))
    yield undo("patch-shorter", "UNDO restores 127 bytes", patches=((FIELD, bytes(127)),))
    yield undo("patch-not-blank", "UNDO restores what no attach replaces", patches=((FIELD, b"evil" * 32),))
    yield undo("two-patches", "UNDO with a second patch", patches=((FIELD, bytes(128)), (FIELD + 4096, bytes(128))))
    yield undo("no-patch", "UNDO without the field", patches=())
    yield undo("no-facts", "UNDO without the volume's size", facts=())
    yield undo("other-volume", "UNDO speaks of another volume", facts=((b"volume_space_size", 23),))
    yield undo("other-size", "UNDO speaks of another size", undo_size=SIZE - SECTOR)

    def locator(name: str, what: str, expect: Expect, **lies: object) -> Case:
        return _case(f"locator-{name}", what, lambda: grafted(**lies), expect)  # type: ignore[arg-type]

    yield locator("into-content", "a record in the content", graft(damaged, "another place"), offset=FIELD)
    yield locator("at-0", "a record at 0", graft(damaged, "another place"), offset=0)
    yield locator("2-62", "a record at 2^62", graft(damaged), offset=1 << 62)
    yield locator("file-0", "an original of nothing", graft(damaged), file_size=0, offset=0)
    yield locator("file-2-62", "an original of 2^62 bytes", graft(damaged), file_size=1 << 62)
    yield locator(
        "file-shorter",
        "an original shorter than the volume",
        graft(damaged),
        file_size=SIZE - SECTOR,
        offset=SIZE - SECTOR,
    )
    yield locator("1-gib", "a record of 1 GiB", graft("record-cut"), size=1 << 30)
    yield locator("flags", "unknown flags", graft(damaged, "locators are damaged"), flags=8)
    yield locator("check", "a wrong digest", graft(damaged, "locators are damaged"), check=bytes(8))
    yield locator("digest", "another record's digest", graft("record-overwritten"), record_sha256=bytes(32))
    yield locator(
        "sidecar", "a sidecar's locator, no sidecar", graft("locator-without-record"), flags=lay.SIDECAR, offset=0
    )
    yield _case("footer-zero", "zeros over the footer", lambda: grafted(footer=bytes(SECTOR)), graft(damaged, "footer"))
    yield _case(
        "footer-more",
        "bytes behind the footer's locator",
        lambda: poke(grafted(), (len(grafted()) - 9, b"x")),
        graft(damaged, "footer"),
    )
    yield _case("footer-cut", "the footer is missing", lambda: grafted()[:-SECTOR], graft("record-cut"))
    yield _case("record-cut", "half the record is missing", lambda: grafted()[: SIZE + 300], graft("record-cut"))
    yield _case("grown", "a sector behind the footer", lambda: grafted() + bytes(SECTOR), graft("file-grown"))
    yield _case(
        "swarm",
        "4000 magics behind the volume",
        lambda: image(tail=lay.MAGIC.ljust(SECTOR, b"\1") * 4000 + bytes(SECTOR)),
        graft("none"),
    )
    record = lay.record([Part(UNDO, lay.undo(SIZE * 100)), ENVELOPE_PART]).ljust(SECTOR, b"\0")
    yield _case(
        "swarm-of-records",
        "1000 sound records of other images behind the volume",
        lambda: image(tail=record * 1000 + bytes(SECTOR)),
        graft("none"),
    )


def samples() -> dict[str, bytes]:
    """A well-formed image, and a grafted one."""
    return {"disc.iso": image(), "grafted.iso": grafted()}


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (descriptors, catalogues, grafts):
        yield from group()
