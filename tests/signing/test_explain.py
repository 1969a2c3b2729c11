"""Explanations are true: applied by somebody else's JSON Patch, an edit makes the check pass."""

from __future__ import annotations

import dataclasses
import json
from datetime import timedelta

import jsonpatch
import pytest
from test_certified import Broken, Remembered, World

from vmgraft.signing.contract import Status
from vmgraft.signing.explain import explain_evidence
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policytools import format_policy


@pytest.fixture(scope="module")
def world(sim):
    return World(sim)


def explain(sim, evidence, document, **options):
    options = {"image_name": "disk.qcow2", "now": sim.now} | options
    return explain_evidence(evidence, parse_policy(format_policy(document)), **options)


def found(explanation, name):
    return next(item for item in explanation.checks if item.check.name == name)


def edited(sim, evidence, document, explanation, name, **options):
    """Apply the first remedy of a check that is an edit, and verify again."""
    edits = next(remedy.edits for remedy in found(explanation, name).remedies if remedy.edits)
    changed = jsonpatch.JsonPatch([dict(edit) for edit in edits]).apply(document)
    return sim.verify(evidence, parse_policy(format_policy(changed)), **options)


def entry(document, **changes):
    document["trustPolicies"][0] |= changes
    return document


CASES = {
    "image scope": ("scope", {"imageScopes": ["name:other*"]}, {}),
    "extension scope": ("scope", {"extensionScopes": ["org.other.*"]}, {}),
    "both scopes": ("scope", {"imageScopes": ["name:other*"], "extensionScopes": ["org.other.*"]}, {}),
    "no grant": ("capabilities", {"grants": {}}, {}),
    "no grants": ("capabilities", {"grants": None}, {}),
    "empty grant": ("capabilities", {"grants": {"com.acme.clock": {}}}, {}),
    "narrow grant": ("capabilities", {"grants": {"com.acme.clock": {"capabilities": ["pio:0x510-0x513"]}}}, {}),
    "security version": ("rollback", {"minSecurityVersion": {"com.acme.clock": 9}}, {}),
    "advance": ("rollback", {"maxAdvance": {"com.acme.clock": 1}}, {"memory": Remembered(clock=1)}),
    "required": ("required", {"requireExtensions": ["com.acme.guard", "com.acme.clock", "com.acme.lock"]}, {}),
    "late": ("expiry", {}, {"now": timedelta(days=90)}),
    "late, override": (
        "expiry",
        {"signatureVerification": {"level": "strict", "override": {"rollback": "log"}}},
        {"now": timedelta(days=90)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_edit_makes_the_check_pass(sim, case):
    name, changes, options = CASES[case]
    document = entry(sim.policy_document(), **changes)
    document["trustPolicies"][0] = {
        key: value for key, value in document["trustPolicies"][0].items() if value is not None
    }
    if "now" in options:
        options = options | {"now": sim.now + options["now"]}
    evidence = sim.graft()
    explanation = explain(sim, evidence, document, **options)
    assert not explanation.report.ok and found(explanation, name).check.status is Status.FAIL
    assert edited(sim, evidence, document, explanation, name, **options).ok


def test_signer_that_is_known_and_not_named(sim):
    document = sim.policy_document("vendor", "second")
    document["trustPolicies"][0]["signatures"] = {"anyOf": {"minimumMatches": 1, "of": ["key:second"]}}
    explanation = explain(sim, sim.graft(), document)
    first = found(explanation, "authenticity").remedies[0]
    assert sim.keys["second"].keyid in first.text and not first.edits
    assert edited(sim, sim.graft(), document, explanation, "authenticity").ok


def test_expired_policy_and_loose_binding(sim):
    document = sim.policy_document(expires=sim.now)
    explanation = explain(sim, sim.graft(), document)
    assert edited(sim, sim.graft(), document, explanation, "policy").ok
    document = sim.policy_document()
    portable = sim.graft(binding="any")
    assert edited(sim, portable, document, explain(sim, portable, document), "binding").ok


def test_identity_that_is_not_named(sim, world):
    document = world.document(entry={"trustedIdentities": ["x509.subject: CN=Somebody"]})
    evidence = world.graft((world.leaf, {}))
    explanation = explain(sim, evidence, document)
    texts = [remedy.text for remedy in found(explanation, "authenticity").remedies]
    assert any("x509.san: email:release@acme.example" in text for text in texts)
    assert edited(sim, evidence, document, explanation, "authenticity").ok


def test_authority_that_is_trusted_elsewhere_only(sim, world):
    from test_certified import stores

    evidence = world.graft((world.other_leaf, {"chain": [world.other_leaf.der]}))
    explanation = explain(sim, evidence, world.document(stores=stores(world)))
    assert any("name ca:other" in remedy.text for remedy in found(explanation, "authenticity").remedies)


def test_unknown_signer_is_named_as_a_claim(sim):
    explanation = explain(sim, sim.graft(signers=["stranger"]), sim.policy_document())
    (remedy,) = found(explanation, "authenticity").remedies
    assert f"says that it is by {sim.keys['stranger'].keyid}" in remedy.text and not remedy.edits


def test_revoked_and_rolled_back(sim):
    document = sim.policy_document()
    document["revocations"]["keys"] = ["key:vendor"]
    explanation = explain(sim, sim.graft(), document)
    assert edited(sim, sim.graft(), document, explanation, "revocation").ok
    document = entry(sim.policy_document(), rollbackState="required")
    assert any("--state" in item.text for item in found(explain(sim, sim.graft(), document), "rollback").remedies)
    explanation = explain(sim, sim.graft(), sim.policy_document(), memory=Remembered(clock=9))
    assert any("state reset default com.acme.clock" in item.text for item in found(explanation, "rollback").remedies)
    explanation = explain(sim, sim.graft(), sim.policy_document(), memory=Broken())
    assert found(explanation, "rollback").check.status is Status.FAIL


def test_tied_policies(sim):
    document = sim.policy_document()
    document["trustPolicies"].append(document["trustPolicies"][0] | {"name": "twin"})
    explanation = explain(sim, sim.graft(), document)
    assert "closer image scope" in found(explanation, "scope").remedies[0].text


def test_what_no_policy_can_change_has_no_edit(sim):
    content = sim.graft()
    content.names = dataclasses.replace(content.names, root_hash=bytes(32))
    payload = sim.graft()
    payload.payloads.clear()
    for evidence, name in ((content, "content"), (payload, "payloads")):
        (remedy,) = found(explain(sim, evidence, sim.policy_document()), name).remedies
        assert remedy.text.startswith("get the image again") and remedy.edits == ()


def test_warning_is_explained_and_success_is_not(sim):
    document = entry(sim.policy_document(), signatureVerification={"level": "permissive"}, grants={})
    explanation = explain(sim, sim.graft(), document)
    assert explanation.report.ok and found(explanation, "capabilities").remedies
    explanation = explain(sim, sim.graft(), sim.policy_document())
    assert explanation.report.ok and not any(item.remedies for item in explanation.checks)


def test_json_form(sim):
    document = explain(sim, sim.graft(), entry(sim.policy_document(), grants={})).to_dict()
    assert json.loads(json.dumps(document)) == document
    check = next(check for check in document["checks"] if check["name"] == "capabilities")
    assert check["remedies"][0]["edits"] == [
        {
            "op": "add",
            "path": "/trustPolicies/0/grants/com.acme.clock",
            "value": {"capabilities": ["log", "pio:0x510-0x517"]},
        }
    ]
