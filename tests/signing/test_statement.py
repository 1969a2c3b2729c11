from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import GraftFormatError, UsageError, VmgraftError
from vmgraft.signing.statement import build_statement, parse_statement

CREATED = datetime(2026, 11, 22, 15, 0, 0, tzinfo=UTC)


def built(sim, *manifests, **options):
    return sim.statement(manifests or [sim.manifest()], **({"created": CREATED, "expires": None} | options))[0]


def test_members_as_documented(sim, content_type):
    document = json.loads(built(sim, expires=CREATED + timedelta(days=1)))
    assert sorted(document) == ["_type", "predicate", "predicateType", "subject"]
    assert document["_type"] == "https://in-toto.io/Statement/v1"
    assert document["predicateType"] == "https://vmgraft.dev/graft/v1"
    names = {subject["name"]: subject["digest"] for subject in document["subject"]}
    assert names["guest-content"] == {"sha256": "33" * 32}
    module = hashlib.sha256(b"module of com.acme.clock").hexdigest()
    assert names["com.acme.clock/1.4.0/module.wasm"] == {"sha256": module}
    assert "com.acme.clock/1.4.0/manifest.json" in names
    predicate = document["predicate"]
    assert predicate["critical"] == ["binding", "extensions"]
    assert predicate["image"] == {
        "virtualSize": "1048576",
        "sectorSize": "512",
        "contentTree": {
            "algorithm": "fs-verity-sha256",
            "blockSize": "65536",
            "rootHash": "11" * 32,
            "digest": "22" * 32,
        },
    }
    assert predicate["extensions"][0]["securityVersion"] == "3"
    assert (predicate["created"], predicate["expires"]) == ("2026-11-22T15:00:00Z", "2026-11-23T15:00:00Z")


def test_same_input_same_bytes_and_no_container_fact(sim):
    one = built(sim)
    assert one == built(sim)
    assert b"qcow2" not in one and b"offset" not in one
    east = timezone(timedelta(hours=5))
    assert built(sim, created=CREATED.astimezone(east)) == one
    assert built(sim, created=CREATED + timedelta(microseconds=999_999)) == one


def test_round_trip(sim, content_type):
    statement = parse_statement(built(sim, content=content_type(flat=None), sector_size=2048))
    assert statement.image.sector_size == 2048
    assert statement.image.root_hash == b"\x11" * 32
    assert "guest-content" not in statement.subjects
    assert statement.expires is None and statement.created == CREATED
    assert statement.unknown == ()
    (entry,) = statement.extensions
    assert (entry.security_version, entry.module) == (3, "com.acme.clock/1.4.0/module.wasm")


def test_portable_statement_names_no_content(sim):
    statement = parse_statement(built(sim, binding="any"))
    assert statement.image is None
    assert all("guest-content" not in name for name in statement.subjects)


def test_extension_without_module(sim):
    statement = parse_statement(built(sim, sim.manifest(module=None)))
    assert statement.extensions[0].module is None


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        ([], {}),
        (["clock", "clock"], {}),
        (["clock"], {"binding": "both"}),
        (["clock"], {"content": None}),
        (["clock"], {"sector_size": 4000}),
        (["clock"], {"expires": CREATED}),
        (["clock"], {"created": datetime(2026, 11, 22)}),
        (["clock", "rival"], {}),
    ],
)
def test_parts_that_make_no_statement(sim, content_type, parts, options):
    manifests = [json.dumps(sim.manifest(f"com.acme.{part}")).encode() for part in parts]
    options = {"content": content_type(), "created": CREATED} | options
    with pytest.raises(UsageError):
        build_statement(options.pop("content"), [(manifest, b"wasm") for manifest in manifests], **options)


def test_module_and_manifest_must_agree(sim, content_type):
    with_module, without = (json.dumps(sim.manifest(module=name)).encode() for name in ("module.wasm", None))
    for part in [(with_module, None), (without, b"wasm")]:
        with pytest.raises(UsageError, match="module"):
            build_statement(content_type(), [part], created=CREATED)


def edit(path, value):
    def apply(document):
        node = document
        for step in path[:-1]:
            node = node[step]
        if value is None:
            del node[path[-1]]
        else:
            node[path[-1]] = value

    return apply


P = "predicate"
SHA = {"sha256": "0" * 64}


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["extra"], 1, None),
        (["_type"], "https://in-toto.io/Statement/v0.1", "_type"),
        (["predicateType"], "https://slsa.dev/provenance/v1", "predicateType"),
        (["subject"], [], "subject"),
        (["subject", 0, "name"], None, "subject[0]"),
        (["subject", 0, "name"], "a\nb", "subject[0].name"),
        (["subject", 0, "digest"], {}, "subject[0].digest"),
        (["subject", 0, "digest"], {"sha1": "0" * 40}, "subject[0].digest"),
        (["subject", 0, "digest"], {"sha256": "A" * 64}, "subject[0].digest.sha256"),
        (["subject", 0, "digest"], {"sha512": "0" * 128}, "subject"),
        (["subject", 0, "name"], "com.acme.clock/1.4.0/module.wasm", "subject"),
        (["subject", 1, "name"], "other", "predicate.extensions[0]"),
        (["subject"], [{"name": str(n), "digest": SHA} for n in range(257)], "subject"),
        ([P, "formatVersion"], "2.0", "predicate.formatVersion"),
        ([P, "binding"], "none", "predicate.binding"),
        ([P, "binding"], "any", "predicate.image"),
        ([P, "image"], None, "predicate.image"),
        ([P, "image", "virtualSize"], 1048576, "predicate.image.virtualSize"),
        ([P, "image", "virtualSize"], "01", "predicate.image.virtualSize"),
        ([P, "image", "virtualSize"], "9" * 20, "predicate.image.virtualSize"),
        ([P, "image", "contentTree", "algorithm"], "sha1", "predicate.image.contentTree.algorithm"),
        ([P, "image", "contentTree", "blockSize"], "4096", "predicate.image.contentTree.blockSize"),
        ([P, "critical"], None, "predicate"),
        ([P, "critical"], ["expires", "quorum"], "predicate.critical"),
        ([P, "critical"], ["expires"], "predicate.critical"),
        ([P, "extensions"], [], "predicate.extensions"),
        ([P, "extensions", 0, "manifest"], "guest-content", "predicate.extensions[0].manifest"),
        ([P, "extensions", 0, "securityVersion"], 3, "predicate.extensions[0].securityVersion"),
        ([P, "extensions", 0, "id"], "com.other.clock", "predicate.extensions[0].manifest"),
        ([P, "created"], "2026-13-22T15:00:00Z", "predicate.created"),
        ([P, "created"], "2026-11-22 15:00:00", "predicate.created"),
        ([P, "expires"], "2026-11-22T15:00:00Z", "predicate.expires"),
    ],
)
def test_malformed(sim, path, value, field):
    document = json.loads(built(sim))
    edit(path, value)(document)
    with pytest.raises(GraftFormatError) as caught:
        parse_statement(json.dumps(document).encode(), file="statement")
    assert (caught.value.file, caught.value.field) == ("statement", field)


def test_extension_listed_twice(sim):
    document = json.loads(built(sim))
    document[P]["extensions"] *= 2
    with pytest.raises(GraftFormatError, match="twice"):
        parse_statement(json.dumps(document).encode())


def test_names_of_unknown_members_are_safe_to_print(sim):
    document = json.loads(built(sim))
    document[P]["x\x1b[2J\u202e"] = 1
    assert parse_statement(json.dumps(document).encode()).unknown == ("predicate.x\\x1b[2J\\u202e",)


@given(st.binary(max_size=200))
def test_only_our_error(data):
    with pytest.raises(GraftFormatError):
        parse_statement(data)


VALUES = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2) | st.just({})


@given(st.data())
def test_bent_documents(sim, data):
    """Any member replaced by any value, at any depth: our error, or a statement."""
    document = json.loads(built(sim))
    node, depth = document, data.draw(st.integers(0, 4))
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if depth == 0 or not isinstance(node[key], dict | list) or not node[key]:
            break
        node, depth = node[key], depth - 1
    node[key] = data.draw(VALUES)
    try:
        parse_statement(json.dumps(document).encode())
    except VmgraftError as exc:
        assert type(exc) is GraftFormatError
