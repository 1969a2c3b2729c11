"""A small qcow2 image written from QEMU's docs/interop/qcow2.txt, and edits of its fields."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

BITS = 12
CLUSTER = 1 << BITS
SIZE = 1 << 20
#: Byte offset and struct code of each header field.
FIELDS = {
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"),
    "autoclear": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression": (104, ">B"),
}
HEADER_LENGTH = 112
#: Clusters of the image: header, refcount table, refcount block, L1 table, L2 table, then guest data.
REFTABLE, REFBLOCK, L1, L2, DATA, PACKED = (number * CLUSTER for number in (1, 2, 3, 4, 5, 8))
COPIED, COMPRESSED = 1 << 63, 1 << 62
EXT_BACKING_FORMAT, EXT_FEATURES, EXT_BITMAPS, EXT_CRYPTO, EXT_DATA_FILE, EXT_GRAFT = (
    0xE2792ACA,
    0x6803F857,
    0x23852875,
    0x0537BE77,
    0x44415441,
    0x564D4772,
)


def extension(magic: int, data: bytes, length: int | None = None) -> bytes:
    return struct.pack(">II", magic, len(data) if length is None else length) + data + bytes(-len(data) % 8)


def packed(data: bytes, level: int = 9) -> bytes:
    """Raw deflate with QEMU's window."""
    press = zlib.compressobj(level, zlib.DEFLATED, -12)
    return press.compress(data) + press.flush()


def descriptor(offset: int, length: int, bits: int = BITS) -> int:
    """The L2 entry of a compressed cluster."""
    sectors = (offset % 512 + length + 511) // 512 - 1
    return COMPRESSED | sectors << 62 - (bits - 8) | offset


def pattern(number: int) -> bytes:
    return bytes((number * 31 + at) & 0xFF for at in range(256)) * (CLUSTER // 256)


def image(
    *,
    version: int = 3,
    extensions: bytes = b"",
    backing: bytes = b"",
    snapshots: bytes = b"",
    more: Sequence[bytes] = (),
    **fields: int,
) -> bytearray:
    """A sound image: guest clusters 0 to 2 are data, 3 is compressed, 4 a zero cluster, the rest unmapped.

    Args:
        version: 2 or 3.
        extensions: Bytes between the header and the end mark.
        backing: A backing file's name; stands right behind the end mark.
        snapshots: A snapshot table; stands in the cluster behind the data.
        more: Further clusters behind that.
        fields: Header fields to overwrite, see ``FIELDS``.
    """
    head = bytearray(CLUSTER)
    head[:4] = b"QFI\xfb"
    length = HEADER_LENGTH if version == 3 else 72
    defaults = {
        "version": version,
        "cluster_bits": BITS,
        "size": SIZE,
        "l1_size": 1,
        "l1_table_offset": L1,
        "refcount_table_offset": REFTABLE,
        "refcount_table_clusters": 1,
    }
    if version == 3:
        defaults |= {"refcount_order": 4, "header_length": HEADER_LENGTH}
    head[length : length + len(extensions)] = extensions
    if backing:
        at = length + len(extensions) + 8
        head[at : at + len(backing)] = backing
        defaults |= {"backing_file_offset": at, "backing_file_size": len(backing)}
    clusters = [bytes(CLUSTER)] * 4 + [pattern(n) for n in range(3)] + [packed(pattern(3)).ljust(CLUSTER, b"\0")]
    if snapshots:
        defaults |= {"snapshots_offset": len(clusters) * CLUSTER + CLUSTER}
        clusters.append(snapshots.ljust(-(-len(snapshots) // CLUSTER) * CLUSTER, b"\0"))
    data = bytearray(head + b"".join([*clusters, *more]))
    for name, value in (defaults | fields).items():
        at, code = FIELDS[name]
        struct.pack_into(code, data, at, value)
    struct.pack_into(">Q", data, REFTABLE, REFBLOCK)
    struct.pack_into(f">{len(data) // CLUSTER}H", data, REFBLOCK, *[1] * (len(data) // CLUSTER))
    struct.pack_into(">Q", data, L1, COPIED | L2)
    zero = 1 if version == 3 else 0
    entries = [COPIED | DATA + n * CLUSTER for n in range(3)] + [descriptor(PACKED, len(packed(pattern(3)))), zero]
    struct.pack_into(">5Q", data, L2, *entries)
    return data


def content() -> bytes:
    """What the guest sees of ``image()``."""
    return b"".join(pattern(n) for n in range(4)).ljust(SIZE, b"\0")


def snapshot(
    *,
    l1_offset: int = L1,
    l1_size: int = 1,
    identity: bytes = b"1",
    name: bytes = b"snap",
    extra: bytes = struct.pack(">QQ", 0, SIZE),
    extra_size: int | None = None,
    id_size: int | None = None,
    name_size: int | None = None,
) -> bytes:
    """One entry of a snapshot table."""
    out = struct.pack(
        ">QIHHIIQII",
        l1_offset,
        l1_size,
        len(identity) if id_size is None else id_size,
        len(name) if name_size is None else name_size,
        0,
        0,
        0,
        0,
        len(extra) if extra_size is None else extra_size,
    )
    out += extra + identity + name
    return out + bytes(-len(out) % 8)


def changed(*edits: tuple[int, int], base: bytearray | None = None) -> bytearray:
    """The image with 64-bit big-endian numbers replaced: (file offset, value) each."""
    data = image() if base is None else base
    for offset, value in edits:
        struct.pack_into(">Q", data, offset, value)
    return data
