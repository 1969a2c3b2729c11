"""The graft of a VHD: the record in a sidecar, and in dynamic disks a pointer to it in the dynamic header.

The pointer fills the last of the eight parent locator entries (24 bytes at byte 744 of the header): platform code
``VGft``, zero lengths, and in the place of the offset 4 bytes of the tree digest and 4 of the SHA-256 over the
sidecar's locator. It lies in another sector than the header's checksum. Both are written with one write; where a power
loss tears that, the header is one of two that can be told, and either counts as not grafted:

* the pointer is there and the checksum is that of a header without it;
* the checksum is that of a header with the pointer that belongs to the sidecar, and the pointer is not there.
"""

from __future__ import annotations

from contextlib import suppress
from hashlib import sha256

from vmgraft.errors import FileError, GraftFormatError, MalformedImageError, NoRoomError, UsageError
from vmgraft.imagefmt.contract import GraftState, Located, Locator, Placement, RecordBuilder, Undo
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.locator import pack_locator
from vmgraft.imagefmt.sidecar import Sidecar, read_sidecar, remove_sidecar, stray_sidecar, write_sidecar
from vmgraft.imagefmt.vhd import _layout as layout
from vmgraft.imagefmt.vhd.header import DynamicHeader, checksum

_BLANK = bytes(layout.PARENT_LOCATOR_SIZE)
_FILLER = bytes(layout.PARENT_LOCATOR_SIZE - 12)
#: Where the pointer has its part of the tree digest.
_TREE = slice(16, 16 + layout.POINTER_TREE_SIZE)
#: States in which the sidecar beside the image is somebody else's.
_FOREIGN = (GraftState.SWAPPED, GraftState.STALE)
_INTERRUPTED = "an attach or detach was interrupted; the next one, or `vmgraft recover`, cleans up behind it"


def make_pointer(locator: Locator) -> bytes:
    """Return the parent locator entry that points to the sidecar with this locator."""
    digest = sha256(pack_locator(locator)).digest()
    tail = locator.tree_digest[: layout.POINTER_TREE_SIZE] + digest[: layout.POINTER_LOCATOR_SIZE]
    return layout.POINTER_CODE + _FILLER + tail


def is_torn(file: FlatFile, header: DynamicHeader) -> bool:
    """Return whether the header was torn while a graft was written or taken away.

    Raises:
        MalformedImageError: when its checksum is wrong for any other reason.
    """
    if header.checksum == checksum(header.raw, layout.HEADER_CHECKSUM_OFFSET):
        return False
    if header.pointer.startswith(layout.POINTER_CODE) and _checksum_with(header, _BLANK) == header.checksum:
        return True
    if header.pointer == _BLANK:
        stray = stray_sidecar(file.path)
        if stray is not None and stray.locator is not None:
            pointer = make_pointer(stray.locator)
            if _checksum_with(header, pointer) == header.checksum:
                return True
    raise MalformedImageError(
        "the dynamic header's checksum does not match",
        file=file.path,
        offset=header.offset + layout.HEADER_CHECKSUM_OFFSET,
        field="dynamic_header.checksum",
    )


def _checksum_with(header: DynamicHeader, pointer: bytes) -> int:
    at = layout.HEADER_CHECKSUM_OFFSET
    return int.from_bytes(header.with_pointer(pointer)[at : at + 4], "big")


def locate_dynamic(file: FlatFile, header: DynamicHeader, torn: bool) -> Located:
    """Follow the pointer of a dynamic disk."""
    pointer = header.pointer
    if torn or not pointer.startswith(layout.POINTER_CODE):
        stray = stray_sidecar(file.path)
        if stray is None:
            return Located(GraftState.NONE, _INTERRUPTED if torn else "")
        detail = "the image does not point to the sidecar beside it (another program dropped the pointer, or attach or "
        return Located(GraftState.ORPHANED, detail + "detach was interrupted)", stray.locator, None, stray.record)
    offset = header.offset + layout.POINTER_OFFSET
    sidecar = read_sidecar(file.path)
    state, detail = _judge(pointer, sidecar)
    return Located(state, detail, sidecar.locator, offset, sidecar.record)


def _judge(pointer: bytes, sidecar: Sidecar) -> tuple[GraftState, str]:
    """Compare the pointer with the sidecar that is there."""
    name, locator = sidecar.path.name, sidecar.locator
    if pointer[len(layout.POINTER_CODE) : _TREE.start] != _FILLER:
        return GraftState.DAMAGED, "the pointer in the dynamic header was overwritten"
    if sidecar.state is GraftState.NONE:
        return GraftState.NO_RECORD, f"the sidecar {name} is missing: put it back beside the image"
    if locator is None:
        return sidecar.state, sidecar.detail
    expected = make_pointer(locator)
    foreign = (
        (
            locator.placement is not Placement.SIDECAR,
            GraftState.DAMAGED,
            f"the locator in {name} is not one of a sidecar",
        ),
        (
            expected != pointer and sidecar.state is not GraftState.OK,
            GraftState.DAMAGED,
            f"the sidecar {name} belongs to another graft, and is damaged itself",
        ),
        (
            expected[_TREE] != pointer[_TREE],
            GraftState.SWAPPED,
            f"the sidecar {name} was made for other content: put the right one in its place",
        ),
        (
            expected != pointer,
            GraftState.STALE,
            f"the sidecar {name} belongs to an earlier or later graft of the same content",
        ),
    )
    return next(((state, detail) for wrong, state, detail in foreign if wrong), (sidecar.state, sidecar.detail))


def locate_fixed(file: FlatFile) -> Located:
    """Look at the sidecar of a fixed disk, whose own bytes are never touched."""
    sidecar = read_sidecar(file.path)
    state, detail, locator = sidecar.state, sidecar.detail, sidecar.locator
    if locator is None:
        return Located(state, detail, record=sidecar.record)
    if locator.placement is not Placement.SIDECAR:
        detail = "the locator in the sidecar is not one of a sidecar"
        return Located(GraftState.DAMAGED, detail, record=sidecar.record)
    if state is GraftState.OK and file.size != locator.file_size:
        grown = file.size > locator.file_size
        state = GraftState.GROWN if grown else GraftState.DAMAGED
        detail = f"the image {'grew' if grown else 'shrank'} from {locator.file_size} bytes since attach"
    return Located(state, detail, locator, None, sidecar.record)


def attach_vhd(
    file: FlatFile,
    build: RecordBuilder,
    placement: Placement,
    tree_digest: bytes,
    *,
    header: DynamicHeader | None,
    located: Located,
) -> None:
    """Write the sidecar, then the pointer.

    Raises:
        UsageError: when the image already carries a graft.
        NoRoomError: when the record is to be inline, or the last parent locator entry is in use.
        FileError: when writing fails; the image is as before then.
    """
    if located.state not in (GraftState.NONE, GraftState.ORPHANED):
        raise UsageError("the image already carries a graft", file=file.path, hint="detach it first")
    if placement is Placement.INLINE:
        raise NoRoomError("a VHD has no room for a record", file=file.path, hint="use --placement sidecar")
    if header is not None and header.pointer != _BLANK:
        offset = header.offset + layout.POINTER_OFFSET
        raise NoRoomError("the last parent locator entry is in use", file=file.path, offset=offset)
    size = file.current_size()
    record = build(Undo(file_size=size))
    locator = Locator(Placement.SIDECAR, 0, record.size, record.sha256, tree_digest, size)
    write_sidecar(file.path, locator, record)
    if header is None:
        return
    try:
        write_header(file, header, make_pointer(locator))
    except FileError:
        with suppress(FileError):
            write_header(file, header, _BLANK)
            remove_sidecar(file.path)
        raise


def detach_vhd(file: FlatFile, undo: Undo, *, header: DynamicHeader | None, located: Located) -> None:
    """Clear the pointer, then remove the sidecar if it belongs to this image.

    What the pointer replaced is known, so a dynamic disk needs nothing of UNDO.

    Raises:
        GraftFormatError: when a fixed disk's UNDO contradicts the sidecar's locator.
    """
    if header is not None and header.pointer.startswith(layout.POINTER_CODE):
        write_header(file, header, _BLANK)
    elif header is None and located.state is not GraftState.ORPHANED:
        locator = located.locator
        if locator is None or undo.file_size != locator.file_size or undo.patches:
            raise GraftFormatError("UNDO and the sidecar's locator disagree about the original file", file=file.path)
    if located.state not in _FOREIGN:
        remove_sidecar(file.path)


def write_header(file: FlatFile, header: DynamicHeader, pointer: bytes) -> None:
    """Write the dynamic header with another last entry, and flush.

    Raises:
        FileError: when that fails.
    """
    writer = file.writer()
    writer.write(header.offset, header.with_pointer(pointer))
    writer.sync()


def roll_back(file: FlatFile, header: DynamicHeader) -> None:
    """Make a torn header the one it was before attach, or should be after detach."""
    write_header(file, header, _BLANK)
