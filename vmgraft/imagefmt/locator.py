"""The locator: 128 bytes in the container's metadata that point to the record.

Read :func:`parse_locator` as the specification: what it refuses is not a locator.
"""

from __future__ import annotations

from hashlib import sha256
from os import PathLike
from typing import Any

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt import _layout as layout
from vmgraft.imagefmt._layout import LOCATOR_SIZE, MAGIC
from vmgraft.imagefmt.contract import Locator, Placement
from vmgraft.imagefmt.parse import parse_struct

__all__ = ["LOCATOR_SIZE", "MAGIC", "pack_locator", "parse_locator"]

_TO_FLAGS = {Placement.INLINE: layout.PLACEMENT_INLINE, Placement.SIDECAR: layout.PLACEMENT_SIDECAR}
_FROM_FLAGS = {flags: placement for placement, flags in _TO_FLAGS.items()}
#: File offsets are signed 64-bit numbers on every system we run on.
_MAX_OFFSET = (1 << 63) - 1


def pack_locator(locator: Locator) -> bytes:
    """Return the 128 bytes of ``locator``.

    Raises:
        GraftFormatError: when a value is outside the format's limits.
    """
    _check_range(locator, file=None, offset=None)
    if locator.placement not in _TO_FLAGS:
        raise GraftFormatError("a locator is either inline or sidecar", field="locator.flags")
    head = layout.LOCATOR.build(
        {
            "major": layout.VERSION_MAJOR,
            "minor": layout.VERSION_MINOR,
            "flags": _TO_FLAGS[locator.placement],
            "record_offset": locator.record_offset,
            "record_size": locator.record_size,
            "record_sha256": locator.record_sha256,
            "tree_digest": locator.tree_digest,
            "file_size": locator.file_size,
            "reserved": bytes(16),
            "check": bytes(layout.LOCATOR_CHECK_SIZE),
        }
    )[: -layout.LOCATOR_CHECK_SIZE]
    return head + _check_bytes(head)


def parse_locator(data: bytes, *, file: str | PathLike[str] | None, offset: int | None) -> Locator:
    """Parse a locator.

    Args:
        data: At least 128 bytes; more is ignored.
        file: The file it stands in, for messages.
        offset: Where in the file it stands, in bytes.

    Raises:
        GraftFormatError: when it is no sound locator of a version we know.
    """
    where = offset or 0
    raw = parse_struct(layout.LOCATOR, data, file=file, offset=where, what="locator", error=GraftFormatError)
    head = bytes(data[: LOCATOR_SIZE - layout.LOCATOR_CHECK_SIZE])
    if raw.check != _check_bytes(head):
        raise GraftFormatError(
            "the locator's own digest does not match", file=file, offset=where, field="locator.check"
        )
    _check_version(raw, file, where)
    placement = _FROM_FLAGS.get(raw.flags)
    if placement is None:
        raise GraftFormatError(f"unknown locator flags 0x{raw.flags:x}", file=file, offset=where, field="locator.flags")
    locator = Locator(
        placement=placement,
        record_offset=raw.record_offset,
        record_size=raw.record_size,
        record_sha256=bytes(raw.record_sha256),
        tree_digest=bytes(raw.tree_digest),
        file_size=raw.file_size,
    )
    _check_range(locator, file=file, offset=where)
    return locator


def _check_version(raw: Any, file: str | PathLike[str] | None, offset: int) -> None:
    if raw.major != layout.VERSION_MAJOR:
        raise GraftFormatError(
            f"format version {raw.major}.{raw.minor} is not readable by this release",
            file=file,
            offset=offset,
            field="locator.major",
            hint="use a release of vmgraft that knows this version",
        )
    if raw.minor == layout.VERSION_MINOR and any(raw.reserved):
        raise GraftFormatError("reserved bytes are not zero", file=file, offset=offset, field="locator.reserved")


def _check_range(locator: Locator, *, file: str | PathLike[str] | None, offset: int | None) -> None:
    def refuse(message: str, field: str) -> GraftFormatError:
        return GraftFormatError(message, file=file, offset=offset, field=f"locator.{field}")

    if not layout.RECORD_HEADER_SIZE <= locator.record_size <= layout.MAX_RECORD_SIZE:
        raise refuse(f"record size {locator.record_size} is outside the limits", "record_size")
    if not 0 <= locator.record_offset <= _MAX_OFFSET - locator.record_size:
        raise refuse(f"record offset {locator.record_offset} is outside the limits", "record_offset")
    if not 0 <= locator.file_size <= _MAX_OFFSET - layout.MAX_RECORD_SIZE:
        raise refuse(f"file size {locator.file_size} is outside the limits", "file_size")
    if len(locator.record_sha256) != 32 or len(locator.tree_digest) != 32:
        raise refuse("a digest is not 32 bytes long", "record_sha256")


def _check_bytes(head: bytes) -> bytes:
    return sha256(head).digest()[: layout.LOCATOR_CHECK_SIZE]
