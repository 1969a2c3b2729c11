"""Many extensions, with the installed program: added, replaced, removed, and the original back at the end."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

GRUB = Path("/usr/lib/grub-rescue/grub-rescue-cdrom.iso")
IDS = {"clock": "org.vmgraft.clock", "entropy": "org.vmgraft.entropy"}


@pytest.fixture(params=["disk.img", "disk.qcow2", "disc.iso"])
def image(request, tmp_path: Path, guest: Path, tool) -> Path:
    path: Path = tmp_path / request.param
    if path.suffix == ".iso":
        shutil.copy(GRUB, path)
    elif path.suffix == ".qcow2":
        tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", guest, path)
    else:
        path.write_bytes(guest.read_bytes().ljust(70_000, b"\x5a"))
    return path


def newer(folder: Path, target: Path, security: int) -> Path:
    """Copy an extension folder with another version."""
    shutil.copytree(folder, target)
    manifest = target / "manifest.toml"
    text = re.sub(r"(?m)^version = .*$", f'version = "2.{security}.0"', manifest.read_text())
    manifest.write_text(re.sub(r"(?m)^securityVersion = .*$", f"securityVersion = {security}", text))
    return target


def listed(cli, image: Path) -> list[tuple[str, str]]:
    document = cli.json("list", image)
    return [(item["id"], item["version"]) for item in document["unverified"]["extensions"]]


def test_add_replace_remove(cli, vendor: Path, image: Path, clock: Path, entropy: Path, sha256, tmp_path: Path) -> None:
    clean = sha256(image)
    key, policy = vendor / "acme.key", vendor / "policy.json"
    cli("attach", image, entropy, "--key", key)
    done = cli.json("attach", image, clock, "--key", key, "--add")
    assert [item["id"] for item in done["extensions"]] == [IDS["entropy"], IDS["clock"]]
    assert done["droppedSigners"] == [] and done["placement"] == "inline"
    assert [[item["id"] for item in done[part]] for part in ("removed", "replaced", "added", "kept")] == [
        [], [], [IDS["clock"]], [IDS["entropy"]],
    ]  # fmt: skip
    second = newer(entropy, tmp_path / "second", 9)
    out = cli("attach", image, second, "--key", key, "--replace")
    assert "replaced  org.vmgraft.entropy 1.0.0 with 2.9.0\nkept      org.vmgraft.clock 1.0.0\nin  " in out
    assert listed(cli, image)[0] == (IDS["entropy"], "2.9.0") and listed(cli, image)[1][0] == IDS["clock"]
    error = cli.json("attach", image, entropy, "--key", key, "--replace", code=16)["error"]
    assert error["code"] == "rollback" and "--allow-downgrade" in error["hint"]
    done = cli.json("attach", image, entropy, "--key", key, "--replace", "--allow-downgrade")
    assert done["replaced"] == [{"id": IDS["entropy"], "version": "1.0.0", "previousVersion": "2.9.0"}]
    out = cli("detach", image, IDS["clock"], "--key", key)
    assert out.startswith("removed   org.vmgraft.clock 1.0.0\nkept      org.vmgraft.entropy 1.0.0\nin  ")
    assert [name for name, _ in listed(cli, image)] == [IDS["entropy"]]
    cli("verify", image, "--policy", policy)
    cli("detach", image, IDS["entropy"])
    assert sha256(image) == clean
    assert not list(tmp_path.glob(f"{image.name}.*"))


def test_another_vendor_takes_over(cli, vendor: Path, clock: Path, entropy: Path, guest: Path, tmp_path: Path) -> None:
    disk, out = tmp_path / "disk.img", tmp_path / "out.img"
    shutil.copy(guest, disk)
    cli("keygen", tmp_path / "second", "--no-passphrase")
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    error = cli.json("attach", disk, entropy, "--key", tmp_path / "second.key", "--add", code=11)["error"]
    assert error["code"] == "untrusted-signer" and "--trust" in error["hint"]
    text = cli("attach", disk, entropy, "--key", tmp_path / "second.key", "--add", "--trust", vendor / "acme.pub")
    assert text.count("signed ") == 1 and "gone " in text
    cli("verify", disk, "--policy", vendor / "policy.json", code=11)
    both = ("--key", vendor / "acme.key", "--key", tmp_path / "second.key")
    cli("detach", disk, IDS["entropy"], *both, "-o", out)
    cli("verify", out, "--policy", vendor / "policy.json")
    assert len(listed(cli, disk)) == 2


def test_requests_that_make_no_sense(cli, vendor: Path, clock: Path, tmp_path: Path, guest: Path) -> None:
    disk = tmp_path / "disk.img"
    shutil.copy(guest, disk)
    key = vendor / "acme.key"
    cli("attach", disk, clock, "--key", key, "--add", code=4)
    cli("attach", disk, clock, "--key", key, "--trust", vendor / "acme.pub", code=2)
    cli("attach", disk, clock, "--key", key)
    error = cli.json("attach", disk, clock, "--key", key, code=2)["error"]
    assert "--add and --replace" in error["hint"]
    error = cli.json("detach", disk, "com.example.other", code=2)["error"]
    assert "one statement covers all" in error["message"] and "--key" in error["hint"]
    cli("detach", disk, "com.example.nothing", "--key", key, code=2)
    cli("detach", disk, "--expires", "2030-01-01", code=2)
    assert "name the ids" in cli.json("detach", disk, "--key", key, code=2)["error"]["hint"]
    cli("detach", disk)
    assert disk.read_bytes() == guest.read_bytes()


def test_a_kill_before_any_change(cli, vendor: Path, clock: Path, entropy: Path, tmp_path: Path, guest, tool) -> None:
    """strace kills the program right before a change to the disk: list sees before or after, never neither."""
    disk, key = tmp_path / "disk.qcow2", vendor / "acme.key"
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", guest, disk)
    cli("attach", disk, clock, "--key", key, "--placement", "sidecar")
    start = {path: path.read_bytes() for path in tmp_path.glob("disk.qcow2*")}
    command = [Path(sys.executable).with_name("vmgraft"), "attach", disk, entropy, "--key", key, "--add"]
    seen = set()
    for call, number in (("pwrite64", 1), ("unlink", 1), ("pwrite64", 9), ("unlink", 2)):
        for path in tmp_path.glob("disk.qcow2*"):
            path.unlink()
        for path, data in start.items():
            path.write_bytes(data)
        inject = f"inject={call}:signal=KILL:when={number}"
        strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject, *command]
        done = subprocess.run([str(part) for part in strace], check=False, capture_output=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, (call, number, done.stderr)
        ids = [name for name, _ in listed(cli, disk)]
        assert ids in ([IDS["clock"]], [IDS["clock"], IDS["entropy"]])
        seen.add(len(ids))
    assert seen == {1, 2}
    cli("verify", disk, "--policy", vendor / "policy.json")
    cli("recover", disk)
    cli("detach", disk)
    assert sorted(path.name for path in tmp_path.glob("disk.qcow2*")) == ["disk.qcow2"]
