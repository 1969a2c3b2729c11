"""The sandbox holds: what a worker must not do is tried from inside one."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmgraft.vmmhost.layer import sandbox
from vmgraft.vmmhost.layer.sandbox import NAMESPACES, Mechanism, level_of
from vmgraft.vmmhost.layer.syscalls import CLONE_NEWUSER, Child

ROOT = Path(__file__).parents[3]
USERS = [0, 65534] if os.geteuid() == 0 else [0]
ALL_NAMESPACES = Mechanism(sum(NAMESPACES))
INSIDE = {
    "open file", "open device", "create file", "list directory", "unlink", "socket", "fork", "execve", "kill host",
    "ptrace host", "map executable", "make executable", "become root", "mount", "unshare", "inherited descriptor",
    "dup",
}  # fmt: skip


def probe(mode, uid):
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("probe_isolation.py")), mode, str(uid)],
        capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=30, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("uid", USERS)
def test_with_the_filter_nothing_is_allowed(uid):
    got = probe("errno", uid)
    tried = {
        name: answer for name, answer in got.items() if name not in {"mechanisms", "level", "pid", "signal", "child"}
    }
    assert set(tried) > INSIDE
    assert len([name for name in tried if name.startswith("call ")]) >= 24
    assert tried == dict.fromkeys(tried, "EPERM")
    assert {"no-new-privs", "seccomp", "rlimits", "fds"} <= set(got["mechanisms"])
    assert got["level"] >= 1


@pytest.mark.parametrize("uid", USERS)
def test_without_the_filter_the_other_walls_stand(uid):
    """What the filter would stop is stopped by Landlock, limits, namespaces or the lack of rights too."""
    got = probe("none", uid)
    assert "seccomp" not in got["mechanisms"]
    assert got["level"] == 0
    if "landlock" in got["mechanisms"]:
        for name in ("open file", "list directory", "create file", "execve"):
            assert got[name] == "EACCES", name
    assert got["fork"] == "EAGAIN"
    assert got["inherited descriptor"] == "EBADF"
    assert got["become root"] in {"EPERM", "EINVAL"}
    assert got["call fork" if "call fork" in got else "call clone"] == "EAGAIN"
    assert got["raise a limit"] in {"EPERM", "EINVAL"}
    for name in ("call chroot", "call setns", "call kcmp", "call tgkill"):
        assert got[name] != "ALLOWED", name
    if "ns-pid" in got["mechanisms"]:
        assert got["kill host"] == got["ptrace host"] == "ESRCH"
        assert got["pid"] == 1
        assert got["child"] > 1


def test_the_filter_of_real_workers_kills():
    assert probe("kill", 0)["signal"] == "SIGSYS"


def test_levels_are_cumulative():
    everything = Mechanism(sum(Mechanism))
    assert level_of(everything) == 3
    for missing, level in (
        (Mechanism.SECCOMP, 0), (Mechanism.NO_CAPABILITIES, 0),
        (Mechanism.NO_NEW_PRIVS, 0), (Mechanism.LANDLOCK, 1), (Mechanism.NS_NET, 2),
        (Mechanism.NS_PID, 2), (Mechanism.UNPRIVILEGED_UID, 2), (Mechanism.NS_CGROUP, 3), (Mechanism.LANDLOCK_NET, 3),
    ):  # fmt: skip
        assert level_of(everything & ~missing) == level, missing


@pytest.fixture
def fake_clone(monkeypatch):
    """A kernel that gives some namespaces only, and PIDs that nobody waits for."""

    def install(works):
        def clone(flags):
            if not works(flags):
                raise OSError(errno.EPERM, "no")
            return Child(1234, os.open(os.devnull, os.O_RDONLY))

        monkeypatch.setattr(sandbox, "clone", clone)
        monkeypatch.setattr(os, "waitpid", lambda *_args: (1234, 0))

    return install


def test_namespaces_degrade_one_by_one(fake_clone):
    refused = NAMESPACES[Mechanism.NS_NET]
    fake_clone(lambda flags: not flags & refused)
    got = sandbox.choose_namespaces()
    assert Mechanism.NS_NET not in got
    assert Mechanism.NS_PID in got
    assert (Mechanism.NS_USER in got) == (os.geteuid() != 0)


def test_a_containers_root_gets_them_through_a_user_namespace(fake_clone, monkeypatch):
    fake_clone(lambda flags: not flags or flags & CLONE_NEWUSER)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert sandbox.choose_namespaces() == ALL_NAMESPACES
    child, got = sandbox.clone_worker(ALL_NAMESPACES)
    os.close(child.pidfd)
    level_1 = Mechanism.NO_CAPABILITIES | Mechanism.NO_NEW_PRIVS | Mechanism.SECCOMP
    assert got == ALL_NAMESPACES  # and no UNPRIVILEGED_UID: root's files stay its own
    assert level_of(got | level_1 | Mechanism.LANDLOCK) == 2


def test_without_any_namespace_a_plain_fork_is_left(fake_clone):
    fake_clone(lambda flags: not flags)
    assert sandbox.choose_namespaces() == Mechanism(0)
    child, got = sandbox.clone_worker(ALL_NAMESPACES)  # they worked when they were chosen, and do not any more
    os.close(child.pidfd)
    assert not got & ALL_NAMESPACES


def test_host_confinement_says_what_the_kernel_lacks():
    code = """
import json
from vmgraft.vmmhost.layer import confine, landlock, seccomp
def refuse(_program, **_how): raise OSError(22, "Invalid argument")
landlock.abi_version = lambda: 0
seccomp.install = refuse
print(json.dumps(confine.confine_host()))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30,
                         env={"PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == ["no-new-privs", "not-dumpable", "no-core", "few-capabilities"]


def test_host_confinement_in_a_process_of_its_own(tmp_path):
    code = """
import json, os, sys
from vmgraft.vmmhost.layer.confine import confine_host
def attempt(f):
    try: f()
    except OSError as error: return type(error).__name__
    return "ALLOWED"
open_before = os.open("/etc/passwd", os.O_RDONLY)
applied = confine_host(write=[sys.argv[1]])
import colorsys
print(json.dumps({
    "applied": applied,
    "new open": attempt(lambda: os.open("/etc/passwd", os.O_RDONLY)),
    "old descriptor": attempt(lambda: os.read(open_before, 1)),
    "device": attempt(lambda: os.open("/dev/zero", os.O_RDONLY)),
    "write": attempt(lambda: open(sys.argv[1] + "/report", "w").close()),
    "elsewhere": attempt(lambda: open(sys.argv[1] + "/../other", "w").close()),
    "exec": attempt(lambda: os.execv(sys.executable, ["python", "-c", "print(1)"])),
}))
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=30,
                         env={"PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    got = json.loads(run.stdout)
    assert {"no-new-privs", "seccomp", "no-core"} <= set(got["applied"])
    assert (got["old descriptor"], got["write"], got["exec"]) == ("ALLOWED", "ALLOWED", "PermissionError")
    if "landlock" in got["applied"]:
        assert (got["new open"], got["device"], got["elsewhere"]) == ("PermissionError",) * 3


def test_a_worker_holds_one_socket_and_no_file_of_the_host(bench, wat, tmp_path):
    """What /proc shows of a live worker; readable here because a test runs as the worker's maker."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    with secret.open():
        proxy = bench.one(wat('(func (export "on_event") (param i32))'))
    proc = Path(f"/proc/{proxy.pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    assert status["Seccomp"] == "2"
    assert status["NoNewPrivs"] == "1"
    assert status["CapEff"].strip("0") == ""
    assert status["Threads"] == "1"
    if os.geteuid() == 0:
        links = [str(entry.readlink()) for entry in (proc / "fd").iterdir()]
        assert [link.split(":")[0] for link in links] == ["socket"]
        maps = (proc / "maps").read_text()
        assert "kvm" not in maps
        assert str(secret) not in maps
        assert status["Uid"].split() == ["65534"] * 4
