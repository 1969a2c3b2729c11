"""Run as a program: become a worker in a test's sense, try what a worker must not do, and report it as JSON on stdout.

argv: mode (``errno``: the filter answers EPERM; ``kill``: it ends the process; ``none``: everything but the filter),
uid to be beforehand (0: as started).
"""

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import sys
from pathlib import Path

from vmgraft.vmmhost.layer import landlock, sandbox

LIBC = ctypes.CDLL(None, use_errno=True)


def call(name, *args):
    ctypes.set_errno(0)
    if getattr(LIBC, name)(*args) == -1:
        raise OSError(ctypes.get_errno(), name)


def mprotect_exec():
    area = mmap.mmap(-1, 4096)
    call("mprotect", ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area))), 4096, 5)


def fork():
    if os.fork() == 0:
        os._exit(0)


def tcp():
    with socket.socket() as made:
        made.connect(("127.0.0.1", 9))


def attempts(host, inherited):
    return {
        "open file": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "open device": lambda: os.open("/dev/null", os.O_RDWR),
        "create file": lambda: os.open("/tmp/vmgraft-probe", os.O_CREAT | os.O_WRONLY, 0o600),
        "list directory": lambda: list(Path("/").iterdir()),
        "unlink": Path("/tmp/vmgraft-probe").unlink,
        "socket": tcp,
        "fork": fork,
        "execve": lambda: os.execv("/bin/true", ["true"]),  # noqa: S606 - that it fails is the point
        "kill host": lambda: os.kill(host, 0),
        "ptrace host": lambda: call("ptrace", 16, host, 0, 0),
        "map executable": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        "make executable": mprotect_exec,
        "become root": lambda: os.setuid(0),
        "mount": lambda: call("mount", b"none", b"/tmp", b"tmpfs", 0, None),
        "unshare": lambda: call("unshare", 0x10000000),
        "inherited descriptor": lambda: os.read(inherited, 1),
        "dup": lambda: os.dup(0),
    }


def report(fd, mode, mechanisms, host, inherited):
    result = {"mechanisms": mechanisms.names(), "level": sandbox.level_of(mechanisms), "pid": os.getpid()}
    for name, attempt in attempts(host, inherited).items():
        try:
            attempt()
        except OSError as error:
            result[name] = errno.errorcode[error.errno]
        else:
            result[name] = "ALLOWED"
    os.write(fd, json.dumps(result).encode())


def main():
    mode, uid = sys.argv[1], int(sys.argv[2])
    landlock.abi_version()  # loads what is needed before the file system goes away
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    host, (ours, theirs) = os.getpid(), socket.socketpair()
    inherited = os.open("/etc/hostname", os.O_RDONLY)
    child, namespaces = sandbox.clone_worker(sandbox.choose_namespaces())
    if child is None:
        fd = theirs.fileno()
        mechanisms = sandbox.lock_down(fd, 1, namespaces)
        if mode != "none":
            mechanisms |= sandbox.install_worker_filter(fd, kill=mode == "kill")
        report(fd, mode, mechanisms, host, inherited)
        os._exit(0)
    theirs.close()
    text = ours.recv(65536)
    _pid, status = os.waitpid(child.pid, 0)
    signalled = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else None
    print(json.dumps({"signal": signalled, "child": child.pid, **(json.loads(text) if text else {})}))


if __name__ == "__main__":
    main()
