"""The UNDO section: what detach needs to give the original file back."""

from __future__ import annotations

from os import PathLike
from typing import Any

from construct import ConstructError

from vmgraft.errors import GraftFormatError
from vmgraft.imagefmt import _layout as layout
from vmgraft.imagefmt.contract import Patch, Undo
from vmgraft.imagefmt.parse import parse_struct

_MAX_OFFSET = (1 << 63) - 1


def pack_undo(undo: Undo) -> bytes:
    """Return the bytes of an UNDO section; facts are sorted by name, so equal undos have equal bytes.

    Raises:
        GraftFormatError: when a value is outside the format's limits.
    """
    problem = _problem(undo)
    if problem is not None:
        raise GraftFormatError(problem, field="undo")
    header = layout.UNDO_HEADER.build(
        {
            "version": layout.UNDO_VERSION,
            "reserved": 0,
            "fact_count": len(undo.facts),
            "patch_count": len(undo.patches),
            "reserved2": 0,
            "file_size": undo.file_size,
        }
    )
    facts = [{"name": name, "value": value} for name, value in sorted(undo.facts.items())]
    patches = [{"offset": patch.offset, "length": len(patch.data), "data": patch.data} for patch in undo.patches]
    try:
        body = layout.UNDO_BODY.build(
            {"facts": facts, "patches": patches}, fact_count=len(facts), patch_count=len(patches)
        )
    except (ConstructError, UnicodeEncodeError) as error:
        raise GraftFormatError(f"the undo facts cannot be stored: {error}", field="undo") from error
    return bytes(header + body)


def parse_undo(data: bytes, *, file: str | PathLike[str] | None, offset: int) -> Undo:
    """Parse the raw bytes of an UNDO section.

    Raises:
        GraftFormatError: when they are malformed, over a limit, or do not fill the section exactly.
    """

    def refuse(message: str, field: str = "undo") -> GraftFormatError:
        return GraftFormatError(message, file=file, offset=offset, field=field)

    header = parse_struct(layout.UNDO_HEADER, data, file=file, offset=offset, what="undo", error=GraftFormatError)
    if header.version != layout.UNDO_VERSION:
        raise refuse(f"unknown undo version {header.version}", "undo.version")
    if header.reserved or header.reserved2:
        raise refuse("reserved bytes are not zero", "undo.reserved")
    if header.fact_count > layout.MAX_FACTS:
        raise refuse(f"{header.fact_count} facts, at most {layout.MAX_FACTS} allowed", "undo.fact_count")
    if header.patch_count > layout.MAX_PATCHES:
        raise refuse(f"{header.patch_count} patches, at most {layout.MAX_PATCHES} allowed", "undo.patch_count")
    undo = _parse_body(data, header, file, offset)
    problem = _problem(undo)
    if problem is not None:
        raise refuse(problem)
    # Only one encoding per undo: catches duplicate facts, unsorted names and trailing bytes in one comparison.
    if pack_undo(undo) != data:
        raise refuse("the undo section is not in canonical form")
    return undo


def _parse_body(data: bytes, header: Any, file: str | PathLike[str] | None, offset: int) -> Undo:
    body = parse_struct(
        layout.UNDO_BODY,
        memoryview(data)[layout.UNDO_HEADER_SIZE :],
        file=file,
        offset=offset,
        what="undo",
        error=GraftFormatError,
        fact_count=header.fact_count,
        patch_count=header.patch_count,
    )
    return Undo(
        file_size=header.file_size,
        patches=tuple(Patch(item.offset, bytes(item.data)) for item in body.patches),
        facts={item.name: item.value for item in body.facts},
    )


def _problem(undo: Undo) -> str | None:
    """Return what is wrong with the values of an undo, or None."""
    if not 0 <= undo.file_size <= _MAX_OFFSET:
        return f"original file size {undo.file_size} is outside the limits"
    if len(undo.facts) > layout.MAX_FACTS or len(undo.patches) > layout.MAX_PATCHES:
        return "too many facts or patches"
    for name in undo.facts:
        if not name or len(name) > layout.MAX_FACT_NAME or not name.isascii() or not name.isprintable():
            return f"{name[:80]!r} is no name for a fact"
    end = 0
    for patch in undo.patches:
        if not patch.data or patch.offset < end or patch.offset + len(patch.data) > _MAX_OFFSET:
            return f"patch at {patch.offset} is empty, out of order, overlapping or out of range"
        end = patch.offset + len(patch.data)
    if sum(len(patch.data) for patch in undo.patches) > layout.MAX_RAW_SIZE:
        return "patches are longer than a section may be"
    return None
