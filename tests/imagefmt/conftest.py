"""Shared by the tests of imagefmt: small images, sections, and a way to die in the middle of a write."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from imagefmt_helpers import iso_bytes, sample_sections, tool


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


@pytest.fixture
def qcow2_image(tmp_path):
    path = tmp_path / "disk.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 64k", path)
    return path
