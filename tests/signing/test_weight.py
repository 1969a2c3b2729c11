"""Certificates that are too much: refused by what can be counted, before any of it is parsed or compared."""

from __future__ import annotations

import warnings
from contextlib import suppress

import pytest
import signing_ca as ca
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from test_certified import World
from test_effort import MESSAGE, calls, signed, stores

from vmgraft.errors import BadSignatureError, FileError, PolicyError
from vmgraft.signing import paths, weight
from vmgraft.signing.chains import parse_chain
from vmgraft.signing.dsse import MAX_SIGNATURES, Envelope
from vmgraft.signing.effort import COMPARISONS, MAX_STEPS, Effort
from vmgraft.signing.judge import judge_signatures
from vmgraft.signing.paths import parse_certificate
from vmgraft.signing.weight import MAX_ATTRIBUTES, MAX_CONSTRAINTS, MAX_ELEMENTS, MAX_NAMES, weigh

__all__ = ["calls"]


def dns(count, text="a"):
    return tuple(x509.DNSName(text) for _ in range(count))


def constraints(permitted, excluded):
    value = x509.NameConstraints(dns(permitted, "b") or None, dns(excluded, "c") or None)
    return ((value, True),)


def named(attributes, together):
    """A certificate whose subject has so many attributes, in one relative name or in many."""
    found = [x509.NameAttribute(NameOID.COMMON_NAME, f"n{number}") for number in range(attributes)]
    name = x509.Name([x509.RelativeDistinguishedName(found)] if together else found)
    entity = ca.issue("Leaf")
    builder = x509.CertificateBuilder(entity.cert.subject, name, entity.cert.public_key(), 1)
    builder = builder.not_valid_before(entity.cert.not_valid_before_utc)
    builder = builder.not_valid_after(entity.cert.not_valid_after_utc)
    return builder.sign(entity.key, hashes.SHA256())


def attributed(count):
    """A certificate whose issuer has so many."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "n")] * count)
    entity = ca.issue("Leaf")
    builder = x509.CertificateBuilder(name, entity.cert.subject, entity.cert.public_key(), 1)
    builder = builder.not_valid_before(entity.cert.not_valid_before_utc)
    return builder.not_valid_after(entity.cert.not_valid_after_utc).sign(entity.key, hashes.SHA256())


def policies(count):
    """An extension of some four elements for each of its items."""
    items = (x509.ObjectIdentifier(f"1.3.6.1.{number}") for number in range(count))
    return ((x509.CertificatePolicies([x509.PolicyInformation(item, None) for item in items]), False),)


@pytest.mark.parametrize(
    ("certificate", "problem"),
    [
        (ca.issue("Leaf", names=dns(MAX_NAMES)).cert, None),
        (ca.issue("Leaf", names=dns(MAX_NAMES + 1)).cert, "alternative names"),
        (ca.issue("Mid", ca=True, extra=constraints(MAX_CONSTRAINTS - 1, 1)).cert, None),
        (ca.issue("Mid", ca=True, extra=constraints(MAX_CONSTRAINTS, 1)).cert, "name constraints"),
        (ca.issue("Mid", ca=True, extra=constraints(0, MAX_CONSTRAINTS + 1)).cert, "name constraints"),
        (named(MAX_ATTRIBUTES, False), None),
        (named(MAX_ATTRIBUTES + 1, False), "attributes"),
        (named(MAX_ATTRIBUTES, True), None),
        (named(MAX_ATTRIBUTES + 1, True), "attributes"),
        (attributed(MAX_ATTRIBUTES + 1), "attributes"),
        (ca.issue("Leaf", extra=policies(500)).cert, None),
        (ca.issue("Leaf", extra=policies(800)).cert, f"more than {MAX_ELEMENTS} elements"),
        (ca.issue("Leaf", extra=((x509.UnrecognizedExtension(NameOID.COMMON_NAME, b"\xff" * 900), False),)).cert, None),
        (
            ca.issue("Leaf", extra=((x509.UnrecognizedExtension(NameOID.COMMON_NAME, b"\xff" * 4000), False),)).cert,
            "elements",
        ),
    ],
)
def test_bounds(certificate, problem):
    found = weigh(certificate)
    assert (found.issuer, found.subject) == (certificate.issuer.public_bytes(), certificate.subject.public_bytes())
    der = certificate.public_bytes(ca.Encoding.DER)
    if problem is None:
        assert found.problem is None and parse_certificate(der) == certificate
    else:
        assert problem in found.problem
        with pytest.raises(BadSignatureError, match=f"a certificate has more than|a certificate has .*{problem}"):
            parse_certificate(der)


def test_what_is_counted():
    leaf = ca.issue("Leaf", names=dns(7), extra=constraints(2, 3)).cert
    assert (weigh(leaf).names, weigh(leaf).constraints) == (7 + 3, 5)  # C, O and CN are names too
    old = named(1, False)
    assert old.version is x509.Version.v3 and weigh(old).names == 1 and weigh(old).constraints == 0


def test_refused_before_names_become_objects(monkeypatch):
    """Thousands of names, and the parser that would make objects of them is not begun."""
    monkeypatch.setattr(paths, "alternative_names", lambda certificate: pytest.fail("the names were parsed"))
    parse_certificate.cache_clear()
    with pytest.raises(BadSignatureError, match="more than 100 subject alternative names"):
        parse_certificate(ca.issue("Leaf", names=dns(5000)).der)


FULL = ca.issue("Leaf", names=dns(2), extra=constraints(1, 1)).der


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bytes_that_are_no_certificate(data):
    """Whatever the library loads can be weighed; whatever it cannot is malformed, and nothing else is raised."""
    der = bytearray(FULL)
    for _ in range(data.draw(st.integers(1, 4))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    try:
        with warnings.catch_warnings(action="ignore"):
            certificate = x509.load_der_x509_certificate(bytes(der))
    except (ValueError, *paths.X509_ERRORS):
        with pytest.raises(BadSignatureError):
            parse_certificate(bytes(der))
        return
    assert weigh(certificate).names <= len(der)
    with suppress(BadSignatureError):
        assert parse_certificate(bytes(der)) == certificate


@given(st.binary(max_size=400))
def test_any_bytes_are_counted(data):
    assert 0 <= weight._all(data, MAX_ELEMENTS) <= MAX_ELEMENTS + max(1, len(data) // 2)


def test_each_certificate_is_parsed_once(monkeypatch):
    """Sixteen signatures, three certificates each, thirty-two stores: forty-eight certificates, parsed once."""
    loaded, load = [], x509.load_der_x509_certificate
    middle = ca.issue("Mid", ca=True, days=(-100, 1000))
    chains = [[ca.issue(f"Z{n}{i}", middle, ca=True).der for i in range(2)] for n in range(MAX_SIGNATURES)]
    signatures = [signed(ca.issue(f"L{n}", middle), chain) for n, chain in enumerate(chains)]
    trusted = stores(32, ca.issue("Mid", ca=True))
    parse_certificate.cache_clear()
    paths._load.cache_clear()
    monkeypatch.setattr(x509, "load_der_x509_certificate", lambda der: loaded.append(der) or load(der))
    found = judge_signatures(Envelope(b"{}", tuple(signatures)), [], trusted, ca.NOW)
    assert len(found.unknown) == MAX_SIGNATURES and len(loaded) == len(set(loaded)) == 3 * MAX_SIGNATURES + 1


def heavy(count, excluded, names):
    """Leaves under an authority with constraints that none of their names breaks, and mazes of it."""
    top = ca.issue("Mid", ca=True, days=(-100, 1000))
    between = ca.issue("X", top, ca=True, days=(-100, 1000), extra=constraints(0, excluded))
    more = [
        ca.issue("X", top, ca=True, key=between.key, days=(-100 + n, 1000), extra=constraints(0, excluded)).der
        for n in range(2)
    ]
    leaves = [ca.issue(f"L{n}", between, names=dns(names), days=(-50, 500)) for n in range(count)]
    return [signed(leaf, [between.der, *more]) for leaf in leaves]


@pytest.mark.parametrize("count", [1, 32])
def test_constraints_cost_what_they_make_the_library_do(calls, monkeypatch, count):
    compared, cost = [], paths._cost
    monkeypatch.setattr(
        paths, "_cost", lambda found, below: compared.append(found.constraints * below) or cost(found, below)
    )
    signatures = heavy(MAX_SIGNATURES, MAX_CONSTRAINTS, MAX_NAMES)
    trusted = stores(count, ca.issue("Mid", ca=True, days=(-2000, 1)))  # its name alone is the authority's
    found = judge_signatures(Envelope(b"{}", tuple(signatures)), [], trusted, ca.NOW)
    assert len(found.unknown) == MAX_SIGNATURES and max(compared) >= MAX_CONSTRAINTS * MAX_NAMES
    assert calls["candidates"] == found.budget.steps <= MAX_STEPS
    done = sum(sorted(compared)[: len(compared) - MAX_SIGNATURES])  # the last of each share is refused, not made
    assert done <= MAX_STEPS * COMPARISONS


def test_a_good_chain_with_constraints_counts_beside_heavy_ones():
    root = ca.issue("Root", ca=True)
    middle = ca.issue("Middle", root, ca=True, extra=constraints(0, 20))
    good = ca.issue("Good", middle, names=dns(10))
    signatures = [*heavy(MAX_SIGNATURES - 1, MAX_CONSTRAINTS, MAX_NAMES), signed(good, [middle.der])]
    trusted = stores(32, root, ca.issue("Mid", ca=True, days=(-2000, 1)))
    found = judge_signatures(Envelope(b"{}", tuple(signatures)), [], trusted, ca.NOW)
    assert [(item.index, len(item.paths)) for item in found.certified] == [(MAX_SIGNATURES - 1, 32)]


def test_every_beginning_is_charged(calls):
    """``ever_valid`` tries each moment at which a certificate begins, and each takes its steps."""
    top = ca.issue("Mid", ca=True, days=(-100, 1000))
    extra = constraints(0, MAX_CONSTRAINTS)
    between = ca.issue("X", top, ca=True, days=(-100, 1000), extra=extra)
    others = [ca.issue("D", top, ca=True, days=(-40 + n, 1000)).cert for n in range(5)]
    leaf = ca.issue("Leaf", between, names=dns(MAX_NAMES), days=(-50, 500))
    effort = Effort()
    root = ca.issue("Mid", ca=True, days=(-2000, 1))
    assert paths.ever_valid([leaf.cert, between.cert, *others], [root.cert], paths.CODE_SIGNING, effort) is None
    each = 2 + MAX_CONSTRAINTS * (MAX_NAMES + 3 * 7) // COMPARISONS
    assert calls["validations"] >= 6 and effort.steps >= calls["validations"] * each


def test_a_step_may_be_worth_several():
    effort = Effort(10)
    assert effort.step(4) and effort.step(6) and effort.steps == 10
    assert not effort.step(1) and effort.spent and effort.steps == 10
    effort = Effort(10)
    assert effort.step(4) and not effort.step(7) and not effort.step(1) and effort.steps == 4


def test_the_bound_is_said_where_a_file_is_read(sim, tmp_path):
    heavy_root = ca.issue("Root", ca=True, extra=constraints(0, MAX_CONSTRAINTS + 1))
    store = {"name": "acme", "type": "ca", "certificates": heavy_root.pem.decode()}
    with pytest.raises(PolicyError, match="a certificate has more than 100 name constraints") as caught:
        World(sim).policy(stores=[store])
    assert caught.value.field == "trustStores[0].certificates"
    (tmp_path / "chain.pem").write_bytes(ca.issue("Leaf", names=dns(MAX_NAMES + 1)).pem)
    with pytest.raises(FileError, match="a certificate has more than 100 subject alternative names"):
        parse_chain(tmp_path / "chain.pem")


def test_the_message_is_the_one_that_was_signed():
    """The helper that the tests above lean on signs what the judge checks."""
    assert Envelope(b"{}", ()).pae == MESSAGE
