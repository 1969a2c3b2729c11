"""One open file, read by absolute offset as a container: zeros behind its end, or an error; never short."""

from __future__ import annotations

from vmgraft.errors import MalformedImageError
from vmgraft.imagefmt.flatfile import FlatFile


class Source:
    """An open file with the size in bytes that it had when it was opened; safe to use from several threads."""

    def __init__(self, flat: FlatFile) -> None:
        self._flat = flat
        self.size = flat.size
        self.file = str(flat.path)

    def readinto(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; what lies behind the end of the file reads as zeros, as in QEMU."""
        done = self._flat.readinto(offset, view)
        if done < len(view):
            clear(view[done:])

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes; fewer only at the end of the file."""
        return self._flat.read(offset, length)

    def exactly(self, offset: int, length: int, field: str) -> bytes:
        """Return exactly ``length`` bytes.

        Raises:
            MalformedImageError: the file ends before.
        """
        data = self._flat.read(offset, length)
        if len(data) < length:
            message = f"{length} bytes wanted, but the file ends after {len(data)}"
            raise MalformedImageError(message, file=self.file, offset=offset, field=field)
        return data


def clear(view: memoryview) -> None:
    """Fill with zeros."""
    view[:] = bytes(len(view))
