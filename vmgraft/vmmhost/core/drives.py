"""What a machine has for drives: anything that reads and writes like a disk, and what the guest is told it is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from vmgraft.vmmhost.core.disk import require_inside


class Disk(Protocol):
    """Content of a drive; :class:`~vmgraft.vmmhost.core.disk.VerifiedDisk` is one.

    ``read`` and ``write`` raise ValueError for a range outside, ContentMismatchError for content that is not what was
    verified, ``disk.OverlayFullError`` when nothing more can be written, and FileError when the medium fails.
    """

    size: int
    sector_size: int

    @property
    def blocks_checked(self) -> int: ...  # noqa: D102
    @property
    def blocks_written(self) -> int: ...  # noqa: D102
    def read(self, offset: int, length: int) -> bytes: ...  # noqa: D102
    def write(self, offset: int, data: bytes) -> None: ...  # noqa: D102


class DriveKind(StrEnum):
    """What a drive is to the guest."""

    HARD_DISK = "hd"
    CDROM = "cdrom"
    FLOPPY = "floppy"


@dataclass(frozen=True, slots=True)
class Drive:
    """One drive beside the boot medium.

    Attributes:
        disk: Its content.
        kind: What it is to the guest; a CD has sectors of 2048 bytes, the others of 512.
        read_only: Whether writes are refused; a CD refuses them always.
        name: For messages, logs and reports.
    """

    disk: Disk
    kind: DriveKind = DriveKind.HARD_DISK
    read_only: bool = False
    name: str = ""


class DiskAround:
    """What stands before another disk and is as large as that; its counts are that one's.

    Args:
        inner: The disk behind it.
    """

    def __init__(self, inner: Disk) -> None:
        self.inner, self.size, self.sector_size = inner, inner.size, inner.sector_size

    @property
    def blocks_checked(self) -> int:
        """How many blocks the disk behind it has checked."""
        return self.inner.blocks_checked

    @property
    def blocks_written(self) -> int:
        """How many blocks of the disk behind it the guest has changed."""
        return self.inner.blocks_written


class PartOfDisk:
    """A stretch of another disk as a disk of its own, such as the image of an emulated drive on a CD.

    Args:
        disk: The disk it lies on.
        offset: Its first byte there.
        size: Its length in bytes.

    Raises:
        ValueError: when it is not inside the disk.
    """

    def __init__(self, disk: Disk, offset: int, size: int) -> None:
        require_inside(disk.size, offset, size)
        self._disk, self._offset, self.size, self.sector_size = disk, offset, size, 512
        #: Checking and counting is the outer disk's.
        self.blocks_checked = 0

    @property
    def blocks_written(self) -> int:
        """None of its own: the outer disk counts."""
        return 0

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the stretch."""
        require_inside(self.size, offset, length)
        return self._disk.read(self._offset + offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Change bytes of the stretch, and so of the outer disk."""
        require_inside(self.size, offset, len(data))
        self._disk.write(self._offset + offset, data)
