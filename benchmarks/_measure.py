"""Alternating measurements and a table of medians and ratios."""

import statistics
import time
from collections.abc import Callable


def compare(title: str, peers: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, float]:
    """Time each peer in turn, ``rounds`` times after one warm-up; print and return medians in seconds."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds + 1):
        for name, run in peers.items():
            started = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    print(title)
    for name, median in medians.items():
        print(f"  {name:34} {median * 1e3:10.2f} ms   {first / median:6.2f}x the speed of the first")
    return medians
