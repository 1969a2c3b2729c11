"""What the writers of new disk images share: content comes in once, front to back, and zeros are left out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vmgraft.errors import UnsupportedError
from vmgraft.imagefmt.commit import Writer
from vmgraft.imagefmt.treenodes import BLOCK_SIZE

if TYPE_CHECKING:
    import numpy.typing as npt

#: Bytes of a guest sector in every format written here.
SECTOR = 512
#: Zeros are left out in pieces of this many bytes: a page, what file systems keep holes in.
PAGE = 4096
#: Bytes of a table that are in memory at a time.
_TABLE_PAGE = 65536


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """What the user may choose.

    Attributes:
        cluster_size: Bytes of a qcow2 cluster; None for the format's usual unit.
        compress: Deflate clusters (qcow2 only).
    """

    cluster_size: int | None = None
    compress: bool = False


#: Whatever the format usually does.
NO_CHOICES = WriteOptions()


@dataclass(frozen=True, slots=True)
class Piece:
    """Content to be stored at guest offset ``offset``; ``packed`` when ``data`` is a deflated cluster."""

    offset: int
    data: bytes | memoryview
    packed: bool = False


class DiskWriter(ABC):
    """Lays out one new disk image.

    Args:
        writer: The empty file.
        size: Bytes of guest content.
        options: What the user chose.
        name: The file's name to be, for formats that note it.

    Raises:
        UnsupportedError: the format cannot hold a content of that size, or does not know an option.
    """

    format_name: ClassVar[str]
    #: Content must come in pieces that begin and end at multiples of this, but for the end of the content.
    alignment: int = BLOCK_SIZE
    #: The size of the content must be a multiple of this many bytes.
    unit: ClassVar[int] = SECTOR

    def __init__(self, writer: Writer, size: int, options: WriteOptions, name: str) -> None:
        self.writer = writer
        self.size = size
        self.options = options
        self.name = name
        if options.compress or options.cluster_size is not None:
            self._check_options()
        if size <= 0 or size % self.unit:
            hint = "-O iso9660 keeps an ISO image of any length" if size > 0 else "there is nothing to convert"
            raise self.refuse(f"a content of {size} bytes is not a whole number of {SECTOR}-byte sectors", hint)

    def _check_options(self) -> None:
        raise self.refuse("cluster size and compression are options of qcow2", "leave them out, or write a qcow2 image")

    def refuse(self, message: str, hint: str) -> UnsupportedError:
        """Return the error for a content that does not fit into the format."""
        return UnsupportedError(f"{self.format_name}: {message}", file=self.writer.file, field="size", hint=hint)

    def pieces(self, offset: int, view: memoryview) -> list[Piece]:
        """Choose what is to be stored of the content at ``offset``; may run in several threads at once.

        ``view`` is a multiple of 64 KiB long, zero-padded behind the end of the content.
        """
        return [Piece(offset + start, view[start:end]) for start, end in nonzero_runs(view)]

    @abstractmethod
    def store(self, piece: Piece) -> None:
        """Write a piece; pieces come in ascending order.

        Raises:
            FileError: it cannot be written.
        """

    @abstractmethod
    def finish(self) -> None:
        """Write everything else, so that the file is complete.

        Raises:
            FileError: it cannot be written.
        """


class BlockWriter(DiskWriter):
    """A format that maps guest blocks to places in the file. A block gets its place when its first piece comes."""

    block_size: int

    def __init__(self, writer: Writer, size: int, options: WriteOptions, name: str) -> None:
        super().__init__(writer, size, options, name)
        self._block, self._place = -1, 0

    @abstractmethod
    def allocate(self, block: int) -> int:
        """Note that a block is stored, and return its file offset; blocks come in ascending order."""

    def store(self, piece: Piece) -> None:
        """Write a piece; what stands together in the file is written together."""
        view = memoryview(piece.data)[: self.size - piece.offset]
        begin = done = place = 0
        while done < len(view):
            block, inside = divmod(piece.offset + done, self.block_size)
            if block != self._block:
                self._block, self._place = block, self.allocate(block)
            here = self._place + inside
            if here != place + done - begin:
                if done > begin:
                    self.writer.write(place, view[begin:done])
                begin, place = done, here
            done = min(len(view), done + self.block_size - inside)
        if done > begin:
            self.writer.write(place, view[begin:done])


class Table:
    """A table of numbers in the new file, filled in ascending order; one page of it is in memory.

    Args:
        writer: The file; what was never written there reads as zeros.
        offset: Where the table begins, in bytes.
        count: Entries it has.
        entry: numpy name of an entry, such as ``>u8``.
        empty: What an entry is that is never set.
    """

    def __init__(self, writer: Writer, offset: int, count: int, entry: str, empty: int = 0) -> None:
        import numpy as np

        self._np = np
        self._writer, self._offset, self._count = writer, offset, count
        self._type, self._empty = np.dtype(entry), empty
        self._per_page = _TABLE_PAGE // self._type.itemsize
        self._number = 0
        self._page: npt.NDArray[Any] | None = None
        #: First page that is not in the file yet.
        self._next = 0

    def __setitem__(self, index: int, value: int) -> None:
        number, inside = divmod(index, self._per_page)
        if self._page is None or number != self._number:
            self._flush()
            self._number, self._page = number, self._fresh(number)
        self._page[inside] = value

    def finish(self) -> None:
        """Write what is left."""
        self._flush()
        self._fill(-(-self._count // self._per_page))

    def _fresh(self, number: int) -> npt.NDArray[Any]:
        length = min(self._per_page, self._count - number * self._per_page)
        return self._np.full(length, self._empty, dtype=self._type)

    def _flush(self) -> None:
        if self._page is not None:
            self._fill(self._number)
            self._write(self._number, self._page)
            self._next, self._page = self._number + 1, None

    def _fill(self, end: int) -> None:
        """Write the pages before page ``end`` that nothing was set in, unless they read as they should anyway."""
        while self._empty and self._next < end:
            self._write(self._next, self._fresh(self._next))
            self._next += 1

    def _write(self, number: int, page: npt.NDArray[Any]) -> None:
        self._writer.write(self._offset + number * _TABLE_PAGE, page.tobytes())


def nonzero_runs(view: memoryview, unit: int = PAGE) -> list[tuple[int, int]]:
    """Return (start, end) of the runs of units that are not all zeros.

    Args:
        view: A whole number of units.
        unit: Bytes of a unit, a multiple of 8.
    """
    import numpy as np

    words = np.frombuffer(view, dtype=np.uint64).reshape(-1, unit // 8)
    used = words[:, 0] != 0  # spares most units of real data the look at the rest
    unsure = np.flatnonzero(~used)
    used[unsure] = words[unsure].any(axis=1)
    edges = np.flatnonzero(np.diff(used, prepend=False, append=False)) * unit
    bounds = edges.tolist()
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def round_up(number: int, unit: int) -> int:
    """Return the smallest multiple of ``unit`` that is not below ``number``."""
    return -(-number // unit) * unit
