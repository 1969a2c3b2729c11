"""JSON for bytes nobody vouches for: one reading, bounded before it starts.

RFC 8259 leaves duplicate names, number ranges and depth to the reader; readers that differ there are how a signed
document comes to mean two things. Here each of those is an error.
"""

from __future__ import annotations

import json
import re
from os import PathLike
from typing import Any, NoReturn

from vmgraft.errors import VmgraftError
from vmgraft.words import size_words

#: Nesting no document of ours reaches.
MAX_DEPTH = 16
#: Most decimal digits of an integer, sign excluded: no 64-bit one has more.
MAX_INTEGER_DIGITS = 20

# A string literal (closed or running to the end), or a bracket. Possessive, so no input makes it backtrack.
_STRING = rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)'
_STRINGS = re.compile(_STRING, re.DOTALL)
_TOKEN = re.compile(_STRING + rb"|[\[{\]}]", re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_BOM = b"\xef\xbb\xbf"


class _RefusedError(ValueError):
    """Carries the reason out of a decoder hook."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _RefusedError(f"the name {name[:64]!r} stands twice in one object")
    return document


def _bounded_integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise _RefusedError(f"an integer has more than {MAX_INTEGER_DIGITS} digits")
    return int(digits)


def _no_float(text: str) -> NoReturn:
    raise _RefusedError(f"the number {text[:32]} is not an integer")


def _no_constant(text: str) -> NoReturn:
    raise _RefusedError(f"{text} is not JSON")


def _is_shallow(data: bytes, max_depth: int) -> bool:
    """Tell quickly that brackets are nested no deeper than allowed; False says nothing.

    Each turn takes the innermost pairs away, so that many turns leave nothing of so many levels.
    """
    brackets = _STRINGS.sub(b"", data).translate(_ONE_KIND, _NO_BRACKETS)
    for _ in range(max_depth):
        if not brackets:
            break
        brackets = brackets.replace(b"[]", b"")
    return not brackets


def _depth_problem(data: bytes, max_depth: int) -> int | None:
    """Return the offset where nesting goes too deep, found without recursion."""
    if _is_shallow(data, max_depth):
        return None
    depth = 0
    for token in _TOKEN.finditer(data):
        first = data[token.start()]
        if first in b"[{":
            depth += 1
            if depth > max_depth:
                return token.start()
        elif first in b"]}":
            depth -= 1
    return None


def strict_json(
    data: bytes,
    *,
    file: str | PathLike[str] | None,
    error: type[VmgraftError],
    max_bytes: int,
    max_depth: int = MAX_DEPTH,
) -> Any:
    """Parse one JSON document, refusing whatever two readers could understand differently.

    Args:
        data: The document's bytes, UTF-8 without a byte order mark.
        file: What to name in the error.
        error: Error class to raise.
        max_bytes: Largest document accepted, in bytes.
        max_depth: Deepest nesting of arrays and objects accepted.

    Raises:
        VmgraftError: (of class ``error``) too long, too deep, not UTF-8, not JSON, a name twice in one object, a number
            that is not an integer of at most 20 digits, NaN or Infinity, half a surrogate pair.
    """
    if len(data) > max_bytes:
        raise error(f"the document has more than {size_words(max_bytes)}", file=file)
    if data.startswith(_BOM):
        raise error("the document starts with a byte order mark", file=file, offset=0, hint="save it without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise error("the document is not UTF-8", file=file, offset=exc.start) from exc
    deep = _depth_problem(data, max_depth)
    if deep is not None:
        raise error(f"arrays and objects are nested more than {max_depth} deep", file=file, offset=deep)
    try:
        document = json.loads(
            text,
            object_pairs_hook=_no_duplicates,
            parse_int=_bounded_integer,
            parse_float=_no_float,
            parse_constant=_no_constant,
        )
        if b"\\u" in data:  # nothing else can spell half a surrogate pair: the bytes themselves are good UTF-8
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as exc:
        offset = len(text[: exc.pos].encode("utf-8"))
        raise error(f"the document is not JSON: {exc.msg}", file=file, offset=offset) from exc
    except UnicodeEncodeError as exc:
        raise error("a string holds half a surrogate pair", file=file) from exc
    except _RefusedError as exc:
        raise error(str(exc), file=file) from exc
    return document
