"""Files that an image names: backing files and external data files, never followed out of a named folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vmgraft.errors import FileError, MalformedImageError, UnsupportedError
from vmgraft.imagefmt.contract import Extent, GraftState, Image, OpenOptions
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.qcow2 import _layout as lay

if TYPE_CHECKING:
    from vmgraft.imagefmt.qcow2.header import Header

MAX_DEPTH = 64
#: QEMU reads everything up to a colon as a protocol, unless a slash comes first (block.c, path_has_protocol).
_PROTOCOL = re.compile(r"[^/]*:")
#: QEMU's name of a format driver → the registry's.
_FORMATS = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "vdi": "vdi", "vhdx": "vhdx", "vpc": "vhd"}


@dataclass(frozen=True, slots=True)
class Chain:
    """What an image hands down to the files it names.

    Attributes:
        root: The folder they must lie in, resolved.
        named: Whether the user named that folder; only then may names be absolute.
        seen: (device, inode) of the images above.
        tables: Bytes of the L1 tables of the images above, all of which are in memory at once.
    """

    root: Path
    named: bool
    seen: tuple[tuple[int, int], ...] = ()
    tables: int = 0

    @classmethod
    def start(cls, image: Path, root: Path | None) -> Chain:
        """Return the chain of a topmost image; without a named root, its own folder is the root."""
        folder = image.absolute().parent if root is None else root
        return cls(folder.resolve(), root is not None)

    def below(self, fd: int, file: Path) -> Chain:
        """Return the chain as the files named by ``file`` (open as ``fd``) see it.

        Raises:
            MalformedImageError: the chain is a loop, or too deep.
        """
        info = os.fstat(fd)
        identity = (info.st_dev, info.st_ino)
        if identity in self.seen:
            raise MalformedImageError("the backing chain leads back to this file", file=file, field="backing_file_name")
        if len(self.seen) >= MAX_DEPTH:
            message = f"the backing chain is deeper than {MAX_DEPTH} files"
            raise MalformedImageError(message, file=file, field="backing_file_name")
        return replace(self, seen=(*self.seen, identity))

    def with_tables(self, size: int, file: Path) -> Chain:
        """Return the chain with an L1 table of ``size`` bytes in ``file`` counted.

        Raises:
            UnsupportedError: the tables of the chain are longer than that of a single image may be.
        """
        if self.tables + size > lay.MAX_L1_BYTES:
            message = f"the L1 tables of the backing chain take {self.tables + size} bytes or more"
            hint = f"at most {lay.MAX_L1_BYTES} are read: shorten the chain with `qemu-img commit` or `rebase`"
            raise UnsupportedError(message, file=file, offset=lay.FIELD_OFFSET["l1_size"], field="l1_size", hint=hint)
        return replace(self, tables=self.tables + size)


def open_named(name: bytes, referrer: Path, chain: Chain, *, field: str, offset: int) -> FlatFile:
    """Open a file that an image names, for reading.

    Args:
        name: The name as it stands in the image.
        referrer: The image that names it; relative names start at its folder.
        chain: Where the file may lie.
        field: ``backing_file_name`` or ``data_file_name``, for messages.
        offset: Where the name stands in ``referrer``.

    Raises:
        MalformedImageError: the name is none.
        UnsupportedError: the name is a protocol, absolute without a named root, or leads out of the root.
        FileError: the file does not exist or cannot be read.
    """

    def refuse(message: str, hint: str) -> UnsupportedError:
        return UnsupportedError(f"{field} {text!r} {message}", file=referrer, offset=offset, field=field, hint=hint)

    if b"\0" in name:
        raise MalformedImageError("contains a NUL byte", file=referrer, offset=offset, field=field)
    text = os.fsdecode(name)
    if _PROTOCOL.match(text):
        raise refuse("is a protocol or JSON description, which is never followed", "use a plain relative file name")
    if text.startswith("/") and not chain.named:
        hint = "say `--root FOLDER` if the file is to be followed"
        raise refuse("is absolute, which is followed only under a root folder that you name", hint)
    try:
        target = (referrer.absolute().parent / text).resolve(strict=True)
    except (OSError, RuntimeError) as exc:  # Python 3.11 reports a loop of symbolic links as RuntimeError
        raise FileError(f"{field} {text!r} cannot be found", file=referrer, offset=offset, field=field) from exc
    if not target.is_relative_to(chain.root):
        raise refuse(f"leads to {target}, outside {chain.root}", "name a root folder that contains it")
    return _open_regular(target)


def _open_regular(target: Path) -> FlatFile:
    """Open a resolved path, and make sure that what was opened is what was resolved."""
    file = FlatFile(target)
    same = Path(f"/proc/self/fd/{file.fd}").readlink() == target
    if same and not file.is_block_device:
        return file
    file.close()
    if same:
        raise UnsupportedError("is a block device, not a regular file", file=target)
    raise FileError("was replaced while it was being opened", file=target)


def backing_format(header: Header, head: bytes, referrer: Path) -> str:
    """Return the registry's name of a format: what the image says its backing file is, else what the file plainly is.

    Raises:
        UnsupportedError: the format is another one, or cannot be known. Guessing "raw" would let a guest that writes a
            qcow2 header into its raw disk read the host's files.
    """
    from vmgraft.imagefmt.registry import format_names

    ext = header.find(lay.EXT_BACKING_FORMAT)
    if ext is not None and ext.length:
        name = header.data(ext).decode("ascii", "backslashreplace")
        if _FORMATS.get(name) in format_names():
            return _FORMATS[name]
        message, offset = f"backing files of format {name!r} are not supported", ext.data_offset
        raise UnsupportedError(message, file=referrer, offset=offset, field="backing_format")
    if head.startswith(lay.MAGIC):
        return "qcow2"
    raise UnsupportedError(
        "the image does not say which format its backing file has, and it is not qcow2",
        file=referrer,
        field="backing_format",
        hint="record it: `qemu-img rebase -u -b NAME -F raw IMAGE`",
    )


def open_other(file: FlatFile, name: str, chain: Chain) -> Image:
    """Open a backing file of a format that is neither raw nor qcow2, and close ``file``.

    Raises:
        FileError: it cannot be opened in that format, or was replaced meanwhile.
    """
    from vmgraft.imagefmt.registry import get_format

    image = get_format(name).open(file.path, OpenOptions(root=chain.root if chain.named else None))
    checked, now = os.fstat(file.fd), file.path.stat()
    if (checked.st_dev, checked.st_ino) != (now.st_dev, now.st_ino):
        image.close()
        raise FileError("was replaced while it was being opened", file=file.path)
    file.close()
    return image


class RawBacking:
    """A raw backing file: bytes, as they stand, ``virtual_size`` of them."""

    def __init__(self, file: FlatFile, size: int) -> None:
        self.path = file.path
        self.virtual_size = size
        self._file = file

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer``; the caller asks for nothing behind ``virtual_size``."""
        return self._file.readinto(offset, buffer)

    def extents(self) -> Iterator[Extent]:
        """Yield the file's runs."""
        return self._file.extents(self.virtual_size)

    def backing_chain(self) -> tuple[Path, ...]:
        """Nothing stands below a raw file."""
        return ()

    def close(self) -> None:
        """Close the descriptor."""
        self._file.close()


#: What stands below an image: another image, or plain bytes.
Backing = Image | RawBacking


def open_raw(file: FlatFile, shown: int) -> RawBacking:
    """Return a raw backing file as the guest saw it, without the trailer that a graft may have put behind it.

    Args:
        file: The backing file.
        shown: How many bytes of it the image above can show at most.

    Raises:
        UnsupportedError: what stands behind the content would be shown and is not just a sound trailer. Hiding it would
            give the image a digest that says nothing of bytes which every other program shows the guest.
    """
    from vmgraft.imagefmt.raw.trailer import find_trailer

    found = find_trailer(file)
    if found is None or found.locator is None or found.locator.file_size >= min(shown, file.size):
        return RawBacking(file, file.size)
    if found.state is not GraftState.OK:
        raise UnsupportedError(
            f"the graft of this backing file is not sound ({found.state.value}: {found.detail})",
            file=file.path,
            offset=found.locator_offset,
            field="backing_file_name",
            hint="restore the backing file, or detach its graft",
        )
    return RawBacking(file, found.locator.file_size)
