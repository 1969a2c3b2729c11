"""A verified boot to the first instruction: a large image against a small one, both with their content tree."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from _measure import GIB, MIB, Bench, dense_file

from vmgraft.signing.keys import PrivateKey, generate
from vmgraft.signing.manifest import parse_manifest
from vmgraft.signing.policytools import format_policy, init_policy
from vmgraft.vendor.graft import AttachOptions, attach
from vmgraft.vendor.pack import load_package
from vmgraft.vmmhost.launch import Launcher
from vmgraft.vmmhost.plan import RunOptions

CLOCK = Path(__file__).resolve().parent.parent / "examples" / "clock"
#: mov dx, 604h; mov ax, 2000h; out dx, ax: power off. The guest's first instructions are its last.
BOOT = bytes.fromhex("ba0406b80020ef").ljust(510, b"\0") + b"\x55\xaa"


def image(path: Path, size: int, data: int, key: PrivateKey) -> Path:
    """Make a disk of ``size`` bytes with ``data`` bytes in pieces of 1 MiB all over it, and graft it."""
    pieces = data // MIB
    dense_file(path, size, at=[number * (size // pieces) for number in range(pieces)])
    with path.open("r+b") as file:
        file.write(BOOT)
    attach(path, [load_package(CLOCK)], [key], AttachOptions(flat="never", tree=True))
    return path


def run(path: Path, policy: Path, cpu: str, *, verify_all: bool) -> None:
    """Verify and boot without the extension, whose process takes the same time for any disk."""
    options = RunOptions(cpu=cpu, extensions=False, verify_all=verify_all, memory_mib=2)
    report = Launcher(path, policy, options).run()
    if report.error is not None or report.plan is None:
        raise SystemExit(f"{path.name} did not run: {report.error}")
    if (report.plan.content_check == "first-read") == verify_all:
        raise SystemExit(f"{path.name}: the content was checked at another time than it should be")


def main() -> None:
    bench = Bench("start", "start of a guest from images with a content tree")
    key, cpu = generate("p256"), "soft"  # where building the machine takes least, so that all else shows most
    large, data = (GIB, 4 * MIB) if bench.small else (100 * GIB, 32 * MIB)
    with bench.folder() as folder:
        policy = folder / "policy.json"
        manifest = parse_manifest(load_package(CLOCK).manifest)
        policy.write_bytes(format_policy(init_policy({"vendor": key.public}, [manifest])))
        small_disk = image(folder / "small.img", 2 * data, data, key)
        large_disk = image(folder / "large.img", large, data, key)
        first_read = partial(run, policy=policy, cpu=cpu, verify_all=False)
        bench.compare(
            f"verified boot to the first instruction ({cpu})",
            {
                f"{2 * data // MIB} MiB": lambda: first_read(small_disk),
                f"{large // GIB} GiB, sparse": lambda: first_read(large_disk),
                f"{2 * data // MIB} MiB, all read first": lambda: run(small_disk, policy, cpu, verify_all=True),
            },
            rounds=21,
        )
    bench.end()


if __name__ == "__main__":
    main()
