"""Locators, records and undos laid out by hand after docs/format.md: they can lie and still have sound digests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

MAGIC = b"VMGRAFT\0"
INLINE, SIDECAR = 1, 2
ENVELOPE, MANIFEST, MODULE, FILES, UNDO, TREE, HINTS = range(1, 8)
CRITICAL, ZSTD = 1, 2


def digest(data: bytes) -> bytes:
    return sha256(data).digest()


def locator(
    record: bytes = b"",
    *,
    offset: int = 0,
    file_size: int = 0,
    flags: int = INLINE,
    size: int | None = None,
    record_sha256: bytes | None = None,
    major: int = 1,
    minor: int = 0,
    reserved: bytes = bytes(16),
    check: bytes | None = None,
) -> bytes:
    """128 bytes; numbers are taken modulo 2^64."""
    length = len(record) if size is None else size
    head = MAGIC + struct.pack("<HHIQQ", major, minor, flags, offset % (1 << 64), length % (1 << 64))
    head += (digest(record) if record_sha256 is None else record_sha256) + bytes(range(32))
    head += struct.pack("<Q", file_size % (1 << 64)) + reserved
    return head + (digest(head)[:8] if check is None else check)


@dataclass(frozen=True)
class Part:
    """A section; what is None is computed as it should be."""

    kind: int
    data: bytes
    flags: int = CRITICAL
    offset: int | None = None
    stored_size: int | None = None
    raw_size: int | None = None
    stored_sha256: bytes | None = None
    raw_sha256: bytes | None = None

    def but(self, **changes: object) -> Part:
        return replace(self, **changes)  # type: ignore[arg-type]


def undo(
    file_size: int, facts: Sequence[tuple[bytes, int]] = (), patches: Sequence[tuple[int, bytes]] = (), **lies: int
) -> bytes:
    """An UNDO section; ``lies`` replaces header fields."""
    fields = {"version": 1, "reserved": 0, "fact_count": len(facts), "patch_count": len(patches), "reserved2": 0} | lies
    out = struct.pack("<HHIIIQ", *fields.values(), file_size % (1 << 64))
    for name, value in facts:
        out += bytes([len(name)]) + name + struct.pack("<q", value)
    for at, data in patches:
        out += struct.pack("<QI", at % (1 << 64), len(data)) + data
    return out


ENVELOPE_PART = Part(ENVELOPE, b'{"payloadType":"x","payload":"","signatures":[]}')
MANIFEST_PART = Part(MANIFEST, b'{"id":"com.example.sample"}\n')


def record(
    parts: Sequence[Part],
    *,
    major: int = 1,
    minor: int = 0,
    header_size: int = 64,
    record_size: int | None = None,
    flags: int = 0,
    count: int | None = None,
    table_sha256: bytes | None = None,
    magic: bytes = MAGIC,
    tail: bytes = b"",
) -> bytes:
    """A record of the parts in their order, each lie covered by sound digests unless they are the lie."""
    position = header_size + 96 * len(parts)
    table, body = b"", b""
    for part in parts:
        stored = len(part.data) if part.stored_size is None else part.stored_size
        table += struct.pack(
            "<IIQQQ",
            part.kind,
            part.flags,
            (position if part.offset is None else part.offset) % (1 << 64),
            stored % (1 << 64),
            (stored if part.raw_size is None else part.raw_size) % (1 << 64),
        )
        table += part.stored_sha256 or digest(part.data)
        table += part.raw_sha256 or digest(part.data)
        body += part.data
        position += len(part.data)
    size = header_size + len(table) + len(body) + len(tail) if record_size is None else record_size
    head = magic + struct.pack(
        "<HHIQII",
        major,
        minor,
        header_size % (1 << 32),
        size % (1 << 64),
        flags,
        len(parts) if count is None else count,
    )
    padding = bytes(max(0, header_size - 64)) if header_size < 8192 else b""
    sealed = digest(head + bytes(32) + padding + table) if table_sha256 is None else table_sha256
    return head + sealed + padding + table + body + tail
