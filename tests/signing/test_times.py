"""Clocks at the end of the calendar: no sum with a time goes wrong."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from test_certified import World
from test_explain import entry, explain, found
from test_vsa import document, rely, signed

from vmgraft.signing.policylint import check_policy
from vmgraft.signing.times import CLOCK_SKEW, format_time, later

END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


@pytest.mark.parametrize("span", [timedelta(seconds=1), CLOCK_SKEW, timedelta(days=90), timedelta.max])
def test_nothing_is_later_than_the_last_moment(span):
    assert later(END, span) == datetime.max.replace(tzinfo=UTC) and format_time(later(END, span)) == format_time(END)
    here = END.astimezone(timezone(timedelta(hours=-8)))
    assert later(here, span) >= here and format_time(later(here, timedelta(days=2))) == format_time(END)


def test_otherwise_it_is_the_sum():
    now = datetime(2026, 11, 22, 15, tzinfo=UTC)
    assert later(now, CLOCK_SKEW) == now + CLOCK_SKEW == datetime(2026, 11, 22, 15, 5, tzinfo=UTC)


def test_a_verification_at_the_end_of_time(sim):
    world = World(sim)
    evidence = world.graft((world.leaf, {}))
    report = sim.verify(evidence, world.policy(), now=END)
    assert report.error == "expired"
    unlimited = sim.graft(expires=None)
    assert sim.verify(unlimited, now=END).ok


def test_an_explanation_at_the_end_of_time(sim):
    made = entry(sim.policy_document(expires=sim.now), rollbackState="required")
    explanation = explain(sim, sim.graft(), made, now=END)
    texts = [remedy.text for remedy in found(explanation, "policy").remedies]
    assert "give this one a new end: 9999-12-31T23:59:59Z" in texts and found(explanation, "expiry").remedies


def test_a_summary_and_a_lint_at_the_end_of_time(sim):
    report = rely(sim, signed(sim, document(sim)), now=END)
    assert report.error == "expired" and "may be 7d old" in report.checks[2].detail
    world = World(sim)
    findings = [str(finding) for finding in check_policy(world.policy(), now=END)]
    assert any("expired" in finding or "ended" in finding for finding in findings)
