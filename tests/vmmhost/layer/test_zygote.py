"""The zygote: starts, ends, and leaves no process behind."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmgraft.errors import HostError
from vmgraft.vmmhost.layer import syscalls
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.layer.zygote import Zygote, describe_status
from vmgraft.vmmhost.layer.zygote_main import EXITED

ROOT = Path(__file__).parents[3]


def gone(pid, seconds=5.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def host_of(bench, wat, **options):
    spec = ExtensionSpec("org.example.test", "1", wat('(func (export "on_event") (param i32))'), on_fault="detach")
    return ExtensionHost([spec], memory=bench.ram, audit=lambda event, fields: bench.audit.append((event, fields)),
                         stop=bench.stops.append, clock=lambda: 0, **options)  # fmt: skip


def test_close_ends_zygote_and_workers(bench, wat):
    with Zygote.start() as zygote:
        host = host_of(bench, wat, zygote=zygote)
        host.start()
        pids = [zygote.pid, host.proxies[0].pid]
    assert not Path(f"/proc/{pids[0]}").exists()  # reaped by close
    assert gone(pids[1])
    host.proxies[0].event(0)
    assert bench.records("fault")[0]["kind"] == "died"
    host.close()
    zygote.close()


def test_a_host_of_its_own_zygote(bench, wat):
    with host_of(bench, wat) as host:
        pid = host._own_zygote.pid
        worker = host.proxies[0].pid
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{worker}").exists()


def test_a_killed_zygote_takes_its_workers_along(bench, wat):
    with Zygote.start() as zygote:
        host = host_of(bench, wat, zygote=zygote)
        host.start()
        worker = host.proxies[0].pid
        os.kill(zygote.pid, signal.SIGKILL)
        assert gone(worker)
        with pytest.raises(HostError):
            host_of(bench, wat, zygote=zygote).start()
        host.close()


def test_a_killed_host_takes_all_along(tmp_path, wat):
    module = tmp_path / "m.wasm"
    module.write_bytes(wat(""))
    code = """
import os, sys, time
from pathlib import Path
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.spec import ExtensionSpec
host = ExtensionHost([ExtensionSpec("a.b", "1", Path(sys.argv[1]).read_bytes())], memory=None,
                     audit=lambda *_: None, stop=print, clock=lambda: 0)
host.start()
print(host._own_zygote.pid, host.proxies[0].pid, flush=True)
time.sleep(60)
"""
    run = subprocess.Popen([sys.executable, "-c", code, str(module)], stdout=subprocess.PIPE, text=True,
                           env={"PYTHONPATH": str(ROOT)})  # fmt: skip
    pids = [int(word) for word in run.stdout.readline().split()]
    run.kill()
    run.wait()
    run.stdout.close()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_a_zygote_that_cannot_load_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr("vmgraft.vmmhost.layer.zygote._BOOT", "import sys; sys.exit('no engine here')")
    with Zygote.start() as zygote, pytest.raises(HostError, match="ended") as caught:
        zygote.wait_ready(20)
    assert caught.value.hint == "no engine here"


def test_a_zygote_that_hangs_meets_the_deadline(monkeypatch):
    monkeypatch.setattr("vmgraft.vmmhost.layer.zygote._BOOT", "import time; time.sleep(60)")
    monkeypatch.setattr("vmgraft.vmmhost.layer.zygote.CLOSE_SECONDS", 0.1)
    with Zygote.start() as zygote, pytest.raises(HostError, match="in time"):
        zygote.wait_ready(0.2)


def test_without_an_interpreter(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(HostError, match="interpreter"):
        Zygote.start()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(HostError, match="does not start"):
        Zygote.start()


def test_statuses_in_words():
    assert describe_status(None) == "ended"
    assert describe_status(signal.SIGKILL) == "was killed by SIGKILL"
    assert "sandbox" in describe_status(signal.SIGSYS)
    assert describe_status(3 << 8) == "ended with exit status 3"
    assert "CPU time" in describe_status(signal.SIGXCPU << 8)


def test_the_library_loads_no_engine_in_the_host():
    code = """
import sys
import vmgraft.vmmhost.layer.client, vmgraft.vmmhost.layer.wasmcheck
heavy = {"wasmtime", "numpy", "cryptography", "unicorn", "jsonschema"} & set(sys.modules)
sys.exit(", ".join(heavy) or 0)
"""
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def test_an_end_is_not_taken_for_that_of_another_with_the_same_number(zygote):
    class Everything(dict):
        def pop(self, pid, default=None):
            asked.append(pid)
            return super().pop(pid, default)

    asked, old = [], zygote._exits
    zygote._exits = Everything(old)
    try:
        worker = zygote.spawn(1)
        assert worker.pid in asked
        assert worker.kill()
    finally:
        zygote._exits = old


def test_without_descriptors_the_error_is_a_clear_one(zygote):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        for attempt in (Zygote.start, lambda: zygote.spawn(1)):
            with pytest.raises(HostError, match="Too many open files"):
                attempt()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_machine_whose_clone_is_not_known(monkeypatch):
    monkeypatch.setattr(syscalls.platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64") as caught:
        syscalls.clone(0)
    assert caught.value.errno == errno.ENOSYS


def test_statuses_of_ended_workers_are_forgotten_in_time():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        zygote = Zygote(None, ours, -1)
        for pid in range(1000):
            assert zygote._note(EXITED.pack(b"X", pid, 9))
        assert list(zygote._exits) == list(range(744, 1000))
        assert zygote.exit_status(999, 0.0) == 9
