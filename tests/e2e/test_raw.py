"""A raw disk: the same journey, what partitioning tools do to it, and block devices."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def disk(tmp_path: Path, guest: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(guest.read_bytes())
        file.seek(1 << 20)
        file.write(os.urandom(300_000))
        file.truncate((4 << 20) + 512)
    return path


def test_journey(cli, vendor: Path, disk: Path, clock: Path, tool, sha256) -> None:
    before, plain = sha256(disk), Path(shutil.copy(disk, disk.with_name("plain.img")))
    printed = cli("attach", disk, clock, "--key", vendor / "acme.key")
    options = next(line.split()[2] for line in printed.splitlines() if line.split()[:1] == ["qemu-img"])
    opts = f"driver=raw,file.driver=file,file.filename={plain}"
    assert "Images are identical" in tool("qemu-img", "compare", "--image-opts", options, opts)
    cli("verify", disk, "--policy", vendor / "policy.json")
    report = cli.json("run", disk, "--policy", vendor / "policy.json", "--cpu", "soft", "--timeout", "30")
    assert "clock: 0x" in report["end"]["serial"]
    assert any("clock: 0x" in line for line in report["end"]["screen"])
    cli("detach", disk)
    assert sha256(disk) == before


def test_a_copy_is_grafted_and_detached_beside_the_original(cli, vendor, disk, clock, sha256) -> None:
    before = sha256(disk)
    cli("attach", disk, clock, "--key", vendor / "acme.key", "-o", disk.with_name("grafted.img"))
    assert sha256(disk) == before
    cli("verify", disk.with_name("grafted.img"), "--policy", vendor / "policy.json")
    cli("detach", disk.with_name("grafted.img"), "-o", disk.with_name("back.img"))
    assert sha256(disk.with_name("back.img")) == before
    cli("verify", disk.with_name("grafted.img"), "--policy", vendor / "policy.json")


def test_both_engines_show_the_same(cli, vendor: Path, disk: Path, clock: Path, entropy: Path, kvm) -> None:
    cli("attach", disk, clock, entropy, "--key", vendor / "acme.key")
    seen = []
    for engine in ("kvm", "soft"):
        report = cli.json("run", disk, "--policy", vendor / "policy.json", "--cpu", engine, "--timeout", "60")
        assert report["end"]["engine"] == engine
        # Clock and entropy differ between runs; what stands around their values must not.
        seen.append([line.split(" 0x")[0] for line in report["end"]["serial"].splitlines()])
    assert seen[0] == seen[1]


def test_a_guest_that_writes_another_containers_magic(cli, vendor: Path, disk: Path, clock: Path, sha256) -> None:
    """The first bytes of a raw disk are the guest's: naming the format keeps them from meaning anything."""
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    with disk.open("r+b") as file:
        file.write(b"QFI\xfb\0\0\0\3")
    cli("detach", disk, code=3)
    assert cli.json("list", disk, "--image-format", "raw")["state"] == "ok"
    assert cli.json("verify", disk, "--policy", vendor / "policy.json", "--image-format", "raw", code=12)
    cli("detach", disk, "--image-format", "raw")
    assert disk.stat().st_size == (4 << 20) + 512


def test_a_file_that_grew_is_not_passed_over_in_silence(cli, vendor: Path, disk: Path, clock: Path) -> None:
    plain = Path(shutil.copy(disk, disk.with_name("plain.img")))
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    with disk.open("ab") as file:
        file.write(b"more" * 16384)
    assert "file-grown" in cli.json("digest", disk)["warnings"][0]
    assert "file-grown" in cli.json("diff", plain, disk)["warnings"][0]
    for command in (("digest", disk), ("diff", plain, disk)):
        cli(*command)
        assert "warning: disk.img: graft state file-grown" in cli.stderr
    cli("verify", disk, "--policy", vendor / "policy.json", code=5)


def test_long_names(cli, vendor: Path, disk: Path, clock: Path, sha256) -> None:
    long = disk.with_name("x" * 251 + ".img")
    before = sha256(disk)
    cli("attach", disk, clock, "--key", vendor / "acme.key", "--placement", "inline", "-o", long, code=0)
    cli("detach", long, "-o", disk.with_name("back.img"))
    assert sha256(disk.with_name("back.img")) == before


@pytest.fixture
def gpt_disk(tmp_path: Path, tool) -> Path:
    path = tmp_path / "gpt.img"
    with path.open("wb") as file:
        file.truncate(8 << 20)
    tool("sgdisk", "--new=1:2048:0", path)
    return path


def test_a_moved_backup_gpt_and_the_way_back(cli, vendor: Path, gpt_disk: Path, clock: Path, tool, sha256) -> None:
    """sgdisk -e writes into the trailer: nothing verifies any more, and what to do is said and works."""
    before = sha256(gpt_disk)
    cli("attach", gpt_disk, clock, "--key", vendor / "acme.key")
    tool("sgdisk", "--move-second-header", gpt_disk)
    assert cli.json("list", gpt_disk)["state"] == "damaged"
    graft = cli.json("inspect", gpt_disk)["graft"]
    assert "moved the backup GPT" in graft["detail"] and "detach, then let the tool move it back" in graft["detail"]
    cli("verify", gpt_disk, "--policy", vendor / "policy.json", code=5)
    cli("recover", gpt_disk, code=5)
    cli("detach", gpt_disk)
    tool("sgdisk", "--move-second-header", gpt_disk)
    assert sha256(gpt_disk) == before


def test_a_lost_locator_is_recovered(cli, vendor: Path, disk: Path, clock: Path, sha256) -> None:
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    grafted = sha256(disk)
    with disk.open("r+b") as file:
        file.seek(-128, os.SEEK_END)
        file.write(bytes(128))
    cli("verify", disk, "--policy", vendor / "policy.json", code=5)
    cli("recover", disk)
    assert sha256(disk) == grafted
    cli("verify", disk, "--policy", vendor / "policy.json")


@pytest.fixture
def device(disk: Path, tool) -> Iterator[Path]:
    """A loop device over the disk, named by a link in the folder."""
    if os.geteuid() != 0:
        pytest.skip("setting up a loop device needs root")
    link = disk.with_name("device")
    link.symlink_to(tool("losetup", "--find", "--show", disk).strip())
    yield link
    tool("losetup", "--detach", str(link.resolve()))


def test_a_block_device(cli, vendor: Path, disk: Path, device: Path, clock: Path, sha256) -> None:
    before, policy = sha256(disk), vendor / "policy.json"
    assert cli.json("digest", device)["tree"] == cli.json("digest", disk)["tree"]
    cli("attach", device, clock, "--key", vendor / "acme.key")
    assert device.with_name("device.vmgraft").exists()
    assert cli.json("list", device)["unverified"]["placement"] == "sidecar"
    assert cli.json("verify", device, "--policy", policy)["error"] is None
    report = cli.json("run", device, "--policy", policy, "--cpu", "soft", "--timeout", "30")
    assert "clock: 0x" in report["end"]["serial"]
    cli("detach", device)
    assert not device.with_name("device.vmgraft").exists()
    assert sha256(disk) == before
    cli("attach", device.resolve(), clock, "--key", vendor / "acme.key", code=5)
    assert "symbolic link" in cli.stderr
    assert not Path(f"{device.resolve()}.vmgraft").exists()
