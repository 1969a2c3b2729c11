"""The compiled schemas say yes and no exactly where the library does."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import UsageError
from vmgraft.schemas import SCHEMAS, load_schema, validate
from vmgraft.schemas.compiled import compile_schema
from vmgraft.schemas.loader import _validator

MANIFEST = {
    "id": "com.acme.clock", "version": "1.4.0", "securityVersion": 3, "generation": 1, "abi": "vmgraft/1",
    "module": "module.wasm", "capabilities": ["log", "pio:0x510-0x517"], "limits": {"memoryMiB": 8},
}  # fmt: skip
STATEMENT = {
    "_type": "https://in-toto.io/Statement/v1",
    "subject": [{"name": "com.acme.clock/1.4.0/manifest.json", "digest": {"sha256": "1" * 64}}],
    "predicateType": "https://vmgraft.dev/graft/v1",
    "predicate": {
        "formatVersion": "1.0", "critical": ["binding", "extensions"], "binding": "image",
        "image": {
            "virtualSize": "1024", "sectorSize": "512",
            "contentTree": {
                "algorithm": "fs-verity-sha256", "blockSize": "65536", "rootHash": "2" * 64, "digest": "3" * 64,
            },
        },
        "extensions": [
            {
                "id": "com.acme.clock", "version": "1.4.0", "securityVersion": "3", "generation": "1",
                "abi": "vmgraft/1", "manifest": "com.acme.clock/1.4.0/manifest.json",
            }
        ],
        "created": "2026-11-22T15:00:00Z", "expires": "2027-11-22T15:00:00Z",
    },
}  # fmt: skip
POLICY = {
    "version": "1.0", "policyVersion": 7, "expires": "2027-03-01T00:00:00Z",
    "keys": [{"name": "acme", "pem": "-----BEGIN PUBLIC KEY-----"}],
    "trustPolicies": [
        {
            "name": "acme", "imageScopes": ["*", "name:acme-*"], "extensionScopes": ["com.acme.*"],
            "signatureVerification": {"level": "strict", "override": {"expiry": "log"}},
            "signatures": {"allOf": ["key:acme"], "anyOf": {"minimumMatches": 1, "of": ["key:acme"]}},
            "binding": "image", "requireExtensions": ["com.acme.clock"], "minSecurityVersion": {"com.acme.clock": 3},
            "grants": {"com.acme.clock": {"capabilities": ["log"], "limits": {"memoryMiB": 32}, "minIsolation": 1}},
        }
    ],
    "revocations": {"keys": [], "statements": ["4" * 64], "payloads": [], "minGeneration": {"com.acme.clock": 2}},
}  # fmt: skip
GOOD = {"manifest": MANIFEST, "statement": STATEMENT, "policy": POLICY}

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 1 << 40, "", "x", "x\n", "com.acme.clock\n", "1" * 64, "a" * 300, "log", "image",
    "any", [], ["x", "x"], [1, True], ["a"] * 300, {}, {"x": 1}, {"a b": "log"}, {str(i): 1 for i in range(300)},
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(node, dict):
        for key, child in node.items():
            found += places(child, (*path, key))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            found += places(child, (*path, index))
    return found


def agree(name: str, document: Any) -> bool:
    """Compare both; return what they say."""
    wanted = _validator(name).is_valid(document)
    assert compile_schema(load_schema(name))(document) is wanted, json.dumps(document)[:2000]
    if wanted:
        validate(name, document, file=None, error=UsageError)
    else:
        with pytest.raises(UsageError):
            validate(name, document, file=None, error=UsageError)
    return wanted


@pytest.mark.parametrize("name", GOOD)
def test_good_documents(name: str) -> None:
    assert agree(name, GOOD[name])


@pytest.mark.parametrize("name", GOOD)
def test_every_place_with_every_odd_value(name: str) -> None:
    predicate, validator = compile_schema(load_schema(name)), _validator(name)
    verdicts = set()
    for path in places(GOOD[name])[1:]:
        for value in ODD:
            document = copy.deepcopy(GOOD[name])
            parent = document
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = value
            verdict = validator.is_valid(document)
            assert predicate(document) is verdict, (path, value)
            verdicts.add(verdict)
        document = copy.deepcopy(GOOD[name])
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
        assert predicate(document) is validator.is_valid(document), path
    assert verdicts == {True, False}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(ODD[:16]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_mutated_documents(name: str, data: st.DataObject) -> None:
    document = copy.deepcopy(GOOD[name])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(document)[1:] or [()]))
        if not path:
            break
        parent: Any = document
        for key in path[:-1]:
            parent = parent[key]
        if isinstance(parent, dict) and data.draw(st.booleans()):
            parent[data.draw(st.sampled_from(["expires", "x", "binding", "image", "module", "limits"]))] = data.draw(
                json_values
            )
        else:
            parent[path[-1]] = data.draw(json_values)
    agree(name, document)


@pytest.mark.parametrize("name", SCHEMAS)
def test_all_schemas_compile(name: str) -> None:
    assert compile_schema(load_schema(name))([]) is False


@pytest.mark.parametrize(
    "schema", [{"contains": {}}, {"type": "number"}, {"$ref": "other.json"}, {"enum": [1.5]}, {"const": {"a": 1}}]
)
def test_what_is_not_known_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="known"):
        compile_schema(schema)


def test_schemas_may_refer_to_themselves() -> None:
    schema = {
        "$defs": {"tree": {"type": "object", "additionalProperties": {"$ref": "#/$defs/tree"}}},
        "$ref": "#/$defs/tree",
    }
    test = compile_schema(schema)
    assert test({"a": {"b": {}}}) and not test({"a": {"b": 1}})
