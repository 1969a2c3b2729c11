"""What the benchmarks share: alternating measurements, medians and ratios, peak memory, files to measure with."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
PYTHON = sys.executable
PROGRAM = str(Path(sys.executable).with_name("vmgraft"))

Peer = Callable[[], object]


class Bench:
    """One script's run: its options, its results, and how they are printed.

    Args:
        name: The script's name.
        what: One line on what is measured.
    """

    def __init__(self, name: str, what: str) -> None:
        parser = argparse.ArgumentParser(prog=name, description=what)
        parser.add_argument(
            "--small", action="store_true", help="small files, one round: shows that it works, not how fast"
        )
        parser.add_argument("--rounds", type=int, help="measured rounds after one to warm up")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
        parser.add_argument("--folder", type=Path, help="where files are made (default: the system's temporary folder)")
        self.options = parser.parse_args()
        self.small: bool = self.options.small
        self.name, self.what = name, what
        self._sections: list[dict[str, object]] = []

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a folder that goes away."""
        with tempfile.TemporaryDirectory(prefix="vmgraft-bench-", dir=self.options.folder) as folder:
            yield Path(folder)

    def compare(self, title: str, peers: dict[str, Peer], rounds: int = 5) -> dict[str, float]:
        """Time each peer in turn; return the medians in seconds.

        Machines are noisy: peers alternate, and the ratio is the median of the rounds' own ratios.
        """
        count = 1 if self.small else self.options.rounds or rounds
        times: dict[str, list[float]] = {name: [] for name in peers}
        work: dict[str, list[float]] = {name: [] for name in peers}
        for number in range(self.small, count + 1):  # round 0 warms up, and is left out
            for name, run in peers.items():
                started, busy = time.perf_counter(), _processor_time()
                run()
                if number:
                    times[name].append(time.perf_counter() - started)
                    work[name].append(_processor_time() - busy)
        first = times[next(iter(peers))]
        rows = []
        for name, values in times.items():
            ratio = statistics.median(other / own for other, own in zip(values, first, strict=True))
            cpu = statistics.median(work[name])
            rows.append({"name": name, "seconds": statistics.median(values), "cpu": cpu, "ratio": ratio, "all": values})
        self._sections.append({"title": title, "rounds": count, "rows": rows})
        if not self.options.json:
            print(f"{title}  (median of {count})")
            for row in rows:
                print(
                    f"  {row['name']:36} {row['seconds'] * 1e3:10.2f} ms {row['ratio']:8.2f} x the first"
                    f" {row['cpu'] * 1e3:9.1f} ms of processor time"
                )
        return {name: statistics.median(values) for name, values in times.items()}

    def fact(self, title: str, value: float, unit: str) -> None:
        """Report a single figure."""
        self._sections.append({"title": title, "value": value, "unit": unit})
        if not self.options.json:
            print(f"{title}: {value:.2f} {unit}")

    def end(self) -> None:
        """Print the JSON object, if one is wanted."""
        if self.options.json:
            print(
                json.dumps(
                    {"benchmark": self.name, "what": self.what, "cpus": os.cpu_count(), "results": self._sections}
                )
            )


def _processor_time() -> float:
    """Return the processor time of this process and those it has waited for: what other load disturbs little."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


class Runner:
    """Runs programs and remembers the most memory one of them had at a time."""

    def __init__(self) -> None:
        self.peak = 0

    def __call__(self, *command: str | Path) -> None:
        """Run a program to its end; one that fails is an error."""
        with subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command[0]} ended with {process.returncode}")
        self.peak = max(self.peak, usage.ru_maxrss * 1024)

    def peer(self, *command: str | Path) -> Peer:
        """Return the command as something to measure."""
        return lambda: self(*command)


def dense_file(path: Path, size: int, *, at: Sequence[int] | None = None, piece: int = MIB) -> Path:
    """Make a file of ``size`` bytes of data that does not repeat: everywhere, or in pieces at some offsets."""
    noise = os.urandom(piece)
    with path.open("wb", buffering=0) as file:
        file.truncate(size)
        for number, offset in enumerate(range(0, size, piece) if at is None else at):
            file.seek(offset)
            file.write(number.to_bytes(8, "little") + noise[8 : min(piece, size - offset)])
    return path
