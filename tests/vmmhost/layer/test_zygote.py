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
from vmgraft.vmmhost.layer import sight, syscalls
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.spec import ExtensionSpec
from vmgraft.vmmhost.layer.zygote import Zygote, describe_status
from vmgraft.vmmhost.layer.zygote_main import EXITED, FAILED, SEEN, SPAWNED

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


class Played(Zygote):
    """The host's end of a zygote that the test plays."""

    def __init__(self):
        ours, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.words = os.memfd_create("words")
        super().__init__(None, ours, self.words)
        self._ready = True

    def end(self):
        self._control.close()
        self.far.close()
        os.close(self.words)


@pytest.fixture
def played():
    item = Played()
    yield item
    item.end()


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def late_worker(played, number):
    """Let the zygote answer a question that was given up with a worker; return that."""
    process = subprocess.Popen(["sleep", "60"])
    pidfd = os.pidfd_open(process.pid)
    socket.send_fds(played.far, [SPAWNED.pack(b"P", number, process.pid, 0)], [pidfd])
    os.close(pidfd)
    return process


def seen(number):
    return SEEN.pack(b"V", number) + sight.Sight(views=sight.View.STATUS).pack()


def test_a_late_answer_is_not_taken_for_the_next_one(played):
    with pytest.raises(HostError, match="in time"):
        played.look(7, 0.01)
    with pytest.raises(HostError, match="in time"):
        played.spawn(1, 0.01)
    before = descriptors()
    process = late_worker(played, 2)
    played.far.send(SEEN.pack(b"V", 1) + sight.Sight().pack())
    played.far.send(FAILED.pack(b"E", 2, errno.EAGAIN))
    played.far.send(EXITED.pack(b"X", 99, 5))
    played.far.send(seen(3))
    assert played.look(7, 5).views is sight.View.STATUS
    assert process.wait(5) == -signal.SIGKILL  # nobody would ever have spoken to it
    assert descriptors() == before
    assert played.exit_status(99, 0.01) == 5


def test_waiting_for_an_end_keeps_nothing_of_what_else_comes(played):
    with pytest.raises(HostError, match="in time"):
        played.spawn(1, 0.01)
    before = descriptors()
    process = late_worker(played, 1)
    played.far.send(EXITED.pack(b"X", 99, 5))
    assert played.exit_status(99, 5) == 5
    assert process.wait(5) == -signal.SIGKILL
    assert descriptors() == before


@pytest.mark.parametrize("packet", [b"?", b"V\1\0\0\0", b"P\1\0\0\0" + bytes(8), bytes(200)])
def test_answers_that_make_no_sense(played, packet):
    before = descriptors()
    socket.send_fds(played.far, [packet], [0])
    with pytest.raises(HostError):
        played.look(7, 0.05)
    assert descriptors() == before


def test_a_busy_zygote_still_answers_what_it_was_asked():
    with Zygote.start() as zygote:
        first = zygote.spawn(1)
        os.kill(zygote.pid, signal.SIGSTOP)
        try:
            with pytest.raises(HostError, match="in time"):
                zygote.look(first.pid, 0.05)
            with pytest.raises(HostError, match="in time"):
                zygote.spawn(1, 0.05)
        finally:
            os.kill(zygote.pid, signal.SIGCONT)
        second = zygote.spawn(1)
        assert first.pid != second.pid
        assert second.kill()
        assert zygote.exit_status(second.pid, 5) is not None
        assert zygote.exit_status(first.pid, 0.05) is None, "that one still runs"
        assert zygote.look(first.pid, 5).views
        assert first.kill()
        children = Path(f"/proc/{zygote.pid}/task/{zygote.pid}/children")
        deadline = time.monotonic() + 5
        while children.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert children.read_text() == "", "the worker of the answer that came late is gone too"
