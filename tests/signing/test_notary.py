"""Trust policies of the Notary Project: said in our words, or refused by the name of the field."""

from __future__ import annotations

import json

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from signing_ca import crl, issue

from vmgraft.errors import FileError, PolicyError, UnsupportedError
from vmgraft.signing.notary import import_notary
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policytools import format_policy

IDENTITY = "x509.subject: C=US, O=Acme, CN=Release"
#: The example of the specification, with our names.
ENTRY = {
    "name": "acme-images",
    "registryScopes": ["*"],
    "signatureVerification": {"level": "strict"},
    "trustStores": ["ca:acme"],
    "trustedIdentities": [IDENTITY],
}


@pytest.fixture(scope="module")
def roots():
    return issue("Root", ca=True), issue("Second", ca=True), issue("Clock", ca=True)


@pytest.fixture
def store(tmp_path, roots):
    for place, data in {
        "ca/acme/root.crt": roots[0].der,
        "ca/acme/second.pem": roots[1].pem,
        "ca/acme/README.txt": b"not a certificate",
        "tsa/clock/root.cer": roots[2].pem,
        "ca/plain/root.crt": roots[0].pem,
    }.items():
        path = tmp_path / "truststore" / "x509" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "truststore"


def convert(store, *entries, crls=("acme",), roots=None, **options):
    document = {"version": "1.0", "trustPolicies": [ENTRY | entry for entry in entries]}
    lists = {name: options.pop("crl", CRL) for name in crls}
    return import_notary(json.dumps(document).encode(), store, crls=lists, file="trustpolicy.json", **options)


CRL = crl(issue("Root", ca=True))


def test_strict_entry(store, roots):
    document = convert(store, {})
    policy = parse_policy(format_policy(document))
    (entry,) = policy.trust_policies
    assert (entry.name, entry.level, entry.override, entry.trust_stores) == ("acme-images", "strict", {}, ("ca:acme",))
    assert entry.image_scopes[0].text == "*" and entry.signatures.authorities == {"acme"}
    (authority,) = policy.authorities
    assert authority.roots == (roots[0].der, roots[1].der) and authority.require_crls and authority.crls == (CRL,)


def test_imported_policy_accepts_what_notary_accepts(sim, store, roots):
    from test_certified import World

    world = World(sim)
    world.root, world.middle = roots[0], issue("Middle", roots[0], ca=True)
    world.leaf, stranger = issue("Release", world.middle), issue("Somebody", world.middle)
    lists = b"".join(
        x509.load_der_x509_crl(crl(entity)).public_bytes(Encoding.PEM) for entity in (world.root, world.middle)
    )
    document = convert(store, {}, crl=lists)
    grants = sim.policy_document()["trustPolicies"][0]["grants"]
    document["trustPolicies"][0]["grants"] = grants
    policy = parse_policy(format_policy(document))
    assert sim.verify(world.graft((world.leaf, {})), policy).ok
    assert sim.verify(world.graft((stranger, {})), policy).error == "untrusted-signer"
    revoked = x509.load_der_x509_crl(crl(world.middle, world.leaf)).public_bytes(Encoding.PEM)
    document["trustStores"][0]["crls"] = lists.decode() + revoked.decode()
    assert sim.verify(world.graft((world.leaf, {})), parse_policy(format_policy(document))).error == "revoked"


@pytest.mark.parametrize(
    ("verification", "override"),
    [
        ({"level": "strict"}, {}),
        ({"level": "permissive"}, {"expiry": "log", "revocation": "log"}),
        ({"level": "audit"}, {"authenticity": "log", "expiry": "log", "revocation": "log"}),
        ({"level": "strict", "override": {"revocation": "log"}}, {"revocation": "log"}),
        ({"level": "permissive", "override": {"revocation": "enforce"}}, {"expiry": "log"}),
        (
            {"level": "permissive", "override": {"expiry": "enforce", "authenticTimestamp": "enforce"}},
            {"revocation": "log"},
        ),
    ],
)
def test_levels_become_overrides_and_never_touch_what_notary_does_not_know(store, verification, override):
    (entry,) = parse_policy(format_policy(convert(store, {"signatureVerification": verification}))).trust_policies
    assert entry.level == "strict" and entry.override == override
    assert not any(entry.logs(check) for check in ("rollback", "capabilities", "required"))


def test_revocation_that_is_only_logged_needs_no_crl(store):
    document = convert(store, {"signatureVerification": {"level": "permissive"}}, crls=())
    assert "requireCrls" not in document["trustStores"][0]


def test_scopes_and_timestamps(store):
    entries = [
        {"registryScopes": ["reg.example/app", "reg.example/db"]},
        {
            "name": "blobs", "globalPolicy": True, "trustStores": ["ca:acme", "tsa:clock"],
            "signatureVerification": {"level": "strict", "verifyTimestamp": "afterCertExpiry"},
        },
    ]  # fmt: skip
    document = {"version": "1.0", "trustPolicies": [ENTRY | entry for entry in entries]}
    del document["trustPolicies"][1]["registryScopes"]
    scopes = {"reg.example/app": "name:app-*", "reg.example/db": "name:db.qcow2"}
    result = import_notary(json.dumps(document).encode(), store, crls={"acme": CRL}, scopes=scopes)
    policy = parse_policy(format_policy(result))
    first, second = policy.trust_policies
    assert [scope.text for scope in first.image_scopes] == ["name:app-*", "name:db.qcow2"]
    assert second.trust_stores == ("ca:acme", "tsa:clock") and len(policy.timestampers(second)) == 1


E = "trustPolicies[0]"
V = "signatureVerification"


@pytest.mark.parametrize(
    ("entry", "field", "part"),
    [
        ({V: {"level": "skip"}}, f"{E}.{V}.level", "unverified"),
        ({V: {"level": "lax"}}, f"{E}.{V}.level", "not known"),
        ({V: {"level": ["strict"]}}, f"{E}.{V}.level", "not known"),
        ({V: {"level": "strict", "override": {"revocation": "skip"}}}, f"{E}.{V}.override.revocation", "'skip'"),
        ({V: {"level": "strict", "override": {"integrity": "log"}}}, f"{E}.{V}.override", "integrity"),
        ({V: {"level": "strict", "override": {"expiry": "log"}}}, f"{E}.{V}.override", "one check"),
        ({V: {"level": "strict", "custom": 1}}, f"{E}.{V}", "custom"),
        ({"trustStores": ["ca:acme", "tsa:clock"]}, f"{E}.{V}.verifyTimestamp", "beside every signature"),
        ({"trustStores": ["signingAuthority:x"]}, f"{E}.trustStores", "signingAuthority"),
        ({"trustStores": ["ca:plain"]}, f"{E}.trustStores", "no CRL"),
        ({"trustStores": ["tsa:clock"], V: {"level": "strict", "verifyTimestamp": "afterCertExpiry"}},
         f"{E}.trustStores", "no trust store of type ca"),
        ({"registryScopes": ["reg.example/app"]}, f"{E}.registryScopes", "names a registry"),
        ({"globalPolicy": True}, f"{E}.globalPolicy", "both"),
        ({"trustedIdentities": ["x509.email: a@b"]}, f"{E}.trustedIdentities", "neither"),
        ({"futureField": 1}, E, "futureField"),
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_named(store, entry, field, part):
    with pytest.raises(UnsupportedError, match=part) as caught:
        convert(store, entry)
    assert caught.value.field == field and caught.value.file == "trustpolicy.json"
    assert "cannot be expressed" in caught.value.message


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"{", PolicyError),
        (b"[]", PolicyError),
        (b'{"version": "2.0", "trustPolicies": []}', UnsupportedError),
        (b'{"version": "1.0", "trustPolicies": []}', PolicyError),
        (b'{"version": "1.0", "trustPolicies": [1]}', PolicyError),
        (b'{"version": "1.0", "trustPolicies": [{"name": "x"}]}', PolicyError),
        (json.dumps({"version": "1.0", "trustPolicies": [ENTRY | {"trustStores": [1]}]}).encode(), PolicyError),
        (json.dumps({"version": "1.0", "trustPolicies": [ENTRY | {"name": "a b"}]}).encode(), PolicyError),
        (json.dumps({"version": "1.0", "trustPolicies": [ENTRY | {"trustStores": ["ca:../x"]}]}).encode(), PolicyError),
        (json.dumps({"version": "1.0", "trustPolicies": [ENTRY | {"trustStores": ["ca:none"]}]}).encode(), FileError),
    ],
)
def test_malformed(store, data, error):
    with pytest.raises(error):
        import_notary(
            data, store, crls={name: CRL for name in ("acme", "../x", "none") if f'"ca:{name}"'.encode() in data}
        )


def test_what_is_given_and_not_used_is_a_mistake(store):
    with pytest.raises(UnsupportedError, match="'elsewhere' stands nowhere"):
        convert(store, {}, crls=("acme", "elsewhere"))
    with pytest.raises(UnsupportedError, match=r"'reg\.example/app' stands nowhere"):
        convert(store, {}, scopes={"reg.example/app": "*"})
