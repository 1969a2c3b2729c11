"""The table of verdicts: each row of verdicts.json ends as it says."""

from __future__ import annotations

from collections import Counter

import pytest
from verdict_stamps import Stamps
from verdict_world import POLICY_FILE, SUMMARY_FILE, TABLE, Verdict, World

from vmgraft.signing.integrity import CHECKS

ROWS = TABLE["verdicts"]
NAMES = [row["name"] for row in ROWS]
WORDS = {"name", "graft", "policy", "memory", "summary", "at", "image", "reads", "exit", "failed", "warned", "said"}


@pytest.fixture(scope="module")
def world(sim, evidence_type, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdicts")
    return World(sim, evidence_type, folder, Stamps(folder))


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_verdict(world, row):
    found: Verdict = world.judge(row)
    wanted = (row["exit"], row["failed"], row.get("warned", []))
    assert (found.exit, found.failed, found.warned) == wanted, found.said
    assert row.get("said", "") in found.said


def test_the_table_is_what_it_claims_to_be():
    """Enough rows, none twice, no word that nobody reads, and every check and exit code of a verification in it."""
    assert len(ROWS) >= 80
    assert [name for name, count in Counter(NAMES).items() if count > 1] == []
    assert {word for row in ROWS for word in row} <= WORDS
    assert all((row["exit"] == 0) is (row["failed"] == []) for row in ROWS)
    never = {"conflicts"}  # needs a signer who contradicts himself: test_verify.py
    assert {check for row in ROWS for check in row["failed"]} == {*CHECKS, POLICY_FILE, SUMMARY_FILE} - never
    assert {row["exit"] for row in ROWS} == {0, 3, 5, *range(10, 20)}
