"""Counts and sizes in sentences."""

import pytest

from vmgraft.words import counted, size_words


def test_one_is_one():
    assert [counted(number, "key") for number in (0, 1, 2)] == ["0 keys", "1 key", "2 keys"]
    assert counted(1, "entry", "entries") == "1 entry" and counted(2, "entry", "entries") == "2 entries"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (1000, "1000 bytes"), (1024, "1 KiB"), (1536, "1536 bytes"), (64 << 10, "64 KiB"),
     (4 << 20, "4 MiB"), ((4 << 20) + 1, "4194305 bytes"), (1 << 30, "1 GiB"), (1 << 40, "1024 GiB")],
)  # fmt: skip
def test_a_bound_as_people_say_it(size, text):
    assert size_words(size) == text
