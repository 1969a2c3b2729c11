"""What ``key show`` says, against what ssh-keygen and openssl say."""

from __future__ import annotations

import subprocess
from datetime import timedelta

import pytest

from vmgraft.errors import FileError, UsageError
from vmgraft.signing.keyfiles import PASSPHRASE_VARIABLE, PassphraseSource, write_keypair
from vmgraft.signing.keyinfo import describe_key
from vmgraft.signing.keys import generate

from signing_ca import NOW, issue  # isort: skip


@pytest.fixture(autouse=True)
def no_passphrase_outside(monkeypatch):
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)


def run(*command, data=None):
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa3072", "rsa4096", "ed25519"])
def test_ssh_keygen_and_openssl_say_the_same(tmp_path, kind):
    private, public = write_keypair(tmp_path / "k", generate(kind), None)
    line = tmp_path / "ssh.pub"
    if kind == "ed25519":  # ssh-keygen of Debian 12 reads no Ed25519 in PKCS#8
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

        key = load_pem_public_key(public.read_bytes())
        line.write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    else:
        line.write_bytes(run("ssh-keygen", "-i", "-m", "PKCS8", "-f", public))
    bits, fingerprint = run("ssh-keygen", "-lf", line).decode().split()[:2]
    spki = run("openssl", "dgst", "-sha256", data=run("openssl", "pkey", "-pubin", "-in", public, "-outform", "DER"))
    for path, what in ((public, "public key"), (private, "private key")):
        (info,) = describe_key(path)
        shown = info.to_dict()
        assert (shown["what"], shown["bits"], shown["keyid"]) == (what, int(bits), fingerprint)
        assert shown["spkiSha256"] == spki.decode().split()[-1]
        assert shown["kind"] == kind.rstrip("0123456789") if kind.startswith("rsa") else kind
        assert any("P-384" in note for note in info.warnings) is (kind == "p384")


def test_mldsa_is_shown_too(tmp_path):
    _, public = write_keypair(tmp_path / "k", generate("mldsa65"), None)
    (info,) = describe_key(public)
    assert info.public.kind == "mldsa65" and info.public.bits == 1952 * 8  # FIPS 204, table 2


def test_private_keys(tmp_path):
    key = generate("ed25519")
    sealed, _ = write_keypair(tmp_path / "sealed", key, b"secret")
    asked = []
    (info,) = describe_key(sealed, PassphraseSource(prompt=lambda text: asked.append(text) or "secret"))
    assert info.encrypted is True and info.warnings == () and len(asked) == 1
    with pytest.raises(UsageError, match="no passphrase"):
        describe_key(sealed)
    plain, _ = write_keypair(tmp_path / "plain", key, None)
    (info,) = describe_key(plain, PassphraseSource(prompt=lambda _: pytest.fail("asked")))
    assert info.encrypted is False and ["not encrypted" in note for note in info.warnings] == [True]
    secret = run("openssl", "pkey", "-in", plain, "-outform", "DER")[-32:]
    for text in (repr(info), str(info.to_dict())):
        assert "PRIVATE" not in text and secret.hex() not in text and str(secret) not in text
    plain.chmod(0o640)
    assert "chmod 600" in describe_key(plain)[0].warnings[0]


def test_few_rounds_are_worth_a_warning(tmp_path):
    plain, _ = write_keypair(tmp_path / "k", generate(), None)
    weak = tmp_path / "weak.key"
    weak.write_bytes(run("openssl", "pkcs8", "-topk8", "-in", plain, "-passout", "pass:x"))
    weak.chmod(0o600)
    (info,) = describe_key(weak, PassphraseSource(prompt=lambda _: "x"))
    assert len(info.warnings) == 1 and "2048 rounds" in info.warnings[0]


def test_certificates(tmp_path):
    root = issue("Root", ca=True)
    leaf = issue("Leaf", root, days=(-10, 20))
    path = tmp_path / "chain.pem"
    path.write_bytes(leaf.pem + root.pem)
    first, second = describe_key(path, now=NOW)
    (tmp_path / "leaf.pub").write_bytes(run("openssl", "x509", "-in", path, "-pubkey", "-noout"))
    (bare,) = describe_key(tmp_path / "leaf.pub")
    assert first.public == bare.public and first.what == "certificate"
    says = first.certificate.to_dict()
    text = run("openssl", "x509", "-in", path, "-noout", "-nameopt", "RFC2253", "-subject", "-issuer", "-serial",
               "-fingerprint", "-sha256").decode()  # fmt: skip
    facts = dict(item.split("=", 1) for item in text.splitlines())
    assert (says["subject"], says["issuer"]) == (facts["subject"].strip(), facts["issuer"].strip())
    assert says["serial"].upper() == facts["serial"].lstrip("0")
    assert says["sha256"].upper() == facts["sha256 Fingerprint"].replace(":", "")
    assert (says["notBefore"], says["notAfter"]) == ("2026-11-12T15:00:00Z", "2026-12-12T15:00:00Z")
    assert says["authority"] is False and second.certificate.authority is True
    assert len(first.warnings) == 1 and "expires 2026-12-12" in first.warnings[0]
    assert second.warnings == ()
    late = describe_key(path, now=NOW + timedelta(days=21))[0].warnings
    assert "expired 2026-12-12" in late[0] and late[1].startswith("not for --certificate")


def test_certificates_that_do_not_sign_are_shown_all_the_same(tmp_path):
    from cryptography.hazmat.primitives.asymmetric import rsa

    weak = issue("Weak", key=rsa.generate_private_key(public_exponent=65537, key_size=2048))
    (tmp_path / "weak.pem").write_bytes(weak.pem)
    (info,) = describe_key(tmp_path / "weak.pem", now=NOW)
    assert info.public is None and info.to_dict()["keyid"] is None
    assert "2048 bits" in info.warnings[0]
    from vmgraft.signing.certificates import DEVELOPMENT

    mine = issue("Mine", organisation=DEVELOPMENT)
    (tmp_path / "mine.pem").write_bytes(mine.pem)
    assert any("development CA" in note for note in describe_key(tmp_path / "mine.pem", now=NOW)[0].warnings)


def test_programs(tmp_path):
    key = generate()
    _, public = write_keypair(tmp_path / "k", key, None)
    (info,) = describe_key(f"exec:/bin/cat?public-key={public}")
    assert (info.source, info.what, info.public) == ("exec:/bin/cat", "exec", key.public)


def test_what_is_none_of_these(tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "cut.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    for path in (tmp_path / "text", tmp_path / "cut.pem", tmp_path, tmp_path / "missing", "/dev/zero"):
        with pytest.raises(FileError):
            describe_key(path)
