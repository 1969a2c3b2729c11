"""The host once it has given up its rights: from inside, and as the program of root and of an ordinary user."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmgraft.errors import HostError
from vmgraft.vmmhost.core.probe import probe_kvm
from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.layer.confine import host_level, require_host_level
from vmgraft.vmmhost.plan import RunOptions

ROOT = Path(__file__).resolve().parents[2]
AS_USER = Path(__file__).with_name("as_user.sh")
USER, GROUP = 54321, 54322
#: No user namespace can be made behind this, by a root that has no rights of its own: a container's.
WITHOUT_NAMESPACES = [
    "unshare", "--user", "--map-root-user", "sh", "-c",
    'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all "$@"', "sh",
]  # fmt: skip
INSIDE = """
import ctypes, errno, json, os, socket, sys, threading
from vmgraft.vmmhost.layer.confine import confine_host
libc = ctypes.CDLL(None, use_errno=True)
go, gone, elder = threading.Event(), threading.Event(), {}
def attempt(action):
    try: action()
    except OSError as error: return errno.errorcode[error.errno]
    except RuntimeError as error: return str(error)
    return "ALLOWED"
def call(*args):
    ctypes.set_errno(0)
    if libc.syscall(*[ctypes.c_long(a) for a in args]) == -1: raise OSError(ctypes.get_errno(), "")
def fork():
    if os.fork() == 0: os._exit(0)
def thread():
    made = threading.Thread(target=lambda: None); made.start(); made.join()
def wait():
    go.wait(); elder["socket"] = attempt(socket.socket); gone.set()
threading.Thread(target=wait, daemon=True).start()
pair = socket.socketpair()
applied = confine_host()
go.set(); gone.wait(5)
found = {
    "tcp": attempt(socket.socket), "unix": attempt(lambda: socket.socket(socket.AF_UNIX)),
    "fork": attempt(fork), "vfork": attempt(lambda: call(58)), "clone3": attempt(lambda: call(435, 0, 0)),
    "exec": attempt(lambda: os.execv("/bin/true", ["true"])),
    "ptrace": attempt(lambda: call(101, 16, os.getppid(), 0, 0)),
    "process_vm_readv": attempt(lambda: call(310, os.getppid(), 0, 0, 0, 0, 0)),
    "bpf": attempt(lambda: call(321, 0, 0, 0)), "io_uring": attempt(lambda: call(425, 8, 0)),
    "userfaultfd": attempt(lambda: call(323, 0)), "keyctl": attempt(lambda: call(250, 0)),
    "setuid": attempt(lambda: os.setuid(0)), "mount": attempt(lambda: call(165, 0, 0, 0, 0, 0)),
    "chmod": attempt(lambda: os.chmod(sys.executable, 0o777)),
    "type into the terminal": attempt(lambda: call(16, 0, 0x5412, 0)),
    "become dumpable": attempt(lambda: call(157, 4, 1, 0, 0, 0)),
    "unknown call": attempt(lambda: call(1999)),
    "read": attempt(lambda: (pair[0].send(b"x"), pair[1].recv(1))),
    "socketpair": attempt(socket.socketpair), "thread": attempt(thread),
    "memory file": attempt(lambda: os.close(os.memfd_create("x"))),
    "late import": attempt(lambda: __import__("colorsys")),
    "older thread": elder["socket"],
}
rights = next(line for line in open("/proc/self/status") if line.startswith("CapEff"))
print(json.dumps([applied, found, int(rights.split()[1], 16)]))
"""
ALLOWED = {"read", "socketpair", "thread", "memory file", "late import"}


def test_inside_a_confined_host():
    run = subprocess.run([sys.executable, "-c", INSIDE], capture_output=True, text=True, timeout=30,
                         env={"PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    applied, found, capabilities = json.loads(run.stdout)
    if "seccomp-allow" not in applied:
        pytest.skip("this machine's system calls are not known")
    assert {name for name, answer in found.items() if answer == "ALLOWED"} == ALLOWED
    assert {found[name] for name in ("clone3", "unknown call")} == {"ENOSYS"}
    assert {answer for name, answer in found.items() if name not in ALLOWED | {"clone3", "unknown call"}} == {"EPERM"}
    assert not capabilities & ~(1 << 1 | 1 << 3 | 1 << 5 | 1 << 23)


def test_levels_of_the_host():
    names = ["no-new-privs", "seccomp", "landlock", "seccomp-allow", "few-capabilities"]
    assert [host_level(names[:count]) for count in range(6)] == [0, 0, 1, 2, 2, 3]
    assert host_level(["landlock", "seccomp-allow", "few-capabilities"]) == 0
    require_host_level(names, 3)
    with pytest.raises(HostError, match="of level 2, and 3") as caught:
        require_host_level(names[:4], 3)
    assert "seccomp-allow" in (caught.value.hint or "")


def test_a_library_that_confines_nothing_cannot_promise_a_level(studio) -> None:
    studio.graft(studio.wat(studio.ONES))
    options = RunOptions(cpu="soft", timeout=20, audit_log=studio.audit_log, require_isolation=1)
    with pytest.raises(HostError, match="of level 0, and 1"):
        Launcher(studio.image, studio.policy, options).run()
    events = [record["event"] for record in studio.log()]
    assert "boot" not in events
    assert (events[-1], studio.log()[-1]["code"]) == ("error", "host")


def program() -> list[str]:
    """The installed program, else the module."""
    installed = Path(sys.executable).with_name("vmgraft")
    return [str(installed)] if installed.exists() else [sys.executable, "-m", "vmgraft"]


def start(studio, cpu: str, level: int, before: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    command = [
        *before, *program(), "run", str(studio.image), "--policy", str(studio.policy), "--cpu", cpu, "--audit-log",
        str(studio.audit_log), "--require-isolation", str(level), "--timeout", "60", "--json",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=studio.folder,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **env})  # fmt: skip


def ordinary(studio) -> list[str]:
    """What to put before a command so that an ordinary user runs it in the studio's folder."""
    if os.geteuid() != 0:
        return []
    program = shutil.which("unshare")
    tried = None if program is None else subprocess.run([program, "--mount", "true"], capture_output=True, check=False)
    if tried is None or tried.returncode:
        pytest.skip("no mount namespaces here, in which an ordinary user could be played")
    for path in (*studio.folder.rglob("*"), studio.folder):
        os.chown(path, USER, USER)
    needed = dict.fromkeys(map(str, (studio.folder, sys.base_prefix, ROOT, sys.prefix)))
    return ["unshare", "--mount", "--propagation", "private", str(AS_USER), str(USER), str(GROUP), *needed, "--"]


def boot_record(studio) -> dict:
    return next(record for record in studio.log() if record["event"] == "boot")


def test_root_gets_every_level(studio, cpu: str) -> None:
    studio.graft(studio.wat(studio.ONES))
    done = start(studio, cpu, 3, [])
    assert done.returncode == 0, done.stdout
    record = boot_record(studio)
    assert (record["hostLevel"], len(record["hostFilter"]["sha256"])) == (3, 64)


def test_an_ordinary_user_gets_every_level(studio, cpu: str) -> None:
    if cpu == "kvm" and os.geteuid() != 0 and not probe_kvm().usable:
        pytest.skip("this user may not use /dev/kvm")
    studio.graft(studio.wat(studio.ONES))
    state = studio.folder / "state"
    state.mkdir()
    done = start(studio, cpu, 3, ordinary(studio), HOME=str(studio.folder), XDG_STATE_HOME=str(state))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["end"]["engine"] == cpu
    (layer,) = report["layer"]
    assert layer["isolation"] == 3
    assert {"ns-user", "unprivileged-uid", "no-bounding-set"} <= set(layer["mechanisms"])
    assert boot_record(studio)["hostLevel"] == 3
    started = next(record for record in studio.log() if record["event"] == "extension-start")
    assert {"status", "limits"} <= set(started["seen"])


@pytest.mark.parametrize(("level", "code"), [(2, 0), (3, 20)])
def test_where_namespaces_are_forbidden_the_level_falls(studio, level: int, code: int) -> None:
    tried = subprocess.run([*WITHOUT_NAMESPACES, "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"no user namespace to play a container in: {tried.stderr!r}")
    studio.graft(studio.wat(studio.ONES))
    done = start(studio, "soft", level, WITHOUT_NAMESPACES)
    assert done.returncode == code, done.stdout + done.stderr
    report = json.loads(done.stdout)
    if code:
        assert report["error"]["code"] == "host"
        assert "below the 3" in report["error"]["message"]
        assert "extension-start" not in studio.audit_log.read_text()
    else:
        (layer,) = report["layer"]
        assert layer["isolation"] == 2
        assert not {"ns-net", "ns-pid", "ns-user"} & set(layer["mechanisms"])
