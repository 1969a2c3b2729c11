"""A vendor whose keys are elsewhere, with the installed program and openssl: from bytes to sign to a verified image."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "signing"))

from openssl_tsa import serve

from vmgraft.cli import app


def code_of(*args: str | Path) -> int:
    """The exit code of a command that is refused, without a process of its own."""
    code: int = app.cli.main([*map(str, args), "--json"], standalone_mode=False, obj=True)
    return code


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"some disk" * 8000)
    return path


@pytest.fixture
def hsm(tool, tmp_path: Path) -> Path:
    """A key that this program never sees: openssl holds it."""
    folder = tmp_path / "hsm"
    folder.mkdir()
    tool("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", folder / "k.pem")
    tool("openssl", "pkey", "-in", folder / "k.pem", "-pubout", "-out", folder / "k.pub")
    return folder


def policy(cli, target: Path, clock: Path, *trust: str | Path) -> Path:
    cli("policy", "init", *trust, "--grant-all-declared", clock, "-o", target)
    return target


def test_two_parts(cli, tool, disk: Path, hsm: Path, clock: Path, sha256, tmp_path: Path) -> None:
    clean = sha256(disk)
    made = cli.json("payload", disk, clock, "--expires", "2096-01-01", "-o", tmp_path / "out")
    pae = tmp_path / "out" / "payload.pae"
    assert made["payloadSha256"] == sha256(pae) and sha256(disk) == clean
    tool("openssl", "dgst", "-sha256", "-sign", hsm / "k.pem", "-out", tmp_path / "sig", pae)
    given = ("--payload", tmp_path / "out", "--signature", tmp_path / "sig", "--public-key")
    tool("openssl", "genpkey", "-algorithm", "ED25519", "-out", hsm / "x.pem")
    tool("openssl", "pkey", "-in", hsm / "x.pem", "-pubout", "-out", hsm / "x.pub")
    assert code_of("attach-signature", disk, clock, *given, hsm / "x.pub") == 10 and sha256(disk) == clean
    done = cli.json("attach-signature", disk, clock, *given, hsm / "k.pub")
    assert done["statementSha256"] == made["statementSha256"] and len(done["added"]) == 1
    verdict = cli.json("verify", disk, "--policy", policy(cli, tmp_path / "p.json", clock, "--trust", hsm / "k.pub"))
    assert verdict["signers"] == done["added"]
    cli("detach", disk)
    assert sha256(disk) == clean


def test_two_of_two_sign_one_after_the_other(cli, tool, vendor: Path, disk: Path, hsm: Path, clock: Path) -> None:
    """The vendor attaches, the auditor signs elsewhere what is there, a third appends; the policy wants all three."""
    tmp_path = vendor
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    cli("keygen", tmp_path / "third", "--type", "ed25519", "--no-passphrase")
    trust = ("--trust", vendor / "acme.pub")
    wanted = policy(
        cli, tmp_path / "all.json", clock, *trust, "--trust", hsm / "k.pub", "--trust", tmp_path / "third.pub",
        "--minimum", "3",
    )  # fmt: skip
    assert code_of("payload", disk, "-o", tmp_path / "out") == 2
    cli("payload", disk, *trust, "-o", tmp_path / "out")
    tool("openssl", "dgst", "-sha256", "-sign", hsm / "k.pem", "-out", tmp_path / "sig", tmp_path / "out/payload.pae")
    given = ("--payload", tmp_path / "out", "--signature", tmp_path / "sig", "--public-key", hsm / "k.pub")
    cli("attach-signature", disk, *given)
    cli("verify", disk, "--policy", wanted, code=11)
    assert code_of("sign", disk, "--key", tmp_path / "third.key", *trust) == 2
    out = cli("sign", disk, "--append", "--key", tmp_path / "third.key", *trust)
    assert "now with 3 signatures" in out
    assert len(cli.json("verify", disk, "--policy", wanted)["signers"]) == 3


def test_resign(cli, vendor: Path, disk: Path, clock: Path) -> None:
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    cli("keygen", vendor / "new", "--no-passphrase")
    assert code_of("resign", disk, "--key", vendor / "new.key") == 11
    done = cli.json(
        "resign", disk, "--key", vendor / "new.key", "--trust", vendor / "acme.pub", "--expires", "2096-01-01"
    )
    assert done["expires"] == "2096-01-01T00:00:00Z" and done["acceptedExpired"] is None
    assert len(done["droppedSigners"]) == 1
    cli("verify", disk, "--policy", vendor / "policy.json", code=11)


def test_certificates_timestamps_and_exports(cli, tool, disk: Path, clock: Path, tmp_path: Path) -> None:
    """A certified key elsewhere, a timestamp through files and over HTTP; openssl, without us, says the same."""
    ca = tmp_path / "ca"
    subject = cli.json("dev-ca", ca)["subject"]
    cli("payload", disk, clock, "-o", tmp_path / "out")
    tool(
        "openssl", "dgst", "-sha256", "-sign", ca / "release.key", "-out", tmp_path / "s", tmp_path / "out/payload.pae"
    )
    cli(
        "attach-signature", disk, clock, "--payload", tmp_path / "out", "--signature", tmp_path / "s",
        "--public-key", ca / "release.pub", "--certificate", ca / "release.pem",
    )  # fmt: skip
    trust = ("--ca", f"dev={ca / 'root.pem'}", "--identity", f"x509.subject: {subject}", "--tsa", ca / "root.pem")
    wanted = policy(cli, tmp_path / "p.json", clock, *trust)

    def reply(query: bytes) -> bytes:
        (ca / "q").write_bytes(query)
        command = ["openssl", "ts", "-reply", "-config", "tsa.cnf", "-queryfile", "q", "-out", "r"]
        subprocess.run(command, cwd=ca, check=True, capture_output=True)
        return (ca / "r").read_bytes()

    cli("timestamp", disk, "--request", tmp_path / "q.tsq")
    (tmp_path / "r.tsr").write_bytes(reply((tmp_path / "q.tsq").read_bytes()))
    files = ("--request", tmp_path / "q.tsq", "--response", tmp_path / "r.tsr", "--tsa-ca", ca / "root.pem")
    (stamp,) = cli.json("timestamp", disk, *files)["timestamps"]
    with serve(lambda _headers, body: (200, {"Content-Type": "application/timestamp-reply"}, reply(body))) as url:
        cli("timestamp", disk, "--tsa", url, "--signer", stamp["keyid"])
    assert code_of("timestamp", disk) == 2
    cli("verify", disk, "--policy", wanted)
    cli("export", disk, "--format", "openssl", "-o", tmp_path / "check")
    assert len(list((tmp_path / "check").glob("timestamp-1-*.tsr"))) == 2
    roots = ("--ca", ca / "root.pem", "--tsa-ca", ca / "root.pem")
    assert "verified with chain-1.pem" in tool("sh", tmp_path / "check" / "verify.sh", *roots)
    cli("export", disk, "--format", "bundle", "-o", tmp_path / "bundles")
    bundle = json.loads((tmp_path / "bundles" / "signature-1.sigstore.json").read_bytes())["verificationMaterial"]
    assert bundle["certificate"] and len(bundle["timestampVerificationData"]["rfc3161Timestamps"]) == 2
    assert code_of("export", disk, "--format", "openssl", "--bare", "-o", tmp_path / "no") == 2


def test_import_of_what_was_signed_over_a_copy(cli, disk: Path, vendor: Path, clock: Path) -> None:
    """Two vendors sign the same statement on two machines; the bundle of one goes into the image of the other."""
    tmp_path, there = vendor, vendor / "there.img"
    cli("attach", disk, clock, "--key", vendor / "acme.key")
    ca = tmp_path / "ca"
    cli("dev-ca", ca)
    key = ("--key", ca / "release.key", "--certificate", ca / "release.pem")
    cli("sign", disk, "--append", *key, "--trust", vendor / "acme.pub", "-o", there)
    cli("export", there, "--format", "bundle", "-o", tmp_path / "bundles")
    source = tmp_path / "bundles" / "signature-2.sigstore.json"
    assert code_of("import", disk, source) == 2
    assert code_of("import", disk, source, "--public-key", vendor / "acme.pub") == 11
    assert code_of("import", disk, source, "--ca", ca / "root.pem") == 11  # a bundle v0.3 holds the leaf alone
    between = ("--intermediates", tmp_path / "bundles" / "signature-2.intermediates.pem")
    done = cli.json("import", disk, source, "--ca", ca / "root.pem", *between)
    assert len(done["added"]) == 1 and len(done["signatures"]) == 2
    assert code_of("import", disk, source, "--ca", ca / "root.pem", *between) == 2
    assert json.loads(cli("extract", disk, "envelope")) == json.loads(cli("extract", there, "envelope"))
    cli("resign", disk, "--key", vendor / "acme.key")
    assert cli.json("import", disk, source, "--ca", ca / "root.pem", *between, code=13)["error"]["hint"]
