"""Envelopes and bundles from elsewhere: every version that is in use, and one clear refusal for all else."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
from datetime import timedelta

import pytest
import signing_ca as ca
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import given, settings
from hypothesis import strategies as st
from sigstore_js import install

from vmgraft.errors import BadSignatureError, UnsupportedError, VmgraftError
from vmgraft.signing.bundles import BUNDLE_TYPES, MAX_BUNDLE, read_signed, signature_material, with_intermediates
from vmgraft.signing.dsse import Envelope, Signature, parse_envelope, serialise
from vmgraft.signing.export import export_bundle
from vmgraft.signing.material import Material, pack_material
from vmgraft.signing.merge import Vouchers, signer_of

ROOT = ca.issue("Root", ca=True)
INTER = ca.issue("Intermediate", ROOT, ca=True)
LEAF = ca.issue("Release", INTER)


def text(data):
    return base64.b64encode(data).decode()


@pytest.fixture
def envelope(sim):
    return parse_envelope(sim.graft().stored[0])


@pytest.fixture
def document(envelope):
    """A bundle as a program of the cosign family writes it, by its documentation; nothing of ours made it."""
    (signature,) = envelope.signatures
    return {
        "mediaType": BUNDLE_TYPES[-1],
        "verificationMaterial": {"publicKey": {"hint": "W8k="}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": text(envelope.payload),
            "payloadType": "application/vnd.in-toto+json",
            "signatures": [{"sig": text(signature.sig)}],
        },
    }


def read(document):
    return read_signed(json.dumps(document, indent=2).encode() + b"\n")


def chain(*ders):
    return {"certificates": [{"rawBytes": text(der)} for der in ders]}


@pytest.mark.parametrize("kind", BUNDLE_TYPES)
def test_every_version_of_a_bundle_with_a_key(document, envelope, kind):
    found = read(document | {"mediaType": kind})
    assert found.envelope.payload == envelope.payload and found.notes == ()
    assert [s.sig for s in found.envelope.signatures] == [s.sig for s in envelope.signatures]
    assert found.envelope.signatures[0].extension is None


@pytest.mark.parametrize(
    ("member", "value", "kept"),
    [
        ("certificate", {"rawBytes": text(LEAF.der)}, (LEAF.der,)),
        ("x509CertificateChain", chain(LEAF.der), (LEAF.der,)),
        ("x509CertificateChain", chain(LEAF.der, INTER.der), (LEAF.der, INTER.der)),
        ("x509CertificateChain", chain(LEAF.der, INTER.der, ROOT.der), (LEAF.der, INTER.der)),
        ("x509CertificateChain", chain(ROOT.der), (ROOT.der,)),
    ],
)
def test_certificates_and_timestamps_come_along_without_the_root(document, member, value, kept):
    stamps = {"rfc3161Timestamps": [{"signedTimestamp": text(b"\x30\x00")}]}
    document["verificationMaterial"] = {member: value, "timestampVerificationData": stamps, "tlogEntries": [{"a": "1"}]}
    found = read(document)
    assert signature_material(found.envelope.signatures[0], 0) == Material(kept, (b"\x30\x00",))
    assert "transparency log" in found.notes[0]
    serialised = serialise(found.envelope)
    assert signature_material(parse_envelope(serialised).signatures[0], 0).certificates == kept


def test_what_is_exported_can_be_imported(envelope):
    extension = pack_material(Material((LEAF.der,), (b"\x30\x00",)))
    full = Envelope(envelope.payload, (Signature(envelope.signatures[0].keyid, envelope.signatures[0].sig, extension),))
    for source, expected in ((full, full), (envelope, envelope)):
        ((_, data),) = export_bundle(source)
        assert read_signed(data).envelope == expected
    assert read_signed(serialise(full)).envelope == full


@pytest.mark.parametrize("name", ["vendor", "second", "rsa"])
@pytest.mark.parametrize("form", ["key", "certificate", "chain"])
def test_bundles_that_sigstore_js_made(sim, envelope, tmp_path, name, form):
    """Encoding, signature and bundle are all made by node; the key is found under whatever hint it has."""
    key = sim.keys[name]
    (tmp_path / "key").write_bytes(key.pem(None))
    (tmp_path / "statement").write_bytes(envelope.payload)
    leaf = ca.issue("Release", INTER, key=load_pem_private_key(key.pem(None), None))
    (tmp_path / "leaf").write_bytes(leaf.pem)
    extra = {"key": [], "certificate": [tmp_path / "leaf"], "chain": [tmp_path / "leaf", "chain"]}[form]
    command = [
        "node",
        "make_bundle.mjs",
        tmp_path / "statement",
        tmp_path / "key",
        tmp_path / "out",
        "some-hint",
        *extra,
    ]
    subprocess.run(command, cwd=install(), check=True, capture_output=True)
    made = (tmp_path / "out").read_bytes()
    assert json.loads(made)["mediaType"] == BUNDLE_TYPES[1 if form == "chain" else 3]
    brought = with_intermediates(read_signed(made), [INTER.der, ROOT.der])
    assert brought.envelope.payload == envelope.payload
    vouchers = Vouchers((key.public,)) if form == "key" else Vouchers(roots=(ROOT.der,))
    assert signer_of(brought.envelope, 0, vouchers, now=ca.NOW + timedelta(days=1)) == key.public
    kept = () if form == "key" else (leaf.der, INTER.der)
    assert signature_material(brought.envelope.signatures[0], 0).certificates == kept


def test_only_issuers_complete_a_chain(document):
    document["verificationMaterial"] = {"certificate": {"rawBytes": text(LEAF.der)}}
    brought = read(document)
    for offered, kept in (
        ([], (LEAF.der,)),
        ([ROOT.der], (LEAF.der,)),
        ([ROOT.der, INTER.der], (LEAF.der, INTER.der)),
        ([ca.issue("Stranger", ca=True).der, INTER.der], (LEAF.der, INTER.der)),
    ):
        found = with_intermediates(brought, offered).envelope.signatures[0]
        assert signature_material(found, 0).certificates == kept


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda d: d.update(mediaType="application/vnd.dev.sigstore.bundle.v9+json"), UnsupportedError),
        (lambda d: d.update(mediaType=["x"]), UnsupportedError),
        (lambda d: d.pop("mediaType"), BadSignatureError),
        (lambda d: d.update(messageSignature=d.pop("dsseEnvelope")), UnsupportedError),
        (lambda d: d.update(dsseEnvelope=[]), BadSignatureError),
        (lambda d: d.pop("verificationMaterial"), BadSignatureError),
        (lambda d: d.update(verificationMaterial=[]), BadSignatureError),
        (lambda d: d["verificationMaterial"].pop("publicKey"), BadSignatureError),
        (lambda d: d["verificationMaterial"].update(certificate={"rawBytes": "MAA="}), BadSignatureError),
        (lambda d: d.update(verificationMaterial={"certificate": "x"}), BadSignatureError),
        (lambda d: d.update(verificationMaterial={"certificate": {"rawBytes": "="}}), BadSignatureError),
        (lambda d: d.update(verificationMaterial={"x509CertificateChain": {"certificates": []}}), BadSignatureError),
        (
            lambda d: d.update(verificationMaterial={"x509CertificateChain": chain(*[LEAF.der] * 9)}),
            BadSignatureError,
        ),
        (
            lambda d: d.update(verificationMaterial={"x509CertificateChain": chain(LEAF.der, b"junk")}),
            BadSignatureError,
        ),
        (lambda d: d["verificationMaterial"].update(timestampVerificationData="x"), BadSignatureError),
        (lambda d: d["dsseEnvelope"]["signatures"].append({"sig": "AAAA"}), BadSignatureError),
        (lambda d: d["dsseEnvelope"]["signatures"].clear(), BadSignatureError),
        (lambda d: d["dsseEnvelope"].update(payloadType="text/plain"), BadSignatureError),
        (lambda d: d["dsseEnvelope"].update(payload="%"), BadSignatureError),
    ],
)
def test_refusals(document, edit, error):
    broken = copy.deepcopy(document)
    edit(broken)
    with pytest.raises(error):
        read(broken)


@pytest.mark.parametrize("certificates", [(LEAF.der, b"\x30\0"), (b"\x30\0", b"\x30\0"), (LEAF.der, b"0")])
def test_a_malformed_certificate_names_its_file(document, certificates):
    """The last one is parsed to see whether it is a root."""
    document["verificationMaterial"] = {"x509CertificateChain": chain(*certificates)}
    with pytest.raises(BadSignatureError, match="malformed") as caught:
        read_signed(json.dumps(document).encode(), file="x.json")
    assert (caught.value.file, caught.value.field) == ("x.json", "certificate")
    document["verificationMaterial"] = {"certificate": {"rawBytes": text(b"\x30\0")}}
    brought = read_signed(json.dumps(document).encode(), file="x.json")
    with pytest.raises(BadSignatureError, match="malformed") as caught:
        with_intermediates(brought, [INTER.der], file="x.json")
    assert caught.value.file == "x.json"
    with pytest.raises(BadSignatureError, match=r"signature 0: .*malformed") as caught:
        signer_of(brought.envelope, 0, Vouchers(roots=(ROOT.der,)), now=ca.NOW, file="x.json")
    assert caught.value.file == "x.json"


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{}", b'"x"', b"\xff", b"{" * 99, b" " * (MAX_BUNDLE + 1)])
def test_what_is_no_json_object(data):
    with pytest.raises(BadSignatureError) as caught:
        read_signed(data, file="x.json")
    assert caught.value.file == "x.json"


def test_an_envelope_with_malformed_certificates(envelope):
    (signature,) = envelope.signatures
    extension = pack_material(Material((LEAF.der,)))
    extension["ext"]["x509CertificateChain"]["certificates"] = "x"
    broken = Envelope(envelope.payload, (Signature(signature.keyid, signature.sig, extension),))
    with pytest.raises(BadSignatureError):
        read_signed(serialise(broken))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_member_may_be_anything(data):
    """Whatever stands at any one place of a bundle, the answer is an envelope or one of our errors."""
    payload = text(b"{}")
    document = {
        "mediaType": BUNDLE_TYPES[1],
        "verificationMaterial": {
            "x509CertificateChain": chain(LEAF.der),
            "timestampVerificationData": {"rfc3161Timestamps": [{"signedTimestamp": "MAA="}]},
        },
        "dsseEnvelope": {
            "payload": payload, "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig": "AAAA"}],
        },
    }  # fmt: skip
    node, parent, key = document, None, None
    for _ in range(data.draw(st.integers(1, 5))):
        if not isinstance(node, dict | list) or not node:
            break
        parent = node
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
        node = node[key]
    parent[key] = data.draw(JSON)
    try:
        read_signed(json.dumps(document).encode())
    except VmgraftError as error:
        assert error.message
