"""Helpers: VMDK images from the real qemu-img, and small ones laid out here sector by sector."""

from __future__ import annotations

import random
import re
import struct
import zlib
from functools import lru_cache
from pathlib import Path

from imagefmt_helpers import tool

from vmgraft.imagefmt.contract import Image, OpenOptions
from vmgraft.imagefmt.vmdk import FORMAT

MIB = 1 << 20
AT_END = (1 << 64) - 1
HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
#: Offsets in the header, counted by hand from the "Virtual Disk Format" text.
AT = {
    "version": 4, "flags": 8, "capacity": 12, "grain": 20, "descriptor": 28, "descriptor_size": 36, "gtes": 44,
    "rgd": 48, "gd": 56, "overhead": 64, "unclean": 72, "newlines": 73, "compression": 77,
}  # fmt: skip


@lru_cache
def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def descriptor(capacity: int, kind: str = "monolithicSparse", *, name: str = "disk.vmdk", parent: str = "ffffffff",
               more: str = "") -> bytes:  # fmt: skip
    access = "RDONLY" if kind == "streamOptimized" else "RW"
    return (
        f'# Disk DescriptorFile\nversion=1\nCID=7e5b80a7\nparentCID={parent}\ncreateType="{kind}"\n{more}\n'
        f'# Extent description\n{access} {capacity} SPARSE "{name}"\n\n# The Disk Data Base\n#DDB\n\n'
        'ddb.virtualHWVersion = "8"\nddb.adapterType = "lsilogic"\n'
    ).encode()


def head(capacity: int, grain: int, gd: int, overhead: int, *, rgd: int = 0, flags: int = 1, version: int = 1,
         room: int = 20, compression: int = 0) -> bytes:  # fmt: skip
    flags |= 2 if rgd else 0
    fields = (b"KDMV", version, flags, capacity, grain, 1, room, 512, rgd, gd, overhead, 0, b"\n \r\n", compression)
    return HEADER.pack(*fields).ljust(512, b"\0")


def build(grains: dict[int, bytes], *, capacity: int, grain: int = 8, overhead: int = 64, room: int = 20,
          text: bytes | None = None, flags: int = 1, zero: tuple[int, ...] = (),
          redundant: bool = True) -> bytes:  # fmt: skip
    """A monolithicSparse image; ``grains`` by number, ``zero`` those marked as zero."""
    tables = -(-capacity // (grain * 512))
    size = -(-tables * 4 // 512)
    rgd = 1 + room if redundant else 0
    gd = 1 + room + ((size + 4 * tables) if redundant else 0)
    end = gd + size + 4 * tables
    assert end <= overhead, end
    entries, data = [0] * (tables * 512), b""
    for number, content in grains.items():
        entries[number] = overhead + len(data) // 512
        data += content.ljust(grain * 512, b"\0")
    for number in zero:
        entries[number] = 1
    gts = struct.pack(f"<{len(entries)}I", *entries)
    text = descriptor(capacity) if text is None else text
    out = head(capacity, grain, gd, overhead, rgd=rgd, flags=flags | (4 if zero else 0), room=room)
    out += text.ljust(room * 512, b"\0")
    for place in (rgd, gd):
        if place:
            out += (
                struct.pack(f"<{tables}I", *[place + size + 4 * n for n in range(tables)]).ljust(size * 512, b"\0")
                + gts
            )
    return out.ljust(overhead * 512, b"\0") + data


def marker(value: int, kind: int) -> bytes:
    return struct.pack("<QII", value, 0, kind).ljust(512, b"\0")


def pack_grain(lba: int, content: bytes) -> bytes:
    data = zlib.compress(content)
    data = struct.pack("<QI", lba, len(data)) + data
    return data.ljust(-(-len(data) // 512) * 512, b"\0")


def build_stream(grains: dict[int, bytes], *, capacity: int, grain: int = 128, overhead: int = 128, room: int = 20,
                 text: bytes | None = None) -> bytes:  # fmt: skip
    """A streamOptimized image with its grain directory at the end and a footer, as VMware and VirtualBox write it."""
    tables = -(-capacity // (grain * 512))
    entries = [0] * (tables * 512)
    text = descriptor(capacity, "streamOptimized") if text is None else text
    options = {"flags": 0x30001, "version": 3, "room": room, "compression": 1}
    out = head(capacity, grain, AT_END, overhead, **options)
    out = (out + text.ljust(room * 512, b"\0")).ljust(overhead * 512, b"\0")
    for number, content in grains.items():
        entries[number] = len(out) // 512
        out += pack_grain(number * grain, content)
    places = []
    for table in range(tables):
        part = entries[table * 512 : table * 512 + 512]
        out += marker(4, 1) if any(part) else b""
        places.append(len(out) // 512 if any(part) else 0)
        out += struct.pack("<512I", *part) if any(part) else b""
    size = -(-tables * 4 // 512)
    out += marker(size, 2)
    gd = len(out) // 512
    out += struct.pack(f"<{tables}I", *places).ljust(size * 512, b"\0")
    return out + marker(1, 3) + head(capacity, grain, gd, overhead, **options) + marker(0, 0)


def small_image(path: Path, **options: int | bytes) -> Path:
    """Twelve grains of 4 KiB, four of them stored, one zero, the last one cut by the disk's end."""
    grains = {1: noise(4096, 5), 2: b"vmdk" * 1024, 7: noise(4096, 6), 11: b"end" * 1000}
    path.write_bytes(build(grains, capacity=11 * 8 + 3, zero=(4,), **options))  # type: ignore[arg-type]
    return path


def stream_image(path: Path, **options: int | bytes) -> Path:
    """Ten grains of 64 KiB, three of them stored, the last one a single sector."""
    grains = {0: (b"text that shrinks " * 3641)[:65536], 3: noise(65536, 7), 9: b"tail" * 128}
    path.write_bytes(build_stream(grains, capacity=9 * 128 + 1, **options))  # type: ignore[arg-type]
    return path


def qemu_image(path: Path, options: str = "subformat=monolithicSparse", size: str = "6M") -> Path:
    tool("qemu-img", "create", "-q", "-f", "vmdk", "-o", options, path, size)
    qemu_io(path, "write -P 7 64k 100k", "write -P 9 4M 1536k")
    return path


def qemu_stream(path: Path) -> Path:
    raw = path.with_suffix(".in")
    raw.write_bytes(
        noise(100_000, 3).ljust(MIB, b"\0") + b"some text " * 30_000 + bytes(1000 * 512 - 300_000 % 512 - 212)
    )
    size = raw.stat().st_size // 512 * 512
    with raw.open("r+b") as file:
        file.truncate(size)
    tool("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
    raw.unlink()
    return path


def qemu_io(path: Path, *commands: str) -> None:
    tool("qemu-io", "-t", "unsafe", "-f", "vmdk", *[part for one in commands for part in ("-c", one)], path)


def qemu_check(path: Path) -> None:
    tool("qemu-img", "check", "-q", "-f", "vmdk", path)


def raw_bytes(path: Path) -> bytes:
    """What QEMU says the guest sees."""
    out = path.with_suffix(".converted")
    tool("qemu-img", "convert", "-f", "vmdk", "-O", "raw", path, out)
    data = out.read_bytes()
    out.unlink()
    return data


def open_vmdk(path: Path, *, writable: bool = False) -> Image:
    return FORMAT.open(path, OpenOptions(writable=writable))


def text_of(path: Path) -> bytes:
    data = path.read_bytes()
    offset, size = struct.unpack_from("<QQ", data, AT["descriptor"])
    return data[offset * 512 : (offset + size) * 512].partition(b"\0")[0]


def set_text(path: Path, text: bytes) -> None:
    """Rewrite the descriptor as another tool would: the text, then NULs."""
    data = bytearray(path.read_bytes())
    offset, size = struct.unpack_from("<QQ", data, AT["descriptor"])
    assert len(text) < size * 512
    data[offset * 512 : (offset + size) * 512] = text.ljust(size * 512, b"\0")
    path.write_bytes(data)


def without_cid(path: Path) -> bytes:
    """The file without the CID, which QEMU draws by lot at the first write, and without what follows the text's NUL."""
    data = bytearray(path.read_bytes())
    offset, size = struct.unpack_from("<QQ", data, AT["descriptor"])
    text = data[offset * 512 : (offset + size) * 512].partition(b"\0")[0]
    text = re.sub(rb"(?m)^CID=[0-9a-f]+", b"CID=xxxxxxxx", text, count=1)
    data[offset * 512 : (offset + size) * 512] = text.ljust(size * 512, b"\0")
    return bytes(data)
