"""Locks: QEMU's real tools on the other side."""

import os
import subprocess

import pytest
from imagefmt_helpers import attach, digest, tool

from vmgraft.errors import ImageInUseError
from vmgraft.imagefmt.blob import SMALL
from vmgraft.imagefmt.contract import Placement
from vmgraft.imagefmt.flatfile import FlatFile
from vmgraft.imagefmt.graft import detach_image, open_image
from vmgraft.imagefmt.locks import image_lock
from vmgraft.imagefmt.sidecar import sidecar_path


def stop(process):
    """End a qemu-io; a second time is fine."""
    if process.poll() is None:
        process.communicate("quit\n", timeout=30)


@pytest.fixture
def qemu_io(raw_image):
    """Return a function that starts a qemu-io, which keeps the image open for writing."""
    running = []

    def start(*options, path=raw_image, kind="raw"):
        tool("qemu-io", "--version")
        process = subprocess.Popen(
            ["qemu-io", *options, "-f", kind, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        # The answer to a command shows that the image is open.
        process.stdin.write("length\n")
        process.stdin.flush()
        assert process.stdout.readline()
        return process

    yield start
    for process in running:
        stop(process)


def hold(path):
    fd = os.open(path, os.O_RDWR)
    return fd, image_lock(fd, file=path)


def test_qemu_refuses_to_write_while_we_hold(raw_image):
    tool("qemu-io", "-f", "raw", "-c", "write -P 1 0 512", raw_image)
    fd, lock = hold(raw_image)
    with lock:
        refused = tool("qemu-io", "-f", "raw", "-c", "write -P 2 0 512", raw_image, check=False)
        assert refused.returncode != 0
        assert "lock" in refused.stdout + refused.stderr
    assert raw_image.read_bytes()[:512] == b"\1" * 512
    tool("qemu-io", "-f", "raw", "-c", "write -P 3 0 512", raw_image)
    os.close(fd)
    assert raw_image.read_bytes()[:512] == b"\3" * 512


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vmdk", "vdi", "vpc", "vhdx"])
def test_we_refuse_while_qemu_reads(tmp_path, qemu_io, kind):
    path = tmp_path / f"read.{kind}"
    tool("qemu-img", "create", "-q", "-f", kind, path, "1M")
    before = digest(path)
    process = qemu_io("-r", path=path, kind=kind)
    with pytest.raises(ImageInUseError):
        attach(path, Placement.SIDECAR)
    assert digest(path) == before and not sidecar_path(path).exists()
    stop(process)
    attach(path, Placement.SIDECAR)


def test_we_refuse_while_qemu_writes(raw_image, qemu_io):
    before = digest(raw_image)
    process = qemu_io()
    for action in (
        lambda: attach(raw_image, Placement.INLINE),
        lambda: open_image(raw_image, writable=True),
    ):
        with pytest.raises(ImageInUseError) as caught:
            action()
        assert caught.value.hint
    assert digest(raw_image) == before
    stop(process)
    attach(raw_image, Placement.INLINE)
    detach_image(raw_image)
    assert digest(raw_image) == before


def test_two_of_us_exclude_each_other(raw_image):
    with open_image(raw_image, writable=True), pytest.raises(ImageInUseError):
        open_image(raw_image, writable=True)
    open_image(raw_image, writable=True).close()


def test_reading_needs_no_lock(raw_image, qemu_io):
    qemu_io()
    with open_image(raw_image) as image:
        assert image.read(0, 4)


def test_a_refusal_leaves_no_lock_behind(raw_image):
    first, lock = hold(raw_image)
    second = os.open(raw_image, os.O_RDWR)
    with lock, pytest.raises(ImageInUseError), image_lock(second, file=raw_image):
        raise AssertionError("two holders")
    tool("qemu-io", "-f", "raw", "-c", "write 0 512", raw_image)
    os.close(first)
    os.close(second)


def test_a_blob_that_outlives_its_image_holds_no_lock(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"x" * (SMALL + 1))
    file = FlatFile(path, writable=True)
    blob = file.blob(0, SMALL + 1)
    file.close()
    FlatFile(path, writable=True).close()
    assert blob.read(0, 1) == b"x"
