"""What an extension saves that knows the order in which an image's boot reads the disk (examples/readahead).

The image is Debian's GRUB rescue ISO with a kernel added, which GRUB loads on the software CPU; the order is recorded
from such a boot first. What can be gained is the time that the guest waits for the disk, which is reported by itself:
decompression and hashing move to another processor, and slow storage is asked for much at a time. How much of the whole
boot that is depends on the storage, and on a second processor that is free; with a plain local image there is next to
nothing to gain, and on a busy machine asking the extension costs more than local reading.
"""

from __future__ import annotations

import statistics
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import run

from _measure import Bench

from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.tree import digest_with_tree
from vmgraft.vmmhost.core.boot import BootSource
from vmgraft.vmmhost.core.disk import BLOCK, ContentReader, VerifiedDisk
from vmgraft.vmmhost.core.machine import Machine
from vmgraft.vmmhost.core.probe import Engine
from vmgraft.vmmhost.core.services import ServiceTable
from vmgraft.vmmhost.layer.client import ExtensionHost
from vmgraft.vmmhost.layer.spec import ExtensionSpec, LayerLimits, ServiceUse
from vmgraft.vmmhost.layer.zygote import Zygote

ROOT = Path(__file__).parents[1]
RESCUE = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")
#: A manifest's config, bytes.
CONFIG_BYTES = 4096
DONE = "everything is loaded"
#: Seconds that one request to slow storage takes, whatever it asks for.
LATENCY = 0.01


class Reader:
    """Content on storage that takes its time for every request; remembers which blocks were asked for."""

    def __init__(self, inner: ContentReader, latency: float = 0.0) -> None:
        self._inner, self._latency = inner, latency
        self.virtual_size, self.sector_size = inner.virtual_size, inner.sector_size
        self.order: list[int] = []

    def read(self, offset: int, length: int) -> bytes:
        """Read, after a while."""
        self.order.append(offset // BLOCK)
        if self._latency:
            time.sleep(self._latency)
        return self._inner.read(offset, length)


def timed(machine: Machine) -> list[float]:
    """Have the seconds noted that the guest waits for each read of its disk, asking the extension included."""
    waits: list[float] = []
    read = machine.disk.read

    def noting(offset: int, length: int) -> bytes:
        began = time.perf_counter()
        try:
            return read(offset, length)
        finally:
            waits.append(time.perf_counter() - began)

    machine.disk.read = noting  # type: ignore[method-assign]
    return waits


def make_image(folder: Path) -> Path:
    """Make the ISO: GRUB, and what it loads."""
    config, image = folder / "grub.cfg", folder / "boot.iso"
    config.write_text(f"insmod linux\nlinux /vmlinuz\necho {DONE}\nsleep 60\n")
    kernel = max(Path("/boot").glob("vmlinuz-*"))
    command = ["xorriso", "-indev", str(RESCUE), "-outdev", str(image)]
    command += ["-map", str(config), "/boot/grub/grub.cfg", "-map", str(kernel), "/vmlinuz"]
    run([*command, "-boot_image", "any", "replay"], check=True, capture_output=True)
    return image


def boot(
    reader: Reader, check: Callable[[int, bytes], bool], zygote: Zygote | None = None, config: bytes = b""
) -> float:
    """Boot up to the mark, with a zygote with the extension; return the seconds that the guest waited for its disk."""
    services, disk = ServiceTable(), VerifiedDisk(reader, check)
    with Machine(
        Engine.SOFT, disk, memory_mib=256, boot=BootSource.CDROM, until=DONE, timeout=300, services=services
    ) as machine:
        specs = [] if zygote is None else [extension(config)]
        with ExtensionHost(
            specs, memory=machine.memory, audit=lambda _event, _fields: None, stop=lambda _why: None,
            clock=machine.now_ns, zygote=zygote,
        ) as host:  # fmt: skip
            host.claim(machine.bus)
            waits = timed(machine)
            result = machine.run()
            if not result.until_seen:
                raise SystemExit("\n".join(("the boot did not come to its mark:", *result.screen)))
            if any(proxy.counters.faults or not proxy.counters.calls for proxy in host.proxies):
                raise SystemExit("the extension was not asked, or broke a rule")
    return sum(waits)


def extension(config: bytes) -> ExtensionSpec:
    """Return the example, with another order."""
    folder = ROOT / "examples" / "readahead"
    limits = tomllib.loads((folder / "manifest.toml").read_text())["limits"]
    return ExtensionSpec(
        "org.vmgraft.readahead", "1.0.0", (folder / "module.wasm").read_bytes(), config, metric=True,
        services=(ServiceUse("disk", chain=True),),
        limits=LayerLimits(memory_mib=limits["memoryMiB"], fuel_per_call=limits["fuelPerCall"]),
    )  # fmt: skip


def config_of(order: Sequence[int]) -> bytes:
    """Return an order of blocks as the extension's config says it, as much as there is room for."""
    ranges: list[list[int]] = []
    for block in order:
        if ranges and block == sum(ranges[-1]):
            ranges[-1][1] += 1
        else:
            ranges.append([block, 1])
    words: list[str] = []
    size = 0
    for first, count in ranges:
        word = f"{first:x}+{count:x}"
        size += len(word) + 1
        if size > CONFIG_BYTES or len(words) == 512:
            break
        words.append(word)
    return " ".join(words).encode()


def measure(bench: Bench, zygote: Zygote, title: str, path: Path, latency: float) -> None:
    """Compare boots of one image with and without the extension."""
    with open_image(path) as image:
        _digest, tree = digest_with_tree(image, flat="never")
        recorded = Reader(image)
        boot(recorded, tree.check)
        config = config_of(recorded.order)
        waits: dict[str, list[float]] = {"as it is": [], "reading ahead": []}

        def alone() -> None:
            waits["as it is"].append(boot(Reader(image, latency), tree.check))

        def ahead() -> None:
            waits["reading ahead"].append(boot(Reader(image, latency), tree.check, zygote, config))

        bench.fact(f"{title}: blocks of 64 KiB that the boot reads", len(recorded.order), "blocks")
        bench.compare(title, {"as it is": alone, "reading ahead": ahead})
        for name, seconds in waits.items():
            bench.fact(f"{title}, {name}: the guest waits for its disk", statistics.median(seconds) * 1e3, "ms")


def main() -> None:
    """Compare boots with and without the extension."""
    bench = Bench("readahead", "a boot with an extension that has the disk read ahead")
    with bench.folder() as folder, Zygote.start() as zygote:
        zygote.wait_ready()
        iso, packed = make_image(folder), folder / "boot.qcow2"
        run(["qemu-img", "convert", "-c", "-O", "qcow2", str(iso), str(packed)], check=True)
        measure(bench, zygote, "compressed qcow2", packed, 0.0)
        measure(bench, zygote, f"raw on storage with {LATENCY * 1e3:g} ms a request", iso, LATENCY)
    bench.end()


if __name__ == "__main__":
    main()
