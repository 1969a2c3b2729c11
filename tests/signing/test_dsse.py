from __future__ import annotations

import base64
import json

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import BadSignatureError, VmgraftError
from vmgraft.signing.dsse import MAX_ENVELOPE, PAYLOAD_TYPE, Envelope, Signature, pae, parse_envelope, serialise

#: DSSE protocol.md 1.0.0, "Test Vectors".
VECTOR_TYPE = "http://example.com/HelloWorld"
VECTOR_X = 46950820868899156662930047687818585632848591499744589407958293238635476079160
VECTOR_Y = 5640078356564379163099075877009565129882514886557779369047442380624545832820
VECTOR_SIGNATURE = "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="


def b64(data):
    return base64.b64encode(data).decode()


def document(**changes):
    base = {"payload": b64(b"{}"), "payloadType": PAYLOAD_TYPE, "signatures": [{"keyid": "k", "sig": b64(b"s")}]}
    return {name: value for name, value in (base | changes).items() if value is not None}


def parse(doc):
    return parse_envelope(json.dumps(doc).encode(), file="envelope")


def test_protocol_vector():
    message = pae(VECTOR_TYPE, b"hello world")
    assert message == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    raw = base64.b64decode(VECTOR_SIGNATURE)
    signature = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
    key = ec.EllipticCurvePublicNumbers(VECTOR_X, VECTOR_Y, ec.SECP256R1()).public_key()
    key.verify(signature, message, ec.ECDSA(hashes.SHA256()))


def test_pae_counts_bytes():
    assert pae("ü", "ö".encode()) == "DSSEv1 2 ü 2 ö".encode()
    assert pae("", b"") == b"DSSEv1 0  0 "
    assert pae(PAYLOAD_TYPE, b"x").startswith(b"DSSEv1 28 ")


def test_round_trip():
    envelope = Envelope(b'{"a":1}', (Signature("k", b"\0\xff" * 9), Signature("", b"s", {"kind": "x"})))
    data = serialise(envelope)
    assert parse_envelope(data) == envelope
    assert data == serialise(parse_envelope(data))
    assert parse_envelope(data).pae == pae(PAYLOAD_TYPE, b'{"a":1}')


def test_both_base64_alphabets():
    payload = bytes(range(256))
    standard = b64(payload)
    assert "+" in standard and "/" in standard
    url_safe = base64.urlsafe_b64encode(payload).decode()
    assert parse(document(payload=standard)).payload == parse(document(payload=url_safe)).payload == payload
    with pytest.raises(BadSignatureError, match="base64"):
        parse(document(payload=standard.replace("+", "-", 1)))


def test_keyid_may_be_missing():
    assert parse(document(signatures=[{"sig": "c3M="}])).signatures == (Signature("", b"ss"),)


def sigs(*entries):
    return document(signatures=list(entries))


GOOD = {"keyid": "k", "sig": "c3M="}


@pytest.mark.parametrize(
    ("doc", "field"),
    [
        ([], "envelope"),
        ("x", "envelope"),
        (document(payload=None), "envelope"),
        (document(payloadType=None), "envelope"),
        (document(signatures=None), "envelope"),
        (document(extra=1), "envelope"),
        (document(payloadType="application/json"), "payloadType"),
        (document(payloadType=[PAYLOAD_TYPE]), "payloadType"),
        (document(payload="e30"), "payload"),
        (document(payload="e31="), "payload"),
        (document(payload="e30=\n"), "payload"),
        (document(payload="e3 0="), "payload"),
        (document(payload="e30=="), "payload"),
        (document(payload="===="), "payload"),
        (document(payload=7), "payload"),
        (sigs(), "signatures"),
        (document(signatures={}), "signatures"),
        (sigs(*[GOOD] * 17), "signatures"),
        (sigs("x"), "signatures[0]"),
        (sigs(GOOD, {"keyid": "k"}), "signatures[1]"),
        (sigs(GOOD | {"cert": "x"}), "signatures[0]"),
        (sigs(GOOD | {"keyid": 1}), "signatures[0].keyid"),
        (sigs(GOOD | {"keyid": None}), "signatures[0].keyid"),
        (sigs(GOOD | {"keyid": "k\x1b[2J"}), "signatures[0].keyid"),
        (sigs(GOOD | {"keyid": "k" * 257}), "signatures[0].keyid"),
        (sigs(GOOD | {"sig": ""}), "signatures[0].sig"),
        (sigs(GOOD | {"sig": b64(b"s" * 8193)}), "signatures[0].sig"),
        (sigs(GOOD | {"extension": None}), "signatures[0].extension"),
    ],
)
def test_malformed(doc, field):
    with pytest.raises(BadSignatureError) as caught:
        parse(doc)
    assert (caught.value.file, caught.value.field) == ("envelope", field)


def test_duplicate_names_and_size():
    with pytest.raises(BadSignatureError, match="twice"):
        parse_envelope(b'{"payload":"","payload":"","payloadType":"x","signatures":[]}')
    with pytest.raises(BadSignatureError, match="more than"):
        parse_envelope(b" " * (MAX_ENVELOPE + 1))


@given(st.binary(max_size=200))
def test_only_our_error_for_any_bytes(data):
    with pytest.raises(BadSignatureError):
        parse_envelope(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("c3M="),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["keyid", "sig", "extension", "x"]), inner)
    ),
    max_leaves=6,
)


@given(JSON, JSON, JSON)
def test_only_our_error_for_any_json(payload, kind, signatures):
    try:
        parse({"payload": payload, "payloadType": kind, "signatures": signatures})
        parse({"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": [signatures]})
    except VmgraftError as exc:
        assert type(exc) is BadSignatureError
