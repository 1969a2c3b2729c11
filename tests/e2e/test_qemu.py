"""``vmgraft run --engine qemu`` as a user runs it, with the host's own confinement in force."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MANIFEST = """id = "org.example.answer"
version = "1.0"
securityVersion = 1
abi = "vmgraft/1"
module = "module.wasm"
capabilities = ["hypercall:16-16", "log"]
"""


def children(parent: int) -> list[int]:
    """Return the PIDs of a process's children."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(rest[1]) == parent:
            found.append(int(entry.parent.name))
    return found


@pytest.fixture
def image(cli, tmp_path: Path, guest: Path) -> Path:
    """An image that boots the small guest, with an extension that answers hypercalls."""
    import wasmtime

    text = '(module (memory (export "memory") 1 1) (func (export "vmgraft_abi_1")))'
    folder = tmp_path / "answer"
    folder.mkdir()
    (folder / "manifest.toml").write_text(MANIFEST)
    (folder / "module.wasm").write_bytes(bytes(wasmtime.wat2wasm(text)))
    disk = tmp_path / "disk.img"
    disk.write_bytes(guest.read_bytes().ljust(1 << 20, b"\0"))
    cli("keygen", "acme", "--no-passphrase")
    cli("policy", "init", "--trust", "acme.pub", "--grant-all-declared", folder, "-o", "policy.json")
    cli("attach", disk, folder, "--key", "acme.key")
    return disk


def test_the_report_has_the_same_shape_as_the_cores(cli, image: Path) -> None:
    before = image.read_bytes()
    common = ("run", image, "--policy", "policy.json", "--until", "vmgraft guest", "--timeout", "60", "--cpu", "soft")
    qemu = cli.json(*common, "--engine", "qemu", "--audit-log", "qemu.jsonl")
    core = cli.json(*common, "--engine", "core")
    assert qemu.keys() == core.keys()
    assert qemu["end"].keys() == core["end"].keys()
    assert qemu["end"]["engine"] == "qemu-tcg"
    assert "vmgraft guest" in qemu["end"]["serial"] + "\n".join(qemu["end"]["screen"])
    assert qemu["plan"]["engine"] == "qemu"
    assert "seccomp" in qemu["confinement"]
    assert qemu["layer"][0]["state"] == "running"
    cli("check-log", "qemu.jsonl", "--head", qemu["auditHead"])
    assert image.read_bytes() == before


def test_what_the_guest_says_goes_to_stdout(cli, image: Path) -> None:
    out = cli("run", image, "--policy", "policy.json", "--engine", "qemu", "--cpu", "soft", "--timeout", "60")
    assert "vmgraft guest" in out
    assert "on qemu-tcg" in cli.stderr


def test_a_dry_run_shows_the_plan_and_refuses_what_cannot_be(cli, image: Path, clock: Path) -> None:
    plan = json.loads(cli("run", image, "--policy", "policy.json", "--engine", "qemu", "--dry-run"))
    assert plan["engine"] == "qemu"
    cli("run", image, "--policy", "policy.json", "--engine", "qemu", "--dry-run", "--keys", "x", code=2)
    cli("detach", image)
    cli("attach", image, clock, "--key", "acme.key")
    cli("policy", "init", "--trust", "acme.pub", "--grant-all-declared", clock, "-o", "clock.json")
    cli("run", image, "--policy", "clock.json", "--engine", "qemu", "--dry-run", code=17)
    assert "which the engine qemu cannot give" in cli.stderr


def test_sigterm_ends_qemu_too(cli, image: Path) -> None:
    program = Path(sys.executable).with_name("vmgraft")
    image.write_bytes(bytes.fromhex("fbf4ebfc").ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))  # sti; hlt; again
    cli("attach", image, "answer", "--key", "acme.key")
    with subprocess.Popen(
        [str(program), "run", str(image), "--policy", "policy.json", "--engine", "qemu", "--cpu", "soft",
         "--audit-log", "log.jsonl"],
        cwd=cli.cwd, env=cli.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        log, deadline = cli.cwd / "log.jsonl", time.monotonic() + 30
        while not (log.exists() and '"event": "boot"' in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # From this record on a signal is an orderly end.
        watches = [os.pidfd_open(pid) for pid in children(running.pid)]
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=30)
    assert running.returncode == 130, said
    assert len(watches) >= 2  # the zygote and QEMU
    for watch in watches:
        with pytest.raises(ProcessLookupError):
            signal.pidfd_send_signal(watch, 0)
        os.close(watch)
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "end"
