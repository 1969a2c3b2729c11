"""Certificate chains: what `openssl verify` says, we say; and what it does not look at, we do."""

from __future__ import annotations

import base64
import re
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import signing_ca as ca
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import BadSignatureError, UntrustedSignerError, VmgraftError
from vmgraft.signing.certificates import DEVELOPMENT, Authority, certify, leaf_key
from vmgraft.signing.keys import public_from_pem
from vmgraft.signing.revocation import parse_crl

ROOT = ca.issue("Root", ca=True)
INTER = ca.issue("Intermediate", ROOT, ca=True, path_length=0)
LEAF = ca.issue("Release", INTER, names=(x509.RFC822Name("release@acme.example"), x509.DNSName("acme.example")))
STRANGER = ca.issue("Root", ca=True)  # the same name, another key


def authority(*crls: bytes, root: ca.Entity = ROOT, require: bool = False) -> Authority:
    return Authority("acme", (root.der,), crls, require)


def judge(*chain: ca.Entity, trust: Authority | None = None, days: float = 0):
    at = ca.NOW + timedelta(days=days)
    return certify([entity.der for entity in chain], [trust or authority()], at=at, now=at)


def openssl_agrees(
    tmp_path: Path, good: bool, *chain: ca.Entity, crls: tuple[bytes, ...] = (), days: float = 0
) -> None:
    """Ask OpenSSL about the same chain and time; it knows nothing of codeSigning."""
    (tmp_path / "root.pem").write_bytes(ROOT.pem)
    (tmp_path / "leaf.pem").write_bytes(chain[0].pem)
    (tmp_path / "inter.pem").write_bytes(b"".join(entity.pem for entity in chain[1:]) or ROOT.pem)
    at = int((ca.NOW + timedelta(days=days)).timestamp())
    command = [
        "openssl",
        "verify",
        "-x509_strict",
        "-attime",
        str(at),
        "-trusted",
        "root.pem",
        "-untrusted",
        "inter.pem",
    ]
    if crls:
        text = b"".join(
            b"-----BEGIN X509 CRL-----\n" + base64.encodebytes(der) + b"-----END X509 CRL-----\n" for der in crls
        )
        (tmp_path / "crls.pem").write_bytes(text)
        command += ["-crl_check_all", "-CRLfile", "crls.pem"]
    done = subprocess.run([*command, "leaf.pem"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode == 0) is good, done.stdout + done.stderr


def test_a_good_chain(tmp_path: Path) -> None:
    found = judge(LEAF, INTER)
    assert found.authority == "acme" and found.expired is None and found.revoked is None and found.warnings == ()
    assert found.sans == ("email:release@acme.example", "dns:acme.example")
    assert found.name == "CN=Release,O=Acme,C=US"
    assert found.key == leaf_key([LEAF.der])
    assert found.not_after == LEAF.cert.not_valid_after_utc
    openssl_agrees(tmp_path, True, LEAF, INTER)
    pem = subprocess.run(
        ["openssl", "x509", "-pubkey", "-noout"], input=LEAF.pem, check=True, capture_output=True
    ).stdout
    assert found.key == public_from_pem(pem)


KINDS = {
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "rsa": lambda: rsa.generate_private_key(public_exponent=65537, key_size=3072),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("kind", KINDS)
def test_leaf_keys_of_every_kind(tmp_path: Path, kind: str) -> None:
    leaf = ca.issue("Release", INTER, key=KINDS[kind]())
    assert judge(leaf, INTER).key.kind == kind
    openssl_agrees(tmp_path, True, leaf, INTER)


def test_intermediates_in_any_order_and_strangers_among_them() -> None:
    deep = ca.issue("Deep", ca.issue("x", ca=True), ca=True)
    assert judge(LEAF, deep, INTER).expired is None


def _too_deep() -> tuple[ca.Entity, ...]:
    below = ca.issue("Below", INTER, ca=True)
    return ca.issue("Release", below), below, INTER


def _no_cert_sign() -> tuple[ca.Entity, ...]:
    weak = ca.issue("Weak", ROOT, ca=True, usage={"key_cert_sign": False})
    return ca.issue("Release", weak), weak


def _constrained(names: x509.NameConstraints) -> tuple[ca.Entity, ...]:
    inter = ca.issue("Constrained", ROOT, ca=True, extra=((names, True),))
    return ca.issue("Release", inter, names=(x509.DNSName("a.evil.example"),)), inter


def _with_unknown() -> ca.Entity:
    odd = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\x05\x00")
    return ca.issue("Release", INTER, extra=((odd, True),))


BAD_BY_OPENSSL_TOO = {
    "no intermediate": lambda: (LEAF,),
    "another root of the same name": lambda: (ca.issue("Release", STRANGER),),
    "the signature is by another key": lambda: (LEAF, ca.issue("Intermediate", STRANGER, ca=True)),
    "path length": _too_deep,
    "the issuer is no authority": lambda: (ca.issue("Evil", LEAF), LEAF, INTER),
    "the issuer may not sign certificates": _no_cert_sign,
    "excluded name": lambda: _constrained(x509.NameConstraints(None, [x509.DNSName("evil.example")])),
    "name not permitted": lambda: _constrained(x509.NameConstraints([x509.DNSName("acme.example")], None)),
    "unknown critical extension": lambda: (_with_unknown(), INTER),
}


@pytest.mark.parametrize("name", BAD_BY_OPENSSL_TOO)
def test_bad_chains(tmp_path: Path, name: str) -> None:
    chain = BAD_BY_OPENSSL_TOO[name]()
    openssl_agrees(tmp_path, False, *chain)
    with pytest.raises(UntrustedSignerError, match="no trusted path"):
        judge(*chain)


def _long() -> tuple[ca.Entity, ...]:
    chain, issuer = [], ROOT
    for number in range(8):
        issuer = ca.issue(f"I{number}", issuer, ca=True)
        chain.insert(0, issuer)
    return (ca.issue("Release", issuer), *chain)


BAD_HERE_ALONE = {
    "no extended key usage": lambda: (ca.issue("Release", INTER, usages=None), INTER),
    "another extended key usage": lambda: (ca.issue("R", INTER, usages=(ExtendedKeyUsageOID.SERVER_AUTH,)), INTER),
    "no digital signature": lambda: (ca.issue("Release", INTER, usage={"digital_signature": False}), INTER),
    "an authority as leaf": lambda: (ca.issue("Release", ROOT, ca=True),),
    "too long": _long,
}


@pytest.mark.parametrize("name", BAD_HERE_ALONE)
def test_chains_that_do_not_sign_code(name: str) -> None:
    with pytest.raises(UntrustedSignerError, match="no trusted path"):
        judge(*BAD_HERE_ALONE[name]())


def test_weak_keys() -> None:
    weak = ca.issue("Release", INTER, key=rsa.generate_private_key(public_exponent=65537, key_size=2048))
    with pytest.raises(UntrustedSignerError, match="2048 bits"):
        judge(weak, INTER)
    with pytest.raises(UntrustedSignerError):
        judge(ca.issue("Release", INTER, key=ec.generate_private_key(ec.SECP521R1())), INTER)


@pytest.mark.parametrize(("days", "what"), [(-20, "not valid before"), (400, "expired at")])
def test_validity_is_judged_at_the_time_asked_for(tmp_path: Path, days: int, what: str) -> None:
    found = judge(LEAF, INTER, days=days)
    assert found.expired is not None and what in found.expired
    openssl_agrees(tmp_path, False, LEAF, INTER, days=days)


def test_an_expired_chain_must_have_been_good_once() -> None:
    """A path that was valid at no time is no expired path."""
    inter = ca.issue("Intermediate", ROOT, ca=True, days=(-300, -200))
    with pytest.raises(UntrustedSignerError):
        judge(ca.issue("Release", inter, days=(-100, 100)), inter)
    with pytest.raises(UntrustedSignerError):
        judge(ca.issue("Release", STRANGER, days=(-100, -50)))


def test_a_renewed_root_does_not_hide_that_a_chain_ended() -> None:
    """The only time at which all were valid begins with the root."""
    root = ca.issue("Root", ca=True, days=(-20, -10))
    found = judge(ca.issue("Release", root, days=(-30, 30)), trust=authority(root=root))
    assert "CN=Root" in str(found.expired) and "expired at" in str(found.expired)


def test_hostile_sets_of_certificates_are_given_up_on_soon() -> None:
    """Six intermediates that certify each other in a ring, two of each: the number of paths is bounded."""
    ring = {name: ca.issue(name, ca=True) for name in "ABC"}
    between = [ca.issue(a, ring[b], ca=True, key=ring[a].key) for a, b in ("AB", "BC", "CA") for _ in range(2)]
    with pytest.raises(UntrustedSignerError, match="Exceeded maximum"):
        judge(ca.issue("Release", ring["A"]), *between, trust=authority(root=ca.issue("A", ca=True)))


def test_expiry_is_announced() -> None:
    found = judge(LEAF, INTER, days=340)
    assert len(found.warnings) == 3 and all("expires" in warning for warning in found.warnings)


def test_development_authorities_are_marked() -> None:
    root = ca.issue("Root", ca=True, organisation=DEVELOPMENT)
    found = judge(ca.issue("Release", root), trust=authority(root=root))
    assert any("development CA" in warning for warning in found.warnings)


# --- CRLs

ODD = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.55555.1"), b"\x05\x00")
SUPERSEDED = x509.CRLReason(x509.ReasonFlags.superseded)
#: Where OpenSSL is asked nothing: it takes deltas for full ones unless told otherwise, ignores the old one, believes
#: what is partial but covers the leaf, and the moment at which a CRL ends.
OPENSSL_DIFFERS = {"delta", "an old one lists the leaf", "partial, not critical", "partial", "ends at this moment"}


def _partial(*, indirect: bool = False) -> x509.IssuingDistributionPoint:
    return x509.IssuingDistributionPoint(
        full_name=None, relative_name=None, only_contains_user_certs=not indirect, only_contains_ca_certs=False,
        only_some_reasons=None, indirect_crl=indirect, only_contains_attribute_certs=False,
    )  # fmt: skip


GOOD_CRLS = (ca.crl(ROOT), ca.crl(INTER))
CRL_CASES = {
    "nothing revoked": (GOOD_CRLS, True, None),
    "leaf": ((ca.crl(ROOT), ca.crl(INTER, LEAF)), False, "CN=Release.*was revoked"),
    "intermediate": ((ca.crl(ROOT, INTER), ca.crl(INTER)), False, "CN=Intermediate.*was revoked"),
    "expired": ((ca.crl(ROOT), ca.crl(INTER, days=(-60, -1))), False, "expired at"),
    "from the future": ((ca.crl(ROOT), ca.crl(INTER, days=(5, 60))), False, "from the future"),
    "one is missing": ((ca.crl(ROOT),), False, "no usable CRL"),
    "by another key": ((ca.crl(ROOT), ca.crl(INTER, key=STRANGER.key)), False, "no usable CRL"),
    "renewed: an old one beside the current one": ((*GOOD_CRLS, ca.crl(INTER, days=(-90, -30))), True, None),
    "an old one lists the leaf": ((*GOOD_CRLS, ca.crl(INTER, LEAF, days=(-90, -30))), False, "was revoked"),
    "ends at this moment": ((ca.crl(ROOT), ca.crl(INTER, days=(-60, 0))), False, "expired at"),
    "partial": ((ca.crl(ROOT), ca.crl(INTER, extra=((_partial(), True),))), False, "no usable CRL"),
    "partial, not critical": ((ca.crl(ROOT), ca.crl(INTER, extra=((_partial(), False),))), False, "no usable CRL"),
    "indirect": ((ca.crl(ROOT), ca.crl(INTER, extra=((_partial(indirect=True), True),))), False, "no usable CRL"),
    "unknown critical extension": ((ca.crl(ROOT), ca.crl(INTER, extra=((ODD, True),))), False, "no usable CRL"),
    "revoked in the future": ((ca.crl(ROOT), ca.crl(INTER, LEAF, revoked_on=timedelta(days=9))), False, "was revoked"),
    "superseded": ((ca.crl(ROOT), ca.crl(INTER, LEAF, entry_extra=(SUPERSEDED,))), False, "was revoked"),
    "delta": ((ca.crl(ROOT), ca.crl(INTER, extra=((x509.DeltaCRLIndicator(1), True),))), False, "no usable CRL"),
}


@pytest.mark.parametrize("name", CRL_CASES)
def test_revocation(tmp_path: Path, name: str) -> None:
    crls, good, problem = CRL_CASES[name]
    found = judge(LEAF, INTER, trust=authority(*crls, require=True))
    if name not in OPENSSL_DIFFERS:
        openssl_agrees(tmp_path, good, LEAF, INTER, crls=crls)
    if problem is None:
        assert found.revoked is None
    else:
        assert re.search(problem, str(found.revoked))


def test_crls_are_optional_until_they_are_there() -> None:
    assert judge(LEAF, INTER).revoked is None
    assert "no usable CRL" in str(judge(LEAF, INTER, trust=authority(require=True)).revoked)
    assert judge(LEAF, INTER, trust=authority(ca.crl(ROOT))).revoked is None
    forged = authority(ca.crl(ROOT), ca.crl(INTER, key=STRANGER.key))
    assert "no usable CRL" in str(judge(LEAF, INTER, trust=forged).revoked)


def test_a_timestamp_does_not_undo_revocation() -> None:
    """Revoked two days ago as superseded, signed nine days ago: revoked all the same."""
    crls = (ca.crl(ROOT), ca.crl(INTER, LEAF, entry_extra=(SUPERSEDED,)))
    before = ca.NOW - timedelta(days=9)
    found = certify([LEAF.der, INTER.der], [authority(*crls)], at=before, now=ca.NOW)
    assert found.expired is None and "was revoked" in str(found.revoked)


def test_crls_that_anybody_could_make(tmp_path: Path) -> None:
    """A CRL signed with SHA-1, which OpenSSL makes and cryptography does not."""
    (tmp_path / "ca.cnf").write_text("[ca]\ndefault_ca=c\n[c]\ndatabase=db\ndefault_crl_days=30\n")
    (tmp_path / "db").write_text("")
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ROOT.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "k.pem").write_bytes(key)
    (tmp_path / "r.pem").write_bytes(ROOT.pem)
    leaf = ca.issue("Release", ROOT)
    for digest, problem in (("sha256", None), ("sha1", "no usable CRL")):
        command = [
            "openssl",
            "ca",
            "-gencrl",
            "-config",
            "ca.cnf",
            "-keyfile",
            "k.pem",
            "-cert",
            "r.pem",
            "-md",
            digest,
        ]
        pem = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
        der = x509.load_pem_x509_crl(pem).public_bytes(Encoding.DER)
        at = x509.load_der_x509_crl(der).last_update_utc
        found = certify([leaf.der], [authority(der, require=True)], at=at, now=at)
        assert (found.revoked is None) if problem is None else (problem in str(found.revoked))


def test_an_issuer_that_may_not_sign_crls() -> None:
    inter = ca.issue("Intermediate", ROOT, ca=True, usage={"crl_sign": False})
    found = judge(ca.issue("Release", inter), inter, trust=authority(ca.crl(ROOT), ca.crl(inter)))
    assert "no usable CRL" in str(found.revoked)


def test_crl_that_ends_soon() -> None:
    found = judge(LEAF, INTER, trust=authority(ca.crl(ROOT), ca.crl(INTER, days=(-1, 5))))
    assert found.revoked is None and len(found.warnings) == 1 and "CRL" in found.warnings[0]


# --- malformed


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_certificates(data: st.DataObject) -> None:
    der = bytearray(LEAF.der)
    for _ in range(data.draw(st.integers(1, 3))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = certify([bytes(der), INTER.der], [authority()], at=ca.NOW, now=ca.NOW)
    except VmgraftError:
        return
    altered = x509.load_der_x509_certificate(bytes(der))  # the form of the signature's bit string is not signed
    assert altered.tbs_certificate_bytes == LEAF.cert.tbs_certificate_bytes and found.expired is None


LISTING = ca.crl(INTER, LEAF)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_crls(data: st.DataObject) -> None:
    """What was taken once never ends in anything but a verdict."""
    der = bytearray(LISTING)
    for _ in range(data.draw(st.integers(1, 3))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_crl(bytes(der))
    except VmgraftError:
        return
    assert judge(LEAF, INTER, trust=authority(ca.crl(ROOT), bytes(der), require=True)).revoked is not None


@pytest.mark.parametrize(
    "der", [b"", b"\x30\x00", LEAF.der, LISTING + b"\0", LISTING.replace(b"\x02\x01\x01", b"\x02\x01\x00", 1)]
)
def test_malformed_crls(der: bytes) -> None:
    """The last one says that it is of version 1, which has no extensions."""
    with pytest.raises(BadSignatureError, match="CRL is malformed"):
        parse_crl(der)


def test_the_first_authority_with_a_good_path_counts() -> None:
    other, old = ca.issue("Other", ca=True), ca.issue("Root", ca=True, key=ROOT.key, days=(-300, -5))
    stores = [Authority("other", (other.der,)), Authority("old", (old.der,)), authority()]
    found = certify([LEAF.der, INTER.der], stores, at=ca.NOW, now=ca.NOW)
    assert found.authority == "acme" and found.expired is None
    found = certify([LEAF.der, INTER.der], stores[:2], at=ca.NOW, now=ca.NOW)
    assert found.authority == "old" and "expired" in str(found.expired)
    with pytest.raises(UntrustedSignerError, match="no certificate"):
        certify([], stores, at=ca.NOW, now=ca.NOW)


@pytest.mark.parametrize("der", [b"", b"\x30\x80", LEAF.der + b"\0", LEAF.der[:-1], b"\x30\x84\xff\xff\xff\xff"])
def test_malformed(der: bytes) -> None:
    with pytest.raises(BadSignatureError, match="malformed"):
        certify([der], [authority()], at=ca.NOW, now=ca.NOW)
