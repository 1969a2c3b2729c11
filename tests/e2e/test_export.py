"""Signatures leave in forms that programs nobody here wrote can check."""

import json
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def grafted(cli, vendor: Path, clock: Path, tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"some disk" * 1000)
    cli("keygen", tmp_path / "second", "--type", "ed25519", "--no-passphrase")
    cli("attach", path, clock, "--key", vendor / "acme.key", "--key", tmp_path / "second.key")
    return path


def test_openssl_alone_verifies(cli, grafted: Path, tmp_path: Path) -> None:
    out = tmp_path / "check"
    keys = ("--key", tmp_path / "acme.pub", "--key", tmp_path / "second.pub")
    cli("export", grafted, "--format", "openssl", *keys, "-o", out)
    script = (out / "verify.sh").read_text()
    assert "openssl" in script
    assert "vmgraft " not in script.replace("vmgraft export", "")
    done = subprocess.run(["sh", "verify.sh"], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pae = next(path for path in out.iterdir() if path.read_bytes().startswith(b"DSSEv1 "))
    pae.write_bytes(pae.read_bytes()[:-1] + b" ")
    assert subprocess.run(["sh", "verify.sh"], cwd=out, capture_output=True, check=False).returncode != 0


def test_one_bundle_a_signature(cli, grafted: Path, tmp_path: Path) -> None:
    cli("export", grafted, "--format", "bundle", "-o", tmp_path / "bundles")
    bundles = sorted((tmp_path / "bundles").glob("*.sigstore.json"))
    assert len(bundles) == 2
    for path in bundles:
        assert len(json.loads(path.read_text())["dsseEnvelope"]["signatures"]) == 1


def test_nothing_is_overwritten(cli, grafted: Path, tmp_path: Path) -> None:
    cli("export", grafted, "--format", "bundle", "-o", tmp_path / "bundles")
    cli("export", grafted, "--format", "bundle", "-o", tmp_path / "bundles", code=3)
