"""Counting signers: against a brute force over every way to seat keys."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given
from hypothesis import strategies as st

from vmgraft.signing.rules import SignatureRule, Vouch, filled, label

NAMES = ("vendor", "second", "third", "stranger")
AUTHORITIES = ("a", "b", "c")


def brute(places, signed):
    """The most places that distinct keys fill, by trying every order of the keys."""
    keys = sorted({vouch.key for vouch in signed}, key=lambda key: key.spki)
    keys += [None] * len(places)
    return max(
        sum(
            key is not None and any(vouch.key == key and vouch.fills(place) for vouch in signed)
            for place, key in zip(places, order, strict=False)
        )
        for order in permutations(keys, len(places))
    )


@given(st.data())
def test_most_places_that_distinct_keys_fill(sim, data):
    keys = [sim.keys[name].public for name in NAMES[:3]]
    vouches = [Vouch(key, authority) for key in keys for authority in (None, *AUTHORITIES)]
    signed = set(data.draw(st.lists(st.sampled_from(vouches), max_size=8)))
    places = data.draw(st.lists(st.sampled_from([*keys, *AUTHORITIES]), min_size=1, max_size=4, unique_by=label))
    assert filled(places, signed) == brute(places, signed)
    rule = SignatureRule(frozenset(places), frozenset(), 0)
    assert (rule.problem(signed) is None) is (brute(places, signed) == len(places))
    for minimum in range(1, len(places) + 1):
        rule = SignatureRule(frozenset(), frozenset(places), minimum)
        assert (rule.problem(signed) is None) is (brute(places, signed) >= minimum)


@given(st.data())
def test_more_signatures_never_hurt_and_missing_ones_are_named(sim, data):
    keys = [sim.keys[name].public for name in NAMES]
    vouches = [Vouch(key, authority) for key in keys for authority in (None, *AUTHORITIES)]
    signed = set(data.draw(st.lists(st.sampled_from(vouches), max_size=6)))
    more = set(data.draw(st.lists(st.sampled_from(vouches), max_size=4)))
    draw = st.lists(st.sampled_from([*keys, *AUTHORITIES]), max_size=4, unique_by=label)
    all_of, any_of = data.draw(draw), data.draw(draw)
    rule = SignatureRule(frozenset(all_of), frozenset(any_of), data.draw(st.integers(0, len(any_of))))
    if rule.problem(signed) is None:
        assert rule.problem(signed | more) is None and rule.missing(signed) == ()
    else:
        assert set(rule.missing(signed)) <= {label(place) for place in rule.signatories}


def test_a_rule_without_anybody_never_holds(sim):
    everybody = {Vouch(sim.keys[name].public) for name in NAMES}
    assert SignatureRule(frozenset(), frozenset(), 0).problem(everybody) == "the rule names no key"


def test_an_authority_is_no_key_of_that_name(sim):
    key = sim.keys["vendor"].public
    rule = SignatureRule(frozenset({"acme"}), frozenset(), 0)
    assert rule.problem({Vouch(key)}) is not None and rule.problem({Vouch(key, "acme")}) is None
    assert SignatureRule(frozenset({key}), frozenset(), 0).problem({Vouch(key, "acme")}) is not None
