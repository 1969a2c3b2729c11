"""Shared by the tests of imagefmt: small images, sections, and a way to die in the middle of a write."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from imagefmt_helpers import iso_bytes, sample_sections  # noqa: E402 - the line above makes it importable


@pytest.fixture
def sections():
    return sample_sections()


@pytest.fixture
def raw_image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 40 + b"odd")
    return path


@pytest.fixture
def iso_image(tmp_path):
    path = tmp_path / "disc.iso"
    path.write_bytes(iso_bytes())
    return path
