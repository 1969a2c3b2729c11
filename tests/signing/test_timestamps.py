"""Timestamps: what ``openssl ts`` makes we take, what it refuses we refuse, and what it leaves open too."""

from __future__ import annotations

import hashlib
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import signing_ca as ca
from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st
from openssl_tsa import STAMPING, Tsa, serve, tsa_leaf

from vmgraft.errors import BadSignatureError, FileError, UntrustedSignerError, UsageError, VmgraftError
from vmgraft.signing import _tsp
from vmgraft.signing.certificates import DEVELOPMENT, Authority, certify
from vmgraft.signing.material import MAX_TIMESTAMP
from vmgraft.signing.timestamps import (
    TimestampAuthority,
    accept_response,
    examine_timestamp,
    fetch,
    make_request,
    verify_timestamp,
)

SIGNATURE = b"the bytes of a signature"
WIDE = (-4000, 4000)  # openssl stamps with the clock, whatever time the tests pretend that it is
ROOT = ca.issue("TSA Root", ca=True, days=WIDE)
INTER = ca.issue("TSA Intermediate", ROOT, ca=True, days=WIDE)
LEAF = tsa_leaf(INTER, days=WIDE)
TRUST = [TimestampAuthority("acme-time", (ROOT.der,))]


@pytest.fixture
def tsa(tmp_path: Path) -> Tsa:
    (tmp_path / "serial").write_text("01")
    return Tsa(tmp_path, LEAF, (INTER,))


@pytest.fixture(scope="module")
def response(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("tsa")
    (folder / "serial").write_text("01")
    return Tsa(folder, LEAF, (INTER,)).reply(make_request(SIGNATURE))


def stamp(tsa: Tsa, **changes: object) -> bytes:
    for name, value in changes.items():
        setattr(tsa, name, value)
    return tsa.reply(make_request(SIGNATURE))


# --- good ones


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_openssl_reads_our_request_and_we_its_answer(tsa: Tsa, algorithm: str) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    request = make_request(SIGNATURE, algorithm=algorithm)
    answer = tsa.reply(request)
    stored, seen = accept_response(answer, request, SIGNATURE)
    assert stored == answer and seen.authority == ""
    found = examine_timestamp(stored, SIGNATURE, TRUST)
    assert before <= found.time <= datetime.now(UTC) + timedelta(seconds=1)  # its accuracy
    assert found.authority == "acme-time" and "CN=TSA" in found.signer and found.warnings == ()
    assert found.time == seen.time == verify_timestamp(stored, SIGNATURE, TRUST)
    assert tsa.openssl_verifies(stored, SIGNATURE, ROOT)


def test_our_request_in_the_words_of_openssl(tmp_path: Path) -> None:
    (tmp_path / "q").write_bytes(make_request(SIGNATURE))
    done = subprocess.run(
        ["openssl", "ts", "-query", "-in", "q", "-text"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "Hash Algorithm: sha256" in done.stdout and "Certificate required: yes" in done.stdout
    assert "Nonce: 0x" in done.stdout and "Nonce: unspecified" not in done.stdout
    assert make_request(SIGNATURE) != make_request(SIGNATURE)


KINDS = {
    "p384": (lambda: ec.generate_private_key(ec.SECP384R1()), "sha384", "sha256"),
    "rsa3072": (lambda: rsa.generate_private_key(public_exponent=65537, key_size=3072), "sha512", "sha512"),
    "old name of the certificate": (lambda: ec.generate_private_key(ec.SECP256R1()), "sha256", "sha1"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_signers_of_every_kind(tsa: Tsa, kind: str) -> None:
    make, digest, ess = KINDS[kind]
    token = stamp(tsa, signer=tsa_leaf(INTER, days=WIDE, key=make()), digest=digest, ess=ess, ess_chain="yes")
    assert examine_timestamp(token, SIGNATURE, TRUST).authority == "acme-time"
    assert tsa.openssl_verifies(token, SIGNATURE, ROOT)


def test_a_token_without_the_response_around_it(tsa: Tsa) -> None:
    request = make_request(SIGNATURE)
    token = tsa.reply(request, "-token_out")
    assert verify_timestamp(token, SIGNATURE, TRUST)
    stored, _ = accept_response(token, request, SIGNATURE)
    assert stored.endswith(token) and verify_timestamp(stored, SIGNATURE, TRUST)
    assert tsa.openssl_verifies(stored, SIGNATURE, ROOT)  # which reads responses


def test_the_first_authority_with_a_path_counts(response: bytes) -> None:
    other = TimestampAuthority("other", (ca.issue("TSA Root", ca=True, days=WIDE).der,))
    assert examine_timestamp(response, SIGNATURE, [other, *TRUST]).authority == "acme-time"
    with pytest.raises(UntrustedSignerError, match="other: "):
        verify_timestamp(response, SIGNATURE, [other])
    with pytest.raises(UntrustedSignerError, match="no timestamp authority here"):
        verify_timestamp(response, SIGNATURE, [])


def test_development_authorities_are_marked(tsa: Tsa) -> None:
    root = ca.issue("TSA Root", ca=True, days=WIDE, organisation=DEVELOPMENT)
    token = stamp(tsa, signer=tsa_leaf(root, days=WIDE), chain=())
    found = examine_timestamp(token, SIGNATURE, [TimestampAuthority("dev", (root.der,))])
    assert "anybody may hold its keys" in found.warnings[0]
    request = make_request(SIGNATURE)
    _, seen = accept_response(tsa.reply(request), request, SIGNATURE)
    assert "anybody may hold its keys" in seen.warnings[0], "also where no authority was named"


def test_vagueness_is_added(tsa: Tsa) -> None:
    token = stamp(tsa, accuracy="secs:60, millisecs:500, microsecs:100")
    stated = asn1.decode_der(_tsp.TstInfo, content_of(token)).time.as_datetime()
    vague = timedelta(seconds=60, milliseconds=500, microseconds=100)
    assert verify_timestamp(token, SIGNATURE, TRUST) == stated + vague
    with pytest.raises(BadSignatureError, match="vaguer"):
        verify_timestamp(stamp(tsa, accuracy="secs:3601"), SIGNATURE, TRUST)


def content_of(token: bytes) -> bytes:
    return asn1.decode_der(_tsp.Response, token).token.content.content.content


def test_a_signature_outlives_its_certificate(response: bytes) -> None:
    """The leaf is good when the signature is stamped, and judged long after it ended."""
    issuer = ca.issue("Root", ca=True, days=WIDE)
    leaf = ca.issue("Release", issuer, days=(-4000, 3000))
    authority, later = Authority("acme", (issuer.der,)), ca.NOW + timedelta(days=3500)
    assert "expired at" in str(certify([leaf.der], [authority], at=later, now=later).expired)
    when = verify_timestamp(response, SIGNATURE, TRUST)
    assert certify([leaf.der], [authority], at=when, now=later).expired is None


# --- bad ones


def test_it_is_over_these_bytes_alone(tsa: Tsa, response: bytes) -> None:
    with pytest.raises(BadSignatureError, match="over other bytes"):
        verify_timestamp(response, SIGNATURE + b"\0", TRUST)
    assert not tsa.openssl_verifies(response, SIGNATURE + b"\0", ROOT)


def _weak(tsa: Tsa) -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return stamp(tsa, signer=tsa_leaf(INTER, days=WIDE, key=key))


UNTRUSTED = {
    "expired when it was stamped": lambda tsa: stamp(tsa, signer=tsa_leaf(INTER, days=(-4000, -3000))),
    "not yet valid": lambda tsa: stamp(tsa, signer=tsa_leaf(INTER, days=(3000, 4000))),
    "no path": lambda tsa: stamp(tsa, chain=()),
    "another root": lambda tsa: stamp(tsa, signer=tsa_leaf(ca.issue("R", ca=True, days=WIDE), days=WIDE), chain=()),
}
UNTRUSTED_HERE_ALONE = {
    "the intermediate is for other things": lambda tsa: _under_usage(tsa, ExtendedKeyUsageOID.CODE_SIGNING),
    "RSA of 2048 bits": _weak,
}


@pytest.mark.parametrize("name", UNTRUSTED | UNTRUSTED_HERE_ALONE)
def test_certificates_that_do_not_count(tsa: Tsa, name: str) -> None:
    token = (UNTRUSTED | UNTRUSTED_HERE_ALONE)[name](tsa)
    with pytest.raises(UntrustedSignerError, match="no trusted path for the timestamp"):
        verify_timestamp(token, SIGNATURE, TRUST)
    assert tsa.openssl_verifies(token, SIGNATURE, ROOT) is (name in UNTRUSTED_HERE_ALONE)


def _under_usage(tsa: Tsa, usage: x509.ObjectIdentifier) -> bytes:
    inter = ca.issue("I", ROOT, ca=True, days=WIDE, extra=((x509.ExtendedKeyUsage((usage,)), False),))
    return stamp(tsa, signer=tsa_leaf(inter, days=WIDE), chain=(inter,))


def test_an_intermediate_may_be_for_time_stamping(tsa: Tsa) -> None:
    token = _under_usage(tsa, STAMPING)
    assert verify_timestamp(token, SIGNATURE, TRUST) and tsa.openssl_verifies(token, SIGNATURE, ROOT)


@pytest.mark.parametrize(
    ("usages", "critical"),
    [((STAMPING,), False), ((STAMPING, ExtendedKeyUsageOID.CODE_SIGNING), True),
     ((ExtendedKeyUsageOID.CODE_SIGNING,), True), ((), True)],
)  # fmt: skip
def test_a_signer_for_time_stamping_alone(tsa: Tsa, usages: tuple[x509.ObjectIdentifier, ...], critical: bool) -> None:
    """openssl will not sign with such a certificate, so its token is signed with one twin and rebuilt for the other."""
    good = tsa_leaf(ROOT, days=WIDE)
    forged = rebuild(stamp(tsa, signer=good, chain=()), tsa_leaf(ROOT, usages=usages, critical=critical, days=WIDE))
    with pytest.raises(UntrustedSignerError, match="no trusted path"):
        verify_timestamp(forged, SIGNATURE, TRUST)
    assert not tsa.openssl_verifies(forged, SIGNATURE, ROOT)
    same = rebuild(stamp(tsa, signer=good, chain=()), tsa_leaf(ROOT, days=WIDE))
    assert verify_timestamp(same, SIGNATURE, TRUST) and tsa.openssl_verifies(same, SIGNATURE, ROOT)


def test_a_statement_by_another_authority(tsa: Tsa) -> None:
    token = rebuild(stamp(tsa, signer=tsa_leaf(ROOT, days=WIDE), chain=()), tsa_leaf(ROOT, "Twin", days=WIDE))
    with pytest.raises(BadSignatureError, match="names another authority"):
        verify_timestamp(token, SIGNATURE, TRUST)
    assert not tsa.openssl_verifies(token, SIGNATURE, ROOT)


# --- a token taken apart and put together again


def sequence(*parts: bytes, tag: bytes = b"\x30") -> bytes:
    return _tsp.encode(tag, b"".join(parts))


def attribute(oid: x509.ObjectIdentifier, *values: bytes) -> bytes:
    return sequence(asn1.encode_der(oid), sequence(*values, tag=b"\x31"))


def rebuild(
    token: bytes,
    signer: ca.Entity,
    *,
    certificates: tuple[bytes, ...] | None = None,
    content: bytes | None = None,
    named: bytes | None = None,
    attributes: tuple[bytes, ...] | None = None,
    digest_of: bytes | None = None,
    content_type: x509.ObjectIdentifier = _tsp.TST_INFO,
    more: tuple[bytes, ...] = (),
    version: int = 3,
    copies: int = 1,
) -> bytes:
    """Sign what a token states again, as another signer, with any part of it bent."""
    content = content_of(token) if content is None else content
    sha256 = sequence(asn1.encode_der(x509.ObjectIdentifier("2.16.840.1.101.3.4.2.1")))
    ecdsa = sequence(asn1.encode_der(x509.ObjectIdentifier("1.2.840.10045.4.3.2")))
    digest = hashlib.sha256(content if digest_of is None else digest_of).digest()
    named = named or hashlib.sha256(signer.der).digest()
    signed = attributes or (
        attribute(_tsp.CONTENT_TYPE, asn1.encode_der(content_type)),
        attribute(_tsp.MESSAGE_DIGEST, asn1.encode_der(digest)),
        attribute(_tsp.SIGNING_CERTIFICATE_V2, sequence(sequence(sequence(asn1.encode_der(named))))),
    )
    signed = tuple(sorted((*signed, *more)))
    signature = signer.key.sign(sequence(*signed, tag=b"\x31"), ec.ECDSA(hashes.SHA256()))
    serial = signer.cert.serial_number
    issuer = sequence(
        signer.cert.issuer.public_bytes(), _tsp.encode(b"\x02", serial.to_bytes(serial.bit_length() // 8 + 1, "big"))
    )
    info = sequence(
        asn1.encode_der(1), issuer, sha256, sequence(*signed, tag=b"\xa0"), ecdsa, asn1.encode_der(signature)
    )
    data = sequence(
        asn1.encode_der(version),
        sequence(sha256, tag=b"\x31"),
        sequence(asn1.encode_der(content_type), sequence(asn1.encode_der(content), tag=b"\xa0")),
        sequence(*((signer.der,) if certificates is None else certificates), tag=b"\xa0"),
        sequence(*([info] * copies), tag=b"\x31"),
    )
    return sequence(
        sequence(asn1.encode_der(0)), sequence(asn1.encode_der(_tsp.SIGNED_DATA), sequence(data, tag=b"\xa0"))
    )


def test_rebuilt_tokens_are_good(tsa: Tsa, response: bytes) -> None:
    again = rebuild(response, LEAF, certificates=(INTER.der, LEAF.der))
    assert verify_timestamp(again, SIGNATURE, TRUST) and tsa.openssl_verifies(again, SIGNATURE, ROOT)


def _other_leaf(**changes: object) -> ca.Entity:
    return tsa_leaf(INTER, days=WIDE, **changes)


def _impostor() -> ca.Entity:
    """Another key under the issuer and serial number of the true signer."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder(
        LEAF.cert.issuer, LEAF.cert.subject, key.public_key(), LEAF.cert.serial_number,
        LEAF.cert.not_valid_before_utc, LEAF.cert.not_valid_after_utc,
    )  # fmt: skip
    for extension in LEAF.cert.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return ca.Entity(builder.sign(key, ca.hashes.SHA256()), key)


def _critical_extension(token: bytes) -> bytes:
    extension = sequence(
        asn1.encode_der(x509.ObjectIdentifier("1.2.3.4")), asn1.encode_der(True), asn1.encode_der(b"x")
    )
    inner = bytes(asn1.decode_der(asn1.TLV, content_of(token)).data)
    return sequence(inner, sequence(extension, tag=b"\xa1"))


BENT = {
    "the statement was altered": lambda t: {"digest_of": b"other"},
    "another certificate is named": lambda t: {"named": _other_leaf_digest()},
    "no certificate is named": lambda t: {"attributes": (
        attribute(_tsp.CONTENT_TYPE, asn1.encode_der(_tsp.TST_INFO)),
        attribute(_tsp.MESSAGE_DIGEST, asn1.encode_der(_sha256(content_of(t)))))},
    "no content type": lambda t: {"attributes": (
        attribute(_tsp.MESSAGE_DIGEST, asn1.encode_der(_sha256(content_of(t)))),
        attribute(_tsp.SIGNING_CERTIFICATE_V2, sequence(sequence(sequence(asn1.encode_der(_sha256(LEAF.der)))))))},
    "another content type": lambda t: {"content_type": x509.ObjectIdentifier("1.2.840.113549.1.7.1")},
    "an attribute twice": lambda t: {"more": (attribute(_tsp.MESSAGE_DIGEST, asn1.encode_der(b"x")),)},
    "an attribute of two values": lambda t: {"more": (
        attribute(x509.ObjectIdentifier("1.2.3"), asn1.encode_der(1), asn1.encode_der(2)),)},
    "the signer's certificate is missing": lambda t: {"certificates": (INTER.der,)},
    "no certificate at all": lambda t: {"certificates": ()},
    "nine certificates": lambda t: {"certificates": (LEAF.der,) * 9},
    "a certificate is malformed": lambda t: {"certificates": (LEAF.der, sequence(asn1.encode_der(1)))},
    "two signers": lambda t: {"copies": 2},
    "another version": lambda t: {"version": 1},
    "a critical extension in the statement": lambda t: {"content": _critical_extension(t)},
    "the statement is not one": lambda t: {"content": sequence(asn1.encode_der(1))},
}  # fmt: skip


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _other_leaf_digest() -> bytes:
    return _sha256(_other_leaf().der)


@pytest.mark.parametrize("name", BENT)
def test_bent_tokens(response: bytes, name: str) -> None:
    with pytest.raises(BadSignatureError):
        verify_timestamp(rebuild(response, LEAF, **BENT[name](response)), SIGNATURE, TRUST)


def test_a_certificate_that_only_looks_like_the_signers(response: bytes) -> None:
    """Same issuer, same serial number, another key: the signed digest tells which one signed."""
    impostor = _impostor()
    for certificates in ((impostor.der, LEAF.der, INTER.der), (LEAF.der, impostor.der, INTER.der)):
        token = rebuild(response, impostor, certificates=certificates)
        with pytest.raises(UntrustedSignerError):
            verify_timestamp(token, SIGNATURE, TRUST)
        token = rebuild(response, impostor, certificates=certificates, named=_sha256(LEAF.der))
        with pytest.raises(BadSignatureError, match="its own signature"):
            verify_timestamp(token, SIGNATURE, TRUST)


def test_a_refusal_says_why(tsa: Tsa) -> None:
    query = bytearray(make_request(SIGNATURE))
    at = query.index(bytes.fromhex("608648016503040201"))
    query[at : at + 9] = bytes.fromhex("608648016503040204")  # SHA-224, which this authority does not do
    with pytest.raises(BadSignatureError, match=r"refused, status 2.*not supported"):
        verify_timestamp(tsa.reply(bytes(query)), SIGNATURE, TRUST)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x30\x00", b"\x30\x80\x00\x00", b"{}", b"\x30" * 900, bytes.fromhex("30053003020100"),
     b"\x30\x82\xff\xff" + b"\0" * 9, b"\x30\x03" + b"\x02\x01\x00", b"0" * (MAX_TIMESTAMP + 1)],
)  # fmt: skip
def test_malformed(data: bytes) -> None:
    with pytest.raises(BadSignatureError, match="cannot be used"):
        verify_timestamp(data, SIGNATURE, TRUST)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_tokens(response: bytes, data: st.DataObject) -> None:
    damaged = bytearray(response)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        when = verify_timestamp(bytes(damaged), SIGNATURE, TRUST)
    except VmgraftError:
        return
    assert when == verify_timestamp(response, SIGNATURE, TRUST)  # what is signed did not change


# --- the answer to a request


def test_answers_to_other_requests(tsa: Tsa) -> None:
    first, second = make_request(SIGNATURE), make_request(SIGNATURE)
    answer = tsa.reply(first)
    with pytest.raises(BadSignatureError, match="nonces differ") as caught:
        accept_response(answer, second, SIGNATURE, file="a.tsr")
    assert caught.value.file == "a.tsr" and caught.value.field == "timestamp"
    with pytest.raises(BadSignatureError, match="request is not over"):
        accept_response(answer, make_request(b"other"), SIGNATURE)
    with pytest.raises(BadSignatureError, match="another digest"):
        accept_response(answer, make_request(SIGNATURE, algorithm="sha512"), SIGNATURE)
    with pytest.raises(BadSignatureError, match="request is malformed"):
        accept_response(answer, b"\x30\x00", SIGNATURE)


def test_requests_for_nothing() -> None:
    with pytest.raises(UsageError):
        make_request(b"")
    with pytest.raises(UsageError):
        make_request(SIGNATURE, algorithm="sha1")


# --- over HTTP


def test_fetch(tsa: Tsa) -> None:
    seen = {}

    def answer(headers, body):
        seen.update(headers)
        return 200, {"Content-Type": "application/timestamp-reply"}, tsa.reply(body)

    request = make_request(SIGNATURE)
    with serve(answer) as url:
        stored, _ = accept_response(fetch(url, request), request, SIGNATURE, file=url)
    assert verify_timestamp(stored, SIGNATURE, TRUST)
    assert seen["Content-Type"] == "application/timestamp-query"


REPLY = {"Content-Type": "application/timestamp-reply"}
ANSWERS = {
    "an error": ((500, REPLY, b"x"), "answers 500"),
    "a redirect": ((302, {"Location": "http://127.0.0.1:1/"}, b""), "answers 302"),
    "a page": ((200, {"Content-Type": "text/html"}, b"<p>"), "text/html"),
    "too much": ((200, REPLY, b"x" * (MAX_TIMESTAMP + 1)), "more than"),
    "less than announced": ((200, REPLY | {"Content-Length": "99"}, b"x"), "cannot be asked"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_are_none(name: str) -> None:
    given_, words = ANSWERS[name]
    with serve(lambda _headers, _body: given_) as url, pytest.raises(FileError, match=words) as caught:
        fetch(url, b"request")
    assert caught.value.file == url


def test_an_answer_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 9999, 30))
    with serve(lambda _headers, _body: (200, REPLY, b"x")) as url:
        monkeypatch.setattr("time.monotonic", lambda: next(clock))
        with pytest.raises(FileError, match="takes too long"):
            fetch(url, b"request")


def test_nobody_answers() -> None:
    with serve(lambda _headers, _body: (200, REPLY, b"")) as url:
        pass
    with pytest.raises(FileError, match="cannot be asked") as caught:
        fetch(url, b"request")
    assert caught.value.hint


@pytest.mark.parametrize(
    "url",
    ["", "tsa.example", "file:///etc/passwd", "ftp://tsa.example/", "http://", "http://u:p@tsa.example/",
     "http://tsa.example:x/", "http://tsa.example/\n", "http://[::1", "data:,x"],
)  # fmt: skip
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        fetch(url, b"request")
