"""ZIP archives: some by Python's zipfile, some laid out by hand after APPNOTE.TXT, independently of the package."""

import io
import random
import struct
import zipfile
import zlib
from functools import lru_cache

STAMP = (2026, 1, 1, 0, 0, 0)
MARK = 0xFFFFFFFF


@lru_cache
def noise(size, seed=1):
    return random.Random(seed).randbytes(size)


def archive(entries=None, *, comment=b"", method=zipfile.ZIP_DEFLATED, prefix=b""):
    """An archive by Python's zipfile; ``prefix`` stands before it and is not counted in its offsets."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, data in (entries or {"a.txt": b"some text\n" * 50, "b/c.bin": noise(3000)}).items():
            made.writestr(zipfile.ZipInfo(name, STAMP), data, method)
        made.comment = comment
    return prefix + buffer.getvalue()


def many(count=1200):
    """An archive whose central directory is longer than a page, and than what programs search for its end."""
    return archive({f"folder/with/a/long/name/{number:06d}.txt": b"x" for number in range(count)}, method=0)


def local(name, data, *, sizes=None, extra=b""):
    packed, raw = (len(data), len(data)) if sizes is None else sizes
    head = struct.pack(
        "<IHHHHHIIIHH", 0x04034B50, 45, 0, 0, 0, 0x21, zlib.crc32(data), packed, raw, len(name), len(extra)
    )
    return head + name + extra + data


def central(name, data, offset, *, sizes=None, extra=b"", disk=0, comment=b"", signature=0x02014B50):
    packed, raw = (len(data), len(data)) if sizes is None else sizes
    head = struct.pack("<IHHHHHHIII", signature, 45, 45, 0, 0, 0, 0x21, zlib.crc32(data), packed, raw)
    return (
        head + struct.pack("<HHHHHII", len(name), len(extra), len(comment), disk, 0, 0, offset) + name + extra + comment
    )


def end(entries, size, offset, *, comment=b"", disk=0, here=None, stated=None):
    here = entries if here is None else here
    length = len(comment) if stated is None else stated
    return struct.pack("<IHHHHIIH", 0x06054B50, disk, disk, here, entries, size, offset, length) + comment


def end64(entries, size, offset, at, *, extra=b"", disks=1, disk=0):
    record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44 + len(extra), 45, 45, disk, 0, entries, entries, size, offset)
    return record + extra + struct.pack("<IIQI", 0x07064B50, 0, at, disks)


def by_hand(*, wide=False, extra=b"", mixed=False, prefix=b"", counted=False, comment=b"", gap=b""):
    """One stored entry; ``wide``: with ZIP64 end records, ``mixed``: which repeat what the end record says."""
    data, name = b"stored bytes\n" * 10, b"entry.txt"
    shift = len(prefix) if counted else 0
    body = local(name, data) + gap
    directory = central(name, data, shift)
    start = len(body) + shift
    if not wide:
        return prefix + body + directory + end(1, len(directory), start, comment=comment)
    narrow = (1, len(directory), start) if mixed else (0xFFFF, MARK, MARK)
    records = end64(1, len(directory), start, start + len(directory), extra=extra)
    return prefix + body + directory + records + end(*narrow, comment=comment)


#: Every kind that is read; the launcher's offsets count the script (zip -A) or do not (cat).
KINDS = {
    "plain": archive(),
    "stored": archive(method=0),
    "comment": archive(comment=b"a comment"),
    "long comment": archive(comment=b"c" * 65535),
    "by hand": by_hand(),
    "zip64": by_hand(wide=True),
    "zip64, repeated": by_hand(wide=True, mixed=True),
    "zip64, extensible": by_hand(wide=True, extra=b"x" * 100),
    "launcher, counted": by_hand(prefix=b"#!/bin/sh\nexec java -jar $0\n", counted=True),
    "launcher, not counted": by_hand(prefix=b"#!/bin/sh\nexec java -jar $0\n"),
    "launcher, zip64": by_hand(prefix=b"MZ" + bytes(700), wide=True),
    "bytes before the directory": by_hand(gap=noise(100)),
    "long directory": many(),
}
