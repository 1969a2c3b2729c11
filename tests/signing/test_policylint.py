"""What ``policy check`` says about valid policies: one row a finding, and a clean policy has none."""

from __future__ import annotations

from datetime import timedelta

import pytest
from signing_ca import NOW, issue
from test_certified import World, pem_crl

from vmgraft.signing.manifest import canonical_manifest, parse_manifest
from vmgraft.signing.paths import DEVELOPMENT
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policylint import check_policy
from vmgraft.signing.policytools import format_policy


@pytest.fixture(scope="module")
def world(sim):
    return World(sim)


def lint(document, **options):
    return check_policy(parse_policy(format_policy(document)), **({"now": NOW} | options))


def test_clean_policies(sim, world):
    assert lint(sim.policy_document()) == []
    assert lint(world.document(crls=pem_crl(world.middle) + pem_crl(world.root), require=True)) == []
    assert lint(sim.policy_document(), against=[manifest(sim)]) == []


def manifest(sim, **changes):
    return parse_manifest(canonical_manifest(sim.manifest(**changes)))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"trustedIdentities": ["*"]}, 'trustedIdentities is "*"'),
        ({"maxAdvance": {"com.acme.clock": 3}}, "maxAdvance is checked only where"),
        ({"maxAdvance": {"org.other.x": 3}, "extensionScopes": ["com.acme.*"]}, "maxAdvance has no effect"),
        ({"signatures": {"allOf": ["key:vendor"]}}, "trusts ca:acme, which its signatures do not name"),
        ({"grants": {}}, "grants nothing"),
    ],
)
def test_one_entry(world, changes, part):
    document = world.document(keys=["vendor"], entry={"signatures": {"allOf": ["ca:acme", "key:vendor"]}} | changes)
    (finding,) = [text for text in lint(document) if part in text]
    assert finding.startswith("default: ")


def test_required_state_quietens_max_advance(sim):
    document = sim.policy_document()
    document["trustPolicies"][0] |= {"maxAdvance": {"com.acme.clock": 3}, "rollbackState": "required"}
    assert lint(document) == []


def test_stores_that_nothing_uses(world):
    clock = {"name": "clock", "type": "tsa", "certificates": world.root.pem.decode()}
    document = world.document()
    document["trustStores"].append(clock)
    assert lint(document) == ["the trust store tsa:clock is used by no trust policy"]
    document = world.sim.policy_document()
    document["trustStores"] = [clock]
    document["trustPolicies"][0]["trustStores"] = ["tsa:clock"]
    assert any("names timestamp authorities and no certificate authority" in text for text in lint(document))


def test_required_crls_that_are_not_there(world):
    assert any("can never certify anybody" in text for text in lint(world.document(require=True)))


@pytest.mark.parametrize(
    ("days", "part"),
    [((-9, -1), "expired at"), ((-9, 5), "expires at"), ((3, 90), "is not valid before"), ((-9, 400), None)],
)
def test_roots_and_time(world, days, part):
    root = issue("Root", ca=True, days=days)
    document = world.document(stores=[{"name": "acme", "type": "ca", "certificates": root.pem.decode()}])
    assert [part in text for text in lint(document)] == ([] if part is None else [True])
    assert lint(document, now=None) == []


@pytest.mark.parametrize("now", [NOW, None])
def test_development_authorities(world, now):
    root = issue("Root", ca=True, days=(-9, 400), organisation=DEVELOPMENT)
    document = world.document(stores=[{"name": "acme", "type": "ca", "certificates": root.pem.decode()}])
    assert lint(document, now=now) == ["ca:acme holds a development authority: anybody may hold its keys"]


@pytest.mark.parametrize(("days", "part"), [((-9, -1), "expired at"), ((-9, 5), "ends at"), ((-1, 60), None)])
def test_crls_and_time(world, days, part):
    document = world.document(crls=pem_crl(world.root, days=days))
    assert [part in text for text in lint(document)] == ([] if part is None else [True])


def test_policy_that_ends_soon(sim):
    document = sim.policy_document(expires=NOW + timedelta(days=3))
    assert lint(document) == ["the policy expires at 2026-11-25T15:00:00Z"]


def test_auditors_are_used_keys(sim):
    document = sim.policy_document("vendor", "second")
    document["trustPolicies"][0]["signatures"] = {"allOf": ["key:vendor"]}
    assert lint(document) == ["the key second is used by no trust policy"]
    document["auditors"] = ["key:second"]
    assert lint(document) == []


@pytest.mark.parametrize(
    ("rule", "never"),
    [
        ({"allOf": ["key:vendor", "ca:acme"]}, True),
        ({"anyOf": {"minimumMatches": 2, "of": ["key:vendor", "ca:acme"]}}, True),
        ({"anyOf": {"minimumMatches": 1, "of": ["key:vendor", "ca:acme"]}}, False),
        ({"anyOf": {"minimumMatches": 2, "of": ["key:vendor", "key:second", "ca:acme"]}}, False),
        ({"anyOf": {"minimumMatches": 3, "of": ["key:vendor", "key:second", "ca:acme"]}}, True),
    ],
)
def test_rules_that_revocations_make_impossible(world, rule, never):
    document = world.document(keys=["vendor", "second"], entry={"signatures": rule})
    document["revocations"]["keys"] = ["key:vendor"]
    found = [text for text in lint(document) if "key" in text and "is used by no" not in text]
    assert ["can never be satisfied" in text for text in found] == [never]


@pytest.mark.parametrize(
    ("grant", "parts"),
    [
        ({"capabilities": ["log", "pio:0x510-0x517", "now"]}, ["now; no manifest claims it"]),
        ({"capabilities": ["log", "pio:0x500-0x5ff"]}, ["only pio:0x510-0x517 of it is claimed"]),
        ({"capabilities": ["log"]}, ["is refused: it claims pio:0x510-0x517, which is not granted"]),
        ({"capabilities": ["log", "pio:0x510-0x517"], "limits": {"memoryMiB": 9}}, ["memoryMiB 9, asked are 8"]),
    ],
)
def test_grants_against_a_manifest(sim, grant, parts):
    document = sim.policy_document()
    document["trustPolicies"][0]["grants"] = {"com.acme.clock": {"limits": {"memoryMiB": 8}} | grant}
    found = lint(document, against=[manifest(sim)])
    assert len(found) == len(parts) and all(part in text for part, text in zip(parts, found, strict=True))


def test_grants_for_another_and_old_manifests(sim):
    document = sim.policy_document()
    found = lint(document, against=[manifest(sim, id="com.acme.guard", capabilities=None)])
    assert found == ["default: grants something to com.acme.clock, of which no manifest was given"]
    found = lint(document, against=[manifest(sim, securityVersion=2)])
    assert found == ["default: com.acme.clock 1.4.0 is refused: its security version 2 is below 3"]
    wider = manifest(sim, capabilities=["log", "now", "pio:0x510-0x517"], limits={"memoryMiB": 16})
    assert any("it claims now" in text for text in lint(document, against=[manifest(sim), wider]))
