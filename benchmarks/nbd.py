"""How fast `vmgraft serve` hands out checked content, against qemu-nbd with the same file and the same client."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _measure import MIB, PROGRAM, Bench, Runner, dense_file

CLOCK = Path(__file__).resolve().parents[1] / "examples" / "clock"


def grafted(folder: Path, size: int) -> Path:
    """Make an image with a graft, and a policy that accepts it."""
    run = Runner()
    image = dense_file(folder / "disk.img", size)
    run(PROGRAM, "keygen", folder / "key", "--no-passphrase")
    run(
        PROGRAM, "policy", "init", "--trust", folder / "key.pub", "--grant-all-declared", CLOCK,
        "-o", folder / "policy.json",
    )  # fmt: skip
    run(PROGRAM, "attach", image, CLOCK, "--key", folder / "key.key")
    return image


@contextmanager
def running(socket: Path, *command: str | Path) -> Iterator[str]:
    """Run a server until the block is left; yield its URI."""
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
        while not socket.exists():
            if one.poll() is not None:
                raise SystemExit(f"{command[0]} ended with {one.returncode}")
            time.sleep(0.01)
        yield f"nbd+unix:///?socket={socket}"
        one.terminate()


def main() -> None:
    bench = Bench("nbd", "reading a whole disk over NBD")
    run = Runner()
    size = 16 * MIB if bench.small else 512 * MIB
    with bench.folder() as folder:
        image = grafted(folder, size)
        theirs, ours = folder / "qemu-nbd.sock", folder / "vmgraft.sock"
        policy = ("--policy", folder / "policy.json", "--state", "none")
        with (
            running(theirs, "qemu-nbd", "-r", "-f", "raw", "-t", "-e", "8", "-k", theirs, image) as their_uri,
            running(ours, PROGRAM, "serve", image, *policy, "--socket", ours) as our_uri,
        ):
            for title, options in (("four connections", ()), ("one connection", ("--connections=1",))):
                peers = {
                    "qemu-nbd": run.peer("nbdcopy", *options, their_uri, "null:"),
                    "vmgraft serve": run.peer("nbdcopy", *options, our_uri, "null:"),
                }
                medians = bench.compare(f"nbdcopy of {size // MIB} MiB, {title}", peers)
                speed = medians["qemu-nbd"] / medians["vmgraft serve"]
                bench.fact(f"speed of checked content, {title}", speed, "x qemu-nbd")
    bench.end()


if __name__ == "__main__":
    main()
