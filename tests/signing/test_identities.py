"""Identities of a policy: exact, order-free, and nothing that only looks alike."""

import pytest

from vmgraft.errors import PolicyError
from vmgraft.signing.identities import MAX_IDENTITY, parse_identity

C, O, CN, OU = "2.5.4.6", "2.5.4.10", "2.5.4.3", "2.5.4.11"  # noqa: E741 - the attribute's name
RELEASE = ((C, "US"), (O, "Acme"), (CN, "Release"))


def matches(text, subject=RELEASE, sans=()):
    return parse_identity(text, field="trustedIdentities").matches(subject, sans)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x509.subject: C=US, O=Acme, CN=Release", True),
        ("x509.subject:CN=Release,O=Acme", True),
        ("x509.subject: O=Acme", True),
        ("x509.subject: O=acme", False),
        ("x509.subject: O=Acm", False),
        ("x509.subject: O=Acme, OU=Build", False),
        ("x509.subject: 2.5.4.10=Acme", True),
        ("x509.subject: CN=Release\\, Inc", False),
    ],
)
def test_subjects(text, expected):
    assert matches(text) is expected


def test_escapes():
    assert matches("x509.subject: O=Acme\\, Inc.", ((O, "Acme, Inc."),))
    assert not matches("x509.subject: O=Acme\\, Inc.", ((O, "Acme"),))
    assert matches("x509.subject: O=Acme\\\\, CN=Release", ((O, "Acme\\"), (CN, "Release")))
    assert matches("x509.subject: CN=Release+OU=Build", (*RELEASE, (OU, "Build")))


def test_an_attribute_that_stands_twice_means_nobody():
    """A subject with two common names is not the one with either."""
    twice = (*RELEASE, (CN, "Evil"))
    assert not matches("x509.subject: O=Acme, CN=Release", twice)
    assert not matches("x509.subject: CN=Release", (*RELEASE, (CN, "Release")))
    assert matches("x509.subject: O=Acme", twice)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x509.san: email:release@acme.example", True),
        ("x509.san:dns:acme.example", True),
        ("x509.san: dns:evil.acme.example", False),
        ("x509.san: email:acme.example", False),
        ("x509.san: uri:release@acme.example", False),
    ],
)
def test_alternative_names(text, expected):
    sans = ("email:release@acme.example", "dns:acme.example")
    assert matches(text, (), sans) is expected
    assert not matches("x509.subject: O=Acme", (), sans)


@pytest.mark.parametrize(
    "text",
    [
        "", "Acme", "x509.subject:", "x509.subject: Acme", "x509.subject: O=Acme, O=Other", "x509.subject: =x",
        "x509.san:", "x509.san: email:", "x509.san: ip:1.2.3.4", "x509.san: email: a@b", "x509.subject: O=\nAcme",
        "x509.subject: CN=" + "x" * MAX_IDENTITY, "X509.SUBJECT: O=Acme",
    ],
)  # fmt: skip
def test_malformed(text):
    with pytest.raises(PolicyError) as caught:
        parse_identity(text, field="trustedIdentities[0]")
    assert caught.value.field == "trustedIdentities[0]" and caught.value.hint
