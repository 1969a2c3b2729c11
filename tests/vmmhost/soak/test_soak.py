"""The same thing very often: no memory, no descriptor, no process is kept.

Short by default. VMGRAFT_SOAK_CYCLES=10000 and VMGRAFT_SOAK_MINUTES=10 make it the long test; -s shows figures.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import pytest
from assembling import booting, nasm

from vmgraft.vmmhost.core.disk import VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.portmap import planning_bus
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.spec import ExtensionSpec, LayerLimits, PioRange
from vmgraft.vmmhost.layer.zygote import Zygote

CYCLES = int(os.environ.get("VMGRAFT_SOAK_CYCLES", "100"))
SECONDS = 60 * float(os.environ.get("VMGRAFT_SOAK_MINUTES", "0.05"))
#: What a heap may grow by after the warm-up: far below one page for each cycle of the long run.
GROWTH_KIB = 2048
pytestmark = pytest.mark.timeout(120 + CYCLES * 0.5 + SECONDS * 2)
EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "clock" / "module.wasm"
ANSWERS = """(module (memory (export "memory") 1 1) (func (export "vmgraft_abi_1"))
  (func (export "on_pio_read") (param i32 i32) (result i64) (i64.const 7))
  (func (export "on_pio_write") (param i32 i32 i32) (result i32) (i32.const 0)))"""


class Held:
    """What some processes hold, the host first.

    Args:
        pids: The processes.
        idle: No worker runs: the last ones have time to be reaped first.
    """

    def __init__(self, *pids: int, idle: bool = True) -> None:
        self.children = [_children(pid, 5.0 if idle else 0.0) for pid in pids[1:]]
        self.rss_kib = [_rss_kib(pid) for pid in pids]
        self.fds = [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids if _may_look(pid)]
        self.mappings = [len(_maps(pid)) for pid in pids if _may_look(pid)]
        self.shared = [line for pid in pids if _may_look(pid) for line in _maps(pid) if "/dev/shm" in line]

    def check_after(self, later: "Held") -> None:
        """Compare with what is held later."""
        assert later.fds == self.fds
        assert later.children == self.children
        assert later.shared == self.shared == []
        for before, after in zip(self.rss_kib, later.rss_kib, strict=True):
            assert after - before < GROWTH_KIB
        for before, after in zip(self.mappings, later.mappings, strict=True):
            assert after - before < 64


def _maps(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/maps").read_text().splitlines()


def _may_look(pid: int) -> bool:
    return pid == os.getpid() or os.access(f"/proc/{pid}/fd", os.R_OK | os.X_OK)


def _rss_kib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * (os.sysconf("SC_PAGESIZE") // 1024)


def _children(pid: int, seconds: float) -> list[str]:
    """Children of a process, once they had some time to end and be reaped."""
    deadline = time.monotonic() + seconds
    while (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found


class NoMemory:
    def read(self, gpa: int, length: int) -> bytes:
        raise ValueError("no guest memory")

    def write(self, gpa: int, data: bytes) -> None:
        raise ValueError("no guest memory")


def test_loading_and_unloading() -> None:
    records = [0]

    def audit(_event: str, _fields: dict) -> None:
        records[0] += 1

    spec = ExtensionSpec(
        "org.vmgraft.clock", "1", EXAMPLE.read_bytes(), log=True, now=True, pio=(PioRange(0x510, 0x517),)
    )
    warm, times, before = max(CYCLES // 10, 20), [], None
    with Zygote.start() as zygote:
        host = ExtensionHost([], memory=NoMemory(), audit=audit, stop=print, clock=lambda: 1, zygote=zygote)
        bus = planning_bus(64 << 20)
        host.claim(bus)
        for number in range(warm + CYCLES):
            if number == warm:
                before = Held(os.getpid(), zygote.pid)
            began = time.perf_counter()
            host.load(spec)
            assert bus.pio_read(0x510, 4) != 0xFFFFFFFF  # somebody answers
            host.unload(spec.id)
            times.append(time.perf_counter() - began)
        after = Held(os.getpid(), zygote.pid)
        host.close()
    assert before is not None
    print(
        f"\n{CYCLES} cycles: median {statistics.median(times) * 1e3:.2f} ms each; RSS of host and zygote "
        f"{before.rss_kib} -> {after.rss_kib} KiB, descriptors {before.fds} -> {after.fds}", file=sys.stderr,
    )  # fmt: skip
    before.check_after(after)
    assert records[0] == 5 * (warm + CYCLES)  # start, its log line, load, end, unload


def test_a_guest_that_never_stops_asking() -> None:
    import wasmtime

    disk = VerifiedDisk(booting(nasm(Path(__file__).with_name("io.asm"))), lambda _index, _block: True)
    samples: list[Held] = []
    limits = LayerLimits(calls_per_second=1_000_000)
    module = bytes(wasmtime.wat2wasm(ANSWERS))
    spec = ExtensionSpec("org.example.soak", "1", module, pio=(PioRange(0x510, 0x510),), limits=limits)
    with Zygote.start() as zygote, Machine(Engine.SOFT, disk, timeout=SECONDS) as machine:
        host = ExtensionHost([spec], memory=machine.memory, audit=lambda _event, _fields: None, stop=print,
                             clock=machine.now_ns, zygote=zygote)  # fmt: skip
        with host:
            host.claim(machine.bus)
            pids = (os.getpid(), zygote.pid, host.proxies[0].pid or 0)
            began = time.monotonic()

            def sample(_now: int) -> None:
                passed = time.monotonic() - began
                due = (SECONDS * 0.2, SECONDS * 0.9)
                if len(samples) < 2 and passed >= due[len(samples)]:
                    samples.append(Held(*pids, idle=False))

            machine.add_tick(sample)
            result = machine.run()
            calls = host.summary()[0]["calls"]
    assert result.reason.value == "timeout"
    assert calls > 50 * SECONDS
    before, after = samples
    print(f"\n{SECONDS:.0f} s: {calls} calls, RSS {before.rss_kib} -> {after.rss_kib} KiB", file=sys.stderr)
    before.check_after(after)
