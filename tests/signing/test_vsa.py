"""Verification summaries: what they say, who may say it, and what nobody's word replaces."""

from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
import signing_ca as ca
from hypothesis import given, settings
from hypothesis import strategies as st

from vmgraft.errors import BadSignatureError, PolicyError, UsageError
from vmgraft.signing.dsse import Envelope, Signature, pae, parse_envelope, serialise
from vmgraft.signing.export import export_bundle
from vmgraft.signing.keys import PrivateKey, public_from_key
from vmgraft.signing.material import KIND, Material, pack_material
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policytools import format_policy
from vmgraft.signing.relying import verify_by_summary
from vmgraft.signing.vsa import (
    SUMMARY_TYPE,
    SummaryDemand,
    build_summary,
    check_verifier,
    read_summary,
    sign_summary,
)

ME = "https://audit.example/vmgraft"
TYPE = "application/vnd.in-toto+json"


def statement_of(evidence) -> bytes:
    return parse_envelope(evidence.stored[0]).payload


def document(sim, evidence=None, policy=None, *, ok: bool = True, now=None, **members) -> dict:
    """What an auditor says about an image, and how it is changed for a test."""
    evidence, policy = evidence or sim.graft(), policy or sim.policy()
    report = sim.verify(evidence, policy)
    assert report.ok is ok
    built = build_summary(
        report, policy, evidence.names, statement=statement_of(evidence), verifier=ME, now=now or sim.now
    )
    made = json.loads(built)
    for path, value in members.items():
        *parents, last = path.split("__")
        place = made
        for name in parents:
            place = place[int(name) if name.isdigit() else name]
        place[last] = value
    return made


def signed(sim, made: dict, signer: str = "second") -> bytes:
    return sign_summary(json.dumps(made).encode(), sim.keys[signer])


def rely(sim, data: bytes, evidence=None, policy=None, *, auditors=("second",), **options):
    named = tuple(sim.keys[name].public for name in auditors)
    age = {"max_age": options.pop("max_age")} if "max_age" in options else {}
    demand = SummaryDemand(data, named, file="summary.json", **age)
    options = {"image_name": "disk.qcow2", "now": sim.now} | options
    return verify_by_summary(evidence or sim.graft(), policy or sim.policy(), demand, **options)


def failed(report) -> tuple[str, str]:
    assert not report.ok
    check = next(check for check in report.checks if check.status.value == "fail")
    return check.name, report.error


# --- what it says


def test_what_a_summary_says(sim):
    evidence, policy = sim.graft(), sim.policy()
    made = document(sim, evidence, policy)
    predicate = made["predicate"]
    assert made["_type"] == "https://in-toto.io/Statement/v1"
    assert made["predicateType"] == "https://slsa.dev/verification_summary/v1" == SUMMARY_TYPE
    assert made["subject"] == [
        {"name": "guest-content", "digest": {"sha256": "33" * 32}},
        {"name": "guest-content/fs-verity-descriptor", "digest": {"sha256": "22" * 32}},
    ]
    assert predicate["verifier"]["id"] == ME
    assert predicate["timeVerified"] == "2026-11-22T15:00:00Z"
    assert predicate["resourceUri"] == "vmgraft:tree:sha256:" + "22" * 32
    assert predicate["policy"]["digest"] == {"sha256": policy.sha256}
    assert predicate["policy"]["name"] == "default"
    statement = hashlib.sha256(statement_of(evidence)).hexdigest()
    assert predicate["inputAttestations"] == [{"uri": "vmgraft:statement", "digest": {"sha256": statement}}]
    assert (predicate["verificationResult"], predicate["verifiedLevels"]) == ("PASSED", ["VMGRAFT_STRICT"])


def test_the_bad_news_is_told_too(sim):
    evidence = sim.graft(signers=("stranger",))
    predicate = document(sim, evidence, ok=False)["predicate"]
    assert (predicate["verificationResult"], predicate["verifiedLevels"]) == ("FAILED", ["FAILED"])
    assert "name" not in predicate["policy"]


def test_without_a_flat_digest(sim, content_type):
    evidence = sim.graft(content=content_type(flat=None))
    evidence.names = content_type(flat=None)
    made = document(sim, evidence)
    assert [subject["name"] for subject in made["subject"]] == ["guest-content/fs-verity-descriptor"]
    assert rely(sim, signed(sim, made), evidence).ok


@pytest.mark.parametrize(
    "uri", ["", "audit.example", "https://a b", "https://\n", "https:", "x:" + "y" * 600, "https://ä"]
)
def test_who_the_auditor_is_must_be_a_uri(sim, uri):
    with pytest.raises(UsageError):
        check_verifier(uri)
    evidence, policy = sim.graft(), sim.policy()
    with pytest.raises(UsageError):
        build_summary(sim.verify(evidence, policy), policy, evidence.names, statement=b"", verifier=uri, now=sim.now)


# --- other programs


def test_openssl_verifies_a_summary(sim, tmp_path):
    """The encoding under the signature is made here, from the file alone."""
    for signer, verify in (
        ("third", ("dgst", "-sha256", "-verify", "key.pem", "-signature", "sig", "pae")),
        ("second", ("pkeyutl", "-verify", "-pubin", "-inkey", "key.pem", "-rawin", "-in", "pae", "-sigfile", "sig")),
    ):
        envelope = json.loads(signed(sim, document(sim), signer))
        body = base64.b64decode(envelope["payload"])
        (signature,) = envelope["signatures"]
        (tmp_path / "pae").write_bytes(b"DSSEv1 28 " + TYPE.encode() + b" " + str(len(body)).encode() + b" " + body)
        (tmp_path / "sig").write_bytes(base64.b64decode(signature["sig"]))
        (tmp_path / "key.pem").write_bytes(sim.keys[signer].public.pem)
        subprocess.run(["openssl", *verify], cwd=tmp_path, check=True, capture_output=True)
        (tmp_path / "pae").write_bytes((tmp_path / "pae").read_bytes().replace(b"PASSED", b"FAILED"))
        assert subprocess.run(["openssl", *verify], cwd=tmp_path, check=False, capture_output=True).returncode == 1


def test_sigstore_js_verifies_a_summary(sim, tmp_path):
    source = Path(__file__).parent / "npm"
    lock = (source / "package-lock.json").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmgraft-tests"
    folder = cache / f"sigstore-{hashlib.sha256(lock).hexdigest()[:16]}"
    assert shutil.which("node"), "node is missing: apt-get install nodejs"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(source / name, folder)
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=240)
        (folder / "installed").touch()
    shutil.copy(source / "verify.mjs", folder)
    key = sim.keys["third"].public
    ((_, bundle),) = export_bundle(parse_envelope(signed(sim, document(sim), "third")))
    (tmp_path / "key.pem").write_bytes(key.pem)
    altered = json.loads(bundle)
    payload = base64.b64decode(altered["dsseEnvelope"]["payload"]).replace(b"PASSED", b"FAILED")
    altered["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    for data, code in ((bundle, 0), (json.dumps(altered).encode(), 1)):
        (tmp_path / "bundle.json").write_bytes(data)
        command = ["node", "verify.mjs", tmp_path / "bundle.json", tmp_path / "key.pem", key.keyid]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr


# --- relying on one


def test_a_named_auditors_word_stands_for_the_signatures(sim):
    """Here nobody could check the vendor's signature: its bytes are gone."""
    evidence, policy = sim.graft(), sim.policy()
    data = signed(sim, document(sim, evidence, policy))
    envelope = parse_envelope(evidence.stored[0])
    evidence.stored = [serialise(Envelope(envelope.payload, (Signature("", b"lost"),)))]
    assert sim.verify(evidence, policy).error == "untrusted-signer"
    report = rely(sim, data, evidence, policy)
    assert report.ok, report
    assert report.policy == "default"
    assert report.signers == ()
    assert [item.id for item in report.extensions] == ["com.acme.clock"]
    assert any("signatures in the image were not checked" in text for text in report.warnings)
    assert {check.status.value for check in report.checks} == {"pass"}


@pytest.mark.parametrize(
    ("change", "check", "error"),
    [
        ({"predicate__verificationResult": "FAILED"}, "signature", "untrusted-signer"),
        ({"predicate__policy__digest": {"sha256": "ab" * 32}}, "signature", "untrusted-signer"),
        ({"predicate__verifiedLevels": ["FAILED"]}, "signature", "untrusted-signer"),
        ({"predicate__verifiedLevels": ["VMGRAFT_AUDIT"]}, "signature", "untrusted-signer"),
        ({"predicate__verifiedLevels": ["VMGRAFT_STRICT", "FAILED"]}, "signature", "untrusted-signer"),
        ({"predicate__policy__name": "other"}, "authenticity", "untrusted-signer"),
        ({"predicate__inputAttestations": []}, "signature", "untrusted-signer"),
        ({"predicate__inputAttestations": [{"digest": {"sha256": "ab" * 32}}]}, "signature", "untrusted-signer"),
        ({"predicate__inputAttestations": [{"digest": {"sha256": "ab" * 32}}] * 2}, "signature", "bad-signature"),
        ({"predicate__timeVerified": "2026-11-15T14:59:59Z"}, "signature", "expired"),
        ({"predicate__timeVerified": "2026-11-22T15:05:01Z"}, "signature", "expired"),
        ({"predicate__timeVerified": "2026-11-22T15:00:00+00:00"}, "signature", "bad-signature"),
        ({"predicate__resourceUri": "vmgraft:tree:sha256:" + "ab" * 32}, "signature", "bad-signature"),
        ({"subject__1__digest": {"sha256": "ab" * 32}}, "signature", "bad-signature"),
        ({"subject__0__digest": {"sha256": "ab" * 32}}, "content", "content-mismatch"),
        ({"subject__1__name": "guest-content"}, "signature", "bad-signature"),
        ({"subject__0__digest": {"sha512": "ab" * 64}}, "signature", "bad-signature"),
        ({"predicateType": "https://vmgraft.dev/graft/v1"}, "signature", "bad-signature"),
        ({"_type": "https://in-toto.io/Statement/v0.1"}, "signature", "bad-signature"),
        ({"predicate__verifier": {}}, "signature", "bad-signature"),
        ({"predicate__verificationResult": "passed"}, "signature", "bad-signature"),
    ],
)
def test_a_summary_that_says_something_else(sim, change, check, error):
    assert failed(rely(sim, signed(sim, document(sim, **change)))) == (check, error)


def test_what_other_auditors_may_add_is_passed_over(sim):
    made = document(sim, predicate__slsaVersion="1.0", predicate__dependencyLevels={})
    made["subject"].append({"name": "more", "digest": {"sha256": "ab" * 32, "sha512": "cd" * 64}})
    assert rely(sim, signed(sim, made)).ok


@pytest.mark.parametrize(
    ("age", "allowed", "ok"), [(7, None, True), (8, None, False), (8, 9, True), (1, 0, False), (-0.003, None, True)]
)
def test_age(sim, age, allowed, ok):
    data = signed(sim, document(sim, now=sim.now - timedelta(days=age)))
    options = {} if allowed is None else {"max_age": timedelta(days=allowed)}
    assert rely(sim, data, **options).ok is ok


@pytest.mark.parametrize(("hours", "text"), [(0, "0d"), (1, "1h"), (48, "2d"), (1.5, "90m"), (0.001, "3s")])
def test_the_age_is_said_as_it_is_asked_for(sim, hours, text):
    data = signed(sim, document(sim, now=sim.now - timedelta(days=3)))
    report = rely(sim, data, max_age=timedelta(hours=hours))
    assert f"it is of 2026-11-19T15:00:00Z, and may be {text} old" in report.checks[2].detail


def test_only_a_named_auditor_counts(sim):
    made = document(sim)
    assert failed(rely(sim, signed(sim, made, "stranger"))) == ("signature", "untrusted-signer")
    assert failed(rely(sim, signed(sim, made), auditors=())) == ("signature", "untrusted-signer")
    assert failed(rely(sim, signed(sim, made, "vendor"), auditors=())) == ("signature", "untrusted-signer"), (
        "who may sign grafts may not vouch for them"
    )
    envelope = json.loads(signed(sim, made, "stranger"))
    envelope["signatures"][0]["keyid"] = sim.keys["second"].keyid
    assert failed(rely(sim, json.dumps(envelope).encode())) == ("signature", "untrusted-signer")
    both = json.loads(signed(sim, made))
    both["signatures"] = envelope["signatures"] + both["signatures"]
    assert rely(sim, json.dumps(both).encode()).ok


def with_auditors(sim, *names: str, **top):
    """A policy that names auditors."""
    keys = sim.policy_document("vendor", *names)["keys"]
    return sim.policy(top={"keys": keys, "auditors": [f"key:{name}" for name in names]} | top)


def test_the_policys_auditors_rule(sim):
    policy = with_auditors(sim, "second")
    data = signed(sim, document(sim, policy=policy))
    assert rely(sim, data, policy=policy, auditors=()).ok
    assert rely(sim, data, policy=policy, auditors=("third", "second")).ok
    assert failed(rely(sim, data, policy=policy, auditors=("third",))) == ("signature", "untrusted-signer")
    other = signed(sim, document(sim, policy=policy), "third")
    assert failed(rely(sim, other, policy=policy, auditors=("third",))) == ("signature", "untrusted-signer")


def test_a_revoked_auditor(sim):
    policy = with_auditors(sim, "second", revocations={"keys": ["key:second"]})
    data = signed(sim, document(sim, policy=policy))
    assert failed(rely(sim, data, policy=policy)) == ("signature", "revoked")


def test_a_graft_is_no_summary_and_a_summary_no_graft(sim):
    evidence = sim.graft(signers=("second",))
    assert failed(rely(sim, evidence.stored[0], evidence)) == ("signature", "bad-signature")
    evidence.stored = [signed(sim, document(sim))]
    assert sim.verify(evidence, sim.policy("second")).error == "graft-format"


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"payload":"' + b"A" * (1 << 20) + b'"}']
)
def test_what_is_no_envelope(sim, data):
    assert failed(rely(sim, data)) == ("signature", "bad-signature")
    with pytest.raises(BadSignatureError):
        read_summary(data, [sim.keys["second"].public])


def test_nothing_is_parsed_that_an_auditor_did_not_sign(sim):
    bomb = b'{"a":' * 5000
    data = sign_summary(bomb, sim.keys["stranger"])
    assert failed(rely(sim, data)) == ("signature", "untrusted-signer")
    assert failed(rely(sim, sign_summary(bomb, sim.keys["second"]))) == ("signature", "bad-signature")


# --- what it never replaces


def test_content_is_read_and_compared_whatever_the_statement_is_bound_to(sim, content_type):
    for options in ({}, {"binding": "any", "content": None}):
        entry = {"binding": "any"}
        policy = sim.policy(entry=entry)
        evidence = sim.graft(**options)
        data = signed(sim, document(sim, evidence, policy))
        assert rely(sim, data, evidence, policy).ok
        for changed in ({"tree_digest": b"\x44" * 32}, {"flat": b"\x44" * 32}):
            other = dataclasses.replace(evidence, names=content_type(**changed), asked=[])
            assert failed(rely(sim, data, other, policy)) == ("content", "content-mismatch")
            assert other.asked, "the content was not read"


def test_another_statement_of_the_same_vendor(sim):
    data = signed(sim, document(sim))
    other = sim.graft(sim.manifest(securityVersion=4))
    assert failed(rely(sim, data, other)) == ("signature", "untrusted-signer")


def test_everything_else_is_checked_here(sim):
    evidence, policy = sim.graft(), sim.policy()
    data = signed(sim, document(sim, evidence, policy))

    class Higher:
        def highest(self, policy: str, extension: str) -> int:
            return 4

    assert failed(rely(sim, data, memory=Higher())) == ("rollback", "rollback")
    late = {"now": sim.now + timedelta(days=31), "max_age": timedelta(days=60)}
    assert failed(rely(sim, data, **late)) == ("expiry", "expired")
    broken = copy.deepcopy(evidence)
    broken.payloads.popitem()
    assert failed(rely(sim, data, broken)) == ("payloads", "payload-mismatch")
    unsound = copy.deepcopy(evidence)
    unsound.problem = "the record is damaged"
    assert failed(rely(sim, data, unsound)) == ("format", "graft-format")
    two = copy.deepcopy(evidence)
    two.stored *= 2
    assert failed(rely(sim, data, two)) == ("envelope", "graft-format")
    named = sim.policy(entry={"imageScopes": ["name:disk.*"]})
    data = signed(sim, document(sim, evidence, named))
    assert failed(rely(sim, data, policy=named, image_name="other.qcow2")) == ("scope", "untrusted-signer")


def test_the_rule_that_the_auditor_used_is_the_one_that_applies_here(sim):
    """One file, two entries: the auditor saw the image under a name for which less is demanded."""
    lax = sim.policy_document("vendor")["trustPolicies"][0] | {"name": "lax", "imageScopes": ["name:test-*"]}
    both = sim.policy_document("vendor", "third")
    both["trustPolicies"][0] |= {"signatures": {"allOf": [f"key:{sim.keys['third'].keyid}"]}}
    policy = sim.policy("vendor", "third", top={"trustPolicies": [*both["trustPolicies"], lax]})
    evidence = sim.graft()
    report = sim.verify(evidence, policy, image_name="test-disk.img")
    assert report.policy == "lax"
    made = build_summary(report, policy, evidence.names, statement=statement_of(evidence), verifier=ME, now=sim.now)
    data = sign_summary(made, sim.keys["second"])
    assert rely(sim, data, evidence, policy, image_name="test-disk.img").ok
    assert failed(rely(sim, data, evidence, policy)) == ("authenticity", "untrusted-signer")


LOGS_WHO = {"signatures": {"allOf": ["key:third"]}}


@pytest.mark.parametrize(
    ("verification", "level", "ok"),
    [
        ({"level": "strict", "override": {"authenticity": "log"}}, "VMGRAFT_AUDIT", False),
        ({"level": "permissive", "override": {"authenticity": "log"}}, "VMGRAFT_AUDIT", False),
        ({"level": "audit"}, "VMGRAFT_AUDIT", True),
    ],
)
def test_a_failure_that_was_only_logged_lowers_the_level(sim, verification, level, ok):
    policy = sim.policy("vendor", "third", entry=LOGS_WHO | {"signatureVerification": verification})
    evidence = sim.graft()
    assert sim.verify(evidence, policy).ok
    made = document(sim, evidence, policy)
    assert made["predicate"]["verifiedLevels"] == [level]
    report = rely(sim, signed(sim, made), evidence, policy)
    if not ok:
        assert failed(report) == ("signature", "untrusted-signer") and "demands VMGRAFT_" in report.checks[2].detail
        return
    assert report.ok and report.checks[7].status.value == "warn", "nobody said that the rule holds"
    assert any("what that level only logs may have failed there" in text for text in report.warnings)


@pytest.mark.parametrize(
    ("verification", "grants", "level"),
    [
        ({"level": "strict", "override": {"capabilities": "log", "authenticity": "log"}}, True, "VMGRAFT_STRICT"),
        ({"level": "strict", "override": {"capabilities": "log"}}, False, "VMGRAFT_PERMISSIVE"),
        ({"level": "permissive"}, True, "VMGRAFT_PERMISSIVE"),
        ({"level": "permissive"}, False, "VMGRAFT_PERMISSIVE"),
        ({"level": "audit", "override": dict.fromkeys(["authenticity", "required"], "enforce")}, True, "VMGRAFT_AUDIT"),
    ],
)
def test_the_level_is_the_policys_or_a_weaker_one(sim, verification, grants, level):
    entry = {"signatureVerification": verification} | ({} if grants else {"grants": {}})
    policy, evidence = sim.policy(entry=entry), sim.graft()
    made = document(sim, evidence, policy)
    assert made["predicate"]["verifiedLevels"] == [level]
    report = rely(sim, signed(sim, made), evidence, policy)
    assert report.ok is (level == f"VMGRAFT_{verification['level'].upper()}")
    if report.ok:
        assert report.checks[7].status.value == "pass"
    raised = copy.deepcopy(made)
    raised["predicate"]["verifiedLevels"] = ["VMGRAFT_AUDIT" if level == "VMGRAFT_STRICT" else "VMGRAFT_STRICT"]
    if verification["level"] != "strict" or level == "VMGRAFT_STRICT":
        assert not rely(sim, signed(sim, raised), evidence, policy).ok


def test_who_signs_images_is_no_auditor(sim):
    """One of two who must sign would otherwise stand in for both."""
    both = sim.policy("vendor", "second")
    evidence = sim.graft(signers=("vendor", "second"))
    data = signed(sim, document(sim, evidence, both))
    report = rely(sim, data, evidence, both)
    assert failed(report) == ("signature", "untrusted-signer") and "may sign images itself" in report.checks[2].detail
    with pytest.raises(PolicyError, match=r"'key:second' is an auditor, and also signs images") as caught:
        sim.policy("vendor", "second", top={"auditors": ["key:second"]})
    assert caught.value.field == "auditors[0]" and "trustPolicies[0].signatures" in caught.value.message
    keyid = f"key:{sim.keys['second'].keyid}"
    with pytest.raises(PolicyError, match="also signs images"):
        sim.policy("vendor", "second", top={"auditors": [keyid]})


def test_an_auditor_who_signs_under_another_trust_policy(sim):
    """Which one applies does not matter: the one who signs any images of this policy file is no auditor in it."""
    made = sim.policy_document("vendor", "second")
    first = made["trustPolicies"][0] | {"signatures": {"allOf": ["key:vendor"]}}
    other = first | {"name": "other", "imageScopes": ["name:zzz"], "signatures": {"allOf": ["key:second"]}}
    for entries in ([first, other], [other, first]):
        policy = parse_policy(format_policy(made | {"trustPolicies": entries}))
        evidence = sim.graft()
        report = rely(sim, signed(sim, document(sim, evidence, policy)), evidence, policy)
        assert failed(report) == ("signature", "untrusted-signer")
        assert "may sign images itself, under the trust policy other" in report.checks[2].detail


@pytest.fixture(scope="module")
def certified(sim):
    """An authority that the rule names, and that also certifies the auditor's key."""
    root = ca.issue("Root", ca=True)
    leaf = ca.issue("Auditor", root)
    sim.keys["leaf"] = PrivateKey(public_from_key(leaf.key.public_key()), leaf.key)
    made = sim.policy_document("vendor")
    made["trustStores"] = [{"name": "acme", "type": "ca", "certificates": root.pem.decode()}]
    made["trustPolicies"][0] |= {
        "trustStores": ["ca:acme"], "trustedIdentities": ["*"], "signatures": {"allOf": ["key:vendor", "ca:acme"]},
    }  # fmt: skip
    yield leaf, parse_policy(format_policy(made))
    del sim.keys["leaf"]


def also_signed(sim, *extra):
    """The vendor's graft, with more signatures: (keyid, signature of the message, certificates)."""
    evidence = sim.graft()
    envelope = parse_envelope(evidence.stored[0])
    more = [Signature(keyid, sign(envelope.pae), pack_material(Material(chain))) for keyid, sign, chain in extra]
    evidence.stored = [serialise(Envelope(envelope.payload, (*envelope.signatures, *more)))]
    return evidence


@pytest.mark.parametrize("named", ["leaf", ""])
def test_an_auditor_who_has_signed_the_image_by_certificate(sim, certified, named):
    """The rule asks for two; the one whom the authority certifies would stand for both."""
    leaf, policy = certified
    keyid = sim.keys[named].keyid if named else ""
    evidence = also_signed(sim, (keyid, sim.keys["leaf"].sign, (leaf.der,)))
    data = signed(sim, document(sim, evidence, policy), "leaf")
    report = rely(sim, data, evidence, policy, auditors=("leaf",))
    assert failed(report) == ("signature", "untrusted-signer")
    assert "signs images itself: signature 1 is by it" in report.checks[2].detail and not report.extensions
    independent = signed(sim, document(sim, evidence, policy), "third")
    assert rely(sim, independent, evidence, policy, auditors=("third",)).ok


def test_an_auditor_of_whose_certificate_the_image_speaks(sim, certified):
    """Not even a signature by it is needed, nor one that is valid, nor a chain that leads anywhere."""
    leaf, policy = certified
    good = also_signed(sim, ("", sim.keys["leaf"].sign, (leaf.der,)))
    data = signed(sim, document(sim, good, policy), "leaf")
    other = ca.issue("Other")
    for chain in ((leaf.der,), (b"junk", leaf.der), (other.der, leaf.der)):
        evidence = also_signed(sim, ("", lambda _message: b"x" * 70, chain))
        report = rely(sim, data, evidence, policy, auditors=("leaf",))
        assert failed(report) == ("signature", "untrusted-signer")
        assert "signs images itself: a certificate for it is beside signature 1" in report.checks[2].detail


def test_a_bare_signature_by_the_auditor(sim):
    """By a key that the policy does not know, and under a keyid that is not its own."""
    policy = sim.policy()
    evidence = also_signed(sim, ("SHA256:else", sim.keys["second"].sign, ()))
    report = rely(sim, signed(sim, document(sim, evidence, policy)), evidence, policy)
    assert failed(report) == ("signature", "untrusted-signer") and "signature 1 is by it" in report.checks[2].detail
    with_policy = with_auditors(sim, "second")
    report = rely(sim, signed(sim, document(sim, evidence, with_policy)), evidence, with_policy, auditors=())
    assert failed(report) == ("signature", "untrusted-signer")


def test_what_is_odd_beside_other_signatures_is_nothing_to_the_auditor(sim):
    policy = sim.policy()
    evidence = also_signed(sim, ("", lambda _message: b"x" * 70, (b"junk",)))
    envelope = parse_envelope(evidence.stored[0])
    alien = Signature("", b"y", {"kind": "something else"})
    broken = Signature("", b"z", {"kind": KIND, "ext": 5})
    evidence.stored = [serialise(Envelope(envelope.payload, (*envelope.signatures, alien, broken)))]
    assert rely(sim, signed(sim, document(sim, evidence, policy)), evidence, policy).ok


def test_the_signature_is_over_the_dsse_encoding(sim):
    made = json.dumps(document(sim)).encode()
    bare = Envelope(made, (Signature("", sim.keys["second"].sign(made)),))
    assert failed(rely(sim, serialise(bare))) == ("signature", "untrusted-signer")
    assert sim.keys["second"].public.verify(
        pae(TYPE, made), parse_envelope(sign_summary(made, sim.keys["second"])).signatures[0].sig
    )


def paths(value, *path):
    """Every place in a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, *path, key)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 64), 1 << 64), st.text(max_size=20), st.just("\x00" * 100_000),
    st.lists(st.none(), max_size=3), st.dictionaries(st.text(max_size=8), st.integers(), max_size=3),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(data=st.data(), junk=JUNK)
def test_an_auditor_may_sign_anything(sim, data, junk):
    """Whatever a named auditor put there, the verdict is a report; and only what says the same thing passes."""
    made = document(sim)
    place = data.draw(st.sampled_from([path for path in paths(made) if path]))
    target = made
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = junk
    report = rely(sim, signed(sim, made))
    spoken = ("verifier", "version"), ("verifiedLevels",), ("policy", "uri"), ("inputAttestations", 0, "uri")
    free = [path for path in spoken if place[1 : 1 + len(path)] == path] or place[:1] == ("subject",)
    assert not report.ok or free, place
