"""The files of an extension, read piece by piece from the evidence; every byte is checked whenever it is taken."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate

from vmgraft.errors import PayloadMismatchError
from vmgraft.signing.contract import Evidence
from vmgraft.signing.supplements import PIECE, FileEntry, piece_count
from vmgraft.words import counted


class SignedFiles:
    """Files of which a statement names the pieces and a manifest every file's size and SHA-256.

    Pieces that were read are kept until :meth:`release`: one while everything is verified, else all, which are four of
    64 MiB at most. The evidence has to stay open.

    Args:
        evidence: Where the pieces are.
        pieces: Name and digests (algorithm to hex) of each piece, as the statement has them.
        entries: The files, in the order of the manifest.
        name: What to call the extension in errors.

    Raises:
        PayloadMismatchError: there are more or fewer pieces than the files need.
    """

    def __init__(
        self,
        evidence: Evidence,
        pieces: Sequence[tuple[str, Mapping[str, str]]],
        entries: Sequence[FileEntry],
        *,
        name: str,
    ) -> None:
        self.entries = tuple(entries)
        self._evidence, self._pieces, self._name = evidence, tuple(pieces), name
        ends = list(accumulate((entry.size for entry in entries), initial=0))
        self._starts = {entry.path: start for entry, start in zip(entries, ends, strict=False)}
        self._by_path = {entry.path: entry for entry in entries}
        self.total = ends[-1]
        self._kept: dict[int, bytes] = {}
        self._verifying = False
        if len(self._pieces) != piece_count(self.total):
            named = counted(len(self._pieces), "piece")
            message = f"the manifest lists {counted(self.total, 'byte')} of files, the statement names {named}"
            raise PayloadMismatchError(message, file=name, field="files")

    def verify(self) -> None:
        """Read everything once and compare it with statement and manifest.

        Raises:
            PayloadMismatchError: missing, or other bytes than signed.
        """
        self._verifying = True
        for entry in self.entries:
            self.read(entry.path)
        self._verifying = False
        self.release()

    def entry(self, path: str) -> FileEntry:
        """Return what the manifest says of a file.

        Raises:
            PayloadMismatchError: it lists no such file.
        """
        if path not in self._by_path:
            raise PayloadMismatchError(f"the manifest lists no file {path!r}", file=self._name, field="files")
        return self._by_path[path]

    def read(self, path: str) -> bytes:
        """Return a file's bytes, checked now.

        Raises:
            PayloadMismatchError: they are not what was signed.
        """
        entry, start = self.entry(path), self._starts[path]
        parts, position, end = [], start, start + entry.size
        while position < end:
            index, offset = divmod(position, PIECE)
            part = self._piece(index)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        data = b"".join(parts)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            message = f"the bytes of {path!r} are not those that the manifest lists"
            raise PayloadMismatchError(message, file=self._name, field="files")
        return data

    def release(self) -> None:
        """Let go of the pieces that were read."""
        self._kept.clear()

    def _piece(self, index: int) -> bytes:
        if index in self._kept:
            return self._kept[index]
        if self._verifying:  # in the order of the stream: none is wanted again
            self._kept.clear()
        name, digests = self._pieces[index]
        data = self._evidence.payload(digests["sha256"])
        if len(data) != min(PIECE, self.total - index * PIECE):
            raise PayloadMismatchError("the piece is longer or shorter than the files in it", file=name, field="files")
        for algorithm, expected in digests.items():
            if hashlib.new(algorithm, data).hexdigest() != expected:
                raise PayloadMismatchError("the stored bytes are not the signed ones", file=name, field=algorithm)
        self._kept[index] = data
        return data
