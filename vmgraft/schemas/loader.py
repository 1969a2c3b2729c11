"""Turns violations of the schemas into our errors, with the path of the field at fault.

Imported when a document was refused (see ``compiled``), since jsonschema takes its time to load. Two keywords of our
own steer the message a person reads: ``x-message`` replaces the library's sentence, ``x-hint`` becomes the error's
hint. Where the standard keywords leave room, the reading here is the narrow one: a pattern must match the whole string
(Python's ``$`` would let a trailing newline pass), ``integer`` means an ``int`` (``1.0`` and ``True`` are not), and a
string or array that is over its length limit is not looked at any further.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import islice
from os import PathLike
from typing import Any, NoReturn

from jsonschema import Draft202012Validator, validators
from jsonschema.exceptions import ValidationError, relevance
from jsonschema.protocols import Validator

from vmgraft.errors import VmgraftError
from vmgraft.schemas import load_schema
from vmgraft.words import counted

#: Violations looked at before one is picked to be reported.
_MAX_VIOLATIONS = 32
#: Characters of a message shown; violations quote their input.
_MAX_MESSAGE = 200


def _pattern(_v: Any, expression: str, value: Any, schema: Mapping[str, Any]) -> Iterator[ValidationError]:
    if isinstance(value, str) and len(value) <= schema.get("maxLength", len(value)):
        body = expression.removeprefix("^").removesuffix("$")
        if re.fullmatch(f"(?:{body})", value) is None:
            yield ValidationError(f"{value!r} does not match {expression}")


def _unique(_v: Any, wanted: bool, value: Any, schema: Mapping[str, Any]) -> Iterator[ValidationError]:
    if wanted and isinstance(value, list) and len(value) <= schema.get("maxItems", len(value)):
        seen = {json.dumps(item, sort_keys=True, default=repr) for item in value}  # TOML has dates
        if len(seen) != len(value):
            yield ValidationError("an item stands twice in the list")


def _is_integer(_checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@cache
def _validator(name: str) -> Validator:
    keywords: dict[str, Callable[..., Iterable[ValidationError]]] = {"pattern": _pattern, "uniqueItems": _unique}
    types = Draft202012Validator.TYPE_CHECKER.redefine_many({"integer": _is_integer, "number": _is_integer})
    cls = validators.extend(Draft202012Validator, keywords, type_checker=types)  # type: ignore[no-untyped-call]
    validator: Validator = cls(load_schema(name))
    return validator


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"


def _field(path: Iterable[str | int]) -> str | None:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:64]}" if text else part[:64]
    return text or None


#: What to say where the library would quote the whole value; ``{0}`` is the keyword's value.
_SENTENCES = {
    "type": "must be of type {0}",
    "const": "must be {0!r}",
    "enum": "must be one of {0}",
    "minimum": "must be at least {0}",
    "maximum": "must be at most {0}",
}


#: The same for keywords that count: what is said before the number, and of what it is one.
_COUNTS = {
    f"{bound}{of}": (f"must have at {'least' if bound == 'min' else 'most'}", noun)
    for bound in ("min", "max")
    for of, noun in (("Items", "item"), ("Length", "character"), ("Properties", "member"))
}


def _sentence(violation: ValidationError) -> str:
    schema = violation.schema if isinstance(violation.schema, dict) else {}
    value, keyword = violation.instance, str(violation.validator)
    if "x-message" in schema:
        return (f"{value[:64]!r}: " if isinstance(value, str) else "") + str(schema["x-message"])
    if keyword == "additionalProperties" and isinstance(value, dict):
        unknown = sorted(set(value) - set(schema.get("properties", {})))
        return "unknown field " + ", ".join(repr(name[:64]) for name in unknown[:4])
    if keyword in _COUNTS and isinstance(violation.validator_value, int):
        bound, noun = _COUNTS[keyword]
        return f"{bound} {counted(violation.validator_value, noun)}"
    if keyword in _SENTENCES:
        return _shorten(_SENTENCES[keyword].format(violation.validator_value))
    return _shorten(violation.message)


def refuse(name: str, document: Any, *, file: str | PathLike[str] | None, error: type[VmgraftError]) -> NoReturn:
    """Say what is wrong with a document that the compiled schema refused.

    Raises:
        VmgraftError: (of class ``error``) with the path of the field at fault in ``field``.
    """
    violations = list(islice(_validator(name).iter_errors(document), _MAX_VIOLATIONS))
    if not violations:
        raise error(f"not a valid {name}", file=file)
    worst = max(violations, key=relevance)
    while worst.context:
        worst = max(worst.context, key=relevance)
    schema = worst.schema if isinstance(worst.schema, dict) else {}
    raise error(_sentence(worst), file=file, field=_field(worst.absolute_path), hint=schema.get("x-hint"))
