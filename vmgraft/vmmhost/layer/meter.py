"""What calls take: fuel, and time in steps of a quarter of an octave, which is exact enough and never grows."""

from __future__ import annotations

from typing import Final

#: Steps that each doubling is cut into: a step's bounds lie at most 25 % apart.
_STEPS: Final = 4
#: Doublings above one nanosecond that are told apart: up to about 18 minutes.
_OCTAVES: Final = 40
_LAST: Final = _STEPS * _OCTAVES - 1
#: What is reported, in per mille.
_SHARES: Final = {"p50": 500, "p90": 900, "p99": 990}


class Meter:
    """Durations and fuel of one extension's calls."""

    __slots__ = ("_burnt", "_counts", "_longest", "_most", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (_STEPS * _OCTAVES)
        self._total = self._longest = self._burnt = self._most = 0

    def add(self, nanoseconds: int) -> None:
        """Count one call."""
        octave = nanoseconds.bit_length() - 1
        octave = max(octave, 2)
        step = (nanoseconds >> octave - 2 & 3) + _STEPS * octave
        self._counts[step if step < _LAST else _LAST] += 1
        self._total += 1
        self._longest = max(self._longest, nanoseconds)

    def burn(self, units: int) -> None:
        """Count the fuel of one call."""
        self._burnt += units
        self._most = max(self._most, units)

    def fuel(self) -> dict[str, int]:
        """Return the fuel used by all calls and by the thirstiest of them, in units of the engine."""
        return {"total": self._burnt, "max": self._most}

    def microseconds(self) -> dict[str, float]:
        """Return percentiles (upper bounds of their steps) and the longest call; nothing where there was none."""
        if not self._total:
            return {}
        found = {name: self._percentile(share) for name, share in _SHARES.items()}
        return {**found, "max": round(self._longest / 1000, 1)}

    def _percentile(self, share: int) -> float:
        wanted, seen = -(-self._total * share // 1000), 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                octave, step = divmod(index, _STEPS)
                upper = (_STEPS + step + 1) << octave >> 2
                return round(min(upper, self._longest) / 1000, 1)
        return round(self._longest / 1000, 1)
