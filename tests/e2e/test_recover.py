"""Recover, and the states of sidecars, with the installed program."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def disks(tmp_path: Path, guest: Path, tool) -> tuple[Path, Path]:
    """Two qcow2 images of different content."""
    for name in ("one", "two"):
        raw = tmp_path / f"{name}.img"
        raw.write_bytes(guest.read_bytes().ljust(100_000, name[0].encode()))
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, tmp_path / f"{name}.qcow2")
    return tmp_path / "one.qcow2", tmp_path / "two.qcow2"


def test_lost_swapped_and_stale_sidecars(cli, vendor: Path, clock: Path, entropy: Path, disks) -> None:
    one, two = disks
    sidecar, other = one.with_name("one.qcow2.vmgraft"), two.with_name("two.qcow2.vmgraft")
    attach = ("--key", vendor / "acme.key", "--placement", "sidecar")
    cli("attach", one, clock, *attach)
    early = sidecar.read_bytes()
    cli("attach", one, entropy, "--key", vendor / "acme.key", "--add")
    cli("attach", two, clock, *attach)
    own = sidecar.read_bytes()
    seen = set()
    for data, state in ((None, "locator-without-record"), (other.read_bytes(), "sidecar-of-another-image"),
                        (early, "sidecar-stale"), (own[:-1], "record-cut")):  # fmt: skip
        sidecar.unlink(missing_ok=True)
        if data is not None:
            sidecar.write_bytes(data)
        listed = cli.json("list", one)
        assert listed["state"] == state and listed["recordFile"] == sidecar.name
        error = cli.json("recover", one, code=5)["error"]
        assert error["hint"]
        seen.add(error["message"])
        assert sidecar.exists() == (data is not None)
    assert len(seen) == 4
    assert f"graft: {state}" in cli("inspect", one)
    assert listed["detail"] in cli("verify", one, "--policy", vendor / "policy.json", code=5)
    sidecar.write_bytes(own)
    assert cli.json("recover", one)["found"] == []
    cli("verify", one, "--policy", vendor / "policy.json")


def test_a_raw_disk_with_the_sidecar_of_another(cli, vendor: Path, clock: Path, tmp_path: Path) -> None:
    """A raw image holds no locator: a sidecar of the same size is found out by its content, and that is said."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.img").write_bytes(name.encode() * 1000)
        cli("attach", tmp_path / f"{name}.img", clock, "--key", vendor / "acme.key", "--placement", "sidecar")
    shutil.copy(tmp_path / "two.img.vmgraft", tmp_path / "one.img.vmgraft")
    error = cli.json("verify", tmp_path / "one.img", "--policy", vendor / "policy.json", code=12)["error"]
    assert "one.img.vmgraft belongs to another image" in error["hint"]
    (tmp_path / "one.img").write_bytes(b"shorter")
    error = cli.json("verify", tmp_path / "one.img", "--policy", vendor / "policy.json", code=5)["error"]
    assert "shrank" in error["message"] and "one.img.vmgraft belongs to another image" in error["message"]


def test_a_damaged_trailer_comes_back(cli, vendor: Path, clock: Path, guest: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    shutil.copy(guest, disk)
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    whole = disk.read_bytes()
    disk.write_bytes(whole[:-128] + b"\0" * 128)
    cli("verify", disk, "--policy", vendor / "policy.json", code=5)
    found = cli.json("recover", disk, "--dry-run")
    assert found["found"] and not found["done"] and disk.read_bytes() != whole
    out = cli("recover", disk)
    assert "found" in out and "done" in out and "state  ok" in out
    assert disk.read_bytes() == whole
    assert "nothing is wrong: the graft is sound" in cli("recover", disk)
    cli("verify", disk, "--policy", vendor / "policy.json")


def test_an_image_without_a_graft_has_nothing_to_recover(cli, guest: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    shutil.copy(guest, disk)
    assert "nothing is wrong: there is no graft" in cli("recover", disk)
