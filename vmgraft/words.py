"""Counts and sizes as sentences hold them."""

from __future__ import annotations

from typing import Final

_UNITS: Final = ("KiB", "MiB", "GiB")


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: ``1 key``, ``2 keys``.

    Args:
        number: How many.
        one: The noun for one.
        many: The noun for any other number; an ``s`` behind the first where it is left out.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"


def size_words(size: int) -> str:
    """Return a bound in bytes as people say it: ``4 MiB``, or ``1000 bytes`` where that is no whole number of units."""
    unit, value = "", size
    for name in _UNITS:
        if value == 0 or value % 1024:
            break
        unit, value = name, value // 1024
    return f"{value} {unit}" if unit else counted(value, "byte")
