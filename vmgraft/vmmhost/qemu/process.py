"""QEMU as a child that is never left behind: started confined, held by a pidfd, killed with its parent."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import vmgraft
from vmgraft.errors import EngineUnavailableError, HostError
from vmgraft.vmmhost.qemu.command import QemuMachine
from vmgraft.vmmhost.qemu.jail import MARK

PROGRAM: Final = "qemu-system-x86_64"
#: Bytes of QEMU's own messages that are kept.
_MESSAGES: Final = 16384
_READS: Final = 16
_KILL_SECONDS: Final = 5.0
_BOOT: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[4]); from vmgraft.vmmhost.qemu.jail import main; "
    "main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'kvm', sys.argv[5:])"
)


def find_qemu() -> str:
    """Return the absolute path of QEMU.

    Raises:
        EngineUnavailableError: it is not installed.
    """
    found = shutil.which(PROGRAM)
    if found is None:
        raise EngineUnavailableError(f"{PROGRAM} is not installed", hint="Debian: apt install qemu-system-x86")
    return str(Path(found).resolve())


class QemuProcess:
    """A running QEMU; a context manager. Start it from the main thread: it is killed when that thread ends.

    Args:
        machine: What it is to run; its descriptors are inherited.

    Raises:
        EngineUnavailableError: QEMU is not installed.
        HostError: it cannot be started.
    """

    def __init__(self, machine: QemuMachine) -> None:
        program = find_qemu()
        if not sys.executable:
            raise HostError("the Python interpreter is not known", hint="run vmgraft under a normal Python")
        self._messages, self._reader = bytearray(), -1
        #: Whether it closed its standard output and error.
        self.silent = False
        paths = [str(Path(vmgraft.__file__).parents[1]), *(path for path in sys.path if Path(path).is_absolute())]
        command = [
            sys.executable, "-I", "-c", _BOOT, program, str(os.getpid()), "kvm" if machine.kvm else "tcg",
            json.dumps(paths), *machine.arguments(),
        ]  # fmt: skip
        self._reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.set_blocking(writer, True)
            self._process = subprocess.Popen(
                command, pass_fds=machine.fds(), env={"LC_ALL": "C.UTF-8"}, cwd="/", start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=writer, stderr=writer,
            )  # fmt: skip
            self.pidfd = self._hold()
        except OSError as error:
            os.close(self._reader)
            raise HostError(f"QEMU does not start: {error.strerror}") from error
        finally:
            os.close(writer)

    def _hold(self) -> int:
        """Return a descriptor of the process; where there is none to be had, there is no process either."""
        try:
            return os.pidfd_open(self._process.pid)
        except OSError:
            self._process.kill()
            self._process.wait()
            raise

    @property
    def pid(self) -> int:
        """Its PID."""
        return self._process.pid

    @property
    def messages_fd(self) -> int:
        """Readable when QEMU says something on its standard output or error."""
        return self._reader

    def read_messages(self) -> None:
        """Take in what QEMU said; what goes beyond a bound is dropped."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_READS):  # a QEMU that never stops talking does not keep the host from its other work
                data = os.read(self._reader, 4096)
                self.silent = not data
                if self.silent:
                    return
                self._messages += data[: _MESSAGES - len(self._messages)]

    def mechanisms(self) -> list[str]:
        """Return what confines it, as far as it said."""
        first = self._messages.decode("utf-8", "replace").split("\n", 1)[0]
        return first.removeprefix(MARK).split() if first.startswith(MARK) else []

    def complaint(self) -> str:
        """Return its last words as one line; they may have been written by a guest that took it over."""
        self.read_messages()
        lines = self._messages.decode("utf-8", "replace").splitlines()
        own = "; ".join(line.strip() for line in lines if line.strip() and not line.startswith(MARK))
        return "".join(c if c.isprintable() else "?" for c in own[-500:])

    def wait(self, seconds: float) -> int | None:
        """Wait for its end; return its exit status (negative: a signal), or None when it lives on."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        if not poller.poll(max(0, int(seconds * 1000))):
            return None
        return self._process.wait()

    def close(self) -> None:
        """Kill it if it still runs, reap it, and close what belongs to it; may be called twice."""
        if self._reader < 0:
            return
        if self.wait(0) is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self.wait(_KILL_SECONDS)
        os.close(self.pidfd)
        os.close(self._reader)
        self._reader = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
