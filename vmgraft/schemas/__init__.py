"""The JSON Schemas of every document vmgraft reads or writes, and a loader that turns violations into our errors."""

import json
from collections.abc import Callable
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

from vmgraft.errors import VmgraftError
from vmgraft.schemas.strict import MAX_DEPTH, strict_json

#: The documents there are schemas for.
SCHEMAS = ("manifest", "policy", "statement", "report", "summary")

__all__ = ["MAX_DEPTH", "SCHEMAS", "load_schema", "strict_json", "validate"]


def load_schema(name: str) -> dict[str, Any]:
    """Return a schema (JSON Schema 2020-12) as a fresh dict.

    Args:
        name: One of ``SCHEMAS``.

    Raises:
        ValueError: there is no such schema.
    """
    if name not in SCHEMAS:
        raise ValueError(f"no schema named {name!r}")
    text = Path(__file__).with_name(f"{name}.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


@cache
def _predicate(name: str) -> Callable[[Any], bool]:
    from vmgraft.schemas.compiled import compile_schema

    return compile_schema(load_schema(name))


def validate(name: str, document: Any, *, file: str | PathLike[str] | None, error: type[VmgraftError]) -> None:
    """Check a parsed document against a schema.

    Args:
        name: One of ``SCHEMAS``.
        document: What ``strict_json`` (or a TOML reader) gave back.
        file: What to name in the error.
        error: Error class to raise.

    Raises:
        VmgraftError: (of class ``error``) with the path of the field at fault in ``field``.
    """
    if not _predicate(name)(document):
        from vmgraft.schemas import loader

        loader.refuse(name, document, file=file, error=error)
