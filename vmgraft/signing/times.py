"""Points in time as they are written in statements and policies: RFC 3339, UTC, whole seconds, ``Z``."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from os import PathLike
from typing import Final

from vmgraft.errors import UsageError, VmgraftError

#: How far another's clock (a signer's, an auditor's, a timestamp authority's) may be ahead of ours.
CLOCK_SKEW: Final = timedelta(minutes=5)

_FORM = "%Y-%m-%dT%H:%M:%SZ"
_SHAPE = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})Z")


def later(when: datetime, span: timedelta) -> datetime:
    """Return a time that much later; the last one there is, where there is none so late."""
    try:
        return when + span
    except OverflowError:
        return datetime.max.replace(tzinfo=UTC)


def format_time(when: datetime) -> str:
    """Return ``2026-11-22T15:00:00Z``; fractions of a second are cut off.

    Raises:
        UsageError: the time does not say its zone.
    """
    utc = require_zone(when).astimezone(UTC)
    return f"{utc.year:04}" + utc.strftime(_FORM[2:])


def parse_time(
    text: str, *, file: str | PathLike[str] | None = None, field: str | None = None, error: type[VmgraftError]
) -> datetime:
    """Return the time a string stands for, in UTC.

    Raises:
        VmgraftError: (of class ``error``) another form, or no such time.
    """
    problem = error(f"{text[:32]!r} is not a time", file=file, field=field, hint="for example 2026-11-22T15:00:00Z")
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise problem
    year, month, day, hour, minute, second = map(int, match.groups())
    try:
        return datetime(year, month, day, hour, minute, second, tzinfo=UTC)
    except ValueError as exc:
        raise problem from exc


def require_zone(when: datetime) -> datetime:
    """Return the time as it is, if it says its zone.

    Raises:
        UsageError: it does not.
    """
    if when.utcoffset() is None:
        raise UsageError("a time without a zone cannot be compared", hint="use datetime.now(UTC)")
    return when
