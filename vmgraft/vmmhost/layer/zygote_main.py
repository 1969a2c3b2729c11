"""The zygote process: loads the engine once, forks workers on request, reaps them. It never sees a module.

Control packets: ``S`` + number + memory MiB with a worker's socket → ``P`` + number + PID + namespaces with the pidfd,
or ``E`` + number + errno; ``L`` + number + PID + inodes of its windows → ``V`` + number + what is seen of that worker
(`sight`): each answer has the number of its question, so that a late one is not taken for the next one's;
``X`` + PID + wait status whenever a worker has ended; ``H`` + fast at the start.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
from typing import Final

from vmgraft.vmmhost.layer import filters, seccomp
from vmgraft.vmmhost.layer.sandbox import choose_namespaces, clone_worker
from vmgraft.vmmhost.layer.sight import MAX_INODES, Sight, look, unpack_inodes
from vmgraft.vmmhost.layer.syscalls import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, prctl

HELLO: Final = struct.Struct("<cB")
SPAWN: Final = struct.Struct("<cII")
LOOK: Final = struct.Struct("<cIiB")
SEEN: Final = struct.Struct("<cI")
SPAWNED: Final = struct.Struct("<cIiI")
FAILED: Final = struct.Struct("<cIi")
EXITED: Final = struct.Struct("<cii")
CONTROL_BYTES: Final = 64 + 8 * MAX_INODES


def main(control_fd: int, parent: int) -> None:
    """Run until the control socket closes; then kill and reap every worker."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        return
    with contextlib.suppress(OSError):
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_DUMPABLE, 0)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    from vmgraft.vmmhost.layer.engine import fast_calls_work

    control = socket.socket(fileno=control_fd)
    zygote = _Zygote(control, fast=fast_calls_work())
    zygote.serve()


class _Zygote:
    def __init__(self, control: socket.socket, *, fast: bool) -> None:
        self.control, self.fast = control, fast
        self.namespaces = choose_namespaces()
        self.children: dict[int, int] = {}  # pidfd → PID

    def serve(self) -> None:
        from vmgraft.vmmhost.layer import worker  # noqa: F401 - loaded once, for every child

        if seccomp.supported():
            filters.worker_program()  # assembled once, for every child
        gc.collect()
        gc.freeze()
        try:
            self.control.send(HELLO.pack(b"H", self.fast))
            while self._step():
                pass
        except OSError:
            pass  # the host is gone; what is left is the clean-up
        finally:
            self._kill_all()

    def _step(self) -> bool:
        poller = select.poll()
        for fd in (self.control.fileno(), *self.children):
            poller.register(fd, select.POLLIN)
        for fd, _events in poller.poll():
            if fd in self.children:
                self._reap(fd)
            elif not self._request():
                return False
        return True

    def _request(self) -> bool:
        packet, fds, _flags, _address = socket.recv_fds(self.control, CONTROL_BYTES, 1)
        if len(packet) >= LOOK.size and packet[:1] == b"L" and not fds:
            _letter, number, pid, count = LOOK.unpack_from(packet)
            windows = unpack_inodes(packet[LOOK.size :])
            known = pid in self.children.values() and count == len(windows)
            sight = look(pid, windows) if known else Sight()
            self.control.send(SEEN.pack(b"V", number) + sight.pack())
            return True
        if len(packet) != SPAWN.size or packet[:1] != b"S" or len(fds) != 1:
            return False
        _letter, number, memory_mib = SPAWN.unpack(packet)
        self._spawn(number, fds[0], memory_mib)
        return True

    def _spawn(self, number: int, worker_socket: int, memory_mib: int) -> None:
        try:
            child, namespaces = clone_worker(self.namespaces)
        except OSError as error:
            os.close(worker_socket)
            self.control.send(FAILED.pack(b"E", number, error.errno or 0))
            return
        if child is None:
            from vmgraft.vmmhost.layer.worker import run_worker

            run_worker(worker_socket, memory_mib, namespaces, fast=self.fast)
        os.close(worker_socket)
        self.children[child.pidfd] = child.pid
        socket.send_fds(self.control, [SPAWNED.pack(b"P", number, child.pid, namespaces)], [child.pidfd])

    def _reap(self, pidfd: int) -> None:
        pid = self.children.pop(pidfd)
        os.close(pidfd)
        _pid, status = os.waitpid(pid, 0)
        self.control.send(EXITED.pack(b"X", pid, status))

    def _kill_all(self) -> None:
        for pidfd, pid in self.children.items():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitpid(pid, 0)
