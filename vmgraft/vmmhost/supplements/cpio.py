"""Archives that a Linux kernel unpacks as (a part of) its initial file system.

Format "newc" as the kernel documents it (Documentation/driver-api/early-userspace/buffer-format.rst): a 110-byte header
of eight-digit hexadecimal fields, the name with a null byte, the data, each padded to four bytes; ``TRAILER!!!`` ends
an archive. The kernel takes several archives one after the other, each beginning at a multiple of four; a file of a
later one replaces that of an earlier one.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from typing import Final

MAGIC: Final = "070701"
TRAILER: Final = "TRAILER!!!"
#: Every entry and every archive begins at a multiple of this.
ALIGN: Final = 4
#: What the archive as a whole is filled up to, as cpio programs do (a tape block of theirs).
_BLOCK: Final = 512


def pad(size: int, unit: int = ALIGN) -> bytes:
    """Return the zeros that bring a size up to a multiple of ``unit``."""
    return bytes(-size % unit)


def archive(files: Iterable[tuple[str, bytes, bool]], *, mtime: int) -> bytes:
    """Return an archive with the files and the folders they need; equal input gives equal bytes.

    Args:
        files: Relative path, bytes, and whether it is executable.
        mtime: Modification time of everything, in seconds since 1970, within 32 bits.
    """
    made: set[str] = set()
    entries: list[tuple[str, int, bytes]] = []
    for path, data, executable in files:
        for folder in _folders(path):
            if folder not in made:
                made.add(folder)
                entries.append((folder, stat.S_IFDIR | 0o755, b""))
        entries.append((path, stat.S_IFREG | (0o755 if executable else 0o644), data))
    parts = [_entry(name, mode, data, inode, mtime) for inode, (name, mode, data) in enumerate(entries, 1)]
    parts.append(_entry(TRAILER, 0, b"", 0, 0))
    body = b"".join(parts)
    return body + pad(len(body), _BLOCK)


def append(initrd: bytes, added: bytes) -> bytes:
    """Return an initrd with an archive behind it, at the alignment the kernel wants."""
    return initrd + pad(len(initrd)) + added


def _folders(path: str) -> Iterator[str]:
    steps = path.split("/")
    for depth in range(1, len(steps)):
        yield "/".join(steps[:depth])


def _entry(name: str, mode: int, data: bytes, inode: int, mtime: int) -> bytes:
    """Return header, name and data of one member; owner and group are 0."""
    label = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (inode, mode, 0, 0, links, mtime, len(data), 0, 0, 0, 0, len(label), 0)
    head = (MAGIC + "".join(f"{value:08x}" for value in fields)).encode() + label
    return head + pad(len(head)) + data + pad(len(data))
