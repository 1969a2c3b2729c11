"""Key management services, none of them the real one.

AWS is moto's imitation, taught to sign what was hashed; Vault a small server here behind the real client; the other two
are stand-ins on securesystemslib's own local signer. They show that URIs, key kinds and signatures go through as they
should, not that a service answers as it does.
"""

from __future__ import annotations

import base64
import json
import logging
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from securesystemslib import exceptions as sslib_errors
from securesystemslib import signer as sslib

from vmgraft.errors import BadSignatureError, FileError, UnsupportedError, UsageError
from vmgraft.signing import kms
from vmgraft.signing.keys import generate
from vmgraft.signing.signers import load_signer, make_signature

GCP = "gcpkms:projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1"
AZURE = "azurekms://acme.vault.azure.net/keys/release/0123abcd"


def sign_digest(self, message, signing_algorithm):
    """What AWS does for MessageType=DIGEST, which moto says it lacks: it would hash the hash."""
    digest = Prehashed({"256": hashes.SHA256(), "384": hashes.SHA384()}[signing_algorithm[-3:]])
    if signing_algorithm.startswith("ECDSA"):
        return self.private_key.sign(message, ec.ECDSA(digest))
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    return self.private_key.sign(message, padding.PKCS1v15() if "PKCS1_V1_5" in signing_algorithm else pss, digest)


@pytest.fixture
def aws(monkeypatch):
    import boto3
    from moto import mock_aws
    from moto.kms import utils

    for name in ("ECDSAPrivateKey", "RSAPrivateKey"):
        monkeypatch.setattr(getattr(utils, name), "sign", sign_digest)

    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    with mock_aws():
        yield boto3.client("kms")


def aws_key(client, spec):
    return client.create_key(KeyUsage="SIGN_VERIFY", KeySpec=spec)["KeyMetadata"]["KeyId"]


@pytest.mark.parametrize(("spec", "kind"), [("ECC_NIST_P256", "p256"), ("ECC_NIST_P384", "p384"), ("RSA_3072", "rsa")])
def test_aws(aws, tmp_path, spec, kind):
    number = aws_key(aws, spec)
    signer = load_signer(f"awskms:{number}")  # RSA: not the PSS that comes first there
    assert signer.public.kind == kind and signer.certificates == ()
    assert signer.public.verify(b"m", make_signature(signer, b"m").sig)
    (tmp_path / "k.pub").write_bytes(signer.public.pem)
    aws.create_alias(AliasName="alias/release", TargetKeyId=number)
    named = load_signer(f"awskms:alias/release?public-key={tmp_path}/k.pub")
    assert named.public == signer.public and named.public.verify(b"m", named.sign(b"m"))


def test_aws_refuses(aws, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, logger="securesystemslib")
    with pytest.raises(FileError, match="NotFoundException") as caught:
        load_signer("awskms:00000000-0000-0000-0000-000000000000")
    assert "credentials" in caught.value.hint
    (tmp_path / "k.pub").write_bytes(generate("p256").public.pem)
    signer = load_signer(f"awskms:{aws_key(aws, 'ECC_NIST_P256')}?public-key={tmp_path}/k.pub")
    with pytest.raises(BadSignatureError, match="does not verify"):
        signer.sign(b"m")
    signer = load_signer(f"awskms:00000000-0000-0000-0000-000000000000?public-key={tmp_path}/k.pub")
    with pytest.raises(FileError, match="cannot sign"):
        signer.sign(b"m")
    with pytest.raises(FileError, match="not accepted"):
        load_signer(f"awskms:{aws_key(aws, 'ECC_SECG_P256K1')}?public-key={weak_key(tmp_path)}")


def weak_key(tmp_path):
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = ec.generate_private_key(ec.SECP256K1()).public_key()
    (tmp_path / "weak.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return tmp_path / "weak.pub"


class Vault(BaseHTTPRequestHandler):
    """Enough of Vault's transit engine: one Ed25519 key, its second version."""

    key = generate("ed25519")

    def answer(self, data):
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        assert self.path == "/v1/transit/keys/release"
        public = base64.b64encode(self.key.public.spki[-32:]).decode()
        self.answer({"keys": {"1": {"public_key": "AAAA"}, "2": {"public_key": public}}})

    def do_POST(self):
        assert self.path.startswith("/v1/transit/sign/release")
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert request["key_version"] == 2
        made = base64.b64encode(self.key.sign(base64.b64decode(request["input"]))).decode()
        self.answer({"signature": f"vault:v2:{made}"})

    do_PUT = do_POST  # noqa: N815 - a name of the base class

    def log_message(self, *_):
        pass


@pytest.fixture
def vault(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Vault)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("VAULT_ADDR", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("VAULT_TOKEN", "x")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_vault(vault, tmp_path):
    signer = load_signer("hv:release/2")
    assert signer.public == Vault.key.public
    assert signer.public.verify(b"m", make_signature(signer, b"m").sig)
    with pytest.raises(UsageError, match="newest version") as caught:
        load_signer("hv:release/1")
    assert "hv:release/2" in caught.value.hint
    (tmp_path / "k.pub").write_bytes(Vault.key.public.pem)
    assert load_signer(f"hv:release/2?public-key={tmp_path}/k.pub").sign(b"m")
    (tmp_path / "k.pub").write_bytes(generate("p256").public.pem)
    with pytest.raises(UsageError, match="kind p256"):
        load_signer(f"hv:release/2?public-key={tmp_path}/k.pub")


def test_vault_that_is_not_there(monkeypatch):
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(FileError, match="Connection"):
        load_signer("hv:release/2")


def stand_in(key, asked):
    """A service that signs with a key of ours, by securesystemslib's own signer."""

    class Service:
        @classmethod
        def import_(cls, *arguments):
            asked.append(arguments)
            described = sslib.CryptoSigner(key._key).public_key
            return AZURE if len(arguments) == 2 else f"gcpkms:{arguments[0]}", described

        @classmethod
        def from_priv_key_uri(cls, uri, public_key, secrets_handler=None):
            asked.append(uri)
            return sslib.CryptoSigner(key._key, public_key)

    return Service


@pytest.mark.parametrize(
    ("uri", "kind"), [(GCP, "p256"), (GCP, "p384"), (GCP, "rsa3072"), (AZURE, "p256"), (AZURE, "p384")]
)
def test_stand_ins(monkeypatch, tmp_path, uri, kind):
    key, asked, scheme = generate(kind), [], uri.split(":")[0]
    monkeypatch.setitem(sslib.SIGNER_FOR_URI_SCHEME, scheme, stand_in(key, asked))
    signer = load_signer(uri)
    assert signer.public == key.public and key.public.verify(b"m", make_signature(signer, b"m").sig)
    assert asked == [("acme", "release") if scheme == "azurekms" else (GCP[7:],), uri]
    asked.clear()
    (tmp_path / "k.pub").write_bytes(key.public.pem)
    assert load_signer(f"{uri}?public-key={tmp_path}/k.pub").sign(b"m")
    assert asked == [uri]


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa3072", "ed25519"])
def test_our_description_of_a_key_is_securesystemslibs(kind):
    """Its own verification takes our signatures under the key as described to it."""
    key = generate(kind)
    described = kms._describe(sslib, key.public)
    described.verify_signature(sslib.Signature(key.keyid, key.sign(b"m").hex()), b"m")
    with pytest.raises(sslib_errors.UnverifiedSignatureError):
        described.verify_signature(sslib.Signature(key.keyid, key.sign(b"m").hex()), b"n")


def test_odd_answers(monkeypatch, tmp_path):
    key = generate("p256")
    (tmp_path / "k.pub").write_bytes(key.public.pem)

    class Odd:
        made = None

        def sign(self, payload):
            return type("Made", (), {"signature": self.made})

    odd = Odd()
    service = type("Service", (), {"from_priv_key_uri": staticmethod(lambda uri, key: odd)})
    monkeypatch.setitem(sslib.SIGNER_FOR_URI_SCHEME, "gcpkms", service)
    for made, error in ((None, FileError), ("xyz", FileError), ("00" * 9000, FileError), ("", BadSignatureError)):
        odd.made = made
        with pytest.raises(error):
            load_signer(f"{GCP}?public-key={tmp_path}/k.pub").sign(b"m")


@pytest.mark.parametrize(
    "uri",
    [
        "awskms:", "awskms:a b", "awskms:key?region=eu", "awskms:key?public-key=k.pub", "gcpkms:projects/p",
        GCP + "/more", "azurekms://evil.example/keys/k/1", "azurekms://a.vault.azure.net.evil/keys/k/1", AZURE + "/..",
        "azurekms://user@acme.vault.azure.net/keys/k/1", "hv:key", "hv:key/x", "hv:../key/1", "hv:key/1#x",
    ],
)  # fmt: skip
def test_uris_that_make_no_sense(uri):
    with pytest.raises(UsageError):
        load_signer(uri)


def test_without_the_packages(monkeypatch):
    with pytest.raises(UnsupportedError, match="gcpkms: keys need") as caught:  # securesystemslib without Google's SDK
        monkeypatch.setattr("securesystemslib.signer._gcp_signer.GCP_IMPORT_ERROR", "missing")
        load_signer(GCP)
    assert caught.value.hint == "pip install 'vmgraft[kms]'"
    monkeypatch.setitem(sys.modules, "securesystemslib.signer", None)
    with pytest.raises(UnsupportedError, match="awskms: keys need"):
        load_signer("awskms:key")
