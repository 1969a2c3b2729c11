"""Block devices: read like files, grafted by a sidecar beside the name that lasts."""

import os
from pathlib import Path

import pytest
from imagefmt_helpers import SECTOR, attach, content_of, iso_bytes, problem_of, state_of, tool

from vmgraft.errors import ImageInUseError, NoRoomError
from vmgraft.imagefmt.contract import GraftState, Placement
from vmgraft.imagefmt.graft import detach_image, open_image
from vmgraft.imagefmt.tree import digest_content

#: A multiple of a sector, and of nothing more.
SIZE = (1 << 20) + 512


@pytest.fixture
def loop(tmp_path):
    """A loop device over a file, and a link to it."""
    if os.geteuid() != 0:
        pytest.skip("setting up a loop device needs root")
    made = []

    def make(content):
        backing, link = tmp_path / "backing.bin", tmp_path / "disk"
        backing.write_bytes(content)
        made.append(tool("losetup", "--find", "--show", backing).stdout.strip())
        link.symlink_to(made[-1])
        return link, backing

    yield make
    for device in made:
        Path(device + ".vmgraft").unlink(missing_ok=True)
        tool("losetup", "--detach", device)


def flush(link):
    tool("blockdev", "--flushbufs", link)


@pytest.mark.parametrize("size", [SIZE, 1 << 20, 512])
def test_there_and_back(loop, size):
    content = os.urandom(size)
    link, backing = loop(content)
    with open_image(link) as image:
        assert image.metadata()["blockDevice"] is True
        assert image.metadata()["fileSize"] == image.virtual_size == size
        assert image.room().inline == 0
        assert sum(extent.length for extent in image.extents()) == size
        found = digest_content(image, flat="always")
    with open_image(backing) as image:
        assert digest_content(image, flat="always") == found
    located = attach(link, Placement.AUTO)
    assert (located.state, located.locator.placement) == (GraftState.OK, Placement.SIDECAR)
    sidecar = link.with_name("disk.vmgraft")
    assert sidecar.exists()
    assert not Path(f"{link.resolve()}.vmgraft").exists()
    assert problem_of(link) is None
    assert content_of(link) == content
    detach_image(link)
    flush(link)
    assert not sidecar.exists()
    assert backing.read_bytes() == content


def test_nothing_goes_into_dev_unasked(loop):
    link, backing = loop(bytes(SIZE))
    node = link.resolve()
    with pytest.raises(NoRoomError) as caught:
        attach(node, Placement.AUTO)
    assert "symbolic link" in caught.value.hint
    assert not Path(f"{node}.vmgraft").exists()
    attach(node, Placement.SIDECAR)
    assert Path(f"{node}.vmgraft").exists()
    assert state_of(node) is GraftState.OK
    assert state_of(link) is GraftState.NONE
    detach_image(node)
    assert not Path(f"{node}.vmgraft").exists()
    assert backing.read_bytes() == bytes(SIZE)


def test_links_within_dev_lead_to_the_node(loop):
    link, _ = loop(bytes(SIZE))
    inside = Path("/dev") / f"vmgraft-test-{os.getpid()}"
    inside.symlink_to(link.resolve())
    try:
        with open_image(inside) as image:
            assert image.path == link.resolve()
    finally:
        inside.unlink()
    with open_image(link) as image:
        assert image.path == link


def test_there_is_no_room_inside(loop):
    link, backing = loop(bytes(SIZE))
    with pytest.raises(NoRoomError, match="does not fit"):
        attach(link, Placement.INLINE)
    assert backing.read_bytes() == bytes(SIZE)


def test_a_device_that_grew_or_is_another(loop):
    link, backing = loop(bytes(SIZE))
    attach(link, Placement.AUTO)
    with open(backing, "ab") as file:
        file.truncate(SIZE + 512)
    tool("losetup", "--set-capacity", link.resolve())
    assert state_of(link) is GraftState.GROWN
    with open(backing, "ab") as file:
        file.truncate(SIZE - 512)
    tool("losetup", "--set-capacity", link.resolve())
    assert state_of(link) is GraftState.DAMAGED


def test_a_trailer_that_a_copied_file_left_on_a_device(loop, tmp_path):
    """dd of a grafted file onto a device of just its size is a graft like the file's."""
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    attach(path, Placement.INLINE)
    link, _ = loop(path.read_bytes())
    assert state_of(link) is GraftState.OK
    assert content_of(link) == content_of(path)


def test_an_iso_on_a_device(loop):
    image = iso_bytes(field=bytes(512))
    link, backing = loop(image)
    located = attach(link, Placement.AUTO)
    flush(link)
    assert located.locator.placement is Placement.SIDECAR
    assert backing.read_bytes() != image
    assert content_of(link) == image
    assert link.with_name("disk.vmgraft").exists()
    detach_image(link)
    flush(link)
    assert backing.read_bytes() == image
    with pytest.raises(NoRoomError) as caught:
        attach(link.resolve(), Placement.AUTO)
    assert "symbolic link" in caught.value.hint


def test_an_iso_on_a_device_whose_field_is_taken(loop):
    link, backing = loop(iso_bytes(field=b"x" * 512))
    with pytest.raises(NoRoomError, match="no room for a locator"):
        attach(link, Placement.AUTO)
    assert backing.read_bytes() == iso_bytes(field=b"x" * 512)
    assert len(iso_bytes()) % SECTOR == 0


def test_a_device_in_use(loop):
    link, _ = loop(bytes(SIZE))
    with open_image(link, writable=True), pytest.raises(ImageInUseError):
        open_image(link, writable=True)
