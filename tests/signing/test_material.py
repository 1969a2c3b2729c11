"""Certificates and timestamps beside a signature: there and back, and everything that is not that."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import BadSignatureError
from vmgraft.signing.material import (
    KIND,
    MAX_CERTIFICATE,
    MAX_CERTIFICATES,
    MAX_TIMESTAMP,
    MAX_TIMESTAMPS,
    Material,
    pack_material,
    parse_material,
)

FIELD = "signatures[0].extension"


def parse(extension):
    return parse_material(extension, field=FIELD)


@given(
    st.lists(st.binary(min_size=1, max_size=99), max_size=MAX_CERTIFICATES).map(tuple),
    st.lists(st.binary(min_size=1, max_size=99), max_size=MAX_TIMESTAMPS).map(tuple),
)
def test_there_and_back(certificates, timestamps):
    material = Material(certificates, timestamps)
    packed = pack_material(material)
    assert (packed is None) is not bool(certificates or timestamps)
    assert parse(json.loads(json.dumps(packed))) == material


def test_largest():
    material = Material((b"c" * MAX_CERTIFICATE,) * MAX_CERTIFICATES, (b"t" * MAX_TIMESTAMP,) * MAX_TIMESTAMPS)
    assert parse(pack_material(material)) == material


def test_other_kinds_are_left_alone():
    assert parse({"kind": "something else", "ext": 7}) is None
    assert parse({}) is None


def chain(*entries):
    return {"kind": KIND, "ext": {"x509CertificateChain": {"certificates": list(entries)}}}


@pytest.mark.parametrize(
    ("extension", "where"),
    [
        ({"kind": KIND}, "ext"),
        ({"kind": KIND, "ext": []}, "ext"),
        ({"kind": KIND, "ext": {}, "more": 1}, ""),
        ({"kind": KIND, "ext": {"publicKey": {}}}, "ext"),
        ({"kind": KIND, "ext": {"x509CertificateChain": []}}, "x509CertificateChain"),
        ({"kind": KIND, "ext": {"x509CertificateChain": {}}}, "certificates"),
        ({"kind": KIND, "ext": {"x509CertificateChain": {"certificates": {}}}}, "certificates"),
        (chain(), "certificates"),
        (chain(*[{"rawBytes": "AA=="}] * (MAX_CERTIFICATES + 1)), "certificates"),
        (chain("AA=="), "certificates[0]"),
        (chain({"rawBytes": "AA==", "more": 1}), "certificates[0]"),
        (chain({}), "rawBytes"),
        (chain({"rawBytes": ""}), "rawBytes"),
        (chain({"rawBytes": 7}), "rawBytes"),
        (chain({"rawBytes": "AA"}), "rawBytes"),
        (chain({"rawBytes": "AB=="}), "rawBytes"),
        (chain({"rawBytes": "A_=="}), "rawBytes"),
        (chain({"rawBytes": "AA==\n"}), "rawBytes"),
        (chain({"rawBytes": "ÄÄ=="}), "rawBytes"),
        (chain({"rawBytes": "AAAA" * (MAX_CERTIFICATE // 3 + 2)}), "rawBytes"),
        ({"kind": KIND, "ext": {"timestampVerificationData": {"rfc3161Timestamps": [{}]}}}, "signedTimestamp"),
    ],
)
def test_malformed(extension, where):
    with pytest.raises(BadSignatureError) as caught:
        parse(extension)
    assert caught.value.field.startswith(FIELD) and caught.value.field.endswith(where)
