"""What goes over the control socket: one JSON object a line, and with some requests one sealed memory file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from vmgraft.errors import HostError, UsageError, VmgraftError
from vmgraft.schemas import strict_json

#: Longest request, in bytes, its line feed included.
MAX_REQUEST: Final = 4096
#: Longest answer, in bytes; the largest is a list of 64 extensions with their counters.
MAX_ANSWER: Final = 4 << 20
#: Longest record that may be offered, in bytes: what the format allows (docs/format.md).
MAX_OFFER: Final = 1 << 30
#: Longest id of an extension (schema ``manifest``).
MAX_ID: Final = 255
#: Seals that make a memory file as good as a copy: its bytes and its length stay (memfd_create(2), fcntl(2)).
SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK


class Op(StrEnum):
    """What may be asked."""

    STATUS = "status"
    STATS = "stats"
    SCREEN = "screen"
    LOAD = "load"
    REPLACE = "replace"
    UNLOAD = "unload"
    STOP = "stop"
    SNAPSHOT = "snapshot"


#: Requests that bring a record along, and those that bring an empty memory file to be filled; all others must not.
OFFERING: Final = frozenset({Op.LOAD, Op.REPLACE})
FILLING: Final = frozenset({Op.SNAPSHOT})
#: Requests that only look.
LOOKING: Final = frozenset({Op.STATUS, Op.STATS, Op.SCREEN})


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request.

    Attributes:
        op: What is asked.
        id: The extension it is about, or None where none is named.
    """

    op: Op
    id: str | None = None


@dataclass(slots=True)
class Later:
    """An answer that comes once the guest rests: then ``outcome`` is what to answer, or why not.

    Attributes:
        outcome: What to answer, or None while it is not known.
        dropped: Called when nobody waits for it any more.
        given_up: Nobody does: it shall not be done any more.
    """

    outcome: dict[str, Any] | VmgraftError | None = None
    dropped: Callable[[], None] = lambda: None
    given_up: bool = False

    def give_up(self) -> None:
        """Take the request back; may be called twice."""
        if not self.given_up:
            self.given_up = True
            self.dropped()


def parse_request(line: bytes) -> Request:
    """Check a request.

    Raises:
        UsageError: it is none.
    """
    document = strict_json(line, file=None, error=UsageError, max_bytes=MAX_REQUEST, max_depth=2)
    if not isinstance(document, dict) or not set(document) <= {"op", "id"}:
        raise UsageError("a request is an object with `op`, and `id` where it is about an extension", field="request")
    try:
        op = Op(str(document.get("op")))
    except ValueError as error:
        raise UsageError("no such request", field="op", hint=f"there are: {', '.join(Op)}") from error
    name = document.get("id")
    if name is not None and not (isinstance(name, str) and 0 < len(name) <= MAX_ID):
        raise UsageError("not the id of an extension", field="id")
    if name is not None and op in LOOKING | FILLING | {Op.STOP}:
        raise UsageError(f"{op.value} is not about one extension", field="id")
    if name is None and op is Op.UNLOAD:
        raise UsageError("say which extension", field="id")
    return Request(op, name)


def request_line(request: Request) -> bytes:
    """Return a request as it is sent."""
    document = {"op": request.op.value} | ({} if request.id is None else {"id": request.id})
    return json.dumps(document).encode() + b"\n"


def answer_line(document: dict[str, Any]) -> bytes:
    """Return an answer as it is sent: ASCII, so that nothing in it can drive a terminal."""
    return json.dumps(document).encode() + b"\n"


def refusal(error: VmgraftError) -> dict[str, Any]:
    """Return the answer that says no."""
    return {"ok": False, "error": error.to_dict()}


def error_kind(code: str | None) -> type[VmgraftError]:
    """Return the family of errors with a code, :class:`HostError` where no family has it."""
    waiting: list[type[VmgraftError]] = [VmgraftError]
    while waiting:
        kind = waiting.pop()
        if kind.code == code:
            return kind
        waiting += kind.__subclasses__()
    return HostError


def check_fillable(fd: int) -> None:
    """Check a descriptor that came in to be written to: an empty memory file, so that writing never waits.

    Raises:
        UsageError: it is anything else.
    """
    hint = "a client passes an empty memory file (memfd_create) without seals"
    try:
        seals, flags, found = fcntl.fcntl(fd, fcntl.F_GET_SEALS), fcntl.fcntl(fd, fcntl.F_GETFL), os.fstat(fd)
    except OSError as error:
        raise UsageError("the descriptor is no memory file", field="file", hint=hint) from error
    sealed = seals & (SEALS | fcntl.F_SEAL_FUTURE_WRITE) if hasattr(fcntl, "F_SEAL_FUTURE_WRITE") else seals & SEALS
    if sealed or found.st_size or not stat.S_ISREG(found.st_mode) or flags & os.O_ACCMODE == os.O_RDONLY:
        raise UsageError("the memory file is sealed, not empty, or not to be written to", field="file", hint=hint)


def offered_size(fd: int) -> int:
    """Check a descriptor that came in from outside, and return the length of what it holds.

    Only a sealed memory file is taken: nobody can change or shorten it while it is read, and reading it never waits, as
    it might with a pipe, a device or a file system that some process plays.

    Raises:
        UsageError: it is anything else.
    """
    hint = "a client passes a memory file (memfd_create) sealed against writing, growing and shrinking"
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        found = os.fstat(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise UsageError(f"the descriptor cannot be used: {error.strerror}", field="record") from error
        raise UsageError("the descriptor is no memory file", field="record", hint=hint) from error
    if seals & SEALS != SEALS or not stat.S_ISREG(found.st_mode):
        raise UsageError("the memory file is not sealed", field="record", hint=hint)
    if not 0 < found.st_size <= MAX_OFFER:
        raise UsageError(f"a record of {found.st_size} bytes; 1 to {MAX_OFFER} are allowed", field="record")
    return found.st_size
