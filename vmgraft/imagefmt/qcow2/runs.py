"""Runs of guest bytes, and how many of them a file can honestly hold."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from vmgraft.imagefmt.qcow2 import _layout as lay


class RunKind(IntEnum):
    """What an L2 entry says about its unit."""

    HOLE = 0
    ZERO = 1
    DATA = 2
    COMPRESSED = 3


@dataclass(frozen=True, slots=True)
class Run:
    """Guest bytes ``start`` .. ``start + length`` that stand together.

    ``host`` is the file offset of the first byte for ``DATA``, the whole L2 entry for ``COMPRESSED`` (a run then never
    leaves its cluster), and means nothing otherwise.
    """

    start: int
    length: int
    kind: RunKind
    host: int


class Budget:
    """How much guest data an image of its size can honestly map, in bytes."""

    def __init__(self, data_size: int, file_size: int, compressed: int) -> None:
        self._data = data_size * lay.MAX_SHARING + lay.SHARING_ALLOWANCE
        self._packed = file_size
        self._compressed = compressed

    def take(self, data: int, compressed: int) -> bool:
        """Account for ``data`` bytes of plain and ``compressed`` compressed clusters; return whether that is honest."""
        self._data -= data
        self._packed -= compressed * self._compressed
        return self._data >= 0 and self._packed >= 0
