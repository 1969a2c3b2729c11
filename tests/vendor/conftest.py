"""Shared by the tests of vendor: images of three containers, and keys."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from vendor_testkit import run

from vmgraft.signing.keys import generate

GRUB_ISO = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")


@pytest.fixture(scope="session")
def acme():
    """A vendor's key."""
    return generate("ed25519")


@pytest.fixture(scope="session")
def other():
    """Somebody else's key."""
    return generate("ed25519")


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """The same disk as raw and qcow2, and an ISO."""
    folder = tmp_path_factory.mktemp("templates")
    (folder / "disk.img").write_bytes(bytes(range(256)) * 1000 + bytes(1 << 20))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", folder / "disk.img", folder / "disk.qcow2")
    shutil.copy(GRUB_ISO, folder / "disc.iso")
    return folder


@pytest.fixture(params=["disk.img", "disk.qcow2", "disc.iso"])
def image(request, tmp_path, templates):
    """A clean image of each container, alone in its folder."""
    folder = tmp_path / "image"
    folder.mkdir()
    return Path(shutil.copy(templates / request.param, folder / request.param))


@pytest.fixture
def raw(tmp_path, templates):
    folder = tmp_path / "image"
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(templates / "disk.img", folder / "disk.img"))
