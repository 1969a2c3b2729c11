"""A qcow2 made by qemu-img: grafted, changed by QEMU's tools, verified, booted, detached."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def disk(tmp_path: Path, guest: Path, tool) -> Path:
    raw, qcow2 = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    data = bytearray(8 << 20)
    boot = guest.read_bytes()
    data[: len(boot)] = boot
    data[1 << 20 : (1 << 20) + 300_000] = bytes(range(250)) * 1200
    raw.write_bytes(data)
    tool("qemu-img", "create", "-q", "-f", "qcow2", qcow2, "8M")
    tool("qemu-img", "convert", "-n", "-O", "qcow2", raw, qcow2)
    return qcow2


def test_journey(cli, vendor: Path, disk: Path, clock: Path, entropy: Path, tool, sha256) -> None:
    before, plain = sha256(disk), Path(shutil.copy(disk, disk.with_name("plain.qcow2")))
    cli("attach", disk, clock, entropy, "--key", vendor / "acme.key")
    tool("qemu-img", "check", disk)
    assert "Images are identical" in tool("qemu-img", "compare", plain, disk)
    cli("verify", disk, "--policy", vendor / "policy.json")
    report = cli.json("run", disk, "--policy", vendor / "policy.json", "--cpu", "soft", "--timeout", "30")
    serial = report["end"]["serial"]
    assert "extensions: 2" in serial
    assert " ok" in serial.split("clock:")[1].split("entropy:")[0]
    assert "entropy: 0x" in serial
    assert serial.rstrip().endswith("done")
    cli("detach", disk)
    assert sha256(disk) == before


OPERATIONS = {
    "amend": [("qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=on", "{}")],
    "resize": [("qemu-img", "resize", "-q", "{}", "12M")],
    "write": [("qemu-io", "-c", "write -P 0x41 3M 100k", "{}")],
    "bitmap": [("qemu-img", "bitmap", "--add", "{}", "bitmap0")],
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_graft_survives_qemu(cli, vendor: Path, disk: Path, clock: Path, tool, operation: str) -> None:
    plain = Path(shutil.copy(disk, disk.with_name("plain.qcow2")))
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    for path in (disk, plain):
        for command in OPERATIONS[operation]:
            tool(*(part.replace("{}", str(path)) for part in command))
    assert cli.json("list", disk)["state"] == "ok"
    # A resize or a write changes what the guest sees, and must be found out; the others must not.
    code = 12 if operation in ("resize", "write") else 0
    cli("verify", disk, "--policy", vendor / "policy.json", code=code)
    cli("detach", disk)
    assert disk.read_bytes() == plain.read_bytes()


def test_the_graft_survives_a_snapshot(cli, vendor: Path, disk: Path, clock: Path, tool) -> None:
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    tool("qemu-img", "snapshot", "-c", "before-update", disk)
    grafted = Path(shutil.copy(disk, disk.with_name("grafted.qcow2")))
    cli("verify", disk, "--policy", vendor / "policy.json")
    cli("detach", disk)
    tool("qemu-img", "check", disk)
    assert "before-update" in tool("qemu-img", "snapshot", "-l", disk)
    assert "Images are identical" in tool("qemu-img", "compare", grafted, disk)
