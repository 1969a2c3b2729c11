"""Exports are checked by the real programs: openssl through verify.sh, and sigstore-js."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vmgraft.errors import UntrustedSignerError
from vmgraft.signing.dsse import Envelope, Signature, parse_envelope, serialise
from vmgraft.signing.export import BUNDLE_TYPE, export_bundle, export_openssl
from vmgraft.signing.keys import generate, private_from_pem

NPM = Path(__file__).parent / "npm"


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
    """The commands a person would type, from the documentation of openssl."""
    folder = write(export_openssl(envelope_of(sim, "vendor"), publics(sim, "vendor")), tmp_path)
    command = ["openssl", "dgst", "-sha256", "-verify", "key-1.pem", "-signature", "signature-1.bin", "pae.bin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "Verified OK\n"


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
    """A folder with sigstore-js and our script, installed once per set of versions and kept in the user's cache."""
    for program in ("npm", "node"):
        assert shutil.which(program), f"{program} is missing: apt-get install npm nodejs"
    lock = (NPM / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmgraft-tests"
    folder = cache / f"sigstore-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(NPM / name, folder)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=240)
        (folder / "installed").touch()
    shutil.copy(NPM / "verify.mjs", folder)
    return folder


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
