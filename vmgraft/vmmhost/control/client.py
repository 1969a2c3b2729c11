"""The asking end of the control socket, for ``vmgraft ctl`` and for programs.

.. code-block:: python

    with ControlClient(Path("guest.sock")) as guest:
        print(guest.ask(Op.STATUS)["extensions"])
        guest.offer(Op.REPLACE, Path("disk-with-a-newer-graft.img"), extension="org.example.clock")
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vmgraft.errors import FileError, GraftFormatError, HostError, UsageError, VmgraftError
from vmgraft.imagefmt.blob import Blob, open_blob
from vmgraft.imagefmt.commit import Writer, atomic_output
from vmgraft.imagefmt.contract import PROBE, Opening
from vmgraft.imagefmt.graft import open_graft, open_image
from vmgraft.imagefmt.locator import MAGIC
from vmgraft.imagefmt.record import parse_record
from vmgraft.vmmhost.control.wire import MAX_ANSWER, MAX_OFFER, SEALS, Op, Request, error_kind, request_line

#: Copied at a time, and the hash that ends a snapshot, in bytes.
_CHUNK: Final = 1 << 20
_HASH_BYTES: Final = 32
#: Seconds to wait for an answer: starting a worker may take 15, and content may have to be read once more.
ANSWER_SECONDS: Final = 120.0
#: Seconds in which a host that ends takes its socket away.
_GONE_SECONDS: Final = 2.0
#: Seconds to wait for a snapshot: 256 MiB that do not shrink took 9 s on two busy cores, and a guest may have 3 GiB.
SNAPSHOT_SECONDS: Final = 1800.0


class ControlClient:
    """A connection to a running guest's control socket; a context manager.

    Args:
        path: The socket.
        seconds: How long to wait for an answer.

    Raises:
        HostError: nobody listens there.
    """

    def __init__(self, path: Path, *, seconds: float = ANSWER_SECONDS) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(seconds)
        try:
            self._socket.connect(os.fspath(path))
        except (OSError, ValueError) as error:
            self._socket.close()
            reason = getattr(error, "strerror", None) or str(error)
            hint = "is a guest running with --control and this path?"
            raise HostError(f"cannot talk to a guest: {reason}", file=path, hint=hint) from error

    def ask(self, op: Op, extension: str | None = None) -> dict[str, Any]:
        """Ask, and return the answer's members.

        Raises:
            VmgraftError: what the host refused, of the family that it named; or there was no answer.
        """
        return self._ask(Request(op, extension), None)

    def ended(self) -> bool:
        """Tell whether the guest ended in order, once it answers no more: its host then takes the socket's name away.

        The connections end a moment before that, so this waits up to two seconds.
        """
        deadline = time.monotonic() + _GONE_SECONDS
        while os.path.lexists(self._path):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def offer(self, op: Op, source: Path, *, extension: str | None = None, opening: Opening = PROBE) -> dict[str, Any]:
        """Offer the graft record of an image, or a record file, and ask for one extension of it to be loaded.

        The record is copied into a sealed memory file, so the host parses no container and reads nothing that changes.

        Raises:
            VmgraftError: as :meth:`ask`; or the source holds no record.
        """
        fd = sealed_copy(read_record(source, opening))
        try:
            return self._ask(Request(op, extension), fd)
        finally:
            os.close(fd)

    def snapshot(self, destination: Path) -> dict[str, Any]:
        """Have the guest kept in a new file of mode 0600, and return its length and hash.

        The host writes into a memory file; the file gets its name once it is whole and on stable storage.

        Raises:
            VmgraftError: as :meth:`ask`; or the file cannot be written.
        """
        with atomic_output(destination, mode=0o600) as out:
            fd = os.memfd_create("vmgraft-snapshot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                self._socket.settimeout(SNAPSHOT_SECONDS)
                done = self._ask(Request(Op.SNAPSHOT), fd)
                _copy_snapshot(fd, out, done, destination)
            finally:
                os.close(fd)
        return done

    def _ask(self, request: Request, fd: int | None) -> dict[str, Any]:
        line = request_line(request)
        try:
            if fd is None:
                self._socket.sendall(line)
            else:
                socket.send_fds(self._socket, [line], [fd])
            answer = self._answer()
        except TimeoutError as error:
            raise HostError("the guest's host does not answer in time", file=self._path) from error
        except OSError as error:
            raise HostError(f"the guest's host went away: {error.strerror}", file=self._path) from error
        if answer.pop("ok", None) is True:
            return answer
        raise _error(answer.get("error"), self._path)

    def _answer(self) -> dict[str, Any]:
        data = bytearray()
        while not data.endswith(b"\n"):
            more = self._socket.recv(65536)
            if not more or len(data) + len(more) > MAX_ANSWER:
                raise HostError("the guest's host went away", file=self._path, hint="the run may have ended")
            data += more
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise HostError("the answer is no JSON", file=self._path) from error
        if not isinstance(document, dict):
            raise HostError("the answer is no JSON object", file=self._path)
        return document

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _copy_snapshot(fd: int, out: int, told: dict[str, Any], destination: Path) -> None:
    """Copy what the host wrote, if it has the length and ends with the hash that it tells of."""
    size, writer = 0, Writer(out, file=destination)
    while chunk := os.pread(fd, _CHUNK, size):
        writer.write(size, chunk)
        size += len(chunk)
    last = os.pread(fd, _HASH_BYTES, max(0, size - _HASH_BYTES))
    if size != told.get("bytes") or last.hex() != told.get("sha256"):
        raise HostError("the host did not write the snapshot that it tells of", file=destination)


def read_record(source: Path, opening: Opening = PROBE) -> Blob:
    """Return the record in a record file (``vmgraft extract … record``) or in a grafted image, as it is stored.

    Raises:
        FileError: the file cannot be read.
        NoGraftError: it is an image without a graft.
        GraftFormatError: the graft has no record that could be read.
    """
    if _begins_as_record(source):
        return _record_file(source)
    with open_image(source, opening) as image:
        located = open_graft(image).located
        if located.record is None:
            raise GraftFormatError(f"no record to offer: {located.detail}", file=source, field="record")
        return located.record


def _begins_as_record(source: Path) -> bool:
    """Look at the first bytes; a pipe, where looking would wait, is no image either."""
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FileError(f"cannot read: {error.strerror}", file=source) from error
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and os.pread(fd, len(MAGIC), 0) == MAGIC
    except OSError as error:
        raise FileError(f"cannot read: {error.strerror}", file=source) from error
    finally:
        os.close(fd)


def _record_file(source: Path) -> Blob:
    record = open_blob(source, MAX_OFFER)
    try:
        parse_record(record, file=source, offset=0)
    except GraftFormatError as error:
        error.hint = error.hint or "a sidecar goes with its image: name the image"
        raise
    return record


def sealed_copy(record: Blob) -> int:
    """Return a memory file with the record, sealed against any change; the caller closes it.

    Raises:
        UsageError: the record is longer than a host takes.
        FileError: it cannot be read, or there is no room for it.
    """
    if record.size > MAX_OFFER:
        raise UsageError(f"the record has {record.size} bytes, at most {MAX_OFFER} are taken", field="record")
    fd = os.memfd_create("vmgraft-record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for chunk in record.chunks():
            view = memoryview(chunk)
            while view:
                view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        os.close(fd)
        raise FileError(f"no room for a copy of the record: {error.strerror}") from error
    except VmgraftError:
        os.close(fd)
        raise
    return fd


def _error(document: Any, path: Path) -> VmgraftError:
    """Return what the host refused as an error of ours; nothing of the answer is taken for more than text."""
    if not isinstance(document, dict):
        return HostError("the guest's host refused, and did not say why", file=path)
    texts = {name: document.get(name) for name in ("code", "message", "field", "hint")}
    known = {name: text for name, text in texts.items() if isinstance(text, str)}
    return error_kind(known.get("code"))(
        known.get("message", "the guest's host refused"),
        file=path,
        field=known.get("field"),
        hint=known.get("hint"),
    )
