"""Workers that are not locked in as they say: they are looked at from outside, and not believed."""

import mmap
import os
import time
from pathlib import Path

import pytest

from vmgraft.errors import ExtensionFaultError, HostError
from vmgraft.vmmhost.layer import sight
from vmgraft.vmmhost.layer.faults import FaultKind, WorkerFaultError
from vmgraft.vmmhost.layer.sandbox import Mechanism
from vmgraft.vmmhost.layer.sight import Sight, View, believed
from vmgraft.vmmhost.layer.zygote import Zygote

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="what this is about only root can be asked to give up, or see")
#: A zygote whose workers run changed code: `sandbox`, `worker` and `sight` are the modules, M is Mechanism.
BOOT = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[3])
from vmgraft.vmmhost.layer import sandbox, sight, worker, zygote_main
from vmgraft.vmmhost.layer.sandbox import Mechanism as M
real = worker.lock_down
def after(action):
    def lock_down(*args):
        done = real(*args)
        return done | (action() or M(0))
    worker.lock_down = lock_down
{lie}
zygote_main.main(int(sys.argv[1]), int(sys.argv[2]))
"""
LIES = {
    "no filter": ("worker.install_worker_filter = lambda fd: M.SECCOMP", "no seccomp", ()),
    "code that can be changed": (
        "worker.seal_code = lambda fd: os.close(fd) or M.NO_WRITABLE_CODE\n"
        "import mmap; keep = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)",
        "no no-writable-code", ROOT_ONLY),
    "another descriptor": ("after(lambda: os.dup(3) * 0)", "no fds", ROOT_ONLY),
    "no limits": ("sandbox._limit = lambda size: None", "no rlimits", ()),
    "a process that can be dumped": ("after(lambda: sandbox.prctl(4, 1))", "no not-dumpable", ()),
    "root": ("sandbox._drop_root = lambda namespaces: M.UNPRIVILEGED_UID", "no unprivileged-uid", ROOT_ONLY),
    "rights": (
        "sandbox._drop_root = lambda namespaces: M(0)\nsandbox.keep_capabilities = lambda: None",
        "no no-capabilities", ROOT_ONLY),
    "rights to come": ("sandbox.empty_bounding_set = lambda: None", "no no-bounding-set", ()),
    "a memory file": (
        "early = os.memfd_create('guest'); os.ftruncate(early, 4096)\n"
        "import mmap; area = mmap.mmap(early, 4096); os.close(early)",
        "no process", ROOT_ONLY),
    "a namespace it is not in": ("after(lambda: M(1 << 30))", "changed", ()),
    "more at the end than at first": (
        "install = worker.install_worker_filter\nworker.install_worker_filter = lambda fd: install(fd) | M.NS_USER",
        "changed", ()),
}  # fmt: skip


@pytest.fixture
def zygote_of(monkeypatch):
    made = []

    def start(lie):
        monkeypatch.setattr("vmgraft.vmmhost.layer.zygote._BOOT", BOOT.replace("{lie}", lie))
        made.append(Zygote.start())
        made[-1].wait_ready()
        return made[-1]

    yield start
    for zygote in made:
        zygote.close()


@pytest.mark.parametrize(
    ("lie", "words"), [pytest.param(lie, words, id=name, marks=marks) for name, (lie, words, marks) in LIES.items()]
)
def test_a_lie_is_a_fault(bench, wat, zygote_of, lie, words):
    bench.zygote = zygote_of(lie)
    with pytest.raises(ExtensionFaultError, match=words):
        bench.one(wat(""))
    assert bench.fault()["kind"] == "isolation"
    assert bench.records("extension-start") == []


def test_what_nobody_sees_does_not_count(bench, wat, zygote_of):
    bench.zygote = zygote_of("sight.look = zygote_main.look = lambda pid, windows: sight.Sight()")
    proxy = bench.one(wat(""))
    assert proxy.ready.level == 0
    (record,) = bench.records("extension-start")
    assert (record["isolation"], record["seen"]) == (0, [])
    assert "seccomp" in record["unseen"]
    assert "seccomp" not in record["mechanisms"]
    with pytest.raises(HostError, match="isolation level 0 is below the 1"):
        bench.one(wat(""), min_isolation=1)
    with pytest.raises(HostError, match="isolation level 0 is below the 2"):
        bench.one(wat(""), {"min_isolation": 2}, min_isolation=1)


def test_what_is_seen_stands_in_the_log(bench, wat):
    bench.one(wat(""))
    (record,) = bench.records("extension-start")
    assert {"status", "limits"} <= set(record["seen"])
    assert {"seccomp", "no-bounding-set", "rlimits"} <= set(record["mechanisms"])
    assert len(record["seccomp"]["sha256"]) == 64
    if os.geteuid() == 0:
        assert record["seen"] == ["status", "limits", "namespaces", "descriptors", "mappings"]
        assert record["unseen"] == []
        assert "no-writable-code" in record["mechanisms"]


def test_the_zygote_looks_at_its_own_workers_only(zygote, bench, wat):
    assert zygote.look(os.getpid()) == Sight()
    assert zygote.look(-1) == Sight()
    seen = zygote.look(bench.one(wat("")).pid)
    assert View.STATUS in seen.views
    assert not seen.denied & (Mechanism.SECCOMP | Mechanism.NO_NEW_PRIVS | Mechanism.FDS)


def test_a_zygote_that_is_gone_cannot_look():
    with Zygote.start() as zygote:
        zygote.wait_ready()
        os.kill(zygote.pid, 9)
        deadline = time.monotonic() + 5
        with pytest.raises(HostError):
            while time.monotonic() < deadline:
                zygote.look(1, 1.0)


def test_a_process_that_is_gone_shows_nothing():
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not sight.look(pid).shown & Mechanism.SECCOMP  # a zombie
    os.waitpid(pid, 0)
    assert sight.look(pid) == Sight()


def test_the_memory_files_of_a_worker_are_its_windows():
    found, other = [os.memfd_create(name) for name in ("vmgraft-window", "secret")]
    areas = []
    try:
        for fd in (found, other):
            os.ftruncate(fd, 4096)
            areas.append(mmap.mmap(fd, 4096))
        inodes = [os.fstat(fd).st_ino for fd in (found, other)]
        assert sight.look(os.getpid(), inodes[:1]).denied & Mechanism.PROCESS
        assert (
            sight.look(os.getpid(), inodes).shown & Mechanism.PROCESS or "/dev/" in Path("/proc/self/maps").read_text()
        )
        assert sight.unpack_inodes(sight.pack_inodes(inodes)) == tuple(inodes)
    finally:
        for area in areas:
            area.close()
        os.close(found)
        os.close(other)


def test_this_process_is_no_worker():
    found = sight.look(os.getpid())
    assert found.views & View.STATUS
    assert found.denied & Mechanism.FDS
    assert found.denied & Mechanism.RLIMITS


STATUS = {b"Seccomp": b"2", b"Threads": b"1", b"Seccomp_filters": b"1"}
NONE = {b"Seccomp": b"0", b"Threads": b"1", b"Seccomp_filters": b"0"}


@pytest.mark.parametrize(
    ("its", "own", "answer"),
    [
        (STATUS, NONE, True),
        (STATUS, STATUS, False),  # inherited from a container, and none of its own
        ({**STATUS, b"Seccomp_filters": b"2"}, STATUS, True),
        ({**STATUS, b"Threads": b"2"}, NONE, False),  # the other thread may have none
        (NONE, NONE, False),
        ({b"Seccomp": b"2", b"Threads": b"1"}, {b"Seccomp": b"0", b"Threads": b"1"}, True),
        ({b"Seccomp": b"2", b"Threads": b"1"}, {b"Seccomp": b"2", b"Threads": b"1"}, None),  # nobody can tell
    ],
)
def test_whose_filter_it_is(its, own, answer):
    assert sight._filtered(its, own) is answer


def test_belief():
    early, namespaces = Mechanism.PROCESS | Mechanism.NS_NET | Mechanism.LANDLOCK, Mechanism.NS_NET
    told = early | Mechanism.SECCOMP
    seen = Sight(View.STATUS, Mechanism.SECCOMP)
    assert believed(told, early, namespaces, seen) == told
    assert believed(told, early, namespaces, Sight()) == early
    for lie in (
        (told | Mechanism.RLIMITS, early, namespaces, seen),
        (Mechanism.SECCOMP, early, namespaces, seen),
        (told, told, namespaces, seen),
        (told, early, namespaces | Mechanism.NS_PID, seen),
        (told, early, Mechanism(0), seen),
        (told, early, namespaces, Sight(View.STATUS, Mechanism(0), Mechanism.SECCOMP)),
        (told, early, namespaces, Sight(View.NAMESPACES, Mechanism(0), Mechanism.NS_NET)),
    ):
        with pytest.raises(WorkerFaultError) as caught:
            believed(*lie)
        assert caught.value.kind is FaultKind.ISOLATION


def test_a_sight_comes_over_whole():
    found = Sight(View.STATUS, Mechanism.SECCOMP, Mechanism.FDS)
    assert Sight.unpack(found.pack()) == found
    assert Sight.unpack(b"short") == Sight()
