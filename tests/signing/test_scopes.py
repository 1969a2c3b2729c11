from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.signing.scopes import ImageScope, Reach, extension_in_scope

TREE = bytes(range(32))


@pytest.mark.parametrize(
    ("scope", "name", "reach"),
    [
        ("*", "anything", Reach.GLOBAL),
        ("name:acme-*", "acme-1.qcow2", Reach.GLOB),
        ("name:acme-*", "not-acme-1.qcow2", Reach.NONE),
        ("name:acme-*", "Acme-1.qcow2", Reach.NONE),
        ("name:disk", "disk\n", Reach.NONE),
        ("name:disk?", "disk\n", Reach.GLOB),
        ("name:[ab].iso", "a.iso", Reach.GLOB),
        ("name:[", "[", Reach.GLOB),
        (f"tree:sha256:{TREE.hex()}", "anything", Reach.EXACT),
        (f"tree:sha256:{TREE.hex()[:-2]}00", "anything", Reach.NONE),
    ],
)
def test_image_scopes(scope, name, reach):
    assert ImageScope(scope).reach(name, TREE) is reach


def test_unknown_content_matches_no_tree():
    assert ImageScope(f"tree:sha256:{TREE.hex()}").reach("x", None) is Reach.NONE


@pytest.mark.parametrize(
    ("scope", "extension", "inside"),
    [
        ("*", "com.acme.clock", True),
        ("com.acme.*", "com.acme.clock", True),
        ("com.acme.*", "com.acme.clock.pro", True),
        ("com.acme.*", "com.acme", False),
        ("com.acme.*", "com.acme-evil.clock", False),
        ("com.acme.*", "com.acmex.clock", False),
        ("com.acme.*", "evil.com.acme.clock", False),
        ("com.acme", "com.acme", True),
        ("com.acme", "com.acme.clock", False),
        ("com.acme", "com.acme-evil", False),
    ],
)
def test_extension_scopes(scope, extension, inside):
    assert extension_in_scope(scope, extension) is inside


LABELS = st.lists(st.sampled_from(["com", "acme", "acme-evil", "a", "b"]), min_size=1, max_size=4)


@given(LABELS, LABELS)
def test_whole_labels_only(scope, extension):
    inside = len(extension) > len(scope) and extension[: len(scope)] == scope
    assert extension_in_scope(".".join(scope) + ".*", ".".join(extension)) is inside


@given(st.text(min_size=1, max_size=12), st.text(max_size=12))
def test_any_glob_is_harmless(glob, name):
    assert ImageScope(f"name:{glob}").reach(name, None) in (Reach.GLOB, Reach.NONE)
