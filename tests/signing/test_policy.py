"""Reading policies: closed by default, and every contradiction is an error before anything is verified."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import PolicyError, VmgraftError
from vmgraft.signing.capabilities import PioRange
from vmgraft.signing.contract import Limits
from vmgraft.signing.policy import MAX_POLICY, OVERRIDABLE, load_policy, parse_policy
from vmgraft.signing.policylint import check_policy
from vmgraft.signing.policytools import format_policy, init_policy, key_name, name_keys


def parse(document):
    return parse_policy(format_policy(document), file="policy.json")


def refused(document, field=None, match=None):
    with pytest.raises(PolicyError, match=match) as caught:
        parse(document)
    assert caught.value.file == "policy.json"
    if field is not None:
        assert caught.value.field == field
    return caught.value


def test_policy_of_init_loads(sim, tmp_path):
    path = tmp_path / "policy.json"
    path.write_bytes(format_policy(sim.policy_document("vendor", "second", minimum=2)))
    policy = load_policy(path)
    (entry,) = policy.trust_policies
    assert policy.file == str(path) and len(policy.sha256) == 64
    assert (entry.level, entry.binding) == ("strict", "image")
    assert entry.signatures.minimum == 2 and len(entry.signatures.keys) == 2
    grant = entry.grants["com.acme.clock"]
    assert PioRange(0x510, 0x517) in grant.capabilities
    assert grant.limits == Limits(memory_mib=8)
    assert entry.min_security_version == {"com.acme.clock": 3}
    assert check_policy(policy) == []


def test_file_that_is_no_policy(sim, tmp_path):
    good = tmp_path / "good.json"
    good.write_bytes(format_policy(sim.policy_document()))
    (tmp_path / "link.json").symlink_to(good)
    (tmp_path / "dangling.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.json")
    for name, part in {
        "missing.json": "No such file",
        "link.json": "symbolic link",
        "dangling.json": "symbolic link",
        "pipe.json": "regular file",
        ".": "regular file",
        "good.json/x": "cannot be read",
    }.items():
        with pytest.raises(PolicyError, match=part) as caught:
            load_policy(tmp_path / name)
        assert caught.value.file == str(tmp_path / name)
        assert name != "missing.json" or "vmgraft policy init" in caught.value.hint
    with pytest.raises(PolicyError, match="more than"):
        parse_policy(b" " * (MAX_POLICY + 1))


def bend(document, path, value):
    node = document
    for step in path[:-1]:
        node = node[step]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return document


T = "trustPolicies"
EMPTY_ANY = {"minimumMatches": 1, "of": []}


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["colour"], 1, None),
        (["version"], "2.0", "version"),
        (["version"], None, None),
        (["policyVersion"], "7", "policyVersion"),
        (["policyVersion"], 7.0, None),
        (["expires"], "tomorrow", "expires"),
        (["expires"], "2026-02-30T00:00:00Z", "expires"),
        (["keys"], None, None),
        ([T], [], T),
        (["keys", 0, "name"], "a b", "keys[0].name"),
        (["keys", 0, "pem"], "no pem", "keys[0].pem"),
        (["keys", 0, "pem"], "pém", "keys[0].pem"),
        (["keys", 0, "path"], "/etc/key", "keys[0]"),
        ([T, 0, "name"], None, f"{T}[0]"),
        ([T, 0, "imageScopes"], [], f"{T}[0].imageScopes"),
        ([T, 0, "imageScopes"], ["acme-*"], f"{T}[0].imageScopes[0]"),
        ([T, 0, "imageScopes"], ["name:/etc/*"], f"{T}[0].imageScopes[0]"),
        ([T, 0, "imageScopes"], ["tree:sha256:00"], f"{T}[0].imageScopes[0]"),
        ([T, 0, "extensionScopes"], ["com.acme*"], f"{T}[0].extensionScopes[0]"),
        ([T, 0, "extensionScopes"], ["*.acme"], f"{T}[0].extensionScopes[0]"),
        ([T, 0, "signatures"], {}, f"{T}[0].signatures"),
        ([T, 0, "signatures"], {"allOf": []}, f"{T}[0].signatures.allOf"),
        ([T, 0, "signatures"], {"anyOf": EMPTY_ANY}, f"{T}[0].signatures.anyOf.of"),
        ([T, 0, "signatures"], {"noneOf": ["key:vendor"]}, f"{T}[0].signatures"),
        ([T, 0, "signatures"], {"allOf": ["ca:acme"]}, f"{T}[0].signatures.allOf"),
        ([T, 0, "signatures"], {"allOf": ["key:nobody"]}, f"{T}[0].signatures.allOf"),
        ([T, 0, "signatures", "anyOf", "minimumMatches"], 0, f"{T}[0].signatures.anyOf.minimumMatches"),
        ([T, 0, "signatures", "anyOf", "minimumMatches"], 3, f"{T}[0].signatures.anyOf.minimumMatches"),
        ([T, 0, "signatureVerification"], None, f"{T}[0]"),
        ([T, 0, "signatureVerification", "level"], "skip", f"{T}[0].signatureVerification.level"),
        ([T, 0, "binding"], "none", f"{T}[0].binding"),
        ([T, 0, "minSecurityVersion"], {"com.acme.clock": "3"}, f"{T}[0].minSecurityVersion.com.acme.clock"),
        ([T, 0, "grants", "com.acme.*"], {}, f"{T}[0].grants"),
        ([T, 0, "grants", "com.acme.clock", "files"], [], f"{T}[0].grants.com.acme.clock"),
        ([T, 0, "grants", "com.acme.clock", "capabilities"], ["irq:1"], f"{T}[0].grants.com.acme.clock.capabilities"),
        ([T, 0, "grants", "com.acme.clock", "limits", "callMs"], 0, f"{T}[0].grants.com.acme.clock.limits.callMs"),
        (["revocations", "keys"], ["key:nobody"], "revocations.keys"),
        (["revocations", "keys"], ["vendor"], "revocations.keys[0]"),
        (["revocations", "statements"], ["A" * 64], "revocations.statements[0]"),
        (["revocations", "certificates"], [], "revocations"),
    ],
)
def test_malformed(sim, path, value, field):
    refused(bend(sim.policy_document(), path, value), field)


@pytest.mark.parametrize("name", ["integrity", "format", "content", "signature", "payloads", "binding", "scope"])
def test_integrity_can_never_be_overridden(sim, name):
    assert name not in OVERRIDABLE
    path = [T, 0, "signatureVerification", "override"]
    error = refused(bend(sim.policy_document(), path, {name: "log"}), match="cannot be overridden")
    assert "expiry" in error.hint


def test_integrity_counts_even_if_the_schema_let_an_override_through(sim):
    """The class itself holds the line, not only the schema in front of it."""
    import dataclasses

    entry = sim.policy().trust_policies[0]
    bent = dataclasses.replace(entry, override={"content": "log", "conflicts": "log", "expiry": "log"})
    assert [name for name in ("content", "conflicts", "expiry") if bent.logs(name)] == ["expiry"]


def test_same_key_under_two_names(sim):
    document = sim.policy_document()
    document["keys"].append(document["keys"][0] | {"name": "alias"})
    refused(document, "keys[1]", "same key")
    document["keys"][1] = sim.policy_document("second")["keys"][0] | {"name": "vendor"}
    refused(document, "keys[1]", "stands twice")


def test_one_key_by_name_and_by_fingerprint_is_one_key(sim):
    document = sim.policy_document()
    references = ["key:vendor", "key:" + sim.keys["vendor"].keyid]
    document[T][0]["signatures"] = {"anyOf": {"minimumMatches": 2, "of": references}}
    refused(document, f"{T}[0].signatures.anyOf.minimumMatches", "2 must sign, of 1 different key:")
    document[T][0]["signatures"]["anyOf"]["minimumMatches"] = 1
    assert len(parse(document).trust_policies[0].signatures.any_of) == 1


def test_two_policies_of_one_name(sim):
    document = sim.policy_document()
    document[T] *= 2
    refused(document, T, "same name")


def test_weak_keys_are_refused(sim):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import rsa

    weak = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    document = sim.policy_document()
    document["keys"][0]["pem"] = weak.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo).decode()
    refused(document, "keys[0].pem", "2048")


def test_empty_rules_never_pass_whoever_built_them():
    from vmgraft.signing.policy import SignatureRule

    assert SignatureRule(frozenset(), frozenset(), 0).problem(frozenset()) is not None


def test_binding_defaults_to_image(sim):
    document = sim.policy_document()
    del document[T][0]["binding"]
    assert parse(document).trust_policies[0].binding == "image"


def test_key_names():
    assert key_name("acme release.pub") == "acme-release.pub"
    assert key_name("///") == "key"
    assert len(key_name("a" * 999)) == 128


def test_files_of_one_name_are_all_trusted(sim):
    """Two vendors' ``release.pub`` must not silently become one key."""
    keys = [sim.keys[name].public for name in ("vendor", "second", "third")]
    named = name_keys([("release", key) for key in keys] + [("again", keys[0])])
    assert named == {"release": keys[0], "release-2": keys[1], "release-3": keys[2]}


def test_init_needs_a_key():
    with pytest.raises(VmgraftError, match="at least one key or authority"):
        init_policy({})


def test_lint(sim):
    document = sim.policy_document("vendor", "second", expires=sim.now)
    entry = document[T][0]
    entry["signatures"] = {"allOf": ["key:vendor"]}
    entry["extensionScopes"] = ["org.other.*"]
    entry["requireExtensions"] = ["com.acme.clock"]
    entry["signatureVerification"] = {"level": "audit", "override": {"expiry": "log"}}
    document[T].append(entry | {"name": "twin"})
    document["revocations"]["keys"] = ["key:vendor"]
    found = "\n".join(check_policy(parse(document), now=sim.now))
    for part in (
        "expired at",
        "the key second is used by no trust policy",
        "default: can never be satisfied, since keys it needs are revoked",
        "requireExtensions can never be satisfied for com.acme.clock",
        "grants has no effect for com.acme.clock",
        "the level audit",
        "only logs: expiry",
        "default and twin tie for *",
    ):
        assert part in found
    document = sim.policy_document()
    document[T][0]["grants"] = {}
    assert any("grants nothing" in line for line in check_policy(parse(document)))


@given(st.binary(max_size=200))
def test_only_our_error(data):
    with pytest.raises(PolicyError):
        parse_policy(data)


JSON = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=6)
    | st.lists(st.text(max_size=3), max_size=2)
    | st.just({})
)


@given(st.data())
def test_bent_policies(sim, data):
    document = sim.policy_document()
    node, depth = document, data.draw(st.integers(0, 5))
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if depth == 0 or not isinstance(node[key], dict | list) or not node[key]:
            break
        node, depth = node[key], depth - 1
    node[key] = data.draw(JSON)
    try:
        parse_policy(json.dumps(document).encode())
    except VmgraftError as exc:
        assert type(exc) is PolicyError


def test_every_byte_of_a_policy_matters_or_is_harmless(sim):
    """One byte changed never turns a refused image into an accepted one, and never ends in a traceback."""
    data = format_policy(sim.policy_document())
    evidence = sim.graft(signers=["stranger"])
    for position in range(0, len(data), 3):
        changed = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        try:
            policy = parse_policy(changed)
        except PolicyError:
            continue
        assert not sim.verify(evidence, policy).ok
