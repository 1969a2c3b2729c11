"""The strict parser of a qcow2 header and its extensions. Nothing in it follows an offset out of the first cluster."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from vmgraft.errors import MalformedImageError, UnsupportedError
from vmgraft.imagefmt.parse import parse_struct
from vmgraft.imagefmt.qcow2 import _layout as lay


@dataclass(frozen=True, slots=True)
class Extension:
    """One header extension.

    Attributes:
        offset: File offset of its 8-byte header.
        magic: Its type.
        length: Bytes of data, without padding.
    """

    offset: int
    magic: int
    length: int

    @property
    def data_offset(self) -> int:
        """File offset of the data."""
        return self.offset + lay.EXT_HEADER_SIZE

    @property
    def end(self) -> int:
        """File offset just behind the padded data."""
        return self.data_offset + (self.length + 7 & ~7)

    @property
    def name(self) -> str:
        """The extension's name, or its magic in hexadecimal."""
        return lay.EXT_NAMES.get(self.magic, f"0x{self.magic:08x}")


@dataclass(frozen=True, slots=True)
class Header:
    """A qcow2 header that passed every check; offsets and sizes in bytes unless said otherwise.

    Attributes:
        size: Bytes of guest content. Whole sectors: QEMU shows no part of one (block/qcow2.c, ``total_sectors``).
        l1_size: Entries of the L1 table.
        refcount_bits: Width of a refcount.
        header_length: 72 in version 2.
        compression_type: 0 zlib, 1 zstd.
        extensions: In file order, without the end mark.
        end_offset: Where the end mark of the extensions stands, or would stand.
        has_end: Whether an explicit end mark is there (the chain may also just run into the backing file name).
        backing_name: Bytes of the backing file's name; empty when there is none.
        feature_names: (type, bit) → name, from the image's own table.
        first_cluster: The bytes of the first cluster.
    """

    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible: int
    compatible: int
    autoclear: int
    refcount_bits: int
    header_length: int
    compression_type: int
    extensions: tuple[Extension, ...]
    end_offset: int
    has_end: bool
    backing_name: bytes
    feature_names: dict[tuple[int, int], str]
    first_cluster: bytes

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries are 128 bits wide and clusters have 32 subclusters."""
        return bool(self.incompatible & lay.EXTENDED_L2)

    @property
    def l2_entries(self) -> int:
        """Entries in one L2 table."""
        return self.cluster_size // (16 if self.extended_l2 else 8)

    def find(self, magic: int) -> Extension | None:
        """Return the first extension of that type."""
        return next((ext for ext in self.extensions if ext.magic == magic), None)

    def data(self, ext: Extension) -> bytes:
        """Return the data of an extension, without padding."""
        return self.first_cluster[ext.data_offset : ext.data_offset + ext.length]


class _Parser:
    """Carries the file name and the raw fields through the checks."""

    def __init__(self, data: bytes, file_size: int, file: str) -> None:
        self.data = data
        self.file_size = file_size
        self.file = file
        self.raw: dict[str, int] = {}

    def bad(self, field: str, message: str, hint: str | None = None, offset: int | None = None) -> NoReturn:
        where = lay.FIELD_OFFSET.get(field) if offset is None else offset
        raise MalformedImageError(message, file=self.file, offset=where, field=field, hint=hint)

    def struct(self, layout: Any, offset: int, field: str) -> dict[str, int]:
        size = layout.sizeof()
        piece = self.data[offset : offset + size]
        if len(piece) < size:
            self.bad(field, f"the file ends inside the header ({len(self.data)} bytes)", offset=offset)
        parsed = parse_struct(layout, piece, file=self.file, offset=offset, what="header")
        return {key: value for key, value in parsed.items() if isinstance(value, int)}

    def read_raw(self) -> None:
        if self.data[:4] != lay.MAGIC:
            self.bad("magic", "not a qcow2 file")
        self.raw = self.struct(lay.HEADER_V2, 0, "header")
        version = self.raw["version"]
        if version not in (2, 3):
            self.bad("version", f"version {version}; only 2 and 3 exist", "convert it with `qemu-img convert -O qcow2`")
        defaults = {"incompatible_features": 0, "compatible_features": 0, "autoclear_features": 0}
        self.raw |= {**defaults, "refcount_order": 4, "header_length": lay.V2_LENGTH, "compression_type": 0}
        if version == 3:
            self.raw |= self.struct(lay.HEADER_V3, lay.V2_LENGTH, "header")

    def check_geometry(self) -> None:
        raw = self.raw
        bits, length = raw["cluster_bits"], raw["header_length"]
        if not lay.MIN_CLUSTER_BITS <= bits <= lay.MAX_CLUSTER_BITS:
            self.bad("cluster_bits", f"{bits} is not within {lay.MIN_CLUSTER_BITS}..{lay.MAX_CLUSTER_BITS}")
        if raw["version"] == 3 and (length < lay.V3_LENGTH or length > 1 << bits or length % 8):
            self.bad("header_length", f"{length} is not a multiple of 8 within {lay.V3_LENGTH}..{1 << bits}")
        if self.file_size < 1 << bits:
            self.bad("cluster_bits", f"the file ({self.file_size} bytes) is shorter than one cluster ({1 << bits})")
        size = raw["size"]
        if not lay.SECTOR <= size <= lay.MAX_SIZE:
            self.bad("size", f"virtual size {size} is not within {lay.SECTOR}..2^63-1")
        if raw["crypt_method"] >= len(lay.CRYPT_NAMES):
            self.bad("crypt_method", f"unknown encryption method {raw['crypt_method']}")
        if raw["refcount_order"] > lay.MAX_REFCOUNT_ORDER:
            self.bad("refcount_order", f"{raw['refcount_order']} is above {lay.MAX_REFCOUNT_ORDER}")

    def check_features(self, names: dict[tuple[int, int], str]) -> None:
        incompatible = self.raw["incompatible_features"]
        unknown = incompatible & ~lay.KNOWN_INCOMPATIBLE
        if unknown:
            found = [f"{names.get((0, bit), 'unnamed')} (bit {bit})" for bit in _bits(unknown)]
            more = f" and {len(found) - 4} more" if len(found) > 4 else ""
            listed = ", ".join(found[:4]) + more
            raise UnsupportedError(
                f"incompatible features that this version does not know: {listed}",
                file=self.file,
                offset=lay.FIELD_OFFSET["incompatible_features"],
                field="incompatible_features",
                hint="convert the image with `qemu-img convert -O qcow2`",
            )
        if incompatible & lay.EXTENDED_L2 and self.raw["cluster_bits"] < lay.MIN_EXTENDED_L2_BITS:
            self.bad("cluster_bits", f"extended L2 entries need at least {lay.MIN_EXTENDED_L2_BITS}")
        compression = self.compression_type()
        if bool(compression) != bool(incompatible & lay.COMPRESSION_TYPE):
            self.bad("compression_type", f"type {compression} contradicts the compression feature bit")
        if compression not in (lay.COMPRESSION_ZLIB, lay.COMPRESSION_ZSTD):
            raise UnsupportedError(
                f"compression type {compression} is neither zlib (0) nor zstd (1)",
                file=self.file,
                offset=lay.FIELD_OFFSET["compression_type"],
                field="compression_type",
            )

    def compression_type(self) -> int:
        present = self.raw["header_length"] > lay.V3_LENGTH
        return self.data[lay.V3_LENGTH] if present else 0

    def check_table(self, field: str, offset: int, size: int, align: int) -> None:
        """A table lies behind the first cluster, aligned, inside the file."""
        cluster = 1 << self.raw["cluster_bits"]
        if offset % align:
            self.bad(field, f"offset {offset} is not a multiple of {align}")
        if offset < cluster:
            self.bad(field, f"offset {offset} lies inside the header's cluster")
        if offset + size > self.file_size:
            self.bad(field, f"the table ({size} bytes at {offset}) ends behind the file ({self.file_size} bytes)")

    def check_tables(self) -> None:
        raw = self.raw
        cluster = 1 << raw["cluster_bits"]
        if raw["l1_size"] * 8 > lay.MAX_L1_BYTES:
            self.bad("l1_size", f"{raw['l1_size']} entries are above the limit of {lay.MAX_L1_BYTES // 8}")
        per_l2 = cluster // (16 if raw["incompatible_features"] & lay.EXTENDED_L2 else 8) * cluster
        needed = -(-raw["size"] // per_l2)
        if raw["l1_size"] < needed:
            self.bad("l1_size", f"{raw['l1_size']} entries are too few: the virtual size needs {needed}")
        self.check_table("l1_table_offset", raw["l1_table_offset"], raw["l1_size"] * 8, cluster)
        table = raw["refcount_table_clusters"] * cluster
        if table == 0 or table > lay.MAX_REFTABLE_BYTES:
            self.bad("refcount_table_clusters", f"{table} bytes are not within 1..{lay.MAX_REFTABLE_BYTES}")
        self.check_table("refcount_table_offset", raw["refcount_table_offset"], table, cluster)
        if raw["nb_snapshots"] > lay.MAX_SNAPSHOTS:
            self.bad("nb_snapshots", f"{raw['nb_snapshots']} is above the limit of {lay.MAX_SNAPSHOTS}")
        if raw["nb_snapshots"]:
            # 40 bytes is the fixed part of an entry (spec, "Snapshots").
            self.check_table("snapshots_offset", raw["snapshots_offset"], raw["nb_snapshots"] * 40, cluster)

    def backing(self) -> bytes:
        offset, size = self.raw["backing_file_offset"], self.raw["backing_file_size"]
        if not offset:
            return b""
        cluster = 1 << self.raw["cluster_bits"]
        if offset < self.raw["header_length"] or offset > cluster:
            self.bad("backing_file_offset", f"{offset} is not behind the header and inside the first cluster")
        if size > min(lay.MAX_BACKING_NAME, cluster - offset):
            self.bad("backing_file_size", f"{size} bytes at {offset} do not fit (at most {lay.MAX_BACKING_NAME})")
        name = self.data[offset : offset + size]
        if b"\0" in name:
            self.bad("backing_file_name", "contains a NUL byte", offset=offset)
        return name

    def extensions(self) -> tuple[tuple[Extension, ...], int, bool]:
        """Walk the chain as QEMU does: up to the end mark, the backing file name or the end of the cluster."""
        found: list[Extension] = []
        offset = self.raw["header_length"]
        area_end = self.raw["backing_file_offset"] or 1 << self.raw["cluster_bits"]
        while offset < area_end:
            if offset + lay.EXT_HEADER_SIZE > area_end:
                self.bad("header_extension", "no room for an extension's header or the end mark", offset=offset)
            magic, length = struct.unpack_from(">II", self.data, offset)
            if magic == lay.EXT_END:
                return tuple(found), offset, True
            ext = Extension(offset, magic, length)
            if ext.data_offset + length > area_end:
                self.bad("header_extension", f"{ext.name} ({length} bytes) runs out of the header area", offset=offset)
            if len(found) == lay.MAX_EXTENSIONS:
                self.bad("header_extension", f"more than {lay.MAX_EXTENSIONS} extensions", offset=offset)
            if magic in (lay.EXT_GRAFT, lay.EXT_DEAD) and any(e.magic == magic for e in found):
                self.bad("header_extension", f"the {ext.name} extension stands there twice", offset=offset)
            found.append(ext)
            offset = ext.end
        return tuple(found), offset, False


def _bits(mask: int) -> Iterator[int]:
    return (bit for bit in range(64) if mask >> bit & 1)


def feature_list(header: Header) -> dict[str, list[str]]:
    """Return the names of the features set, by ``incompatible``, ``compatible`` and ``autoclear``."""
    masks = (header.incompatible, header.compatible, header.autoclear)
    kinds = ("incompatible", "compatible", "autoclear")

    def name(kind: int, bit: int) -> str:
        return lay.FEATURE_NAMES.get((kind, bit)) or header.feature_names.get((kind, bit)) or f"bit {bit}"

    return {kinds[k]: [name(k, bit) for bit in _bits(mask)] for k, mask in enumerate(masks)}


def _feature_names(parser: _Parser, exts: tuple[Extension, ...]) -> dict[tuple[int, int], str]:
    names: dict[tuple[int, int], str] = {}
    table = next((ext for ext in exts if ext.magic == lay.EXT_FEATURE_NAMES), None)
    if table is None:
        return names
    step = lay.FEATURE_NAME.sizeof()
    for offset in range(table.data_offset, table.data_offset + table.length - step + 1, step):
        piece = parser.data[offset : offset + step]
        entry = parse_struct(lay.FEATURE_NAME, piece, file=parser.file, offset=offset, what="feature_name")
        text = bytes(entry.name).split(b"\0", 1)[0].decode("ascii", "replace")
        names[entry.type, entry.bit] = "".join(c if c.isprintable() else "?" for c in text)
    return names


def parse_header(data: bytes, file_size: int, *, file: str) -> Header:
    """Parse and check the header of a qcow2 image.

    Args:
        data: At least the first cluster, or the whole file where it is shorter.
        file_size: Size of the file in bytes.
        file: Its name, for error messages.

    Raises:
        MalformedImageError: a field violates the specification or a limit.
        UnsupportedError: a feature is well-formed but not known here.
    """
    parser = _Parser(data, file_size, file)
    parser.read_raw()
    parser.check_geometry()
    parser.data = parser.data[: 1 << parser.raw["cluster_bits"]]
    backing_name = parser.backing()
    exts, end, has_end = parser.extensions()
    names = _feature_names(parser, exts)
    parser.check_features(names)
    parser.check_tables()
    raw = parser.raw
    copied = ("version", "backing_file_offset", "backing_file_size", "cluster_bits", "crypt_method", "l1_size")
    more = ("l1_table_offset", "refcount_table_offset", "refcount_table_clusters", "nb_snapshots", "snapshots_offset")
    return Header(
        **{key: raw[key] for key in (*copied, *more, "header_length")},
        size=raw["size"] // lay.SECTOR * lay.SECTOR,
        incompatible=raw["incompatible_features"],
        compatible=raw["compatible_features"],
        autoclear=raw["autoclear_features"],
        refcount_bits=1 << raw["refcount_order"],
        compression_type=parser.compression_type(),
        extensions=exts,
        end_offset=end,
        has_end=has_end,
        backing_name=backing_name,
        feature_names=names,
        first_cluster=parser.data,
    )
