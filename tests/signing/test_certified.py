"""Certified signers under a policy: chains, identities, time, revocation, and counting by distinct key."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from signing_ca import CODE_SIGNING, NOW, crl, issue, subject
from verdict_stamps import Stamps

from vmgraft.cli.views import show_report
from vmgraft.errors import PolicyError
from vmgraft.signing.contract import Status
from vmgraft.signing.dsse import Envelope, Signature, pae, parse_envelope, serialise
from vmgraft.signing.judge import judge_signatures
from vmgraft.signing.keys import PrivateKey, public_from_key
from vmgraft.signing.material import KIND, Material, pack_material
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policytools import format_policy
from vmgraft.signing.report import report_document
from vmgraft.signing.standing import take_stand

IDENTITY = "x509.subject: C=US, O=Acme, CN=Release"


def private(entity):
    return PrivateKey(public_from_key(entity.key.public_key()), entity.key)


class World:
    """A root, an intermediate, leaves, and grafts signed by them."""

    def __init__(self, sim):
        self.sim = sim
        self.root = issue("Root", ca=True)
        self.middle = issue("Middle", self.root, ca=True)
        self.leaf = issue("Release", self.middle, names=(x509.RFC822Name("release@acme.example"),))
        self.other_root = issue("Root", ca=True, organisation="Other")
        self.other_leaf = issue("Release", self.other_root, organisation="Acme")

    def sign(self, message, entity, chain=None, keyid=None, timestamps=(), extension=None):
        key = private(entity)
        chain = [entity.der, self.middle.der] if chain is None else chain
        packed = pack_material(Material(tuple(chain), tuple(timestamps))) if extension is None else extension
        return Signature(key.keyid if keyid is None else keyid, key.sign(message), packed)

    def graft(self, *signs, bare=(), **options):
        """A graft signed by (entity, options) pairs, and by bare keys of the simulator."""
        statement, payloads = self.sim.statement([self.sim.manifest()], **options)
        message = pae("application/vnd.in-toto+json", statement)
        signatures = [self.sign(message, entity, **more) for entity, more in signs]
        signatures += [Signature(self.sim.keys[n].keyid, self.sim.keys[n].sign(message)) for n in bare]
        evidence = self.sim.graft()
        evidence.stored, evidence.payloads = [serialise(Envelope(statement, tuple(signatures)))], payloads
        return evidence

    def document(self, *, crls=b"", require=False, entry=None, keys=(), stores=None):
        document = self.sim.policy_document(*(keys or ("vendor",)))
        if not keys:
            document["keys"] = []
        acme = {"name": "acme", "type": "ca", "certificates": self.root.pem.decode()}
        if crls:
            acme["crls"] = crls.decode()
        if require:
            acme["requireCrls"] = True
        document["trustStores"] = [acme] if stores is None else stores
        document["trustPolicies"][0] |= {
            "trustStores": ["ca:acme"], "trustedIdentities": [IDENTITY], "signatures": {"allOf": ["ca:acme"]},
        } | (entry or {})  # fmt: skip
        return document

    def policy(self, **options):
        return parse_policy(format_policy(self.document(**options)), file="policy.json")


def pem_crl(*args, **options):
    return x509.load_der_x509_crl(crl(*args, **options)).public_bytes(Encoding.PEM)


@pytest.fixture(scope="module")
def world(sim):
    return World(sim)


def failures(report):
    return {check.name: check.error for check in report.checks if check.status is Status.FAIL}


def test_a_certified_signature_counts_for_its_authority(world):
    evidence = world.graft((world.leaf, {}))
    report = world.sim.verify(evidence, world.policy())
    assert report.ok and report.signers == (private(world.leaf).keyid,)
    (signer,) = report.certified
    assert (signer.authority, signer.sans, signer.timestamp) == ("acme", ("email:release@acme.example",), None)
    from vmgraft.errors import VmgraftError
    from vmgraft.schemas import validate

    document = {"ok": True, "exitCode": 0, "image": "x", **report_document(report)}
    validate("report", json.loads(json.dumps(document)), file=None, error=VmgraftError)
    assert document["certified"][0]["subject"] == "CN=Release,O=Acme,C=US" and document["signerNames"] == {}


@pytest.mark.parametrize("keyid", ["", None])
def test_keyid_of_a_certified_signature_is_the_leafs_or_empty(world, keyid):
    assert world.sim.verify(world.graft((world.leaf, {"keyid": keyid})), world.policy()).ok


def test_chain_to_nobody_is_untrusted_and_nothing_is_parsed(world, monkeypatch):
    monkeypatch.setattr("vmgraft.signing.integrity.parse_statement", lambda *a, **k: pytest.fail("parsed"))
    report = world.sim.verify(world.graft((world.other_leaf, {"chain": [world.other_leaf.der]})), world.policy())
    assert report.error == "untrusted-signer" and set(failures(report)) == {"authenticity"}
    assert report.statement is None


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"keyid": "release-key"}, "and names release-key"),
        ({"extension": {"kind": KIND, "ext": {"x509CertificateChain": {}}}}, "not counted"),
    ],
)
def test_signatures_that_contradict_themselves(world, more, part):
    alone = world.sim.verify(world.graft((world.leaf, more)), world.policy())
    assert alone.error == "bad-signature" and set(failures(alone)) == {"signature"}
    beside = world.sim.verify(world.graft((world.leaf, more), (world.leaf, {})), world.policy())
    assert beside.ok and any(part in warning for warning in beside.warnings)


def test_certificate_of_another_key(world):
    """A good chain beside a signature that its leaf did not make."""
    stranger = issue("Stranger")
    evidence = world.graft((stranger, {"chain": [world.leaf.der, world.middle.der]}))
    report = world.sim.verify(evidence, world.policy())
    assert report.error == "bad-signature" and report.statement is None
    beside = world.graft((stranger, {"chain": [world.leaf.der, world.middle.der]}), (world.leaf, {}))
    report = world.sim.verify(beside, world.policy())
    assert report.ok and any("is not by the key of the certificate" in warning for warning in report.warnings)


def test_malformed_certificate_beside_a_known_keys_signature_is_only_reported(world):
    evidence = world.graft(bare=["vendor"])
    envelope = parse_envelope(evidence.stored[0])
    packed = pack_material(Material((b"no certificate",)))
    bent = dataclasses.replace(envelope.signatures[0], extension=packed)
    evidence.stored = [serialise(Envelope(envelope.payload, (bent,)))]
    policy = world.policy(keys=["vendor"], entry={"signatures": {"allOf": ["key:vendor"]}})
    report = world.sim.verify(evidence, policy)
    assert report.ok and any("malformed" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("identities", "ok"),
    [
        ([IDENTITY], True),
        (["x509.subject: CN=Release"], True),
        (["x509.san: email:release@acme.example"], True),
        (["*"], True),
        (["x509.subject: CN=Somebody", IDENTITY], True),
        (["x509.subject: CN=Releas"], False),
        (["x509.subject: C=US, O=Acme, CN=Release, OU=Lab"], False),
        (["x509.san: email:release@acme.example.org"], False),
        (["x509.san: dns:release@acme.example"], False),
    ],
)
def test_identities(world, identities, ok):
    report = world.sim.verify(world.graft((world.leaf, {})), world.policy(entry={"trustedIdentities": identities}))
    assert report.ok is ok
    if not ok:
        assert report.error == "untrusted-signer" and "whom default does not name" in report.checks[7].detail
        assert report.checks[7].hint.startswith("signatures by ca:acme")


def stores(world):
    return [
        {"name": "acme", "type": "ca", "certificates": world.root.pem.decode()},
        {"name": "other", "type": "ca", "certificates": world.other_root.pem.decode()},
    ]


def test_authority_of_another_trust_policy_does_not_count_here(world):
    evidence = world.graft((world.other_leaf, {"chain": [world.other_leaf.der]}))
    report = world.sim.verify(evidence, world.policy(stores=stores(world)))
    assert report.error == "untrusted-signer" and "ca:other" in report.checks[7].detail
    audit = {"signatureVerification": {"level": "audit"}}
    report = world.sim.verify(evidence, world.policy(stores=stores(world), entry=audit))
    assert report.error == "untrusted-signer", "nobody's signature passes at any level"


# --- counting


BOTH = {"trustStores": ["ca:acme", "ca:other"]}


def test_each_place_needs_a_key_of_its_own(world):
    """One key certified by two authorities, or known and certified, is one signer."""
    twin = issue("Release", world.other_root, key=world.leaf.key)
    rule = BOTH | {"signatures": {"allOf": ["ca:acme", "ca:other"]}}
    policy = world.policy(stores=stores(world), entry=rule)
    one_key = world.graft((world.leaf, {}), (twin, {"chain": [twin.der]}))
    report = world.sim.verify(one_key, policy)
    assert report.error == "untrusted-signer" and "different keys" in report.checks[7].detail
    assert "more different keys" in report.checks[7].hint
    other = {"chain": [world.other_leaf.der]}
    assert world.sim.verify(world.graft((world.leaf, {}), (world.other_leaf, other)), policy).ok


def test_two_leaves_of_one_authority_fill_one_place(world):
    second = issue("Release", world.middle)
    rule = {"signatures": {"anyOf": {"minimumMatches": 2, "of": ["ca:acme", "key:vendor"]}}}
    policy = world.policy(keys=["vendor"], entry=rule)
    assert world.sim.verify(world.graft((world.leaf, {}), (second, {})), policy).error == "untrusted-signer"
    assert world.sim.verify(world.graft((world.leaf, {}), bare=["vendor"]), policy).ok


def test_a_known_key_with_a_certificate_counts_once(world):
    document = world.document(keys=["vendor"])
    key = private(world.leaf).public
    document["keys"].append({"name": "leaf", "pem": key.pem.decode()})
    rule = {"anyOf": {"minimumMatches": 2, "of": ["ca:acme", "key:leaf"]}}
    document["trustPolicies"][0]["signatures"] = rule
    policy = parse_policy(format_policy(document))
    assert world.sim.verify(world.graft((world.leaf, {})), policy).error == "untrusted-signer"
    rule["anyOf"]["minimumMatches"] = 1
    assert world.sim.verify(world.graft((world.leaf, {})), parse_policy(format_policy(document))).ok


def test_signature_by_a_key_that_only_a_matching_can_place(world):
    """One certified key fits both places, the other only one: greed would seat the first wrongly."""
    from vmgraft.signing.rules import SignatureRule, Vouch

    one, two, three = (world.sim.keys[name].public for name in ("vendor", "second", "third"))
    rule = SignatureRule(frozenset({"a", "b", "c"}), frozenset(), 0)
    signed = {Vouch(one, "a"), Vouch(one, "b"), Vouch(one, "c"), Vouch(two, "a"), Vouch(two, "b"), Vouch(three, "a")}
    assert rule.problem(signed) is None
    assert "different keys" in rule.problem(signed - {Vouch(two, "b")})


# --- time and revocation


@pytest.fixture(scope="module")
def short(world):
    return issue("Release", world.middle, days=(-10, -1))


def test_expired_certificate(world, short):
    report = world.sim.verify(world.graft((short, {})), world.policy())
    assert report.error == "expired" and set(failures(report)) == {"expiry"}
    assert report.signers == () and "timestamp" in report.checks[8].hint
    logged = {"signatureVerification": {"level": "strict", "override": {"expiry": "log"}}}
    report = world.sim.verify(world.graft((short, {})), world.policy(entry=logged))
    assert report.ok and report.signers and any("expired at" in warning for warning in report.warnings)


def test_expired_certificate_beside_a_good_one(world, short):
    report = world.sim.verify(world.graft((short, {}), (world.leaf, {})), world.policy())
    assert report.ok and report.signers == (private(world.leaf).keyid,)
    assert any(warning.startswith("not counted: ") for warning in report.warnings)


def test_certificate_of_tomorrow(world):
    early = issue("Release", world.middle, days=(1, 30))
    assert world.sim.verify(world.graft((early, {})), world.policy()).error == "expired"


@pytest.fixture
def tsa(monkeypatch):
    """Timestamps whose reading is settled by the test; the real thing is tested with its own room."""
    import sys
    import types

    from vmgraft.errors import BadSignatureError

    def examine_timestamp(token, signature, authorities, effort):
        assert not effort.spent
        assert authorities and signature
        if token == b"bad":
            raise BadSignatureError("the token is broken")
        when = NOW + timedelta(days=int(token))
        return types.SimpleNamespace(time=when, authority=authorities[0][0], warnings=("a development one",))

    fake = types.ModuleType("timestamps")
    fake.TimestampAuthority = lambda name, roots: (name, roots)
    fake.examine_timestamp = examine_timestamp
    monkeypatch.setitem(sys.modules, "vmgraft.signing.timestamps", fake)
    return fake


@pytest.mark.parametrize(
    ("tokens", "error", "part"),
    [
        ((b"-5",), None, None),
        ((b"-20", b"-5"), None, None),
        ((b"bad", b"-5"), None, "the token is broken"),
        ((b"0",), "expired", None),
        ((b"-20",), "expired", None),
        ((b"bad",), "expired", "the token is broken"),
        ((b"5",), "expired", "from the future"),
    ],
)
def test_signature_outlives_its_certificate_by_a_timestamp(world, short, tsa, capsys, tokens, error, part):
    clock = {"name": "clock", "type": "tsa", "certificates": world.other_root.pem.decode()}
    entry = {"trustStores": ["ca:acme", "tsa:clock"]}
    policy = world.policy(stores=[stores(world)[0], clock], entry=entry)
    evidence = world.graft((short, {"timestamps": tokens}))
    report = world.sim.verify(evidence, policy)
    assert report.error == error
    assert part is None or any(part in warning for warning in report.warnings)
    if error is None:
        (signer,) = report.certified
        assert (signer.timestamp, signer.timestamp_authority) == ("2026-11-17T15:00:00Z", "clock")
        show_report(report, Path("disk.img"))
        said = "CN=Release,O=Acme,C=US, certified by ca:acme, timestamped 2026-11-17T15:00:00Z by tsa:clock\n"
        assert f"      signer        {signer.keyid}, {said}" in capsys.readouterr().out
        assert report.warnings.count("a development one") == 1
    without = world.policy(stores=[stores(world)[0], clock])
    report = world.sim.verify(evidence, without)
    assert report.error == "expired" and any("names no timestamp authority" in text for text in report.warnings)


def test_a_token_beside_another_signature_says_nothing_of_it(world, tmp_path):
    """A genuine timestamp, copied beside another signature of the same envelope, counts where it belongs alone.

    Wherever it stands first: what was found out about it there is not the answer here.
    """
    stamps = Stamps(tmp_path)
    leaves = [issue("Release", world.middle, days=(-100, -5)) for _ in "ab"]
    envelope = parse_envelope(world.graft(*((leaf, {}) for leaf in leaves)).stored[0])
    sigs = [signature.sig for signature in envelope.signatures]
    for mine, theirs in ((0, 1), (1, 0)):
        token = stamps(sigs[mine], NOW - timedelta(days=7), "tsa")
        chains = (Material((leaf.der, world.middle.der), (token,)) for leaf in leaves)
        signatures = tuple(Signature("", sig, pack_material(chain)) for sig, chain in zip(sigs, chains, strict=True))
        pem = x509.load_der_x509_certificate(stamps.root("tsa")).public_bytes(Encoding.PEM).decode()
        clock = {"name": "clock", "type": "tsa", "certificates": pem}
        policy = world.policy(stores=[stores(world)[0], clock], entry={"trustStores": ["ca:acme", "tsa:clock"]})
        found = judge_signatures(Envelope(envelope.payload, signatures), [], policy.authorities, NOW)
        standing = take_stand(found, policy, policy.trust_policies[0], NOW)
        assert [vouch.key for vouch in standing.expired] == [private(leaves[theirs]).public]
        assert {vouch.key for vouch in standing.signed} == {private(leaf).public for leaf in leaves}
        (note,) = standing.notes
        assert f"the timestamp of signature {theirs} does not count" in note and "over other bytes" in note


def test_other_timestamp_authorities_are_another_question(world, tmp_path):
    """What one trust policy's authorities say of a token is not what those of another one say."""
    stamps = Stamps(tmp_path)
    leaf = issue("Release", world.middle, days=(-100, -5))
    (signature,) = parse_envelope(world.graft((leaf, {})).stored[0]).signatures
    token = stamps(signature.sig, NOW - timedelta(days=7), "tsa")
    tsas = [
        {"name": name, "type": "tsa", "certificates": x509.load_der_x509_certificate(stamps.root(name)).public_bytes(
            Encoding.PEM).decode()} for name in ("tsa", "fake")
    ]  # fmt: skip
    document = world.document(stores=[stores(world)[0], *tsas], entry={"trustStores": ["ca:acme", "tsa:fake"]})
    document["trustPolicies"].append(document["trustPolicies"][0] | {
        "name": "second", "imageScopes": ["name:x"], "trustStores": ["ca:acme", "tsa:tsa"],
    })  # fmt: skip
    policy = parse_policy(format_policy(document))
    payload = parse_envelope(world.graft((leaf, {})).stored[0]).payload
    signature = Signature("", signature.sig, pack_material(Material((leaf.der, world.middle.der), (token,))))
    found = judge_signatures(Envelope(payload, (signature,)), [], policy.authorities, NOW)
    worth = [take_stand(found, policy, entry, NOW) for entry in policy.trust_policies]
    assert [bool(standing.expired) for standing in worth] == [True, False]


def test_timestamp_does_not_undo_a_revocation(world, short, tsa):
    clock = {"name": "clock", "type": "tsa", "certificates": world.other_root.pem.decode()}
    acme = stores(world)[0] | {"crls": pem_crl(world.middle, short).decode()}
    policy = world.policy(stores=[acme, clock], entry={"trustStores": ["ca:acme", "tsa:clock"]})
    assert world.sim.verify(world.graft((short, {"timestamps": [b"-5"]})), policy).error == "revoked"


def test_revoked_leaf_and_intermediate(world):
    for issuer, victim in ((world.middle, world.leaf), (world.root, world.middle)):
        policy = world.policy(crls=pem_crl(issuer, victim))
        report = world.sim.verify(world.graft((world.leaf, {})), policy)
        assert report.error == "revoked" and set(failures(report)) == {"revocation"} and report.signers == ()


def test_expired_crl_fails_under_strict_and_warns_under_permissive(world):
    old = pem_crl(world.middle, days=(-20, -1))
    evidence = world.graft((world.leaf, {}))
    assert set(failures(world.sim.verify(evidence, world.policy(crls=old)))) == {"revocation"}
    permissive = {"signatureVerification": {"level": "permissive"}}
    report = world.sim.verify(evidence, world.policy(crls=old, entry=permissive))
    assert report.ok and any("CRL" in warning for warning in report.warnings)


def test_required_crls(world):
    evidence = world.graft((world.leaf, {}))
    some = pem_crl(world.middle)
    assert world.sim.verify(evidence, world.policy(crls=some, require=True)).error == "revoked"
    assert world.sim.verify(evidence, world.policy(crls=some + pem_crl(world.root), require=True)).ok


def test_leaf_key_revoked_by_the_policy(world):
    document = world.document()
    document["revocations"]["keys"] = [private(world.leaf).keyid]
    report = world.sim.verify(world.graft((world.leaf, {})), parse_policy(format_policy(document)))
    assert report.error == "revoked"


def test_expired_and_revoked_signers_do_not_stand_in_for_each_other(world, short):
    """Each alone would be only a warning because of the other."""
    rule = {"signatures": {"anyOf": {"minimumMatches": 1, "of": ["ca:acme", "key:vendor"]}}}
    document = world.document(keys=["vendor"], entry=rule)
    document["revocations"]["keys"] = ["key:vendor"]
    report = world.sim.verify(world.graft((short, {}), bare=["vendor"]), parse_policy(format_policy(document)))
    assert not report.ok and set(failures(report)) == {"revocation"} and report.signers == ()


# --- the policy's side


def refused(document, field, part):
    with pytest.raises(PolicyError, match=part) as caught:
        parse_policy(format_policy(document), file="policy.json")
    assert caught.value.field == field and caught.value.file == "policy.json"


T = "trustPolicies[0]"


@pytest.mark.parametrize(
    ("entry", "field", "part"),
    [
        ({"trustStores": ["ca:nobody"]}, f"{T}.trustStores", "no trust store 'ca:nobody'"),
        ({"trustStores": ["tsa:acme"]}, f"{T}.trustStores", "no trust store 'tsa:acme'"),
        ({"trustStores": ["key:acme"]}, f"{T}.trustStores[0]", "does not match"),
        ({"trustedIdentities": ["*", IDENTITY]}, f"{T}.trustedIdentities", "others are named"),
        ({"trustedIdentities": ["Release"]}, f"{T}.trustedIdentities", "neither"),
        ({"trustedIdentities": []}, f"{T}.trustedIdentities", "at least 1|should be non-empty|must have"),
        ({"signatures": {"allOf": ["ca:other"]}}, f"{T}.signatures.allOf", "not trusted here"),
        (
            {"signatures": {"anyOf": {"minimumMatches": 2, "of": ["ca:acme"]}}},
            f"{T}.signatures.anyOf.minimumMatches",
            "2 must sign, of 1",
        ),
    ],
)
def test_contradictions(world, entry, field, part):
    refused(world.document(entry=entry), field, part)


def test_identities_and_authorities_go_together(world):
    document = world.document()
    del document["trustPolicies"][0]["trustedIdentities"]
    refused(document, f"{T}.trustedIdentities", "for whom is not said")
    document = world.sim.policy_document()
    document["trustPolicies"][0]["trustedIdentities"] = [IDENTITY]
    refused(document, f"{T}.trustedIdentities", "nobody can have these identities")


@pytest.mark.parametrize(
    ("change", "member", "part"),
    [
        ({"certificates": ""}, "certificates", "PEM"),
        ({"certificates": "text\n@ROOT@"}, "certificates", "PEM"),
        ({"certificates": "@ROOT@@ROOT@"}, "certificates", "stands twice"),
        ({"certificates": "@LEAF@"}, "certificates", "not a certificate authority"),
        ({"certificates": "@CRL@"}, "certificates", "PEM blocks of type CERTIFICATE"),
        ({"certificates": "@BAD@"}, "certificates", "malformed"),
        ({"crls": "@ROOT@"}, "crls", "X509 CRL"),
        ({"crls": "@BADCRL@"}, "crls", "a CRL is malformed"),
        ({"type": "tsa", "crls": "@CRL@"}, "crls", "type ca only"),
    ],
)
def test_stores_that_are_none(world, change, member, part):
    texts = {
        "@ROOT@": world.root.pem.decode(), "@LEAF@": world.leaf.pem.decode(), "@CRL@": pem_crl(world.root).decode(),
        "@BADCRL@": "-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n",
        "@BAD@": "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",
    }  # fmt: skip
    for name, text in texts.items():
        change = {key: value.replace(name, text) for key, value in change.items()}
    document = world.document()
    document["trustStores"][0] |= change
    refused(document, f"trustStores[0].{member}", part)


def test_two_stores_of_one_name(world):
    document = world.document()
    document["trustStores"] *= 2
    refused(document, "trustStores[1]", "stands twice")


# --- rollback memory


class Remembered:
    def __init__(self, **seen):
        self.seen = {("default", "com.acme.clock"): seen["clock"]} if seen else {}

    def highest(self, policy, extension):
        return self.seen.get((policy, extension))


class Broken:
    def highest(self, policy, extension):
        raise PolicyError("the state cannot be read", file="state.db")


@pytest.mark.parametrize(
    ("entry", "memory", "error", "part"),
    [
        ({}, None, None, None),
        ({}, Remembered(), None, None),
        ({}, Remembered(clock=3), None, None),
        ({}, Remembered(clock=2), None, None),
        ({}, Remembered(clock=4), "rollback", "4 was accepted here before"),
        ({"maxAdvance": {"com.acme.clock": 2}}, Remembered(clock=1), None, None),
        ({"maxAdvance": {"com.acme.clock": 1}}, Remembered(clock=1), "rollback", "a jump from 1"),
        ({"maxAdvance": {"com.acme.clock": 0}}, Remembered(clock=3), None, None),
        ({"maxAdvance": {"com.acme.clock": 0}}, Remembered(), None, None),
        ({"maxAdvance": {"com.acme.clock": 0}}, None, None, "maxAdvance is not checked"),
        ({"rollbackState": "required"}, None, "rollback", "there is none"),
        ({"rollbackState": "required"}, Remembered(), None, None),
        ({}, Broken(), "policy-invalid", "the state cannot be read"),
    ],
)
def test_rollback_memory(sim, entry, memory, error, part):
    report = sim.verify(sim.graft(), sim.policy(entry=entry), memory=memory)
    assert report.error == error
    assert set(failures(report)) == ({"rollback"} if error else set())
    found = next(check for check in report.checks if check.name == "rollback")
    assert part is None or part in found.detail or any(part in warning for warning in report.warnings)


def test_rollback_by_memory_can_be_logged_and_broken_memory_cannot(sim):
    entry = {"signatureVerification": {"level": "strict", "override": {"rollback": "log"}}}
    assert sim.verify(sim.graft(), sim.policy(entry=entry), memory=Remembered(clock=9)).ok
    assert not sim.verify(sim.graft(), sim.policy(entry=entry), memory=Broken()).ok


# --- one signature, one key


P256 = (
    0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF,
    0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B,
    0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    (
        0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
        0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
    ),
)


def added(a, b):
    """Add two points of P-256 (SEC 1, 2.2.1); None is the point at infinity."""
    p = P256[0]
    if a is None or b is None:
        return a or b
    if a[0] == b[0] and (a[1] + b[1]) % p == 0:
        return None
    slope = (3 * a[0] * a[0] - 3) * pow(2 * a[1], -1, p) if a == b else (b[1] - a[1]) * pow(b[0] - a[0], -1, p)
    x = (slope * slope - a[0] - b[0]) % p
    return x, (slope * (a[0] - x) - a[1]) % p


def times(factor, point):
    total = None
    while factor:
        total = added(total, point) if factor & 1 else total
        point, factor = added(point, point), factor >> 1
    return total


def second_key(message, sig):
    """The two keys that one ECDSA signature verifies with (SEC 1, 4.1.6)."""
    p, b, n, g = P256
    r, s = decode_dss_signature(sig)
    y = pow((r**3 - 3 * r + b) % p, (p + 1) // 4, p)
    e = int.from_bytes(hashlib.sha256(message).digest(), "big")
    keys = []
    for point in ((r, y), (r, p - y)):
        x, y_ = added(times(s * pow(r, -1, n) % n, point), times(-e * pow(r, -1, n) % n, g))
        keys.append(ec.EllipticCurvePublicNumbers(x, y_, ec.SECP256R1()).public_key())
    return keys


def test_one_signature_never_counts_for_two_keys(world):
    """An authority that certifies whatever key it is shown does not turn one signature into two signers."""
    evidence = world.graft(bare=["vendor"])
    envelope = parse_envelope(evidence.stored[0])
    (signature,) = envelope.signatures
    keys = [public_from_key(key) for key in second_key(envelope.pae, signature.sig)]
    other = next(key for key in keys if key != world.sim.keys["vendor"].public)
    assert other.verify(envelope.pae, signature.sig), "the premise"
    key = next(key for key in second_key(envelope.pae, signature.sig) if public_from_key(key) == other)
    crafted = certificate_for(key, world.middle)
    packed = pack_material(Material((crafted, world.middle.der)))
    policy = world.policy(keys=["vendor"], entry={"signatures": {"allOf": ["key:vendor", "ca:acme"]}})
    for name in ("", signature.keyid, other.keyid):
        for kept in ([], [signature]):
            bent = dataclasses.replace(signature, keyid=name, extension=packed)
            evidence.stored = [serialise(Envelope(envelope.payload, (*kept, bent)))]
            report = world.sim.verify(evidence, policy)
            assert not report.ok and report.error in ("untrusted-signer", "bad-signature")


def certificate_for(key, issuer):
    """A certificate for a public key whose private half nobody has."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject("Release"))
        .issuer_name(issuer.cert.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(x509.ExtendedKeyUsage([CODE_SIGNING]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
    )
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(Encoding.DER)


def test_crafted_certificate_is_otherwise_a_good_one(world):
    """What the test above is refused for is not some other fault of the certificate."""
    leaf = issue("Release", world.middle)
    chain = [certificate_for(leaf.key.public_key(), world.middle), world.middle.der]
    assert world.sim.verify(world.graft((leaf, {"chain": chain})), world.policy()).ok


def test_no_byte_of_a_certified_envelope_can_change(world):
    evidence, policy = world.graft((world.leaf, {})), world.policy()
    original = evidence.stored[0]
    for position in range(original.index(b'"signatures"'), len(original), 5):
        evidence.stored = [original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :]]
        assert not world.sim.verify(evidence, policy).ok, position
