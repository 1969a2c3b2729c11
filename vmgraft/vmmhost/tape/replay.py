"""A run in which a recording answers for the extensions: no worker is started, no module is looked at."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from vmgraft.errors import FileError, HostError, UsageError
from vmgraft.vmmhost.layer.sandbox import Mechanism
from vmgraft.vmmhost.layer.sight import Sight
from vmgraft.vmmhost.layer.zygote import READY_SECONDS, WorkerProcess, Zygote
from vmgraft.vmmhost.plan import LaunchPlan, RunOptions
from vmgraft.vmmhost.regular import open_regular
from vmgraft.vmmhost.tape.lines import (
    MARK,
    MAX_FILE,
    MAX_LINE,
    VERSION,
    Event,
    binding,
    event_line,
    parse_event,
    sent_event,
)

#: First second of the year 3000, UTC, where the machine's clock ends.
_EPOCH_END: Final = 32_503_680_000
#: Longest header, in bytes: it names every module.
_HEADER_MAX: Final = 1 << 20


class DivergedError(HostError):
    """The run does something else than the recorded one did."""


class Replayer:
    """Reads a recording event by event.

    The whole file is checked before anything is started, and every line again when it is used.

    Args:
        path: The recording.
        plan: What runs.
        options: How it runs.

    Raises:
        FileError: it cannot be read, or is no whole recording.
        UsageError: it is one of another image, of other extensions, or of another machine.
    """

    def __init__(self, path: Path, plan: LaunchPlan, options: RunOptions) -> None:
        self._path = path
        self._looks = self._played = 0
        self._file: BinaryIO = open_regular(path, "the recording")
        try:
            header, self.sha256 = self._check()
            self._bind(header, plan, options)
            self._file.seek(0)
            self._file.readline(_HEADER_MAX)
        except BaseException:
            self._file.close()
            raise
        self._events = self._lines()
        self._next: Event | None = next(self._events, None)

    # --- the file ---------------------------------------------------------------------------------------------------

    def _check(self) -> tuple[dict[str, Any], str]:
        """Read the file once, to its end; return its header and the digest over all that comes before the end."""
        line = self._read(_HEADER_MAX)
        header = self._header(line)
        digest, count, size = hashlib.sha256(line), 0, len(line)
        while line := self._read(MAX_LINE):
            event = parse_event(line, self._path, count + 2)
            size += len(line)
            if size > MAX_FILE:
                raise FileError(f"more than {MAX_FILE} bytes", file=self._path)
            if event[0] == "end":
                if event != ("end", count, digest.hexdigest()) or self._read(1):
                    break
                return header, digest.hexdigest()
            digest.update(line)
            count += 1
        raise FileError("the recording is cut or was changed", file=self._path, hint="record the run again")

    def _header(self, line: bytes) -> dict[str, Any]:
        try:
            header = json.loads(line)
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict) or header.get(MARK) != VERSION:
            raise FileError("not a recording of this version", file=self._path, field="line 1")
        epoch, seed = header.get("rtcEpoch"), header.get("seed")
        good = type(epoch) is int and 0 <= epoch < _EPOCH_END and isinstance(seed, str) and len(seed) == 64
        try:
            self.seed = bytes.fromhex(seed) if good and isinstance(seed, str) else b""
        except ValueError:
            self.seed = b""
        if len(self.seed) != 32 or not isinstance(epoch, int):
            raise FileError("a recording without its clock or seed", file=self._path, field="line 1")
        self.rtc_epoch = epoch
        return header

    def _bind(self, header: dict[str, Any], plan: LaunchPlan, options: RunOptions) -> None:
        recorded, now = header.get("binding"), binding(plan, options)
        for name, value in now.items():
            if not isinstance(recorded, dict) or recorded.get(name) != value:
                words = "of other extensions" if name == "modules" else f"of another run: {name} differs"
                hint = "replay the image and options recorded"
                raise UsageError(f"the recording is {words}", file=self._path, field=name, hint=hint)

    def _read(self, limit: int) -> bytes:
        try:
            return self._file.readline(limit)
        except OSError as error:
            raise FileError(f"cannot read the recording: {error.strerror}", file=self._path) from error

    def _lines(self) -> Iterator[Event]:
        number = 1
        while line := self._read(MAX_LINE):
            number += 1
            event = parse_event(line, self._path, number)
            if event[0] == "end":
                return
            yield event

    # --- playing ----------------------------------------------------------------------------------------------------

    def peek(self) -> Event | None:
        """Return the next event, or None at the end."""
        return self._next

    def take(self) -> Event:
        """Return the next event and go on.

        Raises:
            DivergedError: there is none.
        """
        event = self._next
        if event is None:
            raise self.diverged("the recording is over")
        self._played += 1
        self._next = next(self._events, None)
        return event

    def expect(self, event: Event) -> None:
        """Take the next event, which must be this one.

        Raises:
            DivergedError: it is another.
        """
        if self._next != event:
            raise self.diverged(f"it does {_short(event)}")
        self.take()

    def diverged(self, words: str) -> DivergedError:
        """Return the error of a run that goes another way."""
        recorded = "the end" if self._next is None else _short(self._next)
        return DivergedError(
            f"the run differs from the recorded one: {words}, recorded is {recorded}",
            file=self._path,
            field=f"line {self._played + 2}",
            hint="does the guest read a clock that no recording holds (RDTSC)?",
        )

    def ticker(self, tick: Callable[[int], None]) -> Callable[[int], None]:
        """Return a handler for every look around, which passes those on that the recording names."""

        def look(now: int) -> None:
            self._looks += 1
            if self._next == ("at", self._looks):
                self.take()
                tick(now)

        return look

    def summary(self) -> dict[str, Any]:
        """Return what the audit log says of the replay; it is whole where nothing is left but the workers' end."""
        return {"played": self._played, "whole": self._next is None or self._next[0] == "kill"}

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()


class ReplayZygote(Zygote):
    """Gives out workers that are none: the recording answers for them.

    Args:
        replayer: The recording.
    """

    replayed = True

    def __init__(self, replayer: Replayer) -> None:
        self._replayer = replayer
        self._spawned = 0

    def spawn(self, memory_mib: int, seconds: float = READY_SECONDS) -> WorkerProcess:
        """Return the next worker of the recording; its PID is negative, since there is no process."""
        number, self._spawned = self._spawned, self._spawned + 1
        event = self._replayer.peek()
        if event is None or event[:2] != ("spawn", number):
            raise self._replayer.diverged(f"it starts worker {number}")
        namespaces = Mechanism(self._replayer.take()[2])
        return _Nobody(-number - 1, -1, cast("socket.socket", _Voice(self._replayer, number)), namespaces)

    def look(self, pid: int, seconds: float = READY_SECONDS, windows: Sequence[int] = ()) -> Sight:
        """Return what was seen of the recorded worker."""
        event = self._replayer.peek()
        if event is None or event[:2] != ("seen", -pid - 1):
            raise self._replayer.diverged(f"worker {-pid - 1} is looked at")
        return Sight.unpack(bytes.fromhex(self._replayer.take()[2]))

    def exit_status(self, pid: int, seconds: float) -> int | None:
        """Return how the recorded worker ended."""
        event = self._replayer.peek()
        if event is None or event[:2] != ("exit", -pid - 1):
            raise self._replayer.diverged(f"worker {-pid - 1} is gone")
        return cast("int | None", self._replayer.take()[2])

    def close(self) -> None:
        """Nothing runs."""


class _Nobody(WorkerProcess):
    """A worker without a process."""

    def kill(self, seconds: float = 0.0) -> bool:
        """Close its end."""
        self.socket.close()
        return True


class _Voice:
    """The socket of a recorded worker, as far as the host uses it."""

    def __init__(self, replayer: Replayer, worker: int) -> None:
        self._replayer, self._worker = replayer, worker
        self._closed = False

    def settimeout(self, seconds: float | None) -> None:
        """Nothing here is ever waited for."""

    def send(self, packet: bytes) -> int:
        self._met("send")
        self._replayer.expect(sent_event(self._worker, packet))
        return len(packet)

    def recv(self, size: int) -> bytes:
        self._met("recv")
        event = self._replayer.peek()
        if event is None or event[:2] != ("recv", self._worker):
            raise self._replayer.diverged(f"worker {self._worker} is waited for")
        return bytes.fromhex(self._replayer.take()[2])[:size]

    def _met(self, way: str) -> None:
        """Raise what the host met when it was recorded."""
        event = self._replayer.peek()
        if event == ("late", self._worker, way):
            self._replayer.take()
            raise TimeoutError
        if event == ("gone", self._worker, way):
            self._replayer.take()
            raise ConnectionResetError
        if event == ("kill", self._worker):  # its time was up between two packets
            raise TimeoutError

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._replayer.peek() == ("kill", self._worker):
                self._replayer.take()


def _short(event: Event) -> str:
    text = event_line(event).decode().strip()
    return text if len(text) <= 100 else text[:99] + "…"
