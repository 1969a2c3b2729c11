"""Schemas compiled to plain Python: yes or no, in microseconds; the library is asked only for the sentence after a no.

Only the keywords that our schemas use are known (JSON Schema 2020-12, validation and applicator vocabularies); any
other is an error when a schema is compiled, so none can be overlooked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Predicate = Callable[[Any], bool]

#: Keywords that say nothing about what is valid.
_SILENT = frozenset({"$schema", "$id", "$defs", "title", "description", "default", "x-hint", "x-message"})
#: Handled together with ``if`` and ``properties``.
_COMPANIONS = frozenset({"then", "else"})


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_TYPES: Mapping[str, Predicate] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": _is_integer,
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def compile_schema(schema: dict[str, Any]) -> Predicate:
    """Return a function that tells whether a document satisfies a schema.

    Raises:
        ValueError: the schema uses a keyword or a reference that is not known here.
    """
    return _Compiler(schema).compile(schema)


def _all_of(tests: tuple[Predicate, ...]) -> Predicate:
    """Return the predicate that holds when each of these does; a plain loop is twice as fast as ``all`` here."""

    def test(value: Any) -> bool:
        for one in tests:  # noqa: SIM110 - see above
            if not one(value):
                return False
        return True

    return test


class _Compiler:
    """Turns the subschemas of one root schema into predicates; references are resolved when they are first used."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._named: dict[str, Predicate] = {}

    def compile(self, schema: Any) -> Predicate:
        if schema is True or schema == {}:
            return lambda _value: True
        if schema is False:
            return lambda _value: False
        tests = []
        for keyword, argument in schema.items():
            if keyword in _SILENT or keyword in _COMPANIONS:
                continue
            maker = getattr(self, f"_{keyword.replace('$', '')}", None)
            if maker is None:
                raise ValueError(f"the schema keyword {keyword!r} is not known here")
            tests.append(maker(argument, schema))
        if len(tests) == 1:
            only: Predicate = tests[0]
            return only
        return _all_of(tuple(tests))

    # --- any value

    def _ref(self, argument: str, _schema: Any) -> Predicate:
        name = argument.removeprefix("#/$defs/")
        if not argument.startswith("#/$defs/") or name not in self._root.get("$defs", {}):
            raise ValueError(f"the reference {argument!r} is not known here")
        if name not in self._named:
            # A schema that refers to itself is looked up when it is used.
            self._named[name] = lambda value: self._named[name](value)  # noqa: PLW0108
            self._named[name] = self.compile(self._root["$defs"][name])
        return self._named[name]

    def _type(self, argument: str | list[str], _schema: Any) -> Predicate:
        names = [argument] if isinstance(argument, str) else argument
        if any(name not in _TYPES for name in names):
            raise ValueError(f"the type {argument!r} is not known here")
        tests = tuple(_TYPES[name] for name in names)
        return tests[0] if len(tests) == 1 else lambda value: any(test(value) for test in tests)

    def _const(self, argument: Any, _schema: Any) -> Predicate:
        return self._enum([argument], None)

    def _enum(self, argument: list[Any], _schema: Any) -> Predicate:
        if not all(isinstance(item, str | int | None) for item in argument):
            raise ValueError("only strings, integers, booleans and null are known in enum and const")
        values = frozenset((type(item), item) for item in argument)  # True is not 1
        return lambda value: isinstance(value, str | int | None) and (type(value), value) in values

    def _not(self, argument: Any, _schema: Any) -> Predicate:
        test = self.compile(argument)
        return lambda value: not test(value)

    def _if(self, argument: Any, schema: dict[str, Any]) -> Predicate:
        test, then, other = (self.compile(item) for item in (argument, schema.get("then", {}), schema.get("else", {})))
        return lambda value: then(value) if test(value) else other(value)

    # --- numbers

    def _minimum(self, argument: int, _schema: Any) -> Predicate:
        return lambda value: not _is_integer(value) or value >= argument

    def _maximum(self, argument: int, _schema: Any) -> Predicate:
        return lambda value: not _is_integer(value) or value <= argument

    # --- strings

    def _minLength(self, argument: int, _schema: Any) -> Predicate:  # noqa: N802 - the keyword's name
        return lambda value: not isinstance(value, str) or len(value) >= argument

    def _maxLength(self, argument: int, _schema: Any) -> Predicate:  # noqa: N802
        return lambda value: not isinstance(value, str) or len(value) <= argument

    def _pattern(self, argument: str, schema: dict[str, Any]) -> Predicate:
        """Match the whole string; one that is too long is refused by ``maxLength`` and not looked at."""
        match = re.compile(f"(?:{argument.removeprefix('^').removesuffix('$')})").fullmatch
        limit = schema.get("maxLength")
        if limit is None:
            return lambda value: not isinstance(value, str) or match(value) is not None
        return lambda value: not isinstance(value, str) or len(value) > limit or match(value) is not None

    # --- arrays

    def _minItems(self, argument: int, _schema: Any) -> Predicate:  # noqa: N802
        return lambda value: not isinstance(value, list) or len(value) >= argument

    def _maxItems(self, argument: int, _schema: Any) -> Predicate:  # noqa: N802
        return lambda value: not isinstance(value, list) or len(value) <= argument

    def _items(self, argument: Any, _schema: Any) -> Predicate:
        test = self.compile(argument)
        return lambda value: not isinstance(value, list) or all(map(test, value))

    def _uniqueItems(self, argument: bool, schema: dict[str, Any]) -> Predicate:  # noqa: N802
        limit = schema.get("maxItems")
        if not argument:
            return lambda _value: True

        def test(value: Any) -> bool:
            if not isinstance(value, list) or (limit is not None and len(value) > limit):
                return True
            return len({json.dumps(item, sort_keys=True, default=repr) for item in value}) == len(value)

        return test

    # --- objects

    def _required(self, argument: list[str], _schema: Any) -> Predicate:
        names = frozenset(argument)
        return lambda value: not isinstance(value, dict) or names <= value.keys()

    def _minProperties(self, argument: int, _schema: Any) -> Predicate:  # noqa: N802
        return lambda value: not isinstance(value, dict) or len(value) >= argument

    def _maxProperties(self, argument: int, _schema: Any) -> Predicate:  # noqa: N802
        return lambda value: not isinstance(value, dict) or len(value) <= argument

    def _propertyNames(self, argument: Any, _schema: Any) -> Predicate:  # noqa: N802
        test = self.compile(argument)
        return lambda value: not isinstance(value, dict) or all(map(test, value))

    def _dependentRequired(self, argument: dict[str, list[str]], _schema: Any) -> Predicate:  # noqa: N802
        rules = tuple((name, frozenset(others)) for name, others in argument.items())

        def test(value: Any) -> bool:
            return not isinstance(value, dict) or all(
                name not in value or others <= value.keys() for name, others in rules
            )

        return test

    def _properties(self, argument: dict[str, Any], _schema: Any) -> Predicate:
        tests = tuple((name, self.compile(schema)) for name, schema in argument.items())

        def test(value: Any) -> bool:
            if isinstance(value, dict):
                for name, check in tests:
                    if name in value and not check(value[name]):
                        return False
            return True

        return test

    def _additionalProperties(self, argument: Any, schema: dict[str, Any]) -> Predicate:  # noqa: N802
        known, check = frozenset(schema.get("properties", ())), self.compile(argument)

        def test(value: Any) -> bool:
            if not isinstance(value, dict) or value.keys() <= known:
                return True
            return all(name in known or check(item) for name, item in value.items())

        return test
