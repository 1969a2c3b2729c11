"""A guest's port access that an extension answers in its sandboxed process, against one that the core answers."""

import os
from pathlib import Path

from _measure import Bench

from vmgraft.vmmhost.core.devices.cmos import Cmos
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.spec import ExtensionSpec, LayerLimits, PioRange

CALLS = 5000
CLOCK = Path(__file__).resolve().parent.parent / "examples" / "clock" / "module.wasm"


class NoMemory:
    def read(self, gpa: int, length: int) -> bytes:
        raise ValueError("no guest memory")

    def write(self, gpa: int, data: bytes) -> None:
        raise ValueError("no guest memory")


def main() -> None:
    bench = Bench("extension", "port reads answered by an extension and by the core")
    spec = ExtensionSpec(
        "org.vmgraft.clock", "1.0.0", CLOCK.read_bytes(), log=True, now=True, pio=(PioRange(0x510, 0x517),),
        limits=LayerLimits(calls_per_second=1_000_000),
    )  # fmt: skip
    cpu = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})
    options = {"memory": NoMemory(), "audit": lambda *_: None, "stop": print, "clock": lambda: 1}
    cmos = Cmos(lambda: 1, 0, 64 << 20)
    with ExtensionHost([spec], cpu=cpu, **options) as host:  # type: ignore[arg-type]
        (proxy,) = host.proxies

        def extension() -> None:
            for _ in range(CALLS):
                proxy.pio_read(0x510, 4)

        def device() -> None:
            for _ in range(CALLS):
                cmos.pio_read(1, 1)

        title = f"{CALLS} port reads, host and worker on one CPU"
        medians = bench.compare(title, {"core": device, "extension": extension}, rounds=7)
    for name, median in medians.items():
        bench.fact(f"a read, {name}", median / CALLS * 1e6, "microseconds")
    bench.end()


if __name__ == "__main__":
    main()
