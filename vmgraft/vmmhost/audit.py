"""The audit log: one JSON object a line, each naming the hash of the line before it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vmgraft.errors import FileError
from vmgraft.vmmhost.regular import open_regular

#: ``prev`` of the first line.
GENESIS: Final = "0" * 64
#: Longest line a log may hold; longer ones are not ours.
MAX_LINE: Final = 1 << 20
#: Events that end a log; one of them is written however a run goes, unless the host itself is killed.
LAST_EVENTS: Final = ("end", "error")
#: Events after which a log is brought to stable storage at once: decisions, and what cannot be told later.
DECISIVE: Final = frozenset({"start", "verification", "plan", "boot", "control", "fault", *LAST_EVENTS})
#: Signals that may raise an exception where they come.
_HELD: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds between two such moments at least, so that nobody makes a host wait for its storage all the time.
SYNC_SECONDS: Final = 0.1


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
        self._synced = 0.0
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
        with _signals_held():
            if self._fd is not None:
                self._append(self._fd, _encode(record))
            self.head = record["hash"]
            self.count += 1
        if self._fd is not None:
            self._sync(self._fd, event)

    def _append(self, fd: int, data: bytes) -> None:
        line = memoryview(data)
        try:
            while line:
                line = line[os.write(fd, line) :]
        except OSError as error:
            self.broken = True
            raise self._failure(error) from error

    def _sync(self, fd: int, event: str) -> None:
        """Bring what is decisive to stable storage; faults and requests, which can come often, only now and then."""
        now = time.monotonic()
        often = event in ("fault", "control") and now - self._synced < SYNC_SECONDS
        if event not in DECISIVE or often:
            return
        try:
            os.fdatasync(fd)
        except OSError as error:
            self.broken = True
            raise self._failure(error) from error
        self._synced = now

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


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let no signal come between a line and the memory of its hash: the next line would not fit."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    for record in read_records(path):
        previous, event, count = record["hash"], record.get("event"), count + 1
    if not count:
        raise FileError("the audit log is empty", file=path, hint="every run logs at least that it started")
    if expected_head is not None and expected_head != previous:
        raise FileError("the log does not end with the expected hash: lines are missing", file=path, field="hash")
    if event not in LAST_EVENTS:
        raise FileError(
            "the audit log is incomplete: the run has not ended or its last lines are missing",
            file=path,
            field=f"line {count}",
            hint=None if expected_head else "compare with the hash that the run reported: audit-log verify --head",
        )
    return count, previous


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, each once its line is checked against the chain; also of a run that goes on.

    Raises:
        FileError: with the line at fault, when the chain does not hold, or the file cannot be read.
    """
    previous, count = GENESIS, 0
    try:
        with open_regular(path, "the audit log") as log:
            while line := log.readline(MAX_LINE + 1):
                record = _check_line(path, line, count, previous)
                previous, count = record["hash"], count + 1
                yield record
    except OSError as error:
        raise FileError(f"cannot read the audit log: {error.strerror}", file=path) from error


def _check_line(path: Path, line: bytes, number: int, previous: str) -> dict[str, Any]:
    """Check one line against the chain and return its record."""
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
    return {**record, "hash": claimed}


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
