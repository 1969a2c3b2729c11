"""VHDs laid out by hand, independently of the package: "Virtual Hard Disk Image Format Specification" 1.0."""

import random
import struct
from functools import lru_cache

from imagefmt_helpers import tool

MIB = 1 << 20
UUID = bytes(range(16))
#: Offset of the last parent locator entry in a dynamic header, and of the checksums.
POINTER = 744
HEADER = 512
QEMU = ("qemu-img", "convert", "-f", "vpc", "-O", "raw")


def summed(data, field):
    """Return ``data`` with the right checksum at ``field``."""
    blank = data[:field] + bytes(4) + data[field + 4 :]
    return blank[:field] + struct.pack(">I", ~sum(blank) & 0xFFFFFFFF) + blank[field + 4 :]


def footer(size, *, kind=3, creator=b"win ", geometry=(0, 0, 0), data_offset=512, version=0x10000, length=512):
    host = 0xFFFFFFFFFFFFFFFF if kind == 2 else data_offset
    data = struct.pack(">8sIIQI4sI4sQQ", b"conectix", 2, version, host, 0, creator, 0xA0000, b"Wi2k", size, size)
    data += struct.pack(">HBBII16s", *geometry, kind, 0, UUID)
    return summed(data.ljust(512, b"\0"), 64)[:length]


def header(entries, block_size, *, table=1536, version=0x10000, parent="", locators=(), cookie=b"cxsparse"):
    parent_id = bytes(range(16, 32)) if parent else bytes(16)
    data = struct.pack(">8sQQIIII16sII", cookie, (1 << 64) - 1, table, version, entries, block_size, 0, parent_id, 0, 0)
    data += parent.encode("utf-16-be").ljust(512, b"\0")
    for code, space, length, offset in locators:
        data += struct.pack(">4sIIIQ", code, space, length, 0, offset)
    return summed(data.ljust(1024, b"\0"), 36)


@lru_cache
def noise(size, seed=1):
    return random.Random(seed).randbytes(size)


def fixed(content, *, length=512, **options):
    return content + footer(len(content), kind=2, length=length, **options)


def dynamic(blocks, size=65536, block_size=4096, *, bitmaps=None, end=None, foot=None, head=None, bat=None):
    """A dynamic disk: ``blocks`` maps block numbers to bytes, ``bitmaps`` to bytes of their bitmap.

    ``foot``, ``head`` and ``bat`` replace the footer (both copies), the dynamic header and entries of the table.
    """
    entries = -(-size // block_size)
    foot = footer(size) if foot is None else foot
    table = [0xFFFFFFFF] * entries
    first = 1536 + -(-4 * entries // 512) * 512
    room = -(-block_size // 512 // 8 // 512) * 512
    body = b""
    for number, data in blocks.items():
        table[number] = (first + len(body)) // 512
        body += (bitmaps or {}).get(number, b"\xff" * room).ljust(room, b"\0") + data.ljust(block_size, b"\0")
    for number, value in (bat or {}).items():
        table[number] = value
    packed = struct.pack(f">{entries}I", *table).ljust(first - 1536, b"\xff")
    return foot + (head or header(entries, block_size)) + packed + body + (foot if end is None else end)


def sample():
    """A small dynamic disk with two stored blocks, out of order."""
    return dynamic({3: noise(4096, 3), 1: noise(3000, 1)})


def make(path, size="8M", options=""):
    """Let qemu-img make a disk, and write into it."""
    tool("qemu-img", "create", "-q", "-f", "vpc", *(["-o", options] if options else []), path, size)
    return write(path, "write -P 7 64k 128k", "write -P 9 3000k 700k", "write -P 3 7M 1k")


def write(path, *commands):
    tool("qemu-io", "-t", "unsafe", "-f", "vpc", *(part for command in commands for part in ("-c", command)), path)
    return path


def raw_bytes(path, *, current_size=False):
    """What QEMU says the guest sees; ``current_size``: told to take the size from there, as later versions do."""
    out = path.with_suffix(".converted")
    if current_size:
        options = f"driver=vpc,force_size_calc=current_size,file.filename={path}"
        tool("qemu-img", "convert", "--image-opts", "-O", "raw", options, out)
    else:
        tool(*QEMU, path, out)
    data = out.read_bytes()
    out.unlink()
    return data
