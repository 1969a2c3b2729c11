"""Which signatures count, over every combination of rule, overrides and what is wrong with a signature."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmgraft.signing.contract import Status
from vmgraft.signing.rules import SignatureRule, Vouch
from vmgraft.signing.standing import Standing

NAMES = ("vendor", "second", "third")
PLACES = (*NAMES, "dev")

#: (key, by the authority's word, expired, revoked)
SIGNATURES = st.lists(
    st.tuples(st.sampled_from(NAMES), st.booleans(), st.booleans(), st.booleans()),
    max_size=5,
    unique_by=lambda item: item[:2],
)
OVERRIDES = st.sets(st.sampled_from(("authenticity", "expiry", "revocation")))
RULES = st.tuples(st.sets(st.sampled_from(PLACES)), st.sets(st.sampled_from(PLACES)), st.integers(1, 3)).filter(
    lambda rule: rule[0] or rule[1]
)


def verdict(sim, rule, logged, signatures):
    """Judge the usual graft as if it bore these signatures."""
    keys = {name: sim.keys[name].public for name in NAMES}

    def place(name):
        return keys.get(name, name)

    all_of, any_of, minimum = rule
    wanted = SignatureRule(
        frozenset(map(place, all_of)), frozenset(map(place, any_of)), min(minimum, len(any_of))
    )  # fmt: skip
    policy = sim.policy()
    entry = dataclasses.replace(
        policy.trust_policies[0], signatures=wanted, level="strict", override=dict.fromkeys(logged, "log")
    )
    standing = Standing()
    for name, certified, expired, revoked in signatures:
        vouch = Vouch(keys[name], "dev" if certified else None)
        standing.signed.add(vouch)
        standing.expired |= {vouch: "expired"} if expired else {}
        standing.revoked |= {vouch: "revoked"} if revoked else {}
    with patch("vmgraft.signing.judgement.take_stand", return_value=standing):
        return wanted, standing, sim.verify(sim.graft(), dataclasses.replace(policy, trust_policies=(entry,)))


def bad(signature, logged) -> bool:
    return (signature[2] and "expiry" not in logged) or (signature[3] and "revocation" not in logged)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rule=RULES, logged=OVERRIDES, signatures=SIGNATURES)
def test_what_does_not_count_never_helps(sim, rule, logged, signatures):
    """Without its bad signatures a graft that is trusted is trusted too, and somebody's signature counts."""
    wanted, standing, report = verdict(sim, rule, logged, signatures)
    good = [item for item in signatures if not bad(item, logged)]
    _, left, without = verdict(sim, rule, logged, good)
    assert without.ok or not report.ok
    holds = wanted.problem(standing.signed) is None
    expected = bool(good) and (wanted.problem(left.signed) is None if holds else "authenticity" in logged)
    assert report.ok is expected


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rule=RULES, logged=OVERRIDES, signatures=SIGNATURES)
def test_trust_without_a_warning_needs_good_signatures(sim, rule, logged, signatures):
    """Where no check failed and none only warns, the rule holds by signatures with which nothing is wrong."""
    wanted, standing, report = verdict(sim, rule, logged, signatures)
    if report.ok and all(check.status is not Status.WARN for check in report.checks):
        faultless = standing.signed - standing.expired.keys() - standing.revoked.keys()
        assert wanted.problem(faultless) is None
