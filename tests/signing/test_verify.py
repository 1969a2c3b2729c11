"""The verifier against a simulator: every check, its code, and how policies decide."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmgraft.errors import MalformedImageError, PolicyError, UsageError
from vmgraft.signing import verify
from vmgraft.signing.contract import Limits, Status
from vmgraft.signing.dsse import Envelope, Signature, pae, parse_envelope, serialise
from vmgraft.signing.integrity import CHECKS
from vmgraft.signing.keys import PrivateKey
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policytools import format_policy


def status(report, name):
    return next(check.status for check in report.checks if check.name == name)


def failed(report):
    return {check.name: check.error for check in report.checks if check.status is Status.FAIL}


def assert_refused(report, code, *names):
    assert not report.ok
    assert report.error == code
    assert set(names) <= failed(report).keys()
    assert report.extensions == ()
    assert [check.name for check in report.checks] == list(CHECKS)


def test_good_graft_passes_every_check(sim):
    report = sim.verify(sim.graft())
    assert report.ok and report.error is None
    assert {check.status for check in report.checks} == {Status.PASS}
    assert report.policy == "default"
    assert report.signers == (sim.keys["vendor"].keyid,)
    assert report.statement["predicate"]["binding"] == "image"
    (extension,) = report.extensions
    assert extension.capabilities == ("log", "pio:0x510-0x517")
    assert extension.limits == Limits(memory_mib=8)
    assert extension.module == b"module of com.acme.clock"
    assert extension.module_sha256 == hashlib.sha256(extension.module).hexdigest()
    assert extension.manifest["id"] == "com.acme.clock"
    assert extension.on_fault == "stop"


def test_docstring_numbers_the_checks_in_order():
    lines = [line.split() for line in verify.__doc__.splitlines() if "``" in line and line.lstrip()[:1].isdigit()]
    assert [(int(words[0].rstrip(".")), words[1].strip("`")) for words in lines] == list(enumerate(CHECKS, 1))


# --- integrity


def test_format_problem_is_graft_format_and_the_rest_is_still_reported(sim):
    evidence = sim.graft()
    evidence.problem = "section table cut"
    report = sim.verify(evidence)
    assert_refused(report, "graft-format", "format")
    assert status(report, "authenticity") is Status.PASS


@pytest.mark.parametrize("count", [0, 2])
def test_other_than_one_envelope(sim, count):
    evidence = sim.graft()
    evidence.stored = evidence.stored * count
    assert_refused(sim.verify(evidence), "graft-format", "envelope")


def test_malformed_envelope_is_bad_signature(sim):
    evidence = sim.graft()
    evidence.stored = [b"{}"]
    assert_refused(sim.verify(evidence), "bad-signature", "envelope")


def resigned(sim, evidence, signatures):
    envelope = parse_envelope(evidence.stored[0])
    evidence.stored = [serialise(Envelope(envelope.payload, tuple(signatures)))]
    return evidence


def signature_by(sim, evidence, name, keyid=None):
    envelope = parse_envelope(evidence.stored[0])
    key = sim.keys[name]
    return Signature(key.keyid if keyid is None else keyid, key.sign(envelope.pae))


def test_signature_naming_a_known_key_that_does_not_verify(sim):
    evidence = sim.graft()
    spoofed = signature_by(sim, evidence, "stranger", sim.keys["vendor"].keyid)
    report = sim.verify(resigned(sim, evidence, [spoofed]))
    assert_refused(report, "bad-signature", "signature")
    assert report.statement is None


def test_spoofed_keyid_beside_a_good_signature_is_an_altered_envelope(sim):
    evidence = sim.graft()
    good = signature_by(sim, evidence, "vendor")
    spoofed = signature_by(sim, evidence, "stranger", sim.keys["second"].keyid)
    report = sim.verify(resigned(sim, evidence, [good, spoofed]), sim.policy("vendor", "second"))
    assert_refused(report, "bad-signature", "signature")


def test_only_unknown_signers(sim):
    report = sim.verify(sim.graft(signers=["stranger"]))
    assert_refused(report, "untrusted-signer", "authenticity")
    assert report.statement is None and report.signers == ()
    assert status(report, "signature") is Status.SKIP


def test_unknown_extra_signature_does_no_harm_and_is_reported(sim):
    report = sim.verify(sim.graft(signers=["stranger", "vendor"]))
    assert report.ok
    assert any("unknown key" in warning for warning in report.warnings)


def test_empty_keyid_is_found_by_trying(sim):
    evidence = sim.graft()
    assert sim.verify(resigned(sim, evidence, [signature_by(sim, evidence, "vendor", "")])).ok


def test_wrong_keyid_does_not_count(sim):
    evidence = sim.graft()
    misnamed = signature_by(sim, evidence, "vendor", "release-key")
    assert_refused(sim.verify(resigned(sim, evidence, [misnamed])), "bad-signature", "signature")
    evidence = resigned(sim, evidence, [misnamed, signature_by(sim, evidence, "second")])
    report = sim.verify(evidence, sim.policy("vendor", "second"))
    assert report.ok and report.signers == (sim.keys["second"].keyid,)
    assert any("not counted" in warning for warning in report.warnings)


def test_validly_signed_garbage_is_graft_format(sim, evidence_type):
    evidence = evidence_type([serialise(sim.envelope(b"not json", "vendor"))], {})
    assert_refused(sim.verify(evidence), "graft-format", "statement")


def test_unknown_critical_member_is_refused(sim):
    def edit(document):
        document["predicate"]["critical"].append("quorum")
        document["predicate"]["quorum"] = "2"

    assert_refused(sim.verify(sim.edited(edit)), "graft-format", "statement")


def test_unknown_other_member_is_reported_and_not_acted_on(sim):
    def edit(document):
        document["predicate"]["colour"] = {"name": "blue"}
        document["subject"].append({"name": "firmware.bin", "digest": {"sha256": "0" * 64}})

    report = sim.verify(sim.edited(edit))
    assert report.ok
    assert "not understood, not acted on: predicate.colour" in report.warnings
    assert "not understood, not acted on: subject firmware.bin" in report.warnings
    assert report.statement["predicate"]["colour"] == {"name": "blue"}


@pytest.mark.parametrize("which", ["manifest", "module"])
def test_changed_payload(sim, which):
    evidence = sim.graft()
    for digest, data in evidence.payloads.items():
        if data.startswith(b"{") == (which == "manifest"):
            evidence.payloads[digest] = data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]
    report = sim.verify(evidence)
    assert_refused(report, "payload-mismatch", "payloads")
    assert status(report, "content") is Status.PASS


def test_missing_payload(sim):
    evidence = sim.graft()
    evidence.payloads.clear()
    assert_refused(sim.verify(evidence), "payload-mismatch", "payloads")


@pytest.mark.parametrize(
    ("member", "value"),
    [("securityVersion", "4"), ("generation", "9"), ("abi", "vmgraft/2")],
)
def test_statement_and_manifest_must_say_the_same(sim, member, value):
    def edit(document):
        document["predicate"]["extensions"][0][member] = value

    assert_refused(sim.verify(sim.edited(edit)), "payload-mismatch", "payloads")


def test_module_named_by_only_one_side(sim):
    def edit(document):
        document["subject"] = [s for s in document["subject"] if not s["name"].endswith("module.wasm")]

    assert_refused(sim.verify(sim.edited(edit)), "payload-mismatch", "payloads")


def test_every_digest_of_a_payload_counts(sim):
    def good(document):
        digest = hashlib.sha512(b"module of com.acme.clock").hexdigest()
        document["subject"][-1]["digest"]["sha512"] = digest

    def bad(document):
        document["subject"][-1]["digest"]["sha512"] = "0" * 128

    assert sim.verify(sim.edited(good)).ok
    assert_refused(sim.verify(sim.edited(bad)), "payload-mismatch", "payloads")


@pytest.mark.parametrize(
    "change",
    [{"virtual_size": 7}, {"root_hash": bytes(32)}, {"tree_digest": bytes(32)}, {"flat": bytes(32)}, {"flat": None}],
)
def test_changed_content(sim, change):
    evidence = sim.graft()
    evidence.names = dataclasses.replace(evidence.names, **change)
    assert_refused(sim.verify(evidence), "content-mismatch", "content")


def test_flat_digest_is_asked_for_only_when_signed(sim, content_type):
    evidence = sim.graft(content=content_type(flat=None))
    assert sim.verify(evidence).ok
    assert evidence.asked == [False]
    evidence = sim.graft()
    sim.verify(evidence)
    assert evidence.asked == [True]


def test_content_left_to_the_host(sim):
    evidence = sim.graft()
    evidence.names = dataclasses.replace(evidence.names, virtual_size=7)
    report = sim.verify(evidence, check_content=False)
    assert report.ok and evidence.asked == []
    assert status(report, "content") is Status.SKIP


def test_unreadable_content_is_a_failed_check(sim):
    evidence = sim.graft()

    def content(flat):
        raise MalformedImageError("L2 table outside the file", file="disk.qcow2", offset=7)

    evidence.content = content
    assert_refused(sim.verify(evidence), "malformed-image", "content")


# --- authenticity


def rule(*, all_of=(), any_of=(), minimum=None):
    signatures = {}
    if all_of:
        signatures["allOf"] = [f"key:{name}" for name in all_of]
    if any_of:
        signatures["anyOf"] = {"minimumMatches": minimum, "of": [f"key:{name}" for name in any_of]}
    return {"signatures": signatures}


def test_all_of(sim):
    policy = sim.policy("vendor", "second", entry=rule(all_of=["vendor", "second"]))
    assert_refused(sim.verify(sim.graft(), policy), "untrusted-signer", "authenticity")
    report = sim.verify(sim.graft(signers=["second", "vendor"]), policy)
    assert report.ok and len(report.signers) == 2


def test_threshold(sim):
    names = ["vendor", "second", "third"]
    policy = sim.policy(*names, entry=rule(any_of=names, minimum=2))
    assert_refused(sim.verify(sim.graft(signers=["third"]), policy), "untrusted-signer", "authenticity")
    assert sim.verify(sim.graft(signers=["third", "second"]), policy).ok


def test_all_of_and_any_of_together(sim):
    policy = sim.policy(
        "vendor", "second", "third", entry=rule(all_of=["vendor"], any_of=["second", "third"], minimum=1)
    )
    assert_refused(sim.verify(sim.graft(signers=["second", "third"]), policy), "untrusted-signer", "authenticity")
    assert_refused(sim.verify(sim.graft(signers=["vendor"]), policy), "untrusted-signer", "authenticity")
    assert sim.verify(sim.graft(signers=["vendor", "third"]), policy).ok


def test_one_key_signing_twice_counts_once(sim):
    policy = sim.policy("vendor", "second", entry=rule(any_of=["vendor", "second"], minimum=2))
    evidence = sim.graft(signers=["vendor", "vendor"])
    assert_refused(sim.verify(evidence, policy), "untrusted-signer", "authenticity")
    evidence = sim.graft()
    twice = [signature_by(sim, evidence, "vendor"), signature_by(sim, evidence, "vendor", "")]
    assert_refused(sim.verify(resigned(sim, evidence, twice), policy), "untrusted-signer", "authenticity")


def test_key_known_but_not_trusted_for_this_policy(sim):
    policy = sim.policy("vendor", "second", entry=rule(all_of=["second"]))
    report = sim.verify(sim.graft(), policy)
    assert_refused(report, "untrusted-signer", "authenticity")
    assert report.signers == ()


def test_every_algorithm_signs_and_verifies(sim):
    names = ["vendor", "second", "rsa", "pq"]
    policy = sim.policy(*names, entry=rule(all_of=names))
    report = sim.verify(sim.graft(signers=names), policy)
    assert report.ok and len(report.signers) == 4


def test_hybrid_of_classical_and_post_quantum(sim):
    names = ["vendor", "pq"]
    policy = sim.policy(*names, entry=rule(all_of=names))
    assert sim.verify(sim.graft(signers=names), policy).ok
    for alone in names:
        assert_refused(sim.verify(sim.graft(signers=[alone]), policy), "untrusted-signer", "authenticity")


# --- which policy applies


def two_policies(sim, first, second):
    document = sim.policy_document()
    base = document["trustPolicies"][0]
    document["trustPolicies"] = [base | {"name": "one"} | first, base | {"name": "two"} | second]
    return parse_policy(format_policy(document))


def test_exact_wins_over_glob_over_global(sim, content_type):
    tree = f"tree:sha256:{content_type().tree_digest.hex()}"
    for near, wide in [(tree, "name:disk*"), (tree, "*"), ("name:disk*", "*")]:
        policy = two_policies(sim, {"imageScopes": [wide]}, {"imageScopes": [near]})
        assert sim.verify(sim.graft(), policy).policy == "two"


def test_equally_close_policies_are_an_error(sim):
    policy = two_policies(sim, {"imageScopes": ["name:disk*"]}, {"imageScopes": ["name:*.qcow2"]})
    assert_refused(sim.verify(sim.graft(), policy), "policy-invalid", "scope")


def test_no_policy_applies(sim):
    policy = sim.policy(entry={"imageScopes": ["name:other*"]})
    assert_refused(sim.verify(sim.graft(), policy), "untrusted-signer", "scope")


def test_folders_do_not_matter_for_name_scopes(sim):
    policy = sim.policy(entry={"imageScopes": ["name:disk.qcow2"]})
    assert sim.verify(sim.graft(), policy, image_name="/srv/evil/disk.qcow2").ok


def test_extension_scopes_tell_policies_apart_and_never_widen(sim):
    acme, other = {"extensionScopes": ["com.acme.*"]}, {"extensionScopes": ["org.other.*"]}
    assert sim.verify(sim.graft(), two_policies(sim, other, acme)).policy == "two"
    near = {"imageScopes": ["name:disk*"]} | other
    assert_refused(sim.verify(sim.graft(), two_policies(sim, near, {})), "untrusted-signer", "scope")


def test_prefix_does_not_match_half_a_label(sim):
    evil = sim.manifest("com.acme-evil.clock")
    policy = sim.policy(manifests=[evil], entry={"extensionScopes": ["com.acme.*"]})
    assert_refused(sim.verify(sim.graft(evil), policy), "untrusted-signer", "scope")


def test_tree_scope_of_a_portable_statement_reads_the_content(sim, content_type):
    scope = f"tree:sha256:{content_type().tree_digest.hex()}"
    policy = sim.policy(entry={"imageScopes": [scope], "binding": "any"})
    evidence = sim.graft(binding="any")
    assert sim.verify(evidence, policy, check_content=False).ok
    assert evidence.asked == [False]


# --- freshness


@pytest.mark.parametrize(("days", "ok"), [(29, True), (30, False), (400, False), (-2, False)])
def test_expiry(sim, days, ok):
    report = sim.verify(sim.graft(), now=sim.now + timedelta(days=days))
    assert report.ok is ok
    assert ok or report.error == "expired"


def test_small_clock_skew_is_forgiven(sim):
    created = sim.now + timedelta(minutes=4)
    assert sim.verify(sim.graft(created=created)).ok
    assert sim.verify(sim.graft(created=created + timedelta(minutes=2))).error == "expired"


def test_statement_without_end(sim):
    assert sim.verify(sim.graft(expires=None), now=sim.now + timedelta(days=9999)).ok


def test_time_without_zone_is_refused(sim):
    with pytest.raises(UsageError):
        sim.verify(sim.graft(), now=datetime(2026, 11, 22))


def revoking(sim, *names, entry=None, **lists):
    return sim.policy(*names, entry=entry, top={"revocations": lists})


def test_revoked_statement_payload_and_generation(sim):
    evidence = sim.graft()
    statement = hashlib.sha256(parse_envelope(evidence.stored[0]).payload).hexdigest()
    module = hashlib.sha256(b"module of com.acme.clock").hexdigest()
    for lists in (
        {"statements": [statement]},
        {"payloads": [f"sha256:{module}"]},
        {"minGeneration": {"com.acme.clock": 2}},
    ):
        assert_refused(sim.verify(evidence, revoking(sim, **lists)), "revoked", "revocation")
    assert sim.verify(evidence, revoking(sim, minGeneration={"com.acme.clock": 1})).ok


def test_revoked_key(sim):
    for reference in ("key:vendor", sim.keys["vendor"].keyid, "key:" + sim.keys["vendor"].keyid):
        report = sim.verify(sim.graft(), revoking(sim, keys=[reference]))
        assert_refused(report, "revoked", "revocation")
        assert report.signers == ()


def test_revoked_key_beside_enough_others(sim):
    policy = revoking(sim, "vendor", "second", keys=["key:second"])
    report = sim.verify(sim.graft(signers=["vendor", "second"]), policy)
    assert report.ok and report.signers == (sim.keys["vendor"].keyid,)
    assert any("revoked key" in warning for warning in report.warnings)


def test_revoked_key_alone_never_passes_strict_revocation(sim):
    entry = {"signatureVerification": {"level": "strict", "override": {"authenticity": "log"}}} | rule(
        all_of=["second"]
    )
    policy = revoking(sim, "vendor", "second", entry=entry, keys=["key:vendor"])
    assert_refused(sim.verify(sim.graft(), policy), "revoked", "revocation")


def test_rollback(sim):
    policy = sim.policy(entry={"minSecurityVersion": {"com.acme.clock": 4}})
    assert_refused(sim.verify(sim.graft(), policy), "rollback", "rollback")


# --- policy


def test_expired_policy(sim):
    policy = sim.policy(expires=sim.now)
    assert_refused(sim.verify(sim.graft(), policy), "policy-invalid", "policy")


def test_binding(sim):
    portable = sim.graft(binding="any")
    assert_refused(sim.verify(portable), "content-mismatch", "binding")
    report = sim.verify(portable, sim.policy(binding="any"))
    assert report.ok and status(report, "content") is Status.SKIP


def test_declared_but_not_granted(sim):
    policy = sim.policy(entry={"grants": {"com.acme.clock": {"capabilities": ["log", "pio:0x510-0x513"]}}})
    report = sim.verify(sim.graft(), policy)
    assert_refused(report, "capability-denied", "capabilities")
    assert_refused(sim.verify(sim.graft(), sim.policy(entry={"grants": {}})), "capability-denied", "capabilities")


def test_granted_but_not_declared_gives_nothing(sim):
    manifest = sim.manifest(capabilities=["log"])
    report = sim.verify(sim.graft(manifest))
    assert report.extensions[0].capabilities == ("log",)


def test_limits_are_the_lower_of_both(sim):
    grants = {"capabilities": ["log", "pio:0x0-0xffff"], "limits": {"memoryMiB": 4, "callMs": 9000}, "minIsolation": 2}
    manifest = sim.manifest(limits={"memoryMiB": 64, "callMs": 50, "logBytes": 1048576})
    policy = sim.policy(entry={"grants": {"com.acme.clock": grants}})
    (extension,) = sim.verify(sim.graft(manifest), policy).extensions
    assert extension.limits == Limits(memory_mib=4, call_ms=50, log_bytes=65536)
    assert extension.isolation == 2


@pytest.mark.parametrize(
    ("manifest", "grant", "holds"),
    [
        ("detach", None, "detach"), ("detach", "stop", "stop"), ("stop", "detach", "stop"),
        ("restart(3)", "detach", "detach"), ("detach", "restart(3)", "detach"),
        ("restart(1)", "restart(9)", "restart(1)"), ("restart(12)", "restart(9)", "restart(9)"),
        ("restart(12)", "stop", "stop"),
    ],
)  # fmt: skip
def test_the_stricter_answer_to_a_fault_holds(sim, manifest, grant, holds):
    grants = {"capabilities": ["log", "pio:0x0-0xffff"]} | ({} if grant is None else {"onFault": grant})
    policy = sim.policy(entry={"grants": {"com.acme.clock": grants}})
    (extension,) = sim.verify(sim.graft(sim.manifest(onFault=manifest)), policy).extensions
    assert extension.on_fault == holds


@pytest.mark.parametrize(
    "grant", [{"minIsolation": 4}, {"minIsolation": -1}, {"onFault": "ignore"}, {"onFault": "restart(0)"}]
)
def test_grants_that_no_host_can_honour(sim, grant):
    with pytest.raises(PolicyError):
        sim.policy(entry={"grants": {"com.acme.clock": {"capabilities": [], **grant}}})


def test_overlapping_claims_of_two_extensions(sim):
    other = sim.manifest("com.acme.other")

    def twin(document):
        other_bytes = next(iter(payloads))
        document["subject"].append({"name": "com.acme.other/1.4.0/manifest.json", "digest": {"sha256": other_bytes}})
        entry = document["predicate"]["extensions"][0]
        manifest = "com.acme.other/1.4.0/manifest.json"
        document["predicate"]["extensions"].append(entry | {"id": "com.acme.other", "manifest": manifest})

    other.pop("module")
    _, payloads = sim.statement([other])
    evidence = sim.edited(twin)
    evidence.payloads |= payloads
    audit = {"signatureVerification": {"level": "audit"}}
    report = sim.verify(evidence, sim.policy(manifests=[sim.manifest(), other], entry=audit))
    assert_refused(report, "capability-denied", "conflicts")


def test_required_extension(sim):
    policy = sim.policy(entry={"requireExtensions": ["com.acme.clock", "com.acme.guard"]})
    assert_refused(sim.verify(sim.graft(), policy), "required-extension-missing", "required")


def test_no_capabilities_needs_no_grant(sim):
    manifest = sim.manifest(capabilities=None)
    report = sim.verify(sim.graft(manifest), sim.policy(entry={"grants": {}}))
    assert report.ok and report.extensions[0].capabilities == ()


# --- levels


def at_level(sim, level, override=None, **entry):
    return sim.policy(entry={"signatureVerification": {"level": level, "override": override or {}}} | entry)


LATE = timedelta(days=100)


def test_permissive_and_audit_warn_where_strict_fails(sim):
    for level, override, ok in [
        ("strict", {}, False),
        ("permissive", {}, True),
        ("audit", {}, True),
        ("strict", {"expiry": "log"}, True),
        ("audit", {"expiry": "enforce"}, False),
        ("permissive", {"expiry": "enforce"}, False),
    ]:
        report = sim.verify(sim.graft(), at_level(sim, level, override), now=sim.now + LATE)
        assert report.ok is ok, (level, override)
        assert status(report, "expiry") is (Status.WARN if ok else Status.FAIL)
        assert not ok or any(warning.startswith("expiry:") for warning in report.warnings)


def test_permissive_still_demands_the_signers_and_never_widens_the_grant(sim):
    policy = at_level(sim, "permissive", grants={})
    report = sim.verify(sim.graft(), policy)
    assert report.ok and report.extensions[0].capabilities == ()
    names = ["vendor", "second"]
    policy = sim.policy(*names, entry={"signatureVerification": {"level": "permissive"}} | rule(all_of=names))
    assert_refused(sim.verify(sim.graft(), policy), "untrusted-signer", "authenticity")


def test_audit_never_overlooks_integrity(sim):
    policy = at_level(sim, "audit")
    content = sim.graft()
    content.names = dataclasses.replace(content.names, root_hash=bytes(32))
    payload = sim.graft()
    payload.payloads.clear()
    broken = sim.graft()
    broken.problem = "cut"
    for evidence in (content, payload, broken, sim.graft(signers=["stranger"])):
        assert not sim.verify(evidence, policy).ok


def test_precedence(sim):
    """Integrity before authenticity before freshness before policy, however many fail."""
    names = ["vendor", "second"]
    entry = rule(all_of=names) | {"requireExtensions": ["com.acme.guard"], "minSecurityVersion": {"com.acme.clock": 9}}
    policy = sim.policy(*names, entry=entry, expires=sim.now)
    evidence = sim.graft()
    evidence.names = dataclasses.replace(evidence.names, virtual_size=7)
    late = sim.now + LATE
    report = sim.verify(evidence, policy, now=late)
    assert_refused(report, "content-mismatch", "content", "authenticity", "expiry", "rollback", "policy", "required")
    assert sim.verify(sim.graft(), policy, now=late).error == "untrusted-signer"
    both = sim.graft(signers=names)
    assert sim.verify(both, policy, now=late).error == "expired"
    assert sim.verify(both, policy).error == "rollback"


# --- self check


def test_self_check(sim):
    public = [sim.keys["vendor"].public]
    report = verify.self_check(sim.graft(), public, now=sim.now)
    assert report.ok and report.extensions == () and report.policy is None
    assert not verify.self_check(sim.graft(signers=["second"]), public, now=sim.now).ok
    both = [sim.keys["vendor"].public, sim.keys["second"].public]
    assert verify.self_check(sim.graft(), both, now=sim.now).error == "untrusted-signer"
    assert not verify.self_check(sim.graft(), [], now=sim.now).ok
    evidence = sim.graft()
    evidence.names = dataclasses.replace(evidence.names, virtual_size=7)
    assert verify.self_check(evidence, public, now=sim.now).error == "content-mismatch"


# --- one byte changed, anywhere in an envelope


def test_no_bit_of_an_envelope_can_change(sim):
    evidence = sim.graft(sim.manifest(capabilities=["log"], limits=None))
    policy = sim.policy()
    assert sim.verify(evidence, policy).ok
    original = evidence.stored[0]
    codes = set()
    for position in range(len(original)):
        for mask in (1 << position % 8, 0xFF):
            changed = bytearray(original)
            changed[position] ^= mask
            evidence.stored = [bytes(changed)]
            report = sim.verify(evidence, policy)
            assert not report.ok, position
            codes.add(report.error)
    assert codes == {"bad-signature"}


def test_no_byte_of_a_two_signature_envelope_can_change_when_both_count(sim):
    names = ["vendor", "second"]
    policy = sim.policy(*names, entry=rule(all_of=names))
    evidence = sim.graft(signers=names)
    assert sim.verify(evidence, policy).ok
    original = evidence.stored[0]
    for position in range(original.index(b'"signatures"'), len(original)):
        evidence.stored = [original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :]]
        assert not sim.verify(evidence, policy).ok, position


def test_cut_or_extended_envelopes_are_refused(sim):
    evidence = sim.graft()
    policy = sim.policy()
    original = evidence.stored[0]
    for changed in [original[:n] for n in range(0, len(original), 7)] + [original + b"x", original + original]:
        evidence.stored = [changed]
        assert sim.verify(evidence, policy).error == "bad-signature"


def test_payload_is_parsed_only_after_its_signature(sim, monkeypatch):
    """A statement that would be refused as malformed is not even looked at while its signature is bad."""
    evidence = sim.graft()
    key: PrivateKey = sim.keys["vendor"]
    signature = Signature(key.keyid, key.sign(pae("application/vnd.in-toto+json", b"something else")))
    evidence.stored = [serialise(Envelope(b"{broken", (signature,)))]
    monkeypatch.setattr("vmgraft.signing.integrity.parse_statement", lambda *a, **k: pytest.fail("parsed"))
    assert_refused(sim.verify(evidence), "bad-signature", "signature")


def test_unsigned_image_is_never_ok(sim):
    """An envelope with an empty list of signatures, or none, is refused."""
    evidence = sim.graft()
    document = json.loads(evidence.stored[0])
    document["signatures"] = []
    for changed in (document, {k: v for k, v in document.items() if k != "signatures"}):
        evidence.stored = [json.dumps(changed).encode()]
        assert_refused(sim.verify(evidence), "bad-signature", "envelope")


VALUES = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=2) | st.just({})


@given(st.data())
def test_signed_nonsense_ends_in_a_report(sim, data):
    """A statement bent anywhere by its own signer: a report comes back, whatever it says."""

    def bend(document):
        node, depth = document, data.draw(st.integers(0, 4))
        while True:
            key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if depth == 0 or not isinstance(node[key], dict | list) or not node[key]:
                break
            node, depth = node[key], depth - 1
        node[key] = data.draw(VALUES)

    report = sim.verify(sim.edited(bend))
    assert report.ok or report.error in {
        "graft-format",
        "payload-mismatch",
        "content-mismatch",
        "untrusted-signer",
        "expired",
    }


@given(st.binary(max_size=300))
def test_any_bytes_as_envelope_and_as_payload(sim, data):
    evidence = sim.graft()
    policy = sim.policy()
    evidence.payloads = dict.fromkeys(evidence.payloads, data)
    assert_refused(sim.verify(evidence, policy), "payload-mismatch", "payloads")
    evidence.stored = [data]
    assert_refused(sim.verify(evidence, policy), "bad-signature", "envelope")


def test_flood_of_unknown_members_is_cut_short(sim):
    report = sim.verify(sim.edited(lambda document: document["predicate"].update({f"x{n}": "" for n in range(5000)})))
    assert report.ok and len(report.warnings) == 33
    assert report.warnings[-1].endswith("and 4968 more")
