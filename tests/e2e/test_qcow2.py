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


def test_digest_of_a_snapshot(cli, disk: Path, tool, sha256) -> None:
    tool("qemu-img", "snapshot", "-c", "first", disk)
    tool("qemu-io", "-c", "write -P 0x41 3M 100k", disk)
    raw = disk.with_name("snapshot.raw")
    tool("qemu-img", "convert", "-l", "snapshot.name=first", "-O", "raw", disk, raw)
    then, now = cli.json("digest", disk, "--snapshot", "first"), cli.json("digest", disk)
    assert (then["sha256"], then["snapshot"], then["content"]) == (sha256(raw), "first", "guest")
    assert now["sha256"] != then["sha256"] and now["snapshot"] is None
    assert then["tree"] == cli.json("digest", raw)["tree"]
    assert "snapshot     1\n" in cli("digest", disk, "--snapshot", "1")
    document = cli.json("digest", disk, "--snapshot", "second", code=2)
    assert document["error"]["code"] == "usage"
    assert "'first' (id 1)" in document["error"]["hint"]
    cli("digest", raw, "--snapshot", "first", code=2)
    container = cli.json("inspect", disk)["unverified"]["container"]
    assert [row["name"] for row in container["snapshots"]] == ["first"]


def test_digest_of_ciphertext(cli, disk: Path, sha256) -> None:
    """An image that says it is encrypted: what is stored is digested only when it is asked for, and named so."""
    plain = cli.json("digest", disk)
    cli("digest", disk, "--ciphertext", code=2)
    with disk.open("r+b") as file:
        file.seek(32)
        file.write(b"\0\0\0\2")  # crypt_method: LUKS
    refused = cli.json("digest", disk, code=3)
    assert "--ciphertext" in refused["error"]["hint"]
    stored = cli.json("digest", disk, "--ciphertext")
    assert (stored["content"], stored["sha256"]) == ("ciphertext", plain["sha256"])
    assert "not what the guest sees" in cli("digest", disk, "--ciphertext")
    luks = disk.with_name("x.luks")
    luks.write_bytes(b"LUKS\xba\xbe" + bytes(4090))
    cli("digest", luks, code=3)
    assert cli.json("digest", luks, "--ciphertext")["sha256"] == sha256(luks)


@pytest.mark.parametrize("bit", [1, 2], ids=["dirty", "corrupt"])
def test_damaged_images_are_listed_and_inspected_only(cli, vendor: Path, disk: Path, clock: Path, bit: int) -> None:
    clean = Path(shutil.copy(disk, disk.with_name("clean.qcow2")))
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    for path in (disk, clean):
        with path.open("r+b") as file:
            file.seek(79)
            file.write(bytes([bit]))
    before = clean.read_bytes()
    assert cli.json("list", disk)["state"] == "ok"
    assert cli.json("inspect", disk)["unverified"]["container"]["features"]["incompatible"]
    for arguments in (("digest", disk), ("attach", clean, clock, "--key", vendor / "acme.key")):
        assert "qemu-img check" in cli.json(*arguments, code=3)["error"]["hint"]
    cli("verify", disk, "--policy", vendor / "policy.json", code=3)
    assert clean.read_bytes() == before


def test_a_missing_backing_file_is_said_not_fatal(cli, disk: Path, tool) -> None:
    overlay = disk.with_name("overlay.qcow2")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk.name, "-F", "qcow2", overlay)
    assert cli.json("inspect", overlay)["unverified"]["backingChain"] == [str(disk)]
    disk.rename(disk.with_name("away.qcow2"))
    claims = cli.json("inspect", overlay)["unverified"]
    assert claims["backingChain"] == []
    assert "cannot be found" in claims["backingProblem"]
    assert "cannot be found" in cli("inspect", overlay)
    cli("digest", overlay, code=3)


def test_a_graft_that_another_program_dropped_is_recovered(cli, vendor: Path, disk: Path, clock: Path, tool) -> None:
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    with disk.open("r+b") as file:  # the header that other hypervisors write: 104 bytes and an end mark
        file.seek(100)
        file.write((104).to_bytes(4, "big") + bytes(8))
    tool("qemu-img", "check", disk)
    cli("verify", disk, "--policy", vendor / "policy.json", code=4)
    cli("recover", disk)
    cli("verify", disk, "--policy", vendor / "policy.json")
    tool("qemu-img", "check", disk)
    cli("detach", disk)
