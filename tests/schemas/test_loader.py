"""The schemas are sound, and violations name their field."""

from __future__ import annotations

import time

import pytest
from jsonschema import Draft202012Validator

from vmgraft.errors import PolicyError, UsageError
from vmgraft.schemas import SCHEMAS, load_schema, validate

GOOD = {"id": "com.acme.clock", "version": "1", "securityVersion": 0, "abi": "vmgraft/1"}


def subschemas(node):
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from subschemas(child)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_is_valid(name):
    schema = load_schema(name)
    Draft202012Validator.check_schema(schema)
    assert schema["$id"].endswith(f"/{name}-1.json")
    assert load_schema(name) is not schema


@pytest.mark.parametrize("name", SCHEMAS)
def test_patterns_are_anchored_and_bounded(name):
    """A pattern without a length limit would be matched against strings of any length."""
    patterns = [node for node in subschemas(load_schema(name)) if isinstance(node.get("pattern"), str)]
    for node in patterns:
        assert node["pattern"].startswith("^") and node["pattern"].endswith("$")
        assert "maxLength" in node
    unique = [node for node in subschemas(load_schema(name)) if node.get("uniqueItems") and name != "report"]
    assert all("maxItems" in node for node in unique)


def test_unknown_schema():
    with pytest.raises(ValueError, match="no schema"):
        load_schema("../errors")


def refused(document, error=UsageError):
    with pytest.raises(error) as caught:
        validate("manifest", document, file="manifest.toml", error=error)
    assert caught.value.file == "manifest.toml"
    return caught.value


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": "clock"}, "id"),
        ({"id": "com.acme.clock\n"}, "id"),
        ({"id": "com.acme-.x"}, "id"),
        ({"securityVersion": 1.0}, "securityVersion"),
        ({"securityVersion": True}, "securityVersion"),
        ({"securityVersion": -1}, "securityVersion"),
        ({"capabilities": ["log", "pio:0x510"]}, "capabilities[1]"),
        ({"capabilities": ["log", "log"]}, "capabilities"),
        ({"limits": {"memoryMiB": 0}}, "limits.memoryMiB"),
        ({"limits": {"fuel": 1}}, "limits"),
        ({"module": "../module.wasm"}, "module"),
        ({"module": "a/b.wasm"}, "module"),
        ({"title": "a\x1b[2J"}, "title"),
        ({"title": "a\u202eb"}, "title"),
        ({"homepage": "javascript:alert(1)"}, "homepage"),
        ({"onFault": "restart(0)"}, "onFault"),
        ({"abi": "vmgraft/2"}, "abi"),
    ],
)
def test_field_is_named(change, field):
    assert refused(GOOD | change).field == field


def test_good_manifest_passes():
    assert validate("manifest", GOOD, file=None, error=UsageError) is None


def test_unknown_and_missing_fields():
    assert "unknown field 'colour'" in refused(GOOD | {"colour": 1}).message
    assert "'abi' is a required" in refused({k: v for k, v in GOOD.items() if k != "abi"}).message
    assert refused([]).field is None


def test_one_is_said_as_one():
    policy = {"version": "1.0", "policyVersion": 1, "keys": [], "trustPolicies": []}
    for document, words in ((policy, "at least 1 item"), (policy | {"keys": [{}] * 65}, "at most 64 items")):
        with pytest.raises(PolicyError) as caught:
            validate("policy", document, file=None, error=PolicyError)
        assert caught.value.message == f"must have {words}"


def test_error_class_hint_and_short_message():
    error = refused(GOOD | {"id": "X" * 100}, PolicyError)
    assert "reversed domain name" in error.hint
    assert len(refused(GOOD | {"limits": {"x" * 10_000: 1}}).message) < 300
    assert len(refused(GOOD | {"title": ["y" * 10_000]}).message) < 300


@pytest.mark.parametrize(
    "change",
    [
        {"id": "a-" * 30_000},
        {"capabilities": [1, "a"] * 15_000},
        {"capabilities": [[i] for i in range(15_000)]},
        {"title": "\x00" * 60_000},
        {"x" + str(i): i for i in range(10_000)},
    ],
    ids=["long id", "mixed list", "list of lists", "long title", "many fields"],
)
def test_hostile_documents_end_fast(change):
    started = time.monotonic()
    refused(GOOD | change)
    assert time.monotonic() - started < 2
