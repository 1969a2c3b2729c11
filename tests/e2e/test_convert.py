"""vmgraft convert: from container to container through the installed program, and what a user sees when it fails."""

import os
import pty
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

MIB = 1 << 20
#: Suffix and QEMU's name. tests/vendor goes through all of them.
FORMATS = {"qcow2": "qcow2", "vhdx": "vhdx", "vhd": "vpc", "raw": "raw"}


@pytest.fixture
def disk(tmp_path: Path, guest: Path) -> Path:
    path = tmp_path / "disk.img"
    noise = random.Random(5)
    with path.open("wb") as file:
        file.write(guest.read_bytes())
        for offset in (MIB, 12 * MIB, 20 * MIB - 9):
            file.seek(offset)
            file.write(noise.randbytes(9000))
        file.truncate(20 * MIB + 512)
    return path


def test_a_grafted_disk_travels(cli, vendor, disk, clock, tool, sha256) -> None:
    plain, before = disk.with_name("plain.raw"), sha256(disk)
    plain.write_bytes(disk.read_bytes())
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    statement = cli("extract", disk, "statement")
    current = disk
    for suffix, name in FORMATS.items():
        following = disk.with_name(f"travelled.{suffix}")
        said = cli.json("convert", current, following)
        assert (said["format"], said["virtualSize"]) == (suffix, 20 * MIB + 512)
        assert (said["dropped"], said["warnings"]) == (None, [])
        cli("verify", following, "--policy", vendor / "policy.json")
        if suffix != "raw":
            tool("qemu-img", "compare", "-f", "raw", "-F", name, plain, following)
        current = following
    assert cli("extract", current, "statement") == statement
    report = cli.json("run", current, "--policy", vendor / "policy.json", "--cpu", "soft", "--timeout", "30")
    assert "clock: 0x" in report["end"]["serial"]
    cli("detach", current)
    assert sha256(current) == before


def test_what_people_see(cli, vendor, disk, clock) -> None:
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    shown = cli("convert", disk, "out.qcow2").splitlines()
    assert shown[0].startswith("converted to out.qcow2")
    assert shown[1].startswith("graft        inline, record of")
    assert shown[2].endswith("read back")
    assert "left behind" in cli("convert", disk, "bare.vmdk", "--drop-grafts")
    cli("list", "bare.vmdk", code=4)
    assert cli("convert", "bare.vmdk", "again.vdi").count("\n") == 2  # no graft, no line about one


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["disk.img", "out"], 2, "suffix"),
        (["disk.img", "out.zip"], 2, "suffix"),
        (["disk.img", "out.qcow2", "-O", "zip"], 2, "zip"),
        (["none.img", "out.qcow2"], 3, "cannot be opened"),
        (["disk.img", "disk.img"], 3, "exists already"),
        (["disk.img", "nowhere/out.qcow2"], 3, "no such folder"),
        (["disk.img", "out.vdi", "--compress"], 3, "options of qcow2"),
        (["disk.img", "out.qcow2", "--cluster-size", "1000"], 3, "a cluster of 1000 bytes"),
        (["disk.img", "out.iso"], 3, "no ISO 9660 volume"),
    ],
)
def test_failures(cli, disk, args, code, said) -> None:
    before = set(disk.parent.iterdir())
    assert said in cli.json("convert", *args, code=code)["error"]["message"]
    assert set(disk.parent.iterdir()) == before


def test_altered_content_ends_as_verify_does(cli, vendor, disk, clock) -> None:
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    with disk.open("r+b") as file:
        file.seek(15 * MIB)
        file.write(b"x")
    cli("verify", disk, "--policy", vendor / "policy.json", code=12)
    cli("convert", disk, "out.qcow2", code=12)
    assert not (disk.parent / "out.qcow2").exists()


def test_a_disk_that_fills_up_leaves_nothing(cli, vendor, disk, clock) -> None:
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    before = set(disk.parent.iterdir())
    with disk.open("r+b") as file:
        file.seek(2 * MIB)
        file.write(random.Random(1).randbytes(4 * MIB))
    for limit in (3 * MIB, 1000):

        def full(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        cli("convert", disk, "out.qcow2", "-g", code=3, preexec_fn=full)
        assert "File too large" in cli.stderr
        assert set(disk.parent.iterdir()) == before


def test_terminal_and_signals(cli, disk) -> None:
    """A progress bar on a terminal, none elsewhere; SIGTERM leaves nothing."""
    with disk.open("r+b") as file:
        noise = random.Random(2).randbytes(MIB)
        for number in range(20):
            file.seek(number * MIB)
            file.write(number.to_bytes(4, "little") + noise[4:])
    before = set(disk.parent.iterdir())
    program = [str(Path(os.sys.executable).with_name("vmgraft")), "convert", str(disk)]
    main, side = pty.openpty()
    with subprocess.Popen([*program, "shown.qcow2"], cwd=disk.parent, stderr=side, stdout=subprocess.PIPE) as process:
        assert b"converted to" in process.communicate()[0]
    os.close(side)
    assert b"convert" in os.read(main, 65536)
    os.close(main)
    (disk.parent / "shown.qcow2").unlink()
    assert cli("convert", disk, "quiet.qcow2")
    assert cli.stderr == ""
    (disk.parent / "quiet.qcow2").unlink()
    with subprocess.Popen([*program, "cut.qcow2", "-c"], cwd=disk.parent, stderr=subprocess.PIPE) as process:
        time.sleep(0.8)  # somewhere in start-up, copying or reading back: all must end the same way
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    if process.returncode != 0:
        assert process.returncode in (130, -signal.SIGTERM)  # the latter: before the program had begun
        assert b"Traceback" not in said
        assert set(disk.parent.iterdir()) == before
