"""Keys where vendors keep them, with the installed program: token, program, certificate, all of it in one envelope."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "signing"))

from signing_token import MODULE, PIN, make_token  # isort: skip  # a helper of another folder


@pytest.fixture
def disk(tmp_path: Path, guest: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(guest.read_bytes().ljust(70_000, b"\x5a"))
    return path


@pytest.fixture
def token(tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a P-256 key in a token of SoftHSM; its public half lies in token.pub."""
    monkeypatch.setenv("SOFTHSM2_CONF", os.environ.get("SOFTHSM2_CONF", ""))  # back to this afterwards
    (tmp_path / "softhsm").mkdir()
    made = make_token(tmp_path / "softhsm", "release")
    cli("keygen", tmp_path / "token", "--no-passphrase")
    made.put("acme", "a1", (tmp_path / "token.key").read_bytes())
    (tmp_path / "token.key").unlink()
    (tmp_path / "pin").write_text(PIN)
    cli.env = {**os.environ, "NO_COLOR": "1"}
    return f"pkcs11:token=release;object=acme?module-path={MODULE}&pin-source=file:{tmp_path}/pin"


@pytest.fixture
def program(tmp_path: Path, cli) -> str:
    """The URI of a program that signs with openssl; its public half lies in helper.pub."""
    cli("keygen", tmp_path / "helper", "--no-passphrase", "--type", "rsa3072")
    script = tmp_path / "helper.sh"
    script.write_text(f"#!/bin/sh\nexec openssl dgst -sha256 -sign '{tmp_path}/helper.key'\n")
    script.chmod(0o755)
    return f"exec:{script}?public-key={tmp_path}/helper.pub"


def test_all_homes_in_one_envelope(cli, tmp_path: Path, disk: Path, clock: Path, token: str, program: str) -> None:
    cli("dev-ca", "ca")
    cli("keygen", "pq", "--no-passphrase", "--type", "mldsa65")
    keys = [token, program, "pq.key", "ca/release.key"]
    options = [item for key in keys for item in ("--key", key)]
    done = cli.json("attach", disk, clock, *options, "--certificate", "ca/release.pem")
    shown = [cli.json("key", "show", key)["keys"][0]["keyid"] for key in keys]
    assert done["keyids"] == shown
    for trust in (["--trust", tmp_path / "token.pub"], ["--trust", tmp_path / "helper.pub"], ["--trust", "pq.pub"]):
        policy = tmp_path / f"{Path(trust[1]).name}.json"
        cli("policy", "init", *trust, "--grant-all-declared", clock, "-o", policy)
        report = cli.json("verify", disk, "--policy", policy)
        assert len(report["signers"]) == 1 and report["signers"][0] in shown
    cli(
        "policy", "init", "--ca", "dev=ca/root.pem", "--crl", "dev=ca/crls.pem",
        "--identity", "x509.san: email:release@development.invalid", "--grant-all-declared", clock, "-o", "ca.json",
    )  # fmt: skip
    assert cli.json("verify", disk, "--policy", "ca.json")["ok"]
    publics = [item for name in ("token.pub", "helper.pub") for item in ("--key", tmp_path / name)]
    cli("export", disk, "--format", "openssl", *publics, "-o", "out")
    checked = subprocess.run(["sh", tmp_path / "out" / "verify.sh"], capture_output=True, text=True, check=False)
    assert checked.stdout.count("verified") >= 2, checked.stdout + checked.stderr


def test_edits_take_the_same_keys(cli, disk: Path, clock: Path, entropy: Path, token: str, program: str) -> None:
    cli("attach", disk, clock, "--key", token)
    done = cli.json("attach", disk, entropy, "--add", "--key", token, "--key", program)
    assert len(done["keyids"]) == 2
    done = cli.json("detach", disk, "org.vmgraft.clock", "--key", program)
    assert done["keyids"] == [cli.json("key", "show", program)["keys"][0]["keyid"]]
    assert len(done["droppedSigners"]) == 1


def test_what_cannot_sign_leaves_the_image_alone(cli, tmp_path: Path, disk: Path, clock: Path, token, program) -> None:
    before = disk.read_bytes()
    (tmp_path / "pin").write_text("0000")
    error = cli.json("attach", disk, clock, "--key", token, code=2)["error"]
    assert "PIN" in error["message"] and "0000" not in json.dumps(error)
    (tmp_path / "helper.sh").write_text("#!/bin/sh\ncat >/dev/null\necho 'the card was pulled' >&2\nexit 7\n")
    error = cli.json("attach", disk, clock, "--key", program, code=3)["error"]
    assert "ended with 7" in error["message"] and "the card was pulled" in error["hint"]
    (tmp_path / "helper.sh").write_text("#!/bin/sh\ncat >/dev/null\nhead -c 384 /dev/zero\n")
    error = cli.json("attach", disk, clock, "--key", program, code=10)["error"]
    assert "does not verify" in error["message"]
    cli("dev-ca", "ca")
    error = cli.json("attach", disk, clock, "--key", program, "--certificate", "ca/release.pem", code=2)["error"]
    assert "no such key signs" in error["message"]
    assert disk.read_bytes() == before and [path.name for path in tmp_path.glob("disk*")] == ["disk.img"]


def test_warnings_do_not_disturb_the_json(cli, disk: Path, clock: Path, token: str) -> None:
    loud = token.split("&", maxsplit=1)[0] + f"&pin-value={PIN}"
    assert cli.json("attach", disk, clock, "--key", loud)["ok"]
    assert "warning:" in cli.stderr and "pin-source" in cli.stderr and PIN not in cli.stderr
