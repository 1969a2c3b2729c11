"""The host's end of the zygote: starts it, asks it for workers, learns how they ended, and leaves nothing behind.

The zygote is a fresh interpreter, not a fork of the host: neither the host's heap nor its address layout reaches a
worker.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import vmgraft
from vmgraft.errors import HostError
from vmgraft.vmmhost.layer.sandbox import Mechanism
from vmgraft.vmmhost.layer.sight import SIGHT_BYTES, Sight, pack_inodes
from vmgraft.vmmhost.layer.zygote_main import CONTROL_BYTES, EXITED, FAILED, HELLO, LOOK, SEEN, SPAWN, SPAWNED

READY_SECONDS: Final = 30.0
CLOSE_SECONDS: Final = 5.0
#: Wait statuses kept of workers that have ended.
_EXITS_KEPT: Final = 256
_BOOT: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[3]); "
    "from vmgraft.vmmhost.layer.zygote_main import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A worker as the host holds it: PID, pidfd, the one socket, and the namespaces it was born into."""

    pid: int
    pidfd: int
    socket: socket.socket
    namespaces: Mechanism

    def kill(self, seconds: float = CLOSE_SECONDS) -> bool:
        """End the worker, wait until it is gone, and close what belongs to it; False if it outlived the wait."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        gone = bool(poller.poll(int(seconds * 1000)))
        os.close(self.pidfd)
        self.socket.close()
        return gone


class Zygote:
    """A running zygote. Start it early, before /dev/kvm and before any image is opened; it loads in the background.

    ``replayed`` says whether its workers are none: a recording answers for them.
    """

    replayed = False

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket, errors: int) -> None:
        self._process, self._control, self._errors = process, control, errors
        self._exits: dict[int, int] = {}
        self._asked = 0  # the number of the last question
        self._ready = False
        #: Whether workers use the fast call; known once ready.
        self.fast = False

    @classmethod
    def start(cls) -> Self:
        """Start a zygote and return at once.

        Call it from the main thread: the zygote is killed when the thread that started it ends.

        Raises:
            HostError: the interpreter cannot be started.
        """
        if not sys.executable:
            raise HostError("the Python interpreter is not known", hint="run vmgraft under a normal Python")
        ours, theirs = _socket_pair()
        try:
            errors = os.memfd_create("vmgraft-zygote-errors")
        except OSError as error:
            ours.close()
            theirs.close()
            raise HostError(f"the zygote does not start: {error.strerror}") from error
        paths = [str(Path(vmgraft.__file__).parents[1]), *(path for path in sys.path if Path(path).is_absolute())]
        command = [sys.executable, "-I", "-c", _BOOT, str(theirs.fileno()), str(os.getpid()), json.dumps(paths)]
        try:
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env={"LC_ALL": "C.UTF-8"}, cwd="/", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            os.close(errors)
            raise HostError(f"the zygote does not start: {error.strerror}") from error
        finally:
            theirs.close()
        return cls(process, ours, errors)

    @property
    def pid(self) -> int:
        """The zygote's PID."""
        return self._process.pid

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Wait until the engine is loaded.

        Raises:
            HostError: it does not come up in time, or cannot load the engine.
        """
        if self._ready:
            return
        packet, _fds = self._receive(time.monotonic() + seconds)
        if len(packet) != HELLO.size or packet[:1] != b"H":
            raise HostError("the zygote speaks out of turn")
        self.fast = bool(HELLO.unpack(packet)[1])
        self._ready = True

    def spawn(self, memory_mib: int, seconds: float = READY_SECONDS) -> WorkerProcess:
        """Fork a worker.

        Args:
            memory_mib: Linear memory of its module, for its address space limit.
            seconds: How long this may take once the engine is loaded.

        Raises:
            HostError: the zygote is gone, or cannot fork.
        """
        self.wait_ready()
        deadline, number = time.monotonic() + seconds, self._next()
        ours, theirs = _socket_pair()
        try:
            try:
                socket.send_fds(self._control, [SPAWN.pack(b"S", number, memory_mib)], [theirs.fileno()])
            finally:
                theirs.close()
            packet, fds = self._reply(deadline)
        except OSError as error:
            ours.close()
            raise HostError(f"the zygote does not answer: {error.strerror or error}") from error
        except HostError:
            ours.close()
            raise
        if len(packet) != SPAWNED.size or len(fds) != 1:
            ours.close()
            _drop(packet, fds)
            code = FAILED.unpack(packet)[2] if len(packet) == FAILED.size else 0
            known = "this machine's system calls are not known: x86-64 and AArch64 are"
            hint = known if code == errno.ENOSYS else "check the limits of processes and open files"
            raise HostError(f"no worker can be started: {os.strerror(code)}", hint=hint)
        _letter, _number, pid, namespaces = SPAWNED.unpack(packet)
        self._exits.pop(pid, None)  # of another that had this number before
        return WorkerProcess(pid, fds[0], ours, Mechanism(namespaces))

    def look(self, pid: int, seconds: float = READY_SECONDS, windows: Sequence[int] = ()) -> Sight:
        """Return what the zygote sees of a worker; nothing of one that has ended.

        Args:
            pid: The worker.
            seconds: How long this may take.
            windows: Inodes of the windows of guest memory that were handed to it: the only memory files it may map.

        Raises:
            HostError: the zygote is gone.
        """
        try:
            self._control.send(LOOK.pack(b"L", self._next(), pid, len(windows)) + pack_inodes(windows))
            packet, fds = self._reply(time.monotonic() + seconds)
        except OSError as error:
            raise HostError(f"the zygote does not answer: {error.strerror or error}") from error
        if len(packet) != SEEN.size + SIGHT_BYTES or packet[:1] != b"V" or fds:
            _drop(packet, fds)
            raise HostError("the zygote speaks out of turn")
        return Sight.unpack(packet[SEEN.size :])

    def exit_status(self, pid: int, seconds: float) -> int | None:
        """Return the wait status of a worker that has ended, or None if it is not reported in time."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(HostError, OSError):
            while pid not in self._exits:
                packet, fds = self._receive(deadline)
                if not self._note(packet):  # nothing has been asked: an answer that nobody waits for any more
                    _drop(packet, fds)
        return self._exits.pop(pid, None)

    def close(self) -> None:
        """Let the zygote kill and reap its workers and end; kill it if it does not. May be called twice."""
        if self._errors < 0:
            return
        self._control.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._errors)
        self._errors = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _next(self) -> int:
        self._asked = (self._asked + 1) & 0xFFFFFFFF
        return self._asked

    def _reply(self, deadline: float) -> tuple[bytes, list[int]]:
        """Return the answer to the last question; those to earlier ones, which were given up, are dropped."""
        while True:
            packet, fds = self._receive(deadline)
            if self._note(packet):
                continue
            if len(packet) >= SEEN.size and SEEN.unpack_from(packet)[1] == self._asked:
                return packet, fds
            _drop(packet, fds)

    def _note(self, packet: bytes) -> bool:
        if len(packet) != EXITED.size or packet[:1] != b"X":
            return False
        _letter, pid, status = EXITED.unpack(packet)
        self._exits[pid] = status
        if len(self._exits) > _EXITS_KEPT:  # of those whom nobody asks about, the oldest
            del self._exits[next(iter(self._exits))]
        return True

    def _receive(self, deadline: float) -> tuple[bytes, list[int]]:
        self._control.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            packet, fds, _flags, _address = socket.recv_fds(self._control, CONTROL_BYTES, 1)
        except TimeoutError as error:
            raise HostError("the zygote does not answer in time", hint=self._last_words()) from error
        if not packet:
            raise HostError("the zygote has ended", hint=self._last_words())
        return packet, fds

    def _last_words(self) -> str | None:
        lines = os.pread(self._errors, 65536, 0).decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else None


def _drop(packet: bytes, fds: list[int]) -> None:
    """Close what came with an answer that is not used; a worker that nobody will ever speak to is ended."""
    for fd in fds:
        if packet[:1] == b"P":
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        os.close(fd)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        hint = "close files, or raise the limit (ulimit -n)"
        raise HostError(f"no socket for a worker: {error.strerror}", hint=hint) from error


def describe_status(status: int | None) -> str:
    """Say in words how a process ended, from its wait status."""
    if status is None:
        return "ended"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in signal.valid_signals() and number < signal.SIGRTMIN else number
        reason = " (a system call that its sandbox forbids)" if number == signal.SIGSYS else ""
        return f"was killed by {name}{reason}"
    code = os.WEXITSTATUS(status)
    return "used up its CPU time for compiling" if code == signal.SIGXCPU else f"ended with exit status {code}"
