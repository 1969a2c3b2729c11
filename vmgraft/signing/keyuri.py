"""Reading key URIs: the part before ``?``, and the attributes behind it. Strict: what is not understood is refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes

from vmgraft.errors import UsageError

#: Longest URI accepted, in characters.
MAX_URI: Final = 4096

_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_VALUE: Final = re.compile(r"[!-~]*")


def split_uri(reference: str, query: Collection[str]) -> tuple[str, dict[str, str]]:
    """Return what stands between scheme and ``?``, still escaped, and the query's attributes, decoded.

    Args:
        reference: ``scheme:path?name=value&name=value``.
        query: Names that may stand in the query.

    Raises:
        UsageError: too long, an unknown name, one given twice, or a bad escape.
    """
    scheme = reference.split(":", 1)[0].lower()
    if len(reference) > MAX_URI:
        raise UsageError(f"a {scheme}: URI has at most {MAX_URI} characters", field="key")
    if "#" in reference:
        raise UsageError(f"a {scheme}: URI has no fragment", field="key", hint="write # as %23")
    path, _, text = reference[len(scheme) + 1 :].partition("?")
    pairs = text.split("&") if text else []
    return path, read_attributes(pairs, query, scheme)


def read_attributes(parts: Iterable[str], known: Collection[str], scheme: str) -> dict[str, str]:
    """Decode ``name=value`` parts.

    Raises:
        UsageError: no value, an unknown name, one given twice, or a bad escape.
    """
    found: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals:  # not shown: it may be a piece of a PIN
            hint = "write & as %26 and ; as %3B"
            raise UsageError(f"a part of the {scheme}: URI is not name=value", field="key", hint=hint)
        if name not in known:
            hint = "known are " + ", ".join(sorted(known))
            shown = "" if "pin-value" in found else f" {name[:64]!r}"  # behind an & in a PIN stands the rest of it
            raise UsageError(f"the {scheme}: URI has an unknown attribute{shown}", field="key", hint=hint)
        if name in found:
            raise UsageError(f"the {scheme}: URI names {name} twice", field="key")
        found[name] = decode_text(value, name)
    return found


def decode_text(value: str, name: str) -> str:
    """Decode percent-escapes (RFC 3986, 2.1) to text.

    Raises:
        UsageError: a bad escape, no UTF-8, or a NUL.
    """
    try:
        text = decode_bytes(value, name).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{name} in the key's URI is not UTF-8", field="key") from exc
    if "\0" in text:
        raise UsageError(f"{name} in the key's URI holds a NUL", field="key")
    return text


def decode_bytes(value: str, name: str) -> bytes:
    """Decode percent-escapes (RFC 3986, 2.1) to bytes.

    Raises:
        UsageError: a bad escape, or a character that must be escaped.
    """
    if _ESCAPE.search(value) or not _VALUE.fullmatch(value):
        raise UsageError(f"{name} in the key's URI is not escaped as URIs are", field="key", hint="a space is %20")
    return unquote_to_bytes(value)


def absolute_path(text: str, what: str) -> Path:
    """Return the path that an attribute names.

    Raises:
        UsageError: it is not absolute.
    """
    path = Path(text)
    if not path.is_absolute():
        hint = "a relative one would mean another file in another folder"
        raise UsageError(f"{what} must be an absolute path, not {text[:128]!r}", field="key", hint=hint)
    return path
