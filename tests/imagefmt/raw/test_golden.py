"""Goldens: released grafts stay readable, and the script that made them still makes the same bytes."""

import pytest
from imagefmt_goldens import check_read_and_detached, check_the_script, golden_names

NAMES = golden_names("raw")


def test_there_are_goldens():
    assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_is_read_and_detached(tmp_path, name):
    check_read_and_detached(name, tmp_path)


def test_the_script_makes_the_same_bytes(tmp_path):
    check_the_script("raw", tmp_path)
