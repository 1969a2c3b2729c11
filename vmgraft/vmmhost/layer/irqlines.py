"""The interrupt lines that one extension drives: what it raised, and the way to the machine while there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Drivers = Mapping[int, Callable[[bool], None]]


class IrqLines:
    """Levels outlive a missing machine: what was raised before `connect` goes up with it."""

    def __init__(self) -> None:
        self._drivers: Drivers = {}
        self._raised: set[int] = set()

    def connect(self, drivers: Drivers) -> None:
        """Drive these lines from now on; those raised before go up now."""
        self._drivers = drivers
        for line in self._raised:
            self._drive(line, True)

    def disconnect(self) -> Drivers:
        """Lower every line and let go of them; `connect` with what is returned undoes it."""
        for line in self._raised:
            self._drive(line, False)
        drivers, self._drivers = self._drivers, {}
        return drivers

    def set(self, line: int, level: bool) -> None:
        """Take a level from the module."""
        if level:
            self._raised.add(line)
        else:
            self._raised.discard(line)
        self._drive(line, level)

    def drop(self) -> None:
        """Lower every line: the worker that raised them is gone."""
        for line in self._raised:
            self._drive(line, False)
        self._raised.clear()

    def raised(self) -> frozenset[int]:
        """Return the lines that are up."""
        return frozenset(self._raised)

    def _drive(self, line: int, level: bool) -> None:
        driver = self._drivers.get(line)
        if driver is not None:
            driver(level)
