"""Move, with the installed program: the same disk in another container, the same signature."""

import shutil
from pathlib import Path


def test_from_raw_to_qcow2_and_back(cli, vendor: Path, clock: Path, guest: Path, tmp_path: Path, tool, sha256) -> None:
    raw, qcow2 = tmp_path / "disk.img", tmp_path / "disk.qcow2"
    shutil.copy(guest, raw)
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
    before = {path: sha256(path) for path in (raw, qcow2)}
    cli("attach", raw, clock, "--key", vendor / "acme.key")
    envelope = cli("extract", raw, "envelope")
    assert "moved" in cli("move", raw, qcow2)
    assert sha256(raw) == before[raw]
    assert cli("extract", qcow2, "envelope") == envelope
    cli("verify", qcow2, "--policy", vendor / "policy.json")
    done = cli.json("move", qcow2, raw, "--copy", "--placement", "sidecar", "--dst-format", "raw")
    assert done["placement"] == "sidecar" and done["copied"] is True
    cli("verify", raw, "--policy", vendor / "policy.json", "--image-format", "raw")
    assert cli.json("list", raw)["recordFile"] == "disk.img.vmgraft"
    for path in (raw, qcow2):
        cli("detach", path)
        assert sha256(path) == before[path]


def test_refusals(cli, vendor: Path, clock: Path, guest: Path, tmp_path: Path, sha256) -> None:
    one, other = tmp_path / "one.img", tmp_path / "other.img"
    shutil.copy(guest, one)
    other.write_bytes(guest.read_bytes()[:-1] + b"!")
    before = sha256(other)
    cli("move", one, other, code=4)
    cli("attach", one, clock, "--key", vendor / "acme.key")
    error = cli.json("move", one, other, code=12)["error"]
    assert error["code"] == "content-mismatch" and "lies within bytes 0 to 511" in error["message"]
    assert sha256(other) == before
    cli("verify", one, "--policy", vendor / "policy.json")
