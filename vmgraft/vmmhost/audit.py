"""The audit log: one JSON object a line, each naming the hash of the line before it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any, Final

from vmgraft.errors import FileError

#: ``prev`` of the first line.
GENESIS: Final = "0" * 64
#: Longest line a log may hold; longer ones are not ours.
MAX_LINE: Final = 1 << 20
#: Events that end a log; one of them is written however a run goes, unless the host itself is killed.
LAST_EVENTS: Final = ("end", "error")


def _line_hash(record: dict[str, Any]) -> str:
    """Hash a record without its own ``hash`` member, in canonical form (sorted keys, no spaces)."""
    body = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()


class AuditLog:
    """Appends records ``{seq, time, event, ..., prev, hash}``; cutting, editing or reordering lines breaks the chain.

    The last line's hash is returned by :attr:`head` and printed in the run report: keep it elsewhere and a log cut at
    its end is found out too.

    A record that cannot be written whole breaks the log: every later write fails too, so nothing goes on unlogged.

    Args:
        path: File to create; an existing file is never appended to, since its chain would not be ours. ``None`` only
            counts and hashes.

    Raises:
        FileError: when the file cannot be created.
    """

    def __init__(self, path: Path | None) -> None:
        self.count = 0
        self.head = GENESIS
        #: Whether a write failed.
        self.broken = False
        self._path = path
        self._fd: int | None = None
        if path is not None:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileExistsError as error:
                raise FileError(
                    "the audit log exists already", file=path, hint="name a new file; logs are never appended to"
                ) from error
            except OSError as error:
                raise FileError(f"cannot create the audit log: {error.strerror}", file=path) from error

    def write(self, event: str, detail: dict[str, Any]) -> None:
        """Append one record; it reaches the file before this returns.

        Raises:
            FileError: when it cannot be written, or an earlier one could not.
        """
        if self.broken:
            raise FileError("the audit log is incomplete: an earlier record was not written", file=self._path)
        record: dict[str, Any] = {
            "seq": self.count,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "event": event,
            **detail,
            "prev": self.head,
        }
        record["hash"] = _line_hash(record)
        if self._fd is not None:
            self._append(self._fd, _encode(record))
        self.head = record["hash"]
        self.count += 1

    def _append(self, fd: int, data: bytes) -> None:
        line = memoryview(data)
        try:
            while line:
                line = line[os.write(fd, line) :]
        except OSError as error:
            self.broken = True
            raise self._failure(error) from error

    def close(self) -> None:
        """Flush to stable storage and close.

        Raises:
            FileError: when the storage refuses; the file is closed all the same.
        """
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            os.fsync(fd)
        except OSError as error:
            self.broken = True
            raise self._failure(error) from error
        finally:
            os.close(fd)

    def _failure(self, error: OSError) -> FileError:
        hint = "the run ends here, since nothing may happen unlogged; is the disk full?"
        return FileError(f"cannot write the audit log: {error.strerror}", file=self._path, hint=hint)


def check_chain(path: Path, expected_head: str | None = None) -> tuple[int, str]:
    """Check the hash chain of a log file, and that the log is of a run that has ended.

    Args:
        path: The log.
        expected_head: Hash of the last line as reported by the run, to find a log cut at its end or written anew.

    Returns:
        Number of records and the hash of the last one.

    Raises:
        FileError: with the line at fault, when the chain does not hold, or the log is empty or incomplete.
    """
    previous, count, event = GENESIS, 0, None
    try:
        with path.open("rb") as log:
            while line := log.readline(MAX_LINE + 1):
                previous, event = _check_line(path, line, count, previous)
                count += 1
    except OSError as error:
        raise FileError(f"cannot read the audit log: {error.strerror}", file=path) from error
    if not count:
        raise FileError("the audit log is empty", file=path, hint="every run logs at least that it started")
    if expected_head is not None and expected_head != previous:
        raise FileError("the log does not end with the expected hash: lines are missing", file=path, field="hash")
    if event not in LAST_EVENTS:
        raise FileError(
            "the audit log is incomplete: the run has not ended or its last lines are missing",
            file=path,
            field=f"line {count}",
            hint=None if expected_head else "compare with the hash that the run reported: check-log --head",
        )
    return count, previous


def _check_line(path: Path, line: bytes, number: int, previous: str) -> tuple[str, object]:
    """Check one line against the chain and return its hash and event."""
    field = f"line {number + 1}"
    record, written = _parse(line)
    if record is None:
        raise FileError("not a record of an audit log", file=path, field=field)
    claimed = record.pop("hash", None)
    if record.get("prev") != previous or record.get("seq") != number:
        raise FileError("the chain is broken: a line was removed, added or moved", file=path, field=field)
    # The bytes too: of two members of one name a JSON reader keeps the last, and the hash would not see the first.
    if claimed != _line_hash(record) or line != written:
        raise FileError("the line was changed", file=path, field=field)
    return claimed, record.get("event")


def _parse(line: bytes) -> tuple[dict[str, Any] | None, bytes]:
    """Return the record in a line, or None, and the bytes that :meth:`AuditLog.write` writes for it."""
    if len(line) > MAX_LINE:
        return None, b""
    try:
        record = json.loads(line)
        return (record, _encode(record)) if isinstance(record, dict) else (None, b"")
    except (ValueError, RecursionError):
        return None, b""


def _encode(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
