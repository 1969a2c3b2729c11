"""Makes the helper module of this folder importable, and real ISO images."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from iso_testkit import make_iso, make_tree


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path)


@pytest.fixture(params=["genisoimage", "xorriso"])
def any_iso(request, tmp_path, tree):
    """An ISO image by either maker: they fill the application-use field with spaces and with zeros."""
    return make_iso(tmp_path / "disc.iso", tree, maker=request.param)


@pytest.fixture
def iso(tmp_path, tree):
    return make_iso(tmp_path / "disc.iso", tree)
