"""QEMU and vmgraft keep out of each other's way, for every base container."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@pytest.fixture(params=["raw", "qcow2", "iso"])
def image(request, tmp_path: Path, tool) -> tuple[Path, str]:
    """An image, and the name QEMU has for its format."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"\xfa" * (2 << 20))
    if request.param == "raw":
        return raw, "raw"
    path = tmp_path / f"disk.{request.param}"
    if request.param == "qcow2":
        tool("qemu-img", "convert", "-O", "qcow2", raw, path)
        return path, "qcow2"
    tool("xorriso", "-as", "mkisofs", "-quiet", "-o", path, "-graft-points", f"/data={raw}")
    return path, "raw"


@contextmanager
def qemu_writer(path: Path, form: str) -> Iterator[None]:
    """A QEMU program that has the image open for writing."""
    command = ["qemu-io", "-f", form, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write(b"read 0 512\n")
        program.stdin.flush()
        assert b"read 512" in program.stdout.readline()
        try:
            yield
        finally:
            program.communicate(b"quit\n")


def test_attach_and_detach_refuse_an_image_in_use(cli, vendor: Path, image, clock: Path, sha256) -> None:
    path, form = image
    before = sha256(path)
    with qemu_writer(path, form):
        cli("attach", path, clock, "--key", vendor / "acme.key", code=3)
        assert "another process" in cli.stderr
        cli("attach", path, clock, "--key", vendor / "acme.key", "-o", path.with_name("copy"), code=3)
    assert sha256(path) == before
    assert not path.with_name("copy").exists()
    cli("attach", path, clock, "--key", vendor / "acme.key")
    with qemu_writer(path, form):
        cli("detach", path, code=3)
    cli("detach", path)
    assert sha256(path) == before


def test_qemu_refuses_an_image_that_is_being_grafted(image) -> None:
    from vmgraft.imagefmt.graft import open_image

    path, form = image
    with open_image(path, writable=True):
        done = subprocess.run(
            ["qemu-io", "-f", form, "-c", "write 0 512", str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert "lock" in done.stderr
