"""What it costs that an extension answers a guest in its sandboxed process, and how fast such a process is there."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _measure import Bench, Peer
from exits import bare, code, disk_of

from vmgraft.vmmhost.core.devices.cmos import Cmos
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.probe import Engine, probe_kvm
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.spec import ExtensionSpec, LayerLimits, PioRange
from vmgraft.vmmhost.layer.zygote import Zygote

#: Calls without a guest in a round, and accesses of a guest.
CALLS = 5000
ACCESSES = 100_000
#: Ports of the clock: the module answers the one by itself, and imports the time for the other.
PLAIN, ASKING = 0x514, 0x510
CLOCK = Path(__file__).resolve().parent.parent / "examples" / "clock" / "module.wasm"


class NoMemory:
    def read(self, gpa: int, length: int) -> bytes:
        raise ValueError("no guest memory")

    def write(self, gpa: int, data: bytes) -> None:
        raise ValueError("no guest memory")


def _calls(bench: Bench, host: ExtensionHost) -> None:
    """Compare a read that the extension answers with one that a device of the core answers; there is no guest."""
    cmos, (proxy,) = Cmos(lambda: 1, 0, 64 << 20), host.proxies

    def extension() -> None:
        for _ in range(CALLS):
            proxy.pio_read(PLAIN, 4)

    def device() -> None:
        for _ in range(CALLS):
            cmos.pio_read(1, 1)

    medians = bench.compare(f"{CALLS} port reads without a guest", {"core": device, "extension": extension}, rounds=7)
    for name, median in medians.items():
        bench.fact(f"a read, {name}", median / CALLS * 1e6, "microseconds")


def _guest(bench: Bench, host: ExtensionHost, spec: ExtensionSpec) -> None:
    """Compare guest → extension → guest with a loop of nothing but KVM_RUN."""
    accesses = 2000 if bench.small else ACCESSES

    def extension(program: bytes) -> None:
        with Machine(Engine.KVM, disk_of(program), memory_mib=2) as machine:
            host.claim(machine.bus)
            result = machine.run()
        if result.exits["pio"] < accesses or host.summary()[0]["state"] != "running":
            raise SystemExit(f"the guest or the extension ended early: {result.reason}, {result.detail}")

    plain, asking = (code("ec", port, accesses) for port in (PLAIN, ASKING))
    peers: dict[str, Peer] = {
        "bare KVM_RUN": lambda: bare(plain, accesses),
        "extension": lambda: extension(plain),
        "extension that asks for the time": lambda: extension(asking),
    }
    medians = bench.compare(f"{accesses} times IN of a guest", peers, rounds=3)
    for peer, median in medians.items():
        bench.fact(f"IN, {peer}", median / accesses * 1e6, "microseconds")
    delayed = host.summary()[0]["delayedMs"]
    if delayed:
        raise SystemExit(f"the quota of {spec.limits.calls_per_second} calls a second slowed the guest down")


def _start(bench: Bench, spec: ExtensionSpec, options: dict[str, Any]) -> None:
    """Compare a worker from the zygote, verified, compiled and locked in, with a fresh interpreter with the engine."""
    times: list[float] = []

    def worker() -> None:
        began = time.perf_counter()
        with ExtensionHost([spec], zygote=zygote, **options):
            times.append(time.perf_counter() - began)

    def interpreter() -> None:
        subprocess.run([sys.executable, "-I", "-c", "import wasmtime"], check=True)

    with Zygote.start() as zygote:
        zygote.wait_ready()
        bench.compare("a start", {"interpreter": interpreter, "worker": worker}, rounds=15)
    bench.fact("worker ready, from the zygote", statistics.median(times) * 1e3, "milliseconds")


def main() -> None:
    bench = Bench("extension", "accesses of a guest that an extension answers")
    spec = ExtensionSpec(
        "org.vmgraft.clock", "1.0.0", CLOCK.read_bytes(), log=True, now=True, pio=(PioRange(0x510, 0x517),),
        limits=LayerLimits(calls_per_second=1_000_000),
    )  # fmt: skip
    everywhere = os.sched_getaffinity(0)
    cpu = min(everywhere)
    options: dict[str, Any] = {"memory": NoMemory(), "audit": lambda *_: None, "stop": print, "clock": lambda: 1}
    kvm = probe_kvm()
    os.sched_setaffinity(0, {cpu})
    for pinned in (cpu, None):
        print(f"host and worker {'on any processor' if pinned is None else 'on one processor'}", file=sys.stderr)
        os.sched_setaffinity(0, everywhere if pinned is None else {cpu})
        with Zygote.start() as zygote, ExtensionHost([spec], zygote=zygote, cpu=pinned, **options) as host:
            _calls(bench, host)
            if kvm.usable:
                _guest(bench, host, spec)
    if not kvm.usable:
        print(f"no guest: {kvm.reason}", file=sys.stderr)
    _start(bench, spec, options)
    bench.end()


if __name__ == "__main__":
    main()
