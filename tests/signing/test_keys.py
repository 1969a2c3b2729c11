from __future__ import annotations

import contextlib
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import FileError, PolicyError, UsageError, VmgraftError
from vmgraft.signing.keys import (
    GENERATED_KINDS,
    PublicKey,
    generate,
    keyid,
    private_from_pem,
    public_from_pem,
)

PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER
SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
PKCS8 = serialization.PrivateFormat.PKCS8


@pytest.fixture(scope="module")
def made():
    return {kind: generate(kind) for kind in GENERATED_KINDS}


def pem_of(key):
    return key.public_bytes(PEM, SPKI)


@pytest.mark.parametrize("kind", GENERATED_KINDS)
def test_sign_and_verify(made, kind):
    key = made[kind]
    signature = key.sign(b"message")
    assert key.public.verify(b"message", signature)
    assert not key.public.verify(b"messagf", signature)
    assert not key.public.verify(b"message", signature[:-1] + bytes([signature[-1] ^ 1]))
    for garbage in (b"", b"\0", b"x" * 64, b"x" * 5000, signature + b"\0"):
        assert not key.public.verify(b"message", garbage)
    for other in made.values():
        assert other is key or not other.public.verify(b"message", signature)


@pytest.mark.parametrize("kind", GENERATED_KINDS)
def test_pem_round_trips(made, kind):
    key = made[kind]
    assert public_from_pem(key.public.pem) == key.public
    assert private_from_pem(key.pem(None), None).public == key.public
    sealed = key.pem(b"secret")
    assert b"ENCRYPTED" in sealed
    assert private_from_pem(sealed, b"secret").public == key.public
    for wrong in (b"Secret", b"", None):
        with pytest.raises(UsageError, match="passphrase"):
            private_from_pem(sealed, wrong, file="acme.key")


def test_wrong_passphrase_that_decrypts_to_a_valid_padding(monkeypatch):
    """One wrong passphrase in 256 gets past the padding and fails later, in the parser."""

    def parser_error(*_):
        raise ValueError("Could not deserialize key data.")

    monkeypatch.setattr(serialization, "load_pem_private_key", parser_error)
    with pytest.raises(UsageError, match="passphrase"):
        private_from_pem(SEALED, b"Secret")


@pytest.mark.parametrize("kind", ["p256", "ed25519", "rsa3072"])
def test_keyid_is_what_ssh_keygen_prints(made, kind, tmp_path):
    key = serialization.load_pem_public_key(made[kind].public.pem)
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path = tmp_path / "key.pub"
    path.write_bytes(line + b"\n")
    printed = subprocess.run(["ssh-keygen", "-lf", path], capture_output=True, text=True, check=True).stdout
    assert printed.split()[1] == made[kind].keyid == keyid(made[kind].public)


def test_keyid_of_mldsa_is_the_spki(made, tmp_path):
    import base64
    import hashlib

    key = made["mldsa65"].public
    body = b"".join(key.pem.splitlines()[1:-1])
    digest = base64.b64encode(hashlib.sha256(base64.b64decode(body)).digest()).decode()
    assert key.keyid == "SHA256:" + digest.rstrip("=")


def test_keys_of_openssl_are_read(tmp_path):
    """Both halves made by openssl: the private one signs, the public one verifies."""
    private, public = tmp_path / "k.pem", tmp_path / "p.pem"
    for arguments in (["EC", "-pkeyopt", "ec_paramgen_curve:P-256"], ["ED25519"]):
        subprocess.run(
            ["openssl", "genpkey", "-algorithm", *arguments, "-out", private], check=True, capture_output=True
        )
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
        key = private_from_pem(private.read_bytes(), None)
        assert public_from_pem(public.read_bytes()).verify(b"m", key.sign(b"m"))


def test_one_key_in_two_encodings_is_one_key():
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    plain = public_from_pem(pem_of(key))
    point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    algorithm = bytes.fromhex("301306072a8648ce3d020106082a8648ce3d030107")
    der = b"\x30" + bytes([len(algorithm) + 4 - 1 + len(point)]) + algorithm + b"\x03\x22\x00" + point
    squeezed = public_from_pem(pem_of(serialization.load_der_public_key(der)))
    import base64

    raw = b"-----BEGIN PUBLIC KEY-----\n" + base64.b64encode(der) + b"\n-----END PUBLIC KEY-----\n"
    assert public_from_pem(raw) == plain == squeezed
    assert len({plain, public_from_pem(raw)}) == 1


def test_p384_verifies_with_a_warning():
    key = ec.generate_private_key(ec.SECP384R1())
    public = public_from_pem(pem_of(key.public_key()))
    assert public.kind == "p384" and "P-384" in public.warning
    private = private_from_pem(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()), None)
    assert public.verify(b"m", private.sign(b"m"))
    assert generate("p256").public.warning is None


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP256K1()),
        ec.generate_private_key(ec.SECP224R1()),
        rsa.generate_private_key(public_exponent=65537, key_size=2048),
        x25519.X25519PrivateKey.generate(),
        ed448.Ed448PrivateKey.generate(),
    ],
    ids=["p521", "secp256k1", "p224", "rsa2048", "x25519", "ed448"],
)
def test_other_keys_are_refused(key):
    with pytest.raises(FileError, match="not accepted") as caught:
        public_from_pem(pem_of(key.public_key()), file="k.pub")
    assert caught.value.file == "k.pub" and "P-256" in caught.value.hint
    with pytest.raises(FileError, match="not accepted"):
        private_from_pem(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()), None)


def test_unknown_kind():
    with pytest.raises(UsageError, match="rsa1024"):
        generate("rsa1024")


def test_wrong_files_get_helpful_errors(made):
    key = made["p256"]
    with pytest.raises(FileError, match="private key"):
        public_from_pem(key.pem(None))
    with pytest.raises(FileError, match="one PEM block") as caught:
        public_from_pem(b"ssh-ed25519 AAAA vendor@acme")
    assert "ssh-keygen -e" in caught.value.hint
    with pytest.raises(FileError, match="one PEM block"):
        public_from_pem(key.public.pem * 2)
    with pytest.raises(FileError, match="not a PEM private key"):
        private_from_pem(key.public.pem, None)
    with pytest.raises(PolicyError):
        public_from_pem(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", error=PolicyError)


def test_secrets_are_not_shown(made):
    assert "_key" not in repr(made["p256"]) and "PRIVATE" not in repr(made["p256"])


@given(st.data())
def test_only_our_error_for_bent_keys(data):
    private = PRIVATE
    base = bytearray(data.draw(st.sampled_from([private.pem(None), private.public.pem, SEALED])))
    for _ in range(data.draw(st.integers(1, 3))):
        base[data.draw(st.integers(0, len(base) - 1))] = data.draw(st.integers(0, 255))
    for parse in (public_from_pem, lambda pem: private_from_pem(pem, b"secret")):
        with contextlib.suppress(VmgraftError):
            assert parse(bytes(base)) is not None


@given(st.binary(max_size=200))
def test_any_signature_bytes_are_just_wrong(signature):
    for public in PUBLICS:
        assert isinstance(public, PublicKey)
        assert not public.verify(b"message", signature)


PRIVATE = generate("p256")
SEALED = serialization.load_pem_private_key(PRIVATE.pem(None), None).private_bytes(  # few rounds: it is opened often
    PEM, PKCS8, serialization.BestAvailableEncryption(b"secret")
)
PUBLICS = [generate(kind).public for kind in ("p256", "ed25519", "mldsa65")]
