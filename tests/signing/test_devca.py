"""The development CA: good for openssl, good for us, and marked as what it is."""

from __future__ import annotations

import json
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from vmgraft.errors import FileError, UsageError
from vmgraft.signing.certificates import Authority, certify
from vmgraft.signing.devca import MAILBOX, MAX_DAYS, make_development_ca
from vmgraft.signing.identities import parse_identity
from vmgraft.signing.keyfiles import load_private
from vmgraft.signing.timestamps import TimestampAuthority, accept_response, examine_timestamp, make_request


def ders(path: Path) -> list[bytes]:
    return [one.public_bytes(Encoding.DER) for one in x509.load_pem_x509_certificates(path.read_bytes())]


def openssl(folder: Path, *args: str) -> str:
    done = subprocess.run(["openssl", *args], cwd=folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["p256", "ed25519", "rsa3072", "mldsa65"])
def test_chain(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "ca"
    made = make_development_ca(folder, kind=kind)
    key = load_private(folder / "release.key")
    now = datetime.now(UTC)
    authority = Authority("dev", tuple(ders(folder / "root.pem")), _crls(folder), True)
    found = certify(ders(folder / "release.pem"), [authority], at=now, now=now)
    assert found.key == key.public and made.keyid == key.keyid
    assert found.expired is None and found.revoked is None
    assert [note for note in found.warnings if "anybody may hold its keys" in note] == list(found.warnings)
    for text in (f"x509.subject: {made.subject}", f"x509.san: email:{MAILBOX}"):
        assert parse_identity(text, field="x").matches(found.subject, found.sans)
    if kind != "mldsa65":  # OpenSSL 3.0 does not know it
        openssl(
            folder, "verify", "-x509_strict", "-CAfile", "root.pem", "-untrusted", "intermediate.pem", "-CRLfile",
            "crls.pem", "-crl_check_all", "release.pem",
        )  # fmt: skip


def _crls(folder: Path) -> tuple[bytes, ...]:
    end = b"-----END X509 CRL-----\n"
    blocks = [block + end for block in (folder / "crls.pem").read_bytes().split(end) if block]
    return tuple(x509.load_pem_x509_crl(block).public_bytes(Encoding.DER) for block in blocks)


def test_its_timestamp_authority(tmp_path: Path) -> None:
    folder = tmp_path / "ca"
    make_development_ca(folder)
    request = make_request(b"signature")
    (folder / "q").write_bytes(request)
    openssl(folder, "ts", "-reply", "-config", "tsa.cnf", "-queryfile", "q", "-out", "r")
    stored, _ = accept_response((folder / "r").read_bytes(), request, b"signature")
    found = examine_timestamp(stored, b"signature", [TimestampAuthority("dev", tuple(ders(folder / "root.pem")))])
    assert "anybody may hold its keys" in found.warnings[0]
    openssl(folder, "ts", "-verify", "-queryfile", "q", "-in", "r", "-CAfile", "root.pem")


def test_everything_says_what_it_is(tmp_path: Path) -> None:
    made = make_development_ca(tmp_path / "ca", days=10)
    for path in made.files:
        if path.suffix == ".key":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        if path.suffix == ".pem" and path.stem != "crls":
            for certificate in x509.load_pem_x509_certificates(path.read_bytes()):
                assert certificate.subject.rfc4514_string().count("DEVELOPMENT ONLY") == 2
                assert certificate.not_valid_after_utc == made.not_after
    assert sum(path.suffix == ".key" for path in made.files) == 4
    assert b"DEVELOPMENT ONLY" in (tmp_path / "ca" / "README").read_bytes()
    assert abs(made.not_after - datetime.now(UTC) - timedelta(days=10)) < timedelta(minutes=1)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"kind": "dsa"}, {"days": 0}, {"days": MAX_DAYS + 1}):
        with pytest.raises(UsageError):
            make_development_ca(tmp_path / "ca", **options)
    with pytest.raises(FileError, match="cannot be made") as caught:
        make_development_ca(tmp_path)
    assert caught.value.hint

    from vmgraft.signing import devca

    def full(path: Path, *_args: object, **_options: object) -> None:
        if path.name == "tsa.pem":
            raise FileError("no room", file=path)
        path.write_bytes(b"x")

    monkeypatch.setattr(devca, "write_new", full)
    with pytest.raises(FileError, match="no room"):
        make_development_ca(tmp_path / "ca")
    assert not (tmp_path / "ca").exists()


def test_command(tmp_path: Path) -> None:
    from vmgraft.cli.commands.devca import dev_ca

    done = CliRunner().invoke(dev_ca, [str(tmp_path / "a")])
    assert done.exit_code == 0 and done.output.startswith("DEVELOPMENT ONLY") and MAILBOX in done.output
    done = CliRunner().invoke(dev_ca, [str(tmp_path / "b"), "--json", "--type", "ed25519", "--days", "5"])
    document = json.loads(done.output)
    assert document["ok"] and document["developmentOnly"] and document["keyid"].startswith("SHA256:")
    assert all(Path(name).exists() for name in document["files"])
