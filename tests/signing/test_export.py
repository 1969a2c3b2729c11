"""Exports are checked by the real programs: openssl through verify.sh, and sigstore-js."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import signing_ca as ca
from openssl_tsa import Tsa, tsa_leaf
from sigstore_js import install

from vmgraft.errors import BadSignatureError, UntrustedSignerError
from vmgraft.signing.dsse import Envelope, Signature, parse_envelope, serialise
from vmgraft.signing.export import BUNDLE_TYPE, export_bundle, export_openssl
from vmgraft.signing.keys import generate, private_from_pem
from vmgraft.signing.material import Material, pack_material
from vmgraft.signing.timestamps import make_request


def write(files, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files:
        assert "/" not in name
        (folder / name).write_bytes(data)
    return folder


def envelope_of(sim, *signers):
    return parse_envelope(sim.graft(signers=signers).stored[0])


def publics(sim, *names):
    return [sim.keys[name].public for name in names]


def run(folder, *arguments):
    command = ["sh", folder / "verify.sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)


# --- openssl


def test_openssl_verifies_every_algorithm(sim, tmp_path):
    names = ["vendor", "second", "rsa"]
    folder = write(export_openssl(envelope_of(sim, *names), publics(sim, *names)), tmp_path / "out put")
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("verified with") == 3


def test_openssl_verifies_p384(sim, tmp_path):
    made = subprocess.run(
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
        capture_output=True,
        check=True,
    )
    key = private_from_pem(made.stdout, None)
    envelope = envelope_of(sim, "vendor")
    envelope = Envelope(envelope.payload, (Signature(key.keyid, key.sign(envelope.pae)),))
    assert run(write(export_openssl(envelope, [key.public]), tmp_path)).returncode == 0


def test_without_our_script(sim, tmp_path):
    """The commands of docs/signing.md that a person would type."""
    text = (Path(__file__).parents[2] / "docs" / "signing.md").read_text()
    commands = re.findall(r"^openssl pkeyutl .*$", text, re.MULTILINE)
    assert len(commands) == 2
    for command, names in zip(commands, (("vendor", "rsa"), ("second",)), strict=True):
        for name in names:
            folder = write(export_openssl(envelope_of(sim, name), publics(sim, name)), tmp_path / name)
            (folder / "vendor.pub").write_bytes(sim.keys[name].public.pem)
            done = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True, check=True)
            assert done.stdout == "Signature Verified Successfully\n"


#: An openssl from before 3.0, as far as the script can see.
OLD_OPENSSL = """#!/bin/sh
case "$*" in
    "pkeyutl -help") echo "-verify -pubin -inkey -in -sigfile" >&2 ;;
    *-rawin*) echo "unknown option -rawin" >&2; exit 1 ;;
    *) exec {openssl} "$@" ;;
esac
"""


@pytest.mark.parametrize(
    ("kind", "old"),
    [("p256", False), ("p384", False), ("rsa3072", False), ("ed25519", False), ("p256", True), ("p384", True),
     ("rsa3072", True)],
)  # fmt: skip
def test_a_signature_is_all_that_there_is(sim, tmp_path, monkeypatch, kind, old):
    """Nothing may stand behind a signature, or be missing at its end; ``openssl dgst`` would not always notice."""
    if old:
        wrapper = tmp_path / "bin" / "openssl"
        wrapper.parent.mkdir()
        wrapper.write_text(OLD_OPENSSL.format(openssl=shutil.which("openssl")))
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    key, envelope = generate(kind), envelope_of(sim, "vendor")
    sig = key.sign(envelope.pae)
    while kind.startswith("p") and len(sig) < {"p256": 72, "p384": 104}[kind]:  # the longest: dgst reads no further
        sig = key.sign(envelope.pae)
    folder = write(
        export_openssl(Envelope(envelope.payload, (Signature(key.keyid, sig),)), [key.public]), tmp_path / "x"
    )
    assert run(folder).returncode == 0
    for changed in (sig + b"\0", sig + sig, sig[:-1], sig[:1], b"", b"\0" + sig):
        (folder / "signature-1.bin").write_bytes(changed)
        assert run(folder).returncode == 1, changed
        assert not key.public.verify(envelope.pae, changed)


#: An openssl from before 3.5, which knows no ML-DSA: neither in a key nor in a certificate.
NO_MLDSA = """#!/bin/sh
case "$*" in
    "pkey -pubin "*|"x509 "*" -pubkey")
        {openssl} pkey -pubin -in "$4" -outform DER 2>/dev/null | grep -q . || [ "$1" = x509 ] || exit 1
        grep -q '^MIIHsjALBglghkgBZQMEAxID' "$4" && exit 1
        {openssl} x509 -in "$3" -noout -text 2>/dev/null |
            grep -q -e 'Algorithm: 2.16.840.1.101.3.4.3.18' -e 'Algorithm: ML-DSA-65' && exit 1 ;;
esac
exec {openssl} "$@"
"""


@pytest.fixture
def no_mldsa(tmp_path, monkeypatch):
    wrapper = tmp_path / "bin" / "openssl"
    wrapper.parent.mkdir()
    wrapper.write_text(NO_MLDSA.format(openssl=shutil.which("openssl")))
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")


def test_a_key_that_this_openssl_does_not_know(sim, tmp_path, no_mldsa):
    """A genuine signature that cannot be checked here is told from one that is not valid."""
    folder = write(export_openssl(envelope_of(sim, "vendor", "pq"), publics(sim, "vendor", "pq")), tmp_path / "out")
    done = run(folder)
    assert done.returncode == 2 and "signature 1: verified with key-1.pem" in done.stdout
    assert "signature 2: could not be checked here" in done.stderr and "NOT verified" not in done.stderr
    for name, code in (("vendor", 0), ("pq", 2), ("stranger", 1)):
        (tmp_path / "key.pub").write_bytes(sim.keys[name].public.pem)
        assert run(folder, tmp_path / "key.pub").returncode == code, name
    data = bytearray((folder / "signature-1.bin").read_bytes())
    data[-1] ^= 1
    (folder / "signature-1.bin").write_bytes(data)
    done = run(folder)
    assert done.returncode == 1 and "could not be checked here" in done.stderr
    (folder / "key-2.pem").write_bytes(b"-----BEGIN PUBLIC KEY-----\nMIIH\n-----END PUBLIC KEY-----\n")
    assert "signature 2: NOT verified" in run(folder).stderr


def test_only_what_could_not_be_checked_is_left(sim, tmp_path, no_mldsa):
    folder = write(export_openssl(envelope_of(sim, "pq"), publics(sim, "pq")), tmp_path / "out")
    assert run(folder).returncode == 2


@pytest.mark.parametrize("name", ["statement.json", "pae.bin", "signature-1.bin", "signature-2.bin", "key-1.pem"])
def test_any_changed_file_fails(sim, tmp_path, name):
    folder = write(export_openssl(envelope_of(sim, "vendor", "second"), publics(sim, "vendor", "second")), tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert run(folder).returncode == 1


def test_statement_and_pae_changed_together_fail(sim, tmp_path):
    folder = write(export_openssl(envelope_of(sim, "vendor"), publics(sim, "vendor")), tmp_path)
    for name in ("statement.json", "pae.bin"):
        (folder / name).write_bytes((folder / name).read_bytes().replace(b"1.4.0", b"1.4.1"))
    assert run(folder).returncode == 1


def test_key_from_elsewhere(sim, tmp_path):
    folder = write(export_openssl(envelope_of(sim, "vendor", "second")), tmp_path / "export")
    for name in ("second", "stranger"):
        (tmp_path / f"{name}.pub").write_bytes(sim.keys[name].public.pem)
    assert run(folder).returncode == 2
    assert run(folder, tmp_path / "second.pub").returncode == 0
    assert run(folder, tmp_path / "stranger.pub").returncode == 1
    assert run(folder, tmp_path / "missing.pub").returncode == 2


def test_bundled_key_does_not_help_a_stranger(sim, tmp_path):
    folder = write(export_openssl(envelope_of(sim, "vendor"), publics(sim, "vendor")), tmp_path / "export")
    (tmp_path / "stranger.pub").write_bytes(sim.keys["stranger"].public.pem)
    assert run(folder, tmp_path / "stranger.pub").returncode == 1


def test_keys_that_signed_nothing_are_an_error(sim):
    with pytest.raises(UntrustedSignerError):
        export_openssl(envelope_of(sim, "vendor"), publics(sim, "stranger"))


# --- Sigstore bundles


def test_one_bundle_per_signature_without_extensions(sim):
    envelope = envelope_of(sim, "vendor", "second")
    signatures = tuple(Signature(s.keyid, s.sig, {"kind": "x"}) for s in envelope.signatures)
    envelope = parse_envelope(serialise(Envelope(envelope.payload, signatures)))
    files = export_bundle(envelope)
    assert [name for name, _ in files] == ["signature-1.sigstore.json", "signature-2.sigstore.json"]
    for (_, data), name in zip(files, ["vendor", "second"], strict=True):
        bundle = json.loads(data)
        assert bundle["mediaType"] == BUNDLE_TYPE
        assert bundle["verificationMaterial"]["publicKey"] == {"hint": sim.keys[name].keyid}
        (signature,) = bundle["dsseEnvelope"]["signatures"]
        assert sorted(signature) == ["keyid", "sig"]
        assert base64.b64decode(bundle["dsseEnvelope"]["payload"]) == envelope.payload


@pytest.fixture(scope="session")
def sigstore():
    """A folder with sigstore-js and our scripts."""
    return install()


def sigstore_verify(folder, bundle, key, tmp_path):
    (tmp_path / "bundle.json").write_bytes(bundle)
    (tmp_path / "key.pem").write_bytes(key.pem)
    command = ["node", "verify.mjs", tmp_path / "bundle.json", tmp_path / "key.pem", key.keyid]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["vendor", "second", "rsa"])
def test_sigstore_js_verifies_the_bundle(sim, sigstore, tmp_path, name):
    ((_, data),) = export_bundle(envelope_of(sim, name))
    done = sigstore_verify(sigstore, data, sim.keys[name].public, tmp_path)
    assert (done.returncode, done.stdout) == (0, "verified\n"), done.stderr


def test_sigstore_js_refuses_another_key_and_another_payload(sim, sigstore, tmp_path):
    ((_, data),) = export_bundle(envelope_of(sim, "vendor"))
    vendor = sim.keys["vendor"].public
    impostor = generate("p256").public
    fake = type(vendor)(impostor.spki, impostor.kind, vendor.keyid, impostor._key)
    assert "signature verification failed" in sigstore_verify(sigstore, data, fake, tmp_path).stderr
    bundle = json.loads(data)
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"]).replace(b"1.4.0", b"1.4.1")
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    done = sigstore_verify(sigstore, json.dumps(bundle).encode(), vendor, tmp_path)
    assert done.returncode == 1 and "signature verification failed" in done.stderr


# --- certificates and timestamps

WIDE = (-4000, 4000)  # openssl stamps with the clock, and checks paths by it
ROOT = ca.issue("Root", ca=True, days=WIDE)
INTER = ca.issue("Intermediate", ROOT, ca=True, days=WIDE)
OTHER_ROOT = ca.issue("Root", ca=True, days=WIDE)
TSA_ROOT = ca.issue("TSA Root", ca=True, days=WIDE)
TSA_LEAF = tsa_leaf(TSA_ROOT, days=WIDE)


def raw_key(private):
    """The object of cryptography behind one of our keys, for a certificate."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return load_pem_private_key(private.pem(None), None)


def certified(sim, name, folder, *, days=WIDE, usages=(ca.CODE_SIGNING,), stamped=True):
    """An envelope with a signature by the named key, its chain, and a timestamp by openssl."""
    leaf = ca.issue(f"Release {name}", INTER, key=raw_key(sim.keys[name]), days=days, usages=usages)
    envelope = envelope_of(sim, name)
    (signature,) = envelope.signatures
    stamps = ()
    if stamped:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "serial").write_text("01")
        stamps = (Tsa(folder, TSA_LEAF).reply(make_request(signature.sig)),)
    extension = pack_material(Material((leaf.der, INTER.der), stamps))
    return Envelope(envelope.payload, (Signature(signature.keyid, signature.sig, extension),))


@pytest.mark.parametrize("name", ["vendor", "second", "rsa"])
def test_sigstore_js_verifies_by_certificate_and_timestamp(sim, sigstore, tmp_path, name):
    files = dict(export_bundle(certified(sim, name, tmp_path / "tsa")))
    assert sorted(files) == ["signature-1.intermediates.pem", "signature-1.sigstore.json"]
    (tmp_path / "bundle.json").write_bytes(files["signature-1.sigstore.json"])
    (tmp_path / "ca.pem").write_bytes(files["signature-1.intermediates.pem"] + ROOT.pem)
    (tmp_path / "other.pem").write_bytes(files["signature-1.intermediates.pem"] + OTHER_ROOT.pem)
    (tmp_path / "tsa.pem").write_bytes(TSA_LEAF.pem + TSA_ROOT.pem)

    def verify(root):
        command = ["node", "verify_certificate.mjs", tmp_path / "bundle.json", tmp_path / root, tmp_path / "tsa.pem"]
        return subprocess.run(command, cwd=sigstore, capture_output=True, text=True, check=False)

    done = verify("ca.pem")
    assert (done.returncode, done.stdout) == (0, "verified\n"), done.stderr
    assert "certificate chain" in verify("other.pem").stderr


def test_a_bare_bundle_names_the_key_only(sim, sigstore, tmp_path):
    ((name, data),) = export_bundle(certified(sim, "vendor", tmp_path / "tsa"), bare=True)
    vendor = sim.keys["vendor"].public
    material = json.loads(data)["verificationMaterial"]
    assert name == "signature-1.sigstore.json" and material["publicKey"] == {"hint": vendor.keyid}
    assert "certificate" not in material and material["timestampVerificationData"]["rfc3161Timestamps"] == []
    assert sigstore_verify(sigstore, data, vendor, tmp_path).returncode == 0


def test_what_is_malformed_beside_a_signature_is_not_passed_on(sim, tmp_path):
    envelope = certified(sim, "vendor", tmp_path / "tsa", stamped=False)
    (signature,) = envelope.signatures
    signature.extension["ext"]["x509CertificateChain"]["certificates"][0]["rawBytes"] = "!"
    for export in (export_bundle, export_openssl):
        with pytest.raises(BadSignatureError):
            export(envelope)
    assert export_bundle(envelope, bare=True)


@pytest.fixture
def roots(tmp_path):
    for name, entity in (("root", ROOT), ("other", OTHER_ROOT), ("tsa", TSA_ROOT), ("inter", INTER)):
        (tmp_path / f"{name}.pem").write_bytes(entity.pem)
    return tmp_path


@pytest.mark.parametrize("name", ["vendor", "second", "rsa"])
def test_openssl_verifies_by_certificate(sim, roots, name):
    folder = write(export_openssl(certified(sim, name, roots / "tsa")), roots / "out")
    done = run(folder, "--ca", roots / "root.pem")
    assert done.returncode == 0 and "verified with chain-1.pem" in done.stdout, done.stdout + done.stderr
    assert run(folder, "--ca", roots / "other.pem").returncode == 1
    assert run(folder, "--ca", roots / "tsa.pem").returncode == 1
    assert run(folder, "--ca", roots / "missing.pem").returncode == 2
    assert run(folder).returncode == 2  # a certificate without a root proves nothing
    data = ["-data", "signature-1.bin", "-in", "timestamp-1-1.tsr", "-CAfile", roots / "tsa.pem"]
    assert (
        subprocess.run(["openssl", "ts", "-verify", *data], cwd=folder, capture_output=True, check=False).returncode
        == 0
    )


def test_a_certificate_for_a_key_that_this_openssl_does_not_know(sim, roots, no_mldsa):
    folder = write(export_openssl(certified(sim, "pq", roots / "tsa", stamped=False)), roots / "out")
    done = run(folder, "--ca", roots / "root.pem")
    assert done.returncode == 2 and "signature 1: could not be checked here" in done.stderr, done.stderr


def test_roots_of_the_machine_are_not_looked_at(sim, roots, monkeypatch):
    folder = write(export_openssl(certified(sim, "vendor", roots / "tsa", stamped=False)), roots / "out")
    monkeypatch.setenv("SSL_CERT_FILE", str(roots / "root.pem"))
    assert run(folder, "--ca", roots / "other.pem").returncode == 1
    assert run(folder, "--ca", roots / "root.pem").returncode == 0


def test_the_leaf_must_be_for_signing_code(sim, roots):
    envelope = certified(sim, "vendor", roots / "tsa", usages=(ca.ExtendedKeyUsageOID.SERVER_AUTH,), stamped=False)
    assert run(write(export_openssl(envelope), roots / "out"), "--ca", roots / "root.pem").returncode == 1


def test_an_expired_leaf_needs_its_timestamp(sim, roots, monkeypatch):
    """The leaf ends before now; openssl's own clock makes the stamp, so the stamp comes too late for it."""
    folder = write(export_openssl(certified(sim, "vendor", roots / "tsa", days=(-4000, -3900))), roots / "late")
    assert run(folder, "--ca", roots / "root.pem", "--tsa-ca", roots / "tsa.pem").returncode == 1
    # And one that was good when the stamp was made: the check of the path is moved to years from now.
    folder = write(export_openssl(certified(sim, "vendor", roots / "tsa")), roots / "good")
    script = (folder / "verify.sh").read_text()
    moved = script.replace("verify -no-CApath", "verify -no-CApath -attime 4102444800")
    assert moved != script
    (folder / "verify.sh").write_text(moved)
    assert run(folder, "--ca", roots / "root.pem").returncode == 1
    assert run(folder, "--ca", roots / "root.pem", "--tsa-ca", roots / "other.pem").returncode == 1
    done = run(folder, "--ca", roots / "root.pem", "--tsa-ca", roots / "tsa.pem")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["chain-1.pem", "signature-1.bin", "pae.bin"])
def test_any_changed_file_fails_under_a_root(sim, roots, name):
    folder = write(export_openssl(certified(sim, "vendor", roots / "tsa", stamped=False)), roots / "out")
    data = bytearray((folder / name).read_bytes())
    data[200 if name == "chain-1.pem" else len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    assert run(folder, "--ca", roots / "root.pem").returncode == 1
