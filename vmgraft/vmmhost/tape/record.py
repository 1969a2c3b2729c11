"""Writing a recording: a zygote whose workers are listened to."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, cast

from vmgraft import __version__
from vmgraft.errors import FileError, HostError
from vmgraft.vmmhost.layer.sight import Sight
from vmgraft.vmmhost.layer.zygote import READY_SECONDS, WorkerProcess, Zygote
from vmgraft.vmmhost.plan import LaunchPlan, RunOptions
from vmgraft.vmmhost.tape.lines import MARK, MAX_FILE, VERSION, Event, binding, event_line, sent_event

#: Wall-clock seconds between two looks at which ``on_tick`` may be called, as in a run without a recording.
TICK_SECONDS: Final = 0.01


class Recorder:
    """Keeps what host and workers say to each other; the file is whole once it is closed.

    Args:
        path: File to create.
        plan: What runs.
        options: How it runs.

    Raises:
        FileError: the file cannot be made.
    """

    def __init__(self, path: Path, plan: LaunchPlan, options: RunOptions) -> None:
        self._path = path
        self.seed = options.seed or secrets.token_bytes(32)
        self.rtc_epoch = int(time.time())
        self._count = self._size = self._looks = 0
        self._at: int | None = None
        self._next_tick = 0.0
        self._digest = hashlib.sha256()
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise FileError(f"cannot create the recording: {error.strerror}", file=path) from error
        self._buffer = bytearray()
        header = {
            MARK: VERSION,
            "vmgraft": __version__,
            "binding": binding(plan, options),
            "rtcEpoch": self.rtc_epoch,
            "seed": self.seed.hex(),
        }
        self._append(json.dumps(header).encode() + b"\n")

    def write(self, event: Event) -> None:
        """Add one event.

        Raises:
            FileError: it cannot be written, or the recording grows too long; the run must not go on unrecorded.
        """
        if self._at is not None:
            at, self._at = self._at, None
            self._line(("at", at))
        self._line(event)

    def ticker(self, tick: Callable[[int], None]) -> Callable[[int], None]:
        """Return a handler for every look around, which passes some of them on and notes which."""

        def look(now: int) -> None:
            self._looks += 1
            wall = time.monotonic()
            if wall < self._next_tick:
                return
            self._next_tick, self._at = wall + TICK_SECONDS, self._looks
            try:
                tick(now)
            finally:
                self._at = None

        return look

    def close(self) -> None:
        """Write the end, and close; may be called twice.

        Raises:
            FileError: it cannot be written.
        """
        if self._fd < 0:
            return
        try:
            self._append(event_line(("end", self._count, self._digest.hexdigest())))
            self._flush()
        finally:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _line(self, event: Event) -> None:
        self._count += 1
        self._append(event_line(event))
        if self._size > MAX_FILE - (1 << 20):
            hint = "record a shorter run"
            raise FileError(f"the recording is over {MAX_FILE} bytes long", file=self._path, hint=hint)

    def _append(self, line: bytes) -> None:
        self._digest.update(line)
        self._size += len(line)
        self._buffer += line
        if len(self._buffer) >= 1 << 16:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._buffer:
                del self._buffer[: os.write(self._fd, self._buffer)]
        except OSError as error:
            raise FileError(f"cannot write the recording: {error.strerror}", file=self._path) from error


class RecordingZygote(Zygote):
    """A zygote whose workers are listened to.

    Args:
        zygote: The one that starts them.
        recorder: Gets what is heard.
    """

    def __init__(self, zygote: Zygote, recorder: Recorder) -> None:
        self._inner, self._recorder = zygote, recorder
        self._workers: dict[int, int] = {}  # PID → number in the recording
        self._spawned = 0

    def spawn(self, memory_mib: int, seconds: float = READY_SECONDS) -> WorkerProcess:
        """Fork a worker."""
        process = self._inner.spawn(memory_mib, seconds)
        number, self._spawned = self._spawned, self._spawned + 1
        self._workers[process.pid] = number
        self._recorder.write(("spawn", number, int(process.namespaces)))
        tap = cast("socket.socket", _Tap(process.socket, self._recorder, number))
        return WorkerProcess(process.pid, process.pidfd, tap, process.namespaces)

    def look(self, pid: int, seconds: float = READY_SECONDS, windows: Sequence[int] = ()) -> Sight:
        """Return what is seen of a worker."""
        sight = self._inner.look(pid, seconds, windows)
        self._recorder.write(("seen", self._workers[pid], sight.pack().hex()))
        return sight

    def exit_status(self, pid: int, seconds: float) -> int | None:
        """Return how a worker ended."""
        status = self._inner.exit_status(pid, seconds)
        self._recorder.write(("exit", self._workers[pid], status))
        return status

    def close(self) -> None:
        """End the zygote."""
        self._inner.close()


class _Tap:
    """One worker's socket, as far as the host uses it."""

    def __init__(self, inner: socket.socket, recorder: Recorder, worker: int) -> None:
        self._inner, self._recorder, self._worker = inner, recorder, worker

    def settimeout(self, seconds: float | None) -> None:
        self._inner.settimeout(seconds)

    def send(self, packet: bytes) -> int:
        count = cast("int", self._noting("send", lambda: self._inner.send(packet)))
        self._recorder.write(sent_event(self._worker, packet))
        return count

    def recv(self, size: int) -> bytes:
        packet = cast("bytes", self._noting("recv", lambda: self._inner.recv(size)))
        self._recorder.write(("recv", self._worker, packet.hex()))
        return packet

    def _noting(self, way: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except TimeoutError:
            self._recorder.write(("late", self._worker, way))
            raise
        except OSError:
            self._recorder.write(("gone", self._worker, way))
            raise

    def close(self) -> None:
        """The host is done with the worker, which is where a replay that waits for more would notice."""
        self._inner.close()
        self._recorder.write(("kill", self._worker))


def require_repeatable(engine: str, *, live: bool) -> None:
    """Refuse runs that no recording can repeat.

    Args:
        engine: What the user asked the guest to run on.
        live: Whether somebody types or changes extensions while it runs.

    Raises:
        HostError: such a run.
    """
    if engine == "kvm":
        raise HostError("a run on KVM does not repeat itself", hint="record and replay on the soft CPU: --cpu soft")
    if live:
        raise HostError("what comes in while the guest runs is not recorded", hint="leave --console and --control out")
