"""The one place where Construct's errors become ours, with file, offset and field."""

from __future__ import annotations

from os import PathLike
from typing import Any

from construct import Construct, ConstructError, Container, StreamError

from vmgraft.errors import MalformedImageError, VmgraftError


def parse_struct(
    layout: Construct[Any, Any],
    data: bytes | memoryview,
    *,
    file: str | PathLike[str] | None,
    offset: int,
    what: str,
    error: type[VmgraftError] = MalformedImageError,
    hint: str | None = None,
    **parameters: int,
) -> Container[Any]:
    """Parse ``data`` with ``layout``.

    Args:
        layout: The Construct to parse with.
        data: The bytes; bytes behind the end of the layout are ignored.
        file: The file they come from, for the message.
        offset: Where in that file they begin, in bytes.
        what: Name of the structure in the words of its specification.
        error: The class to raise: ``MalformedImageError`` for containers, ``GraftFormatError`` for our own structures.
        hint: What the user can do about it.
        **parameters: Handed to the layout as ``_params``.

    Raises:
        VmgraftError: of class ``error``, when the bytes do not fit the layout.
    """
    try:
        parsed: Container[Any] = layout.parse(bytes(data), **parameters)
    except ConstructError as problem:
        field = _field(problem, what)
        raise error(
            f"{what} cannot be read: {_reason(problem)}", file=file, offset=offset, field=field, hint=hint
        ) from (problem)
    except (UnicodeDecodeError, OverflowError) as problem:
        raise error(f"{what} cannot be read: {problem}", file=file, offset=offset, field=what, hint=hint) from problem
    return parsed


def _field(problem: ConstructError, what: str) -> str:
    """Turn Construct's ``(parsing) -> header -> magic`` into ``what.magic``."""
    path = getattr(problem, "path", None) or ""
    names = [part.strip() for part in path.split("->")[1:]]
    return ".".join([what, *[name for name in names if name]])


def _reason(problem: ConstructError) -> str:
    """Return the sentence of a Construct error, without the path that its text repeats."""
    if isinstance(problem, StreamError):
        return "the data ends too early"
    lines = [line for line in str(problem).splitlines() if line.strip() and not line.startswith("Error in path")]
    return lines[0].strip() if lines else type(problem).__name__
