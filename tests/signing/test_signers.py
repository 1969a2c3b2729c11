"""What --key and --certificate name: one function opens it, and what it signs is verified and packed."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import BadSignatureError, ExpiredError, FileError, UsageError, VmgraftError
from vmgraft.signing import chains
from vmgraft.signing.chains import MAX_CHAIN_PEM, chain_warnings, read_chain
from vmgraft.signing.dsse import PAYLOAD_TYPE, Envelope, pae, parse_envelope, serialise
from vmgraft.signing.keyfiles import PASSPHRASE_VARIABLE, PassphraseSource, write_keypair
from vmgraft.signing.keys import GENERATED_KINDS, generate
from vmgraft.signing.material import MAX_CERTIFICATES, parse_material
from vmgraft.signing.paths import DEVELOPMENT
from vmgraft.signing.signers import load_signer, load_signers, make_signature, signing_warnings

from signing_ca import CODE_SIGNING, NOW, issue  # isort: skip


@pytest.fixture(autouse=True)
def no_passphrase_outside(monkeypatch):
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The test CA's certificates are of one day; so is the clock."""

    class Clock(chains.datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    monkeypatch.setattr(chains, "datetime", Clock)


@pytest.fixture(scope="module")
def ca():
    root = issue("Root", ca=True)
    middle = issue("Middle", root, ca=True)
    return {"root": root, "middle": middle, "leaf": issue("Leaf", middle), "other": issue("Other", middle)}


@pytest.fixture
def files(tmp_path, ca):
    """The leaf's key, and chains as PEM files."""
    for name in ("leaf", "other"):
        pem = ca[name].key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / f"{name}.key").write_bytes(pem)
        (tmp_path / f"{name}.pem").write_bytes(ca[name].pem + ca["middle"].pem)
    return tmp_path


@pytest.mark.parametrize("kind", GENERATED_KINDS)
def test_every_kind_alone(tmp_path, kind):
    key = generate(kind)
    private, _ = write_keypair(tmp_path / "k", key, None)
    for reference in (private, str(private), f"file:{private}", f"FILE://{private}"):
        signer = load_signer(reference)
        assert (signer.public, signer.keyid, signer.certificates) == (key.public, key.keyid, ())
    signature = make_signature(signer, b"message")
    assert signature.extension is None and signature.keyid == key.keyid
    assert key.public.verify(b"message", signature.sig)


def test_all_kinds_in_one_envelope():
    keys = [generate(kind) for kind in GENERATED_KINDS if kind != "rsa4096"]
    message = pae(PAYLOAD_TYPE, b"{}")
    data = serialise(Envelope(b"{}", tuple(make_signature(key, message) for key in keys)))
    parsed = parse_envelope(data)
    assert [item.keyid for item in parsed.signatures] == [key.keyid for key in keys]
    for key, item in zip(keys, parsed.signatures, strict=True):
        assert key.public.verify(parsed.pae, item.sig)


def test_a_signature_that_does_not_verify_is_not_used():
    @dataclass(frozen=True)
    class Liar:
        public: object
        keyid: str = "SHA256:liar"
        certificates: tuple = ()
        made: bytes = b"\0" * 64

        def sign(self, message):
            return self.made

    key = generate("p256")
    with pytest.raises(BadSignatureError, match="64 bytes") as caught:
        make_signature(Liar(key.public), b"m")
    assert "DER" in caught.value.hint and "r and s" in caught.value.hint
    with pytest.raises(BadSignatureError) as caught:
        make_signature(Liar(key.public, made=key.sign(b"another")), b"m")
    assert "SHA-256" in caught.value.hint
    rsa_key = generate("rsa3072")
    with pytest.raises(BadSignatureError) as caught:
        make_signature(Liar(rsa_key.public, made=b"\0" * 384), b"m")
    assert "not PSS" in caught.value.hint
    with pytest.raises(BadSignatureError) as caught:
        make_signature(Liar(generate("p384").public), b"m")
    assert "SHA-384" in caught.value.hint


def test_the_chain_travels_and_the_root_does_not(files, ca):
    (files / "whole.pem").write_bytes(ca["leaf"].pem + ca["middle"].pem + ca["root"].pem)
    for name in ("leaf.pem", "whole.pem"):
        signer = load_signer(files / "leaf.key", certificates=files / name)
        assert signer.certificates == (ca["leaf"].der, ca["middle"].der)
        signature = make_signature(signer, b"m")
        material = parse_material(signature.extension, field="extension")
        assert material.certificates == (ca["leaf"].der, ca["middle"].der)
        assert signer.public.verify(b"m", signature.sig) and signature.keyid == signer.keyid


def test_chains_find_their_keys(files, ca):
    bare, _ = write_keypair(files / "bare", generate(), None)
    signers = load_signers(
        [files / "leaf.key", bare, files / "other.key"], certificates=[files / "other.pem", files / "leaf.pem"]
    )
    assert [signer.certificates[:1] for signer in signers] == [(ca["leaf"].der,), (), (ca["other"].der,)]


def test_a_chain_for_no_key_or_the_second_for_one(files):
    with pytest.raises(UsageError, match="no such key signs") as caught:
        load_signer(files / "leaf.key", certificates=files / "other.pem")
    assert caught.value.file == str(files / "other.pem") and "SHA256:" in caught.value.hint
    with pytest.raises(UsageError, match="no such key signs"):
        load_signers([files / "leaf.key"], certificates=[files / "other.pem"])
    with pytest.raises(UsageError, match="twice"):
        load_signers([files / "leaf.key"], certificates=[files / "leaf.pem", files / "leaf.pem"])
    (files / "again.pem").write_bytes((files / "leaf.pem").read_bytes())
    with pytest.raises(UsageError, match="second chain"):
        load_signers([files / "leaf.key"], certificates=[files / "leaf.pem", files / "again.pem"])


def test_a_bad_chain_is_refused_before_a_passphrase_is_asked_for(files, tmp_path):
    sealed, _ = write_keypair(tmp_path / "sealed", generate(), b"secret")
    (files / "bad.pem").write_text("no certificate")
    source = PassphraseSource(prompt=lambda _: pytest.fail("asked"))
    with pytest.raises(FileError, match="CERTIFICATE"):
        load_signers([sealed], source, certificates=[files / "bad.pem"])


def chain_file(tmp_path, *parts):
    path = tmp_path / "chain.pem"
    path.write_bytes(b"".join(part if isinstance(part, bytes) else part.pem for part in parts))
    return path


def test_what_is_no_chain(tmp_path, ca):
    leaf, middle, root = ca["leaf"], ca["middle"], ca["root"]
    bent = leaf.pem.replace(b"\nM", b"\nN", 1)
    cases = {
        "not PEM blocks": [
            (b"",), (b"garbage",), (leaf.der,), (b"Subject: x\n", leaf), (leaf, generate().public.pem),
            (leaf, b"-----BEGIN CERTIFICATE-----\n"), (b"x" * (MAX_CHAIN_PEM + 5),),
        ],
        "malformed": [(bent,), (leaf, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")],
        "has not issued": [(leaf, root), (leaf, leaf), (middle, leaf), (leaf, middle, middle), (leaf, middle, leaf)],
        "at most": [(leaf,) * (MAX_CERTIFICATES + 2)],
        "authority's|lacks": [(middle,), (root,)],
    }  # fmt: skip
    for words, contents in cases.items():
        for content in contents:
            path = chain_file(tmp_path, *content)
            with pytest.raises(FileError, match=words) as caught:
                read_chain(path)
            assert caught.value.file == str(path)
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileError):
            read_chain(path)


def test_leaves_that_no_policy_would_take(tmp_path, ca):
    middle = ca["middle"]
    client = x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH
    with pytest.raises(FileError, match="codeSigning"):
        read_chain(chain_file(tmp_path, issue("L", middle, usages=None)))
    with pytest.raises(FileError, match="codeSigning"):
        read_chain(chain_file(tmp_path, issue("L", middle, usages=(client,))))
    assert read_chain(chain_file(tmp_path, issue("L", middle, usages=(client, CODE_SIGNING))))
    with pytest.raises(FileError, match="digitalSignature"):
        read_chain(chain_file(tmp_path, issue("L", middle, usage={"digital_signature": False})))
    for days in ((-10, -1), (1, 10)):
        with pytest.raises(ExpiredError, match="not valid now") as caught:
            read_chain(chain_file(tmp_path, issue("L", middle, days=days)))
        assert "valid from" in caught.value.hint
    impostor = replace(middle, key=ec.generate_private_key(ec.SECP256R1()))  # the name fits, the signature does not
    with pytest.raises(FileError, match="has not issued"):
        read_chain(chain_file(tmp_path, issue("L", impostor), middle))


def test_a_leaf_with_a_key_that_is_not_accepted(files, ca):
    weak = issue("L", ca["middle"], key=rsa.generate_private_key(public_exponent=65537, key_size=2048))
    (files / "weak.pem").write_bytes(weak.pem)
    from vmgraft.errors import UntrustedSignerError

    with pytest.raises(UntrustedSignerError, match="2048 bits"):
        load_signer(files / "leaf.key", certificates=files / "weak.pem")


def test_warnings(files, tmp_path, ca):
    p384, _ = write_keypair(tmp_path / "p384", generate("p384"), None)
    assert "P-384" in signing_warnings(p384, load_signer(p384))[0]
    certified = load_signer(files / "leaf.key", certificates=files / "leaf.pem")
    assert signing_warnings(files / "leaf.key", certified) == []
    soon = issue("Leaf", ca["middle"], days=(-10, 5), key=ca["leaf"].key)
    (files / "soon.pem").write_bytes(soon.pem)
    certified = load_signer(files / "leaf.key", certificates=files / "soon.pem")
    assert "expires 2026-11-27" in signing_warnings(files / "leaf.key", certified)[0]
    assert "expired" in chain_warnings((soon.der,), now=NOW + timedelta(days=6))[0]
    root = issue("Try", ca=True, organisation=DEVELOPMENT)
    (files / "try.pem").write_bytes(issue("Leaf", root, key=ca["leaf"].key).pem)
    certified = load_signer(files / "leaf.key", certificates=files / "try.pem")
    (note,) = signing_warnings(files / "leaf.key", certified)
    assert "of a development CA: anybody may hold its keys" in note, "told by the issuer: the root does not travel"


_SCHEMES = st.sampled_from(["", "file:", "pkcs11:", "exec:", "awskms:", "gcpkms:", "azurekms:", "hv:", "PKCS11:"])
_PIECES = st.sampled_from(
    [
        "token=t",
        "object=o",
        "id=%01",
        ";",
        "&",
        "?",
        "=",
        "%",
        "%ff",
        "/",
        "//",
        "/bin/cat",
        "public-key=",
        "\x00",
        "#",
        "module-path=/x",
        "pin-value=1",
        "pin-source=/x",
        "timeout=1",
        "projects/p",
        "acme.vault.azure.net",
        "�",
    ]
)


@given(_SCHEMES, st.lists(_PIECES | st.text(max_size=5), max_size=8))
def test_any_reference_opens_or_is_refused(scheme, pieces):
    """Without ``/x`` nothing here names a key that exists."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(VmgraftError):
        patch.setitem(sys.modules, "securesystemslib.signer", None)  # no service is to be asked
        load_signer(scheme + "".join(pieces), PassphraseSource(environment=False))
