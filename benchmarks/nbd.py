"""How fast `vmgraft serve` hands out checked content, against qemu-nbd with the same file and the same client."""

import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _measure import MIB, PROGRAM, Bench, Runner, dense_file

CLOCK = Path(__file__).resolve().parents[1] / "examples" / "clock"


class Server:
    """A server that runs: where it is found, and what reading from it costs it."""

    def __init__(self, uri: str, pid: int) -> None:
        self.uri, self._pid = uri, pid
        self.busy: list[float] = []
        self.seconds: list[float] = []

    def read(self, run: Runner, *options: str) -> None:
        """Read everything once; note how long that took, and how much processor time of the server, in seconds."""
        started, before = time.perf_counter(), self._processor_time()
        run("nbdcopy", *options, self.uri, "null:")
        self.seconds.append(time.perf_counter() - started)
        self.busy.append(self._processor_time() - before)

    def _processor_time(self) -> float:
        """Return what all its threads have used: the clock that clock_getcpuclockid(3) names."""
        return time.clock_gettime(~self._pid << 3 | 2)


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
def running(socket: Path, *command: str | Path) -> Iterator[Server]:
    """Run a server until the block is left."""
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as one:
        while not socket.exists():
            if one.poll() is not None:
                raise SystemExit(f"{command[0]} ended with {one.returncode}")
            time.sleep(0.01)
        yield Server(f"nbd+unix:///?socket={socket}", one.pid)
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
            running(theirs, "qemu-nbd", "-r", "-f", "raw", "-t", "-e", "8", "-k", theirs, image) as qemu_nbd,
            running(ours, PROGRAM, "serve", image, *policy, "--socket", ours) as vmgraft,
        ):
            for title, options in (("four connections", ()), ("one connection", ("--connections=1",))):
                for server in (qemu_nbd, vmgraft):
                    server.busy.clear()
                    server.seconds.clear()
                bench.compare(
                    f"nbdcopy of {size // MIB} MiB, {title}",
                    {
                        "qemu-nbd": lambda options=options: qemu_nbd.read(run, *options),
                        "vmgraft serve": lambda options=options: vmgraft.read(run, *options),
                    },
                    rounds=9,
                )
                pairs = zip(qemu_nbd.seconds, vmgraft.seconds, strict=True)  # one right after the other: load is alike
                speed = statistics.median(plain / checked for plain, checked in pairs)
                bench.fact(f"speed of checked content, {title}", speed, "x qemu-nbd")
                for name, server in (("qemu-nbd", qemu_nbd), ("vmgraft serve", vmgraft)):
                    busy = statistics.median(server.busy)
                    bench.fact(f"processor time of {name} itself, {title}", busy * 1e3, "ms")
    bench.end()


if __name__ == "__main__":
    main()
