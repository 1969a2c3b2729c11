"""Attach to and detach from ISO images.

Attach appends record and footer with one write; from then on the graft is there, found by its footer. The one-sector
write of the locator into the volume descriptor, which readers look at first, is the last step. Detach goes back the
same way, so between any two steps the image is either grafted or as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from vmgraft.errors import FileError, GraftFormatError, NoRoomError, UsageError
from vmgraft.imagefmt._layout import MAGIC
from vmgraft.imagefmt.blob import SMALL, Blob, BytesBlob
from vmgraft.imagefmt.contract import GraftState, Locator, Patch, Placement, RecordBuilder, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.iso9660 import _layout as layout
from vmgraft.imagefmt.iso9660._layout import Appendix
from vmgraft.imagefmt.iso9660.assess import Found
from vmgraft.imagefmt.locator import pack_locator
from vmgraft.imagefmt.sidecar import remove_sidecar, write_sidecar


def attach_iso(
    file: FlatFile,
    build: RecordBuilder,
    placement: Placement,
    tree_digest: bytes,
    *,
    found: Found,
    volume_space_size: int,
) -> None:
    """Write a record.

    Raises:
        UsageError: when the image already carries a graft.
        NoRoomError: when an inline record is asked for on a block device.
        FileError: when writing fails; the image is as before then.
    """
    if found.located.state not in (GraftState.NONE, GraftState.ORPHANED):
        raise UsageError("the image already carries a graft", file=file.path, hint="detach it first")
    if file.is_block_device and placement is Placement.INLINE:
        raise NoRoomError("a block device has no room behind its end", file=file.path, hint="use --placement sidecar")
    size = file.current_size()
    patches = (Patch(layout.LOCATOR_OFFSET, found.field),) if found.field in layout.BLANKS else ()
    if file.is_block_device and not patches:
        raise NoRoomError("the volume descriptor has no room for a locator", file=file.path)
    if placement is Placement.AUTO:
        file.check_sidecar_lasts()
    record = build(Undo(file_size=size, patches=patches, facts={layout.FACT_VOLUME_SIZE: volume_space_size}))
    if placement is Placement.SIDECAR or file.is_block_device:
        locator = Locator(Placement.SIDECAR, 0, record.size, record.sha256, tree_digest, size)
        write_sidecar(file.path, locator, record)
        appended: list[tuple[int, Blob]] = [] if patches else [(layout.round_up(size), BytesBlob(_sector(locator)))]
    else:
        place = Appendix(size, record.size)
        locator = Locator(Placement.INLINE, place.record, record.size, record.sha256, tree_digest, size)
        end = bytes(place.footer - place.record - record.size) + _sector(locator)
        appended = [(place.record, record), (place.record + record.size, BytesBlob(end))]
        if record.size <= SMALL:  # one write; a larger record that is cut short is recognised by its UNDO
            appended = [(place.record, BytesBlob(record.read_all() + end))]
    try:
        _write(file, size, appended, pack_locator(locator) if patches else b"", found.field)
    except FileError:
        if locator.placement is Placement.SIDECAR:
            with suppress(FileError):
                remove_sidecar(file.path)
        raise


def _sector(locator: Locator) -> bytes:
    """Return a footer: a locator in a sector of its own."""
    return pack_locator(locator).ljust(layout.SECTOR_SIZE, b"\0")


def _write(file: FlatFile, size: int, appended: Sequence[tuple[int, Blob]], in_descriptor: bytes, field: bytes) -> None:
    """Append, flush, then write the locator into the descriptor, which held ``field``; take all back on failure."""
    writer = file.writer()
    try:
        for offset, blob in appended:
            if blob.size <= 2 * SMALL:
                writer.write(offset, blob.read_all())
            else:
                writer.write_blob(offset, blob)
        if appended:
            writer.sync()
        if in_descriptor:
            writer.write(layout.LOCATOR_OFFSET, in_descriptor)
            writer.sync()
    except FileError:
        with suppress(FileError):
            if in_descriptor:
                writer.write(layout.LOCATOR_OFFSET, field)
            if appended:
                writer.truncate(size)
        raise


def detach_iso(file: FlatFile, undo: Undo, *, found: Found, volume_space_size: int) -> None:
    """Give the original file back.

    Raises:
        GraftFormatError: when what is known about the original contradicts the file.
        UsageError: when the file grew behind the graft: cutting would lose those bytes.
    """
    located = found.located
    if located.state is GraftState.ORPHANED and located.locator_offset is not None:
        raise GraftFormatError(
            f"the original cannot be given back: {located.detail}",
            file=file.path,
            offset=located.locator_offset,
            hint="go back to a copy from before the other program changed the image",
        )
    if located.state is not GraftState.ORPHANED:
        _check_detach(file, undo, found, volume_space_size)
        writer = file.writer()
        if undo.patches and found.field != undo.patches[0].data:
            writer.write(layout.LOCATOR_OFFSET, undo.patches[0].data)
            writer.sync()
        if file.current_size() > undo.file_size:
            writer.truncate(undo.file_size)
            writer.sync()
    if located.locator is not None and located.locator.placement is Placement.SIDECAR:
        remove_sidecar(file.path)


def _check_detach(file: FlatFile, undo: Undo, found: Found, volume_space_size: int) -> None:
    """Refuse to touch the file unless size, footer and volume are as attach left them."""

    def refuse(message: str, hint: str | None = None) -> GraftFormatError:
        return GraftFormatError(message, file=file.path, offset=found.located.locator_offset, field="undo", hint=hint)

    size, locator = file.current_size(), found.located.locator
    if found.undo != undo or (locator is not None and locator.file_size != undo.file_size):
        raise refuse("UNDO does not fit this image")
    if undo.facts.get(layout.FACT_VOLUME_SIZE) != volume_space_size:
        raise refuse(
            "another program changed the volume's size since attach: what lies behind the original is no longer ours",
            "copy the files out of the image, or go back to a copy from before",
        )
    if volume_space_size * layout.SECTOR_SIZE > undo.file_size:
        raise refuse("the volume is larger than the original image that UNDO speaks of")
    if found.field.startswith(MAGIC) and not undo.patches:
        raise refuse("UNDO lacks what stood in the volume descriptor")
    if size < undo.file_size:
        raise refuse(f"the file has {size} bytes, the original had {undo.file_size}")
    if size > found.end:
        raise UsageError(
            f"the file grew by {size - found.end} bytes behind the graft since attach, and they would be lost",
            file=file.path,
            offset=found.end,
            hint=f"shrink the file to {found.end} bytes if nothing of value lies there",
        )
    if size == found.end and not found.footer_sound:
        raise refuse("the footer was overwritten: what lies behind the original is no longer ours")
