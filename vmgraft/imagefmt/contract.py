"""What every container format offers: the vocabulary of ``imagefmt``, without any I/O of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from vmgraft.errors import UnsupportedError

if TYPE_CHECKING:
    from vmgraft.imagefmt.blob import Blob
    from vmgraft.imagefmt.flatfile import FlatFile


class Kind(StrEnum):
    """What stands in a run of guest content."""

    DATA = "data"  #: stored bytes
    ZERO = "zero"  #: reads as zeros and the container says so (qcow2 zero clusters)
    HOLE = "hole"  #: nothing allocated; reads as zeros


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of guest content: ``start`` and ``length`` in bytes of guest offset."""

    start: int
    length: int
    kind: Kind


class Placement(StrEnum):
    """Where a record goes."""

    AUTO = "auto"
    INLINE = "inline"
    SIDECAR = "sidecar"


class GraftState(StrEnum):
    """What an inspector can tell about the graft of an image without trusting it."""

    NONE = "none"
    OK = "ok"
    NO_RECORD = "locator-without-record"
    CUT = "record-cut"
    OVERWRITTEN = "record-overwritten"  #: the record differs from its digest, and nothing else is wrong
    ORPHANED = "orphaned"  #: a foreign writer dropped the locator, the record's bytes are still there
    SWAPPED = "sidecar-of-another-image"  #: a sound sidecar, made for other content
    STALE = "sidecar-stale"  #: a sound sidecar of this content, but of an earlier or later graft
    GROWN = "file-grown"  #: intact, but the file grew behind the record since attach
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Locator:
    """What points to a record. All sizes and offsets in bytes.

    Attributes:
        placement: ``INLINE`` or ``SIDECAR``, never ``AUTO``.
        record_offset: Offset of the record in the image file; 0 where the container implies it, and for sidecars.
        record_size: Length of the record.
        record_sha256: SHA-256 over the whole record (32 bytes).
        tree_digest: fs-verity digest of the guest content at attach (32 bytes), a hint and never trusted.
        file_size: Size of the image file before attach.
    """

    placement: Placement
    record_offset: int
    record_size: int
    record_sha256: bytes
    tree_digest: bytes
    file_size: int


@dataclass(frozen=True, slots=True)
class Patch:
    """Original bytes that attach changed: put ``data`` back at file offset ``offset``."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Undo:
    """What detach needs to give the original file back.

    Attributes:
        file_size: Size of the file before attach.
        patches: Original bytes, in ascending order, not overlapping. The format decides which it needs.
        facts: Small format-specific numbers (for qcow2: END offset, backing name offset, ...), by name.
    """

    file_size: int
    patches: tuple[Patch, ...] = ()
    facts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Room:
    """How long a record may be inline, in bytes (0: none fits), and how that number came about."""

    inline: int
    reserve: int
    reason: str


@dataclass(frozen=True, slots=True)
class Located:
    """The graft as found. ``record`` holds the record's bytes whenever they could be read, sound or not.

    ``record_file`` names the file that holds it where that is neither the image nor its sidecar.
    """

    state: GraftState
    detail: str = ""
    locator: Locator | None = None
    locator_offset: int | None = None
    record: Blob | None = None
    record_file: Path | None = None


#: Given the undo facts, builds the final record; called once per attach, after all reads and before any write.
RecordBuilder = Callable[[Undo], "Blob"]

#: Progress callback: (bytes done, bytes in all).
Progress = Callable[[int, int], None]


class Image(ABC):
    """An open image: the **pristine** guest content, and where a graft sits.

    ``read`` and ``extents`` present what the guest saw before grafting. Everything is read through one descriptor that
    stays open for the life of the object, so what was verified is what is served.
    """

    format_name: ClassVar[str]
    #: Whether the content is a disk that a machine could boot; an archive's is not.
    is_disk: ClassVar[bool] = True

    path: Path
    #: Size of the guest content in bytes; raw rounds up to 512.
    virtual_size: int
    #: Bytes a guest sector has: 512, or 2048 for ISO 9660.
    sector_size: int = 512
    #: Whether opening for writing rolled back an attach, or finished a detach, that had been interrupted.
    recovered: bool = False

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """Return guest content; short only at the end of the content.

        Raises:
            MalformedImageError: when the container's tables point astray.
            FileError: when the file cannot be read.
        """

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Fill ``buffer`` with guest content and return the number of bytes; formats override it to save a copy.

        Safe to call from several threads at once.
        """
        data = self.read(offset, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    @abstractmethod
    def extents(self) -> Iterator[Extent]:
        """Yield the runs of the guest content in ascending order, without gaps, covering ``virtual_size``."""

    def backing_chain(self) -> tuple[Path, ...]:
        """Return the files this image reads through, nearest first."""
        return ()

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """Return container facts for people and reports, JSON-able; all of them unverified."""

    @abstractmethod
    def locate(self) -> Located:
        """Find the graft; never raises for a damaged one, but reports its state."""

    @abstractmethod
    def room(self) -> Room:
        """Return how long an inline record may be."""

    @abstractmethod
    def attach(self, build: RecordBuilder, placement: Placement, tree_digest: bytes) -> Located:
        """Write a record. The image must have been opened writable, and carry no graft.

        Raises:
            NoRoomError: when the record does not fit at that placement; nothing was written.
            ImageInUseError: when another process uses the image.
        """

    @abstractmethod
    def detach(self, undo: Undo) -> None:
        """Take the graft away and give the original bytes back, crash-safe."""

    def recovery_undo(self) -> Undo | None:
        """Return an undo rebuilt from what survives outside the record's UNDO section, or None where nothing does."""
        return None

    def reattach(self, located: Located) -> None:
        """Point to a complete record again whose locator, or one of whose locators, was lost; crash-safe.

        Args:
            located: What :meth:`locate` returned.

        Raises:
            UnsupportedError: when this container, or this damage, offers no way.
            GraftFormatError: when the record is not whole.
        """
        raise UnsupportedError(
            f"a graft in state {located.state.value!r} cannot be brought back in a {self.format_name} image",
            file=self.path,
            hint="attach again",
        )

    @abstractmethod
    def close(self) -> None:
        """Release the descriptors; further use is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Opening:
    """What a user says about opening an image.

    Attributes:
        root: Folder that backing files must lie in; None means the image's own folder.
        format: Name of the format; None asks the file. Naming it matters for raw disks: a guest can write the first
            bytes of any other container into its own.
        snapshot: Name or identifier of an internal snapshot whose content is wanted instead of the current one.
        ciphertext: Take the content of an encrypted image as it is stored, undecrypted.
    """

    root: Path | None = None
    format: str | None = None
    snapshot: str | None = None
    ciphertext: bool = False


#: Ask the file for its format, and keep backing files in its folder.
PROBE = Opening()


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How to open an image.

    Attributes:
        writable: Take QEMU-compatible locks and open read-write.
        root: Folder that backing files must lie in; ``None`` means the image's own folder.
        snapshot: See :class:`Opening`; only formats that say so in their row are asked for one.
        ciphertext: See :class:`Opening`; likewise.
    """

    writable: bool = False
    root: Path | None = None
    snapshot: str | None = None
    ciphertext: bool = False


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the registry."""

    name: str
    #: (first 64 KiB of the file, file size) -> is it ours?
    probe: Callable[[bytes, int], bool]
    open: Callable[[Path, OpenOptions], Image]
    #: Whether it can show internal snapshots, and stored ciphertext.
    snapshots: bool = False
    ciphertext: bool = False
    #: (the open file) -> does its end, or its name together with its end, say that it is ours? For containers that
    #: begin with bytes of somebody else.
    probe_end: Callable[[FlatFile], bool] | None = None


@dataclass(frozen=True, slots=True)
class ContentDigest:
    """The names of a guest content; see docs/format.md.

    Attributes:
        virtual_size: Bytes of guest content.
        root_hash: 32 bytes, what ``veritysetup format --no-superblock --salt=-`` prints for 64 KiB blocks.
        tree_digest: 32 bytes, what ``fsverity digest --block-size=65536`` prints.
        flat: SHA-256 of the whole content (32 bytes), or None where it was not computed.
    """

    virtual_size: int
    root_hash: bytes
    tree_digest: bytes
    flat: bytes | None
    block_size: int = 65536
