"""Run as a program: become a worker in a test's sense, try what a worker must not do, and report it as JSON on stdout.

argv: mode (``errno``: the filter answers EPERM; ``kill``: it ends the process; ``none``: everything but the filter),
uid to be beforehand (0: as started).
"""

import ctypes
import errno
import functools
import json
import mmap
import os
import platform
import resource
import signal
import socket
import struct
import sys
from pathlib import Path

from vmgraft.vmmhost.layer import landlock, sandbox

LIBC = ctypes.CDLL(None, use_errno=True)
#: asm/unistd_64.h and asm-generic/unistd.h, for calls that libc has no function for.
NUMBERS = {
    "x86_64": {"fork": 57, "vfork": 58, "clone": 56, "execve": 59, "process_vm_readv": 310, "tgkill": 234, "bpf": 321,
               "perf_event_open": 298, "userfaultfd": 323, "memfd_create": 319, "keyctl": 250, "chroot": 161,
               "setns": 308, "seccomp": 317, "socketpair": 53, "capset": 126, "open": 2, "kcmp": 312, "prlimit": 302},
    "aarch64": {"clone": 220, "execve": 221, "process_vm_readv": 270, "tgkill": 131, "bpf": 280,
                "perf_event_open": 241, "userfaultfd": 282, "memfd_create": 279, "keyctl": 219, "chroot": 51,
                "setns": 268, "seccomp": 277, "socketpair": 199, "capset": 91, "kcmp": 272, "prlimit": 261},
}[platform.machine()]  # fmt: skip
BOTH = {"openat2": 437, "clone3": 435, "io_uring_setup": 425, "pidfd_open": 434, "pidfd_getfd": 438,
        "open_tree": 428, "landlock_create_ruleset": 444, "process_madvise": 440}  # fmt: skip
#: Further calls, with arguments that would do something where they were allowed.
FURTHER = {
    "fork": (), "vfork": (), "clone": (17, 0, 0, 0, 0), "clone3": (0, 0), "execve": (0, 0, 0), "open": (0, 0, 0),
    "openat2": (-100, 0, 0, 24), "process_vm_readv": ("host", 0, 0, 0, 0, 0), "tgkill": ("host", "host", 0),
    "bpf": (0, 0, 0), "perf_event_open": (0, 0, -1, -1, 0), "userfaultfd": (1,), "memfd_create": ("name", 0),
    "keyctl": (0, -3, 1), "chroot": ("name",), "setns": (3, 0), "seccomp": (2, 0, 0), "socketpair": (1, 1, 0, "name"),
    "capset": (0, 0), "kcmp": ("host", "host", 0, 0, 0), "prlimit": ("host", 7, 0, 0), "io_uring_setup": (8, "name"),
    "pidfd_open": ("host", 0), "pidfd_getfd": (3, 0, 0), "open_tree": (-100, "name", 0),
    "landlock_create_ruleset": (0, 0, 1), "process_madvise": (3, 0, 0, 0, 0),
}  # fmt: skip


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


def raw(name, host):
    """Make a system call by its number, so that nothing but the kernel answers."""
    text = ctypes.create_string_buffer(b"/", 4096)
    words = {"host": host, "name": ctypes.addressof(text)}
    number = NUMBERS.get(name, BOTH.get(name))
    call("syscall", *[ctypes.c_long(words.get(arg, arg)) for arg in (number, *FURTHER[name])])


def prctl(option, value):
    call("prctl", option, ctypes.c_ulong(value), 0, 0, 0)


def attempts(host, inherited):
    further = {f"call {name}": functools.partial(raw, name, host) for name in FURTHER if name in NUMBERS | BOTH}
    return {
        **further,
        "signal everybody": lambda: os.kill(-1, 0),
        "relax dumpable": lambda: prctl(4, 1),
        "relax parent death": lambda: prctl(1, 0),
        "raise a limit": lambda: call("setrlimit", resource.RLIMIT_NOFILE, struct.pack("@2L", 64, 64)),
        "unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
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
