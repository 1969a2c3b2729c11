"""Helpers: VDI images from the real qemu-img, and small ones laid out here byte by byte, as VirtualBox does it."""

from __future__ import annotations

import random
import struct
from functools import lru_cache
from pathlib import Path

from imagefmt_helpers import tool

from vmgraft.imagefmt.contract import Image, OpenOptions
from vmgraft.imagefmt.vdi import FORMAT

MIB = 1 << 20
FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
# Offsets in the header, counted by hand from VDICore.h.
VERSION, HEADER_SIZE, TYPE, COMMENT, MAP_AT, DATA_AT = 68, 72, 76, 84, 340, 344
SECTOR_SIZE, DISK_SIZE, BLOCK_SIZE, BLOCK_EXTRA, BLOCKS, ALLOCATED = 360, 368, 376, 380, 384, 388
UUID, LINKAGE, PARENT_MODIFY = 392, 424, 440


@lru_cache
def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def header(count: int, allocated: int, *, block: int = MIB, size: int | None = None, map_at: int = 512,
           data_at: int | None = None, kind: int = 1, comment: bytes = b"",
           header_size: int = 400) -> bytearray:  # fmt: skip
    """The first sector; ``data_at`` is the next sector behind the map by default."""
    data_at = -(-(map_at + 4 * count) // 512) * 512 if data_at is None else data_at
    head = bytearray(512)
    head[:39] = b"<<< Oracle VM VirtualBox Disk Image >>>"
    struct.pack_into("<4sIIII", head, 64, b"\x7f\x10\xda\xbe", 0x00010001, header_size, kind, 0)
    head[COMMENT : COMMENT + len(comment)] = comment
    struct.pack_into("<IIIIIII", head, MAP_AT, map_at, data_at, 0, 0, 0, 512, 0)
    size = count * block if size is None else size
    struct.pack_into("<QIIII", head, DISK_SIZE, size, block, 0, count, allocated)
    head[UUID : UUID + 32] = bytes(range(32))
    return head


def build(entries: list[int], blocks: list[bytes], **options: int | bytes | None) -> bytes:
    """An image with the given block map, and the blocks it may name in their order."""
    head = header(len(entries), len(blocks), **options)  # type: ignore[arg-type]
    map_at, data_at = struct.unpack_from("<II", head, MAP_AT)
    data = bytes(head).ljust(map_at, b"\0") + struct.pack(f"<{len(entries)}I", *entries)
    return data.ljust(data_at, b"\0") + b"".join(blocks)


def vbox_image(path: Path, *, comment: bytes = b"", at: int = MIB) -> Path:
    """Five blocks as VirtualBox lays them out: the map at 1 MiB, the data 1 MiB behind it."""
    blocks = [noise(MIB, 3), b"\7" * MIB]
    options = {"map_at": at, "data_at": at + MIB, "comment": comment}
    path.write_bytes(build([FREE, 1, ZERO, 0, FREE], blocks, **options))
    return path


def small_image(path: Path, gap: int = 4096, comment: bytes = b"") -> Path:
    """Four blocks of 4 KiB and a gap before the map; QEMU cannot read such blocks."""
    entries, blocks = [1, FREE, 0, ZERO], [noise(4096, 5), b"vdi" * 1365 + b"!"]
    path.write_bytes(build(entries, blocks, block=4096, map_at=512 + gap, comment=comment))
    return path


def qemu_image(path: Path, *options: str, size: str = "6M") -> Path:
    tool("qemu-img", "create", "-q", "-f", "vdi", *options, path, size)
    qemu_io(path, "write -P 7 64k 100k", "write -P 9 4M 1536k")
    return path


def qemu_io(path: Path, *commands: str) -> None:
    tool("qemu-io", "-t", "unsafe", "-f", "vdi", *[part for one in commands for part in ("-c", one)], path)


def qemu_check(path: Path) -> None:
    tool("qemu-img", "check", "-q", "-f", "vdi", path)


def raw_bytes(path: Path) -> bytes:
    """What QEMU says the guest sees."""
    out = path.with_suffix(".converted")
    tool("qemu-img", "convert", "-f", "vdi", "-O", "raw", path, out)
    data = out.read_bytes()
    out.unlink()
    return data


def open_vdi(path: Path, *, writable: bool = False) -> Image:
    return FORMAT.open(path, OpenOptions(writable=writable))
