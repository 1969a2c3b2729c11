"""QEMU and vmgraft keep out of each other's way, for every container that holds a disk."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from faulty_runs import PROGRAM

from vmgraft.imagefmt.graft import open_image
from vmgraft.imagefmt.registry import format_names

#: Registered format → QEMU's name for it. A disc is a raw disk to QEMU, and an archive is no disk at all.
QEMU_NAMES = {
    "raw": "raw", "qcow2": "qcow2", "iso9660": "raw", "vhdx": "vhdx", "vmdk": "vmdk", "vdi": "vdi", "vhd": "vpc",
}  # fmt: skip


def test_every_disk_container_is_here() -> None:
    assert set(QEMU_NAMES) == set(format_names()) - {"zip"}


@pytest.fixture(params=QEMU_NAMES)
def image(request, tmp_path: Path, tool) -> tuple[Path, str]:
    """An image, and the name QEMU has for its format."""
    raw, form = tmp_path / "disk.raw", QEMU_NAMES[request.param]
    raw.write_bytes(b"\xfa" * (2 << 20))
    path = tmp_path / f"disk.{request.param}"
    if request.param == "raw":
        return raw, form
    if request.param == "iso9660":
        tool("xorriso", "-as", "mkisofs", "-quiet", "-o", path, "-graft-points", f"/data={raw}")
    else:
        tool("qemu-img", "convert", "-f", "raw", "-O", form, raw, path)
    with open_image(path) as opened:
        assert opened.format_name == request.param
    return path, form


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


def qemu_write(path: Path, form: str) -> subprocess.CompletedProcess[str]:
    """Let QEMU write to the image, and close it again."""
    return subprocess.run(
        ["qemu-io", "-f", form, "-c", "write 0 512", str(path)], capture_output=True, text=True, check=False
    )


def test_attach_and_detach_refuse_an_image_in_use(cli, vendor: Path, image, clock: Path, sha256) -> None:
    path, form = image
    with qemu_writer(path, form):
        before = sha256(path)  # to open some containers for writing is to change them
        cli("attach", path, clock, "--key", vendor / "acme.key", code=3)
        assert "another process" in cli.stderr
        cli("attach", path, clock, "--key", vendor / "acme.key", "-o", path.with_name("copy"), code=3)
        assert sha256(path) == before
    assert not path.with_name("copy").exists()
    before = sha256(path)
    cli("attach", path, clock, "--key", vendor / "acme.key")
    with qemu_writer(path, form):
        cli("detach", path, code=3)
    cli("detach", path)
    if form != "vhdx":  # QEMU has written its headers
        assert sha256(path) == before


def test_qemu_refuses_an_image_that_is_being_grafted(image) -> None:
    path, form = image
    with open_image(path, writable=True):
        done = qemu_write(path, form)
        assert done.returncode != 0
        assert "lock" in done.stderr
    assert qemu_write(path, form).returncode == 0


@pytest.mark.parametrize("image", ["raw", "vhdx"], indirect=True)
def test_qemu_waits_for_the_installed_program(cli, vendor: Path, image, clock: Path, tmp_path: Path) -> None:
    """strace holds the program back before its first flush; until it ends, QEMU cannot have the image."""
    path, form = image
    slow = [
        "strace",
        "-f",
        "-qq",
        "-o",
        tmp_path / "log",
        "-e",
        "trace=fsync",
        "-e",
        "inject=fsync:delay_enter=3s:when=1",
    ]
    attach = [*slow, PROGRAM, "attach", path, clock, "--key", vendor / "acme.key"]
    with subprocess.Popen([str(part) for part in attach], stdout=subprocess.DEVNULL) as program:
        while program.poll() is None and not _is_locked(path):
            time.sleep(0.02)
        assert "lock" in qemu_write(path, form).stderr
        assert program.wait(60) == 0
    cli("detach", path)


def _is_locked(path: Path) -> bool:
    """Whether an open file description holds a lock on the file (proc(5), /proc/locks); asking QEMU would be a race."""
    inode = f":{path.stat().st_ino} "
    return any("OFDLCK" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())
