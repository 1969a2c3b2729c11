"""Advice is right: every edit that is proposed is tried here again, and every sentence belongs to its cause.

The edits are applied by somebody else's JSON Patch. Rows are those of verdicts.json, and policies drawn by hypothesis.
"""

from __future__ import annotations

import base64
import copy
import json
import re
from datetime import timedelta

import jsonpatch
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from signing_ca import NOW, Entity
from test_certified import World as Certified
from test_explain import entry, explain, found
from test_verdicts import ROWS
from verdict_stamps import Stamps
from verdict_world import Memory, World

from vmgraft.errors import VmgraftError
from vmgraft.signing.contract import Status
from vmgraft.signing.explain import explain_evidence
from vmgraft.signing.patches import apply_edits
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.remedies import MAX_REMEDIES
from vmgraft.signing.verify import verify_evidence

LOGGED, GRANTS = "/trustPolicies/*/signatureVerification/override", "/trustPolicies/*/grants"
#: What edits for a check may touch: ``*`` is one token of the path.
TOUCHED = {
    "scope": ("/trustPolicies/*/imageScopes/-", "/trustPolicies/*/extensionScopes/-"),
    "authenticity": ("/trustPolicies/*/signatures/anyOf/of/-", "/trustPolicies/*/trustedIdentities/-"),
    "expiry": ("/trustPolicies/*/trustStores/-", LOGGED, f"{LOGGED}/*"),
    "revocation": (
        "/revocations/statements/*", "/revocations/payloads/*", "/revocations/keys/*", "/revocations/minGeneration/*",
        LOGGED, f"{LOGGED}/*",
    ),
    "rollback": (
        "/trustPolicies/*/minSecurityVersion/*", "/trustPolicies/*/maxAdvance/*", "/trustPolicies/*/rollbackState",
    ),
    "policy": ("/expires", "/policyVersion"),
    "binding": ("/trustPolicies/*/binding",),
    "capabilities": (GRANTS, f"{GRANTS}/*", f"{GRANTS}/*/capabilities", f"{GRANTS}/*/capabilities/-"),
    "required": ("/trustPolicies/*/requireExtensions/*",),
}  # fmt: skip
WRONG = (Status.FAIL, Status.WARN)


@pytest.fixture(scope="module")
def world(sim, evidence_type, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remedies")
    return World(sim, evidence_type, folder, Stamps(folder))


@pytest.fixture(scope="module")
def certified(sim):
    return Certified(sim)


class Case:
    """A row of the table, made once: what is judged, and under what."""

    def __init__(self, world, row):
        self.world, self.row = world, row
        self.evidence, names = world.graft(row.get("graft", {}))
        self.memory = Memory(row["memory"]) if "memory" in row else None
        self.policy = world.policy(row.get("policy", {}), names, self.memory)
        self.options = {
            "image_name": row.get("image", "acme-1.qcow2"), "now": world.time(row.get("at", "+0d")),
            "memory": self.memory,
        }  # fmt: skip

    def explain(self):
        return explain_evidence(self.evidence, self.policy, check_content=self.row.get("reads", True), **self.options)

    def judge(self, policy, evidence=None):
        return verify_evidence(evidence or self.evidence, policy, **self.options)


def statuses(report):
    return {check.name: check.status for check in report.checks}


def touched(path, patterns):
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", "[^/]*"), path) for pattern in patterns)


def hold(case):
    """Hold every remedy of a case to what it says, and return them by check."""
    explanation = case.explain()
    document = copy.deepcopy(case.policy.document)
    before = statuses(explanation.report)
    for explained in explanation.checks:
        name = explained.check.name
        assert bool(explained.remedies) is (explained.check.status in WRONG), name
        for remedy in explained.remedies:
            if not remedy.edits:
                assert remedy.alone is not True
                continue
            changed = jsonpatch.JsonPatch([dict(edit) for edit in remedy.edits]).apply(document)
            assert changed == apply_edits(document, remedy.edits)
            assert all(touched(edit["path"], TOUCHED[name]) for edit in remedy.edits), remedy
            policy = parse_policy(json.dumps(changed).encode())
            after = statuses(case.judge(policy))
            passes = after[name] is Status.PASS or (after[name] is Status.WARN and before[name] is Status.FAIL)
            assert remedy.alone is passes, remedy
            harmless(case, policy, remedy)
    assert case.policy.document == document
    return {explained.check.name: explained.remedies for explained in explanation.checks}


def harmless(case, policy, remedy):
    """Under an edited policy, what had nothing to do with the failure is refused as before."""
    entry_of = {entry.name: entry for entry in policy.trust_policies}
    bound = case.row.get("graft", {}).get("binding", "image") == "image"
    for change in (
        {"signatures": ["stranger"]},
        {"damage": "content tree" if bound else "manifest"},
        {"damage": "module"},
    ):
        words = {key: value for key, value in case.row.get("graft", {}).items() if key != "raw"} | change
        probe, _ = case.world.graft(words)
        assert not case.judge(policy, probe).ok, (change, remedy)
    words = case.row.get("graft", {})
    claims = [{"capabilities": ["log", "hypercall:4000-4001"]} | item for item in words.get("extensions", [{}])]
    needed = [claim for claim in claims[0]["capabilities"] if claim.startswith("supplement:")]
    claims[0] = claims[0] | {"capabilities": ["hypercall:4000-4001", *needed]}
    probe, _ = case.world.graft({key: value for key, value in words.items() if key != "raw"} | {"extensions": claims})
    report = case.judge(policy, probe)
    assert statuses(report)["capabilities"] is not Status.PASS, remedy
    assert not report.ok or entry_of[report.policy].logs("capabilities"), remedy


def usable(row):
    return "summary" not in row and "policy file" not in row["failed"]


@pytest.mark.parametrize("row", [row for row in ROWS if usable(row)], ids=lambda row: row["name"])
def test_every_remedy_of_the_table_is_true(world, row):
    hold(Case(world, row))


def test_the_table_has_edits_for_every_check_that_a_policy_can_change(world):
    """The property above would hold for a program that never proposes anything."""
    edited, enough = set(), set()
    for row in ROWS:
        if usable(row) and (row["failed"] or row.get("warned")):
            for name, remedies in hold(Case(world, row)).items():
                edited |= {name for remedy in remedies if remedy.edits}
                enough |= {name for remedy in remedies if remedy.alone}
    assert edited == enough == set(TOUCHED)


CLOCK, GUARD = "com.acme.clock", "com.acme.guard"
versions = st.dictionaries(st.sampled_from([CLOCK, GUARD, "com.acme.other"]), st.integers(0, 8), max_size=3)
checks = st.sampled_from(["authenticity", "expiry", "revocation", "rollback", "capabilities", "required"])
capabilities = st.sampled_from(["log", "pio:0x510-0x517", "pio:0x510-0x513", "hypercall:1-2"])
entries = st.fixed_dictionaries(
    {},
    optional={
        "imageScopes": st.sampled_from([["*"], ["name:acme-*"], ["name:other-*"]]),
        "extensionScopes": st.sampled_from([["*"], ["com.acme.*"], [CLOCK], ["org.other.*"]]),
        "signatures": st.sampled_from([
            {"allOf": ["key:vendor"]}, {"allOf": ["key:vendor", "key:second"]}, {"allOf": ["key:second"]},
            {"anyOf": {"minimumMatches": 1, "of": ["key:second", "key:third"]}},
            {"anyOf": {"minimumMatches": 2, "of": ["key:vendor", "key:second", "key:third"]}},
            {"allOf": ["key:vendor"], "anyOf": {"minimumMatches": 1, "of": ["key:third"]}},
        ]),
        "signatureVerification": st.fixed_dictionaries(
            {"level": st.sampled_from(["strict", "strict", "permissive", "audit"])},
            optional={"override": st.dictionaries(checks, st.sampled_from(["log", "enforce"]), max_size=2)},
        ),
        "binding": st.sampled_from(["image", "any"]),
        "requireExtensions": st.lists(st.sampled_from([CLOCK, GUARD, "com.acme.x"]), unique=True, max_size=3),
        "minSecurityVersion": versions,
        "maxAdvance": versions,
        "rollbackState": st.sampled_from(["optional", "required"]),
        "grants": st.dictionaries(
            st.sampled_from([CLOCK, GUARD]),
            st.fixed_dictionaries({}, optional={"capabilities": st.lists(capabilities, unique=True, max_size=3)}),
        ),
    },
)  # fmt: skip
revoked = st.fixed_dictionaries(
    {},
    optional={
        "keys": st.lists(st.sampled_from(["key:vendor", "${keyid:vendor}", "key:${keyid:vendor}", "key:second"]),
                         unique=True, max_size=3),
        "statements": st.lists(st.sampled_from(["${statement}", "sha256:${statement}", "0" * 64]), unique=True),
        "payloads": st.lists(st.sampled_from(["${module}", "${manifest}", "2" * 64, "sha256:" + "3" * 64]),
                             unique=True),
        "minGeneration": versions,
    },
)  # fmt: skip
rows = st.fixed_dictionaries(
    {
        "policy": st.fixed_dictionaries(
            {"keys": st.just(["vendor", "second", "third"]), "entry": entries},
            optional={
                "top": st.fixed_dictionaries({"revocations": revoked}),
                "more": st.sampled_from([
                    [{"name": "twin"}],
                    [{"name": "close", "imageScopes": ["name:acme-*"], "extensionScopes": ["org.other.*"]}],
                ]),
                "expires": st.just("+10d"),
            },
        ),
        "graft": st.fixed_dictionaries(
            {"signatures": st.lists(st.sampled_from(["vendor", "second", "stranger"]), min_size=1, max_size=3)},
            optional={
                "binding": st.just("any"), "created": st.sampled_from(["-1d", "+1d"]), "expires": st.just("+20d"),
                "extensions": st.just([{}, {"extension": GUARD, "securityVersion": 5, "capabilities": ["log"]}]),
            },
        ),
    },
    optional={
        "at": st.sampled_from(["-2d", "+11d", "+40d"]),
        "memory": st.one_of(
            st.just("unreadable"),
            st.dictionaries(st.sampled_from([f"{name} {item}" for name in ("default", "twin", "close")
                                             for item in (CLOCK, GUARD)]), st.integers(0, 8), max_size=3),
        ),
    },
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(row=rows)
def test_every_remedy_of_drawn_policies_is_true(world, row):
    try:
        case = Case(world, row)
    except VmgraftError as exc:
        pytest.fail(f"the row is no policy: {exc}")
    hold(case)


# --- rollback


def texts(explanation, name):
    return [remedy.text for remedy in found(explanation, name).remedies]


def test_a_jump_is_not_answered_with_a_higher_version(sim):
    document = entry(sim.policy_document(), maxAdvance={CLOCK: 1}, minSecurityVersion={})
    said = texts(explain(sim, sim.graft(), document, memory=Memory({f"default {CLOCK}": 1})), "rollback")
    assert said == [
        f"use a release of {CLOCK} within reach: a security version from 1 to 2",
        f"let {CLOCK} advance that far, from 1 to 3",
    ]


@pytest.mark.parametrize(
    ("changes", "seen", "first"),
    [
        ({"minSecurityVersion": {CLOCK: 4}}, {}, "with a higher security version: at least 4"),
        ({}, {CLOCK: 5}, "with a higher security version: at least 5"),
        ({"minSecurityVersion": {CLOCK: 4}, "maxAdvance": {CLOCK: 3}}, {CLOCK: 2}, "at least 4 and at most 5"),
        ({"minSecurityVersion": {CLOCK: 9}, "maxAdvance": {CLOCK: 3}}, {CLOCK: 2}, "no release of"),
        ({"maxAdvance": {CLOCK: 0}}, {CLOCK: 1}, "no release of"),
    ],
)
def test_which_release_would_do(sim, changes, seen, first):
    memory = Memory({f"default {name}": version for name, version in seen.items()})
    said = texts(explain(sim, sim.graft(), entry(sim.policy_document(), **changes), memory=memory), "rollback")
    assert first in said[0] and len(said) > 1


def test_two_obstacles_take_two_steps(sim):
    document = entry(sim.policy_document(), minSecurityVersion={CLOCK: 4})
    memory = Memory({f"default {CLOCK}": 5})
    release, lower, reset = found(explain(sim, sim.graft(), document, memory=memory), "rollback").remedies
    assert (release.alone, lower.alone, reset.alone) == (None, False, False)
    two = sim.graft(sim.manifest(), sim.manifest(GUARD, securityVersion=2, capabilities=[]))
    document = entry(sim.policy_document(), minSecurityVersion={CLOCK: 4, GUARD: 4})
    remedies = found(explain(sim, two, document), "rollback").remedies
    assert len(remedies) == 4 and {remedy.alone for remedy in remedies} == {False}


def test_every_trust_policy_under_which_more_ran_is_named(sim):
    document = sim.policy_document()
    document["trustPolicies"].append(document["trustPolicies"][0] | {"name": "fleet", "imageScopes": ["name:r*"]})
    memory = Memory({f"default {CLOCK}": 5, f"fleet {CLOCK}": 4})
    said = texts(explain(sim, sim.graft(), document, memory=memory), "rollback")
    assert f"forget what ran here: vmgraft state reset default {CLOCK}, vmgraft state reset fleet {CLOCK}" in said


def test_a_memory_that_cannot_answer_is_to_be_mended(sim):
    said = texts(explain(sim, sim.graft(), sim.policy_document(), memory=Memory("unreadable")), "rollback")
    assert said == ["mend the rollback memory of this host, or bring back a backup: docs/state.md says how"]


# --- expiry


def test_a_statement_from_the_future_is_not_to_be_signed_again(sim):
    explanation = explain(sim, sim.graft(), sim.policy_document(), now=sim.now - timedelta(days=2))
    wait, log = texts(explanation, "expiry")
    assert wait == (
        "wait until then, or look at this host's clock, which says 2026-11-20T15:00:00Z: the statement says that it "
        "was made at 2026-11-21T15:00:00Z"
    )
    assert log.startswith("have expiry logged only")


def advice(world, name, check, **changes):
    """What is said about a row of the table."""
    row = next(row for row in ROWS if row["name"] == name)
    explanation = Case(world, row | changes).explain()
    return [remedy.text for remedy in found(explanation, check).remedies]


def test_an_expired_statement_beside_an_expired_certificate_that_nobody_needs(world):
    both = {"signatures": [{"by": "leaf-expired", "chain": ["leaf-expired", "inter"]}, {"by": "vendor"}]}
    policy = {"is": "acme", "entry": {"signatures": {"anyOf": {"minimumMatches": 1, "of": ["ca:acme", "key:vendor"]}}}}
    said = advice(world, "expired leaf", "expiry", graft=both, policy=policy, at="+40d")
    assert len(said) == 2 and "vmgraft resign --accept-expired --expires END" in said[0]


def test_an_expired_statement_by_an_expired_certificate_has_two_causes(world):
    row = {"name": "", "graft": {"signatures": [{"by": "leaf-expired", "chain": ["leaf-expired", "inter"]}]}}
    case = Case(world, row | {"policy": "acme with time", "at": "+40d"})
    statement, certificate, log = found(case.explain(), "expiry").remedies
    assert "resign" in statement.text and statement.alone is False
    assert "a certificate that is valid (the certificate of 'CN=Release," in certificate.text
    assert "timestamped by tsa:clock" in certificate.text and certificate.alone is False
    assert log.alone is True


def test_a_certificate_that_has_not_begun(world):
    for name in ("leaf not yet valid", "leaf not yet valid with a timestamp from the future"):
        said = advice(world, name, "expiry")
        assert said[0].startswith("wait until then, or look at this host's clock") and "is not valid before" in said[0]
        assert not any("timestamped" in text or "sign again" in text for text in said)


def test_a_timestamp_that_nobody_asked_for_yet(world):
    stores = [
        {"name": "acme", "type": "ca", "roots": ["root"]}, {"name": "clock", "type": "tsa", "roots": ["tsa"]},
        {"name": "fake", "type": "tsa", "roots": ["fake"]},
    ]  # fmt: skip
    name = "expired leaf with a timestamp, and the policy trusts no authority for time"
    row = next(row for row in ROWS if row["name"] == name) | {"policy": {"is": "acme", "stores": stores}}
    case = Case(world, row)
    first, again, _ = hold(case)["expiry"]
    assert first.text == "believe the timestamps of tsa:clock in default" and first.alone is True
    assert "tsa:fake" not in first.text + again.text


# --- revocation


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("expired CRL", "put a current CRL of that issuer into trustStores[0].crls (ca:acme): the CRL of"),
        ("expired CRL of the root", "put a current CRL of that issuer into trustStores[0].crls (ca:acme): the CRL of"),
        ("a CRL from the future", "put a current CRL of that issuer into trustStores[0].crls (ca:acme): the CRL of"),
        ("a CRL that somebody else signed", "put a current CRL of that issuer into trustStores[0].crls"),
        ("CRLs are required and one is missing", "(ca:acme): there is no usable CRL for the certificate of"),
        ("CRLs are required and there are none", "(ca:acme): there is no usable CRL for the certificate of"),
        ("revoked leaf", "let the image be signed with a certificate that is not revoked: the certificate of"),
        ("revoked intermediate", "let the image be signed with a certificate that is not revoked: the certificate of"),
        ("the only key is revoked", "let the image be signed by a key that is not revoked, in place of SHA256:"),
        ("the statement is revoked", "let the vendor make another statement, if what it covers is still good"),
        ("the module is revoked", "without what is revoked: com.acme.clock"),
        ("the content is revoked by its fs-verity digest", "without what is revoked: the content"),
        ("the content is revoked by its flat digest", "without what is revoked: guest-content"),
        ("the generation is revoked", "use a release of com.acme.clock of generation 2 or later"),
    ],
)
def test_each_revocation_has_its_own_advice(world, name, part):
    said = advice(world, name, "revocation")
    assert part in said[0], said
    assert sum(text.startswith(("put a current", "let ", "use a")) for text in said) == 1


def test_a_name_does_not_choose_the_advice(world, sim, certified):
    """The certificate's own name reads like the beginning of another sentence."""
    from signing_ca import crl, issue

    root = issue("there is no usable CRL for the certificate of", ca=True)
    leaf = issue("the certificate of 'x' was revoked at", root)
    pem = base64.encodebytes(crl(root, leaf)).decode()
    store = {"name": "acme", "type": "ca", "certificates": root.pem.decode()}
    store["crls"] = f"-----BEGIN X509 CRL-----\n{pem}-----END X509 CRL-----\n"
    document = certified.document(stores=[store], entry={"trustedIdentities": ["*"]})
    evidence = certified.graft((leaf, {"chain": [leaf.der]}))
    assert texts(explain(sim, evidence, document), "revocation")[0].startswith("let the image be signed with")
    del store["crls"]
    document = certified.document(stores=[store | {"requireCrls": True}], entry={"trustedIdentities": ["*"]})
    assert texts(explain(sim, evidence, document), "revocation")[0].startswith("put a current CRL of that issuer")


def test_what_is_logged_already_is_not_proposed_to_be_logged(world):
    for name, check in (
        ("revoked leaf, and revocation is logged", "revocation"),
        ("expired under permissive", "expiry"),
    ):
        assert not any("logged only" in text for text in advice(world, name, check))


# --- identities


def named(certified, name, sans=()):
    """A leaf of the authority with this subject."""
    key = ec.generate_private_key(ec.SECP256R1())
    usage = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(certified.root.cert.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=100))
        .add_extension(usage, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(certified.root.key.public_key()), critical=False
        )
    )
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=not list(name))
    return Entity(builder.sign(certified.root.key, hashes.SHA256()), key)


UNIT, COMMON = NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME
TWO_UNITS = x509.Name([x509.NameAttribute(UNIT, "Lab"), x509.NameAttribute(UNIT, "Press")])
MAIL = (x509.RFC822Name("lab@acme.example"),)


@pytest.mark.parametrize(
    ("name", "sans", "wanted"),
    [
        (x509.Name([]), MAIL, ["x509.san: email:lab@acme.example"]),
        (TWO_UNITS, MAIL, ["x509.san: email:lab@acme.example"]),
        (TWO_UNITS, (), []),
        (x509.Name([x509.NameAttribute(COMMON, "a\nb")]), (), []),
        (x509.Name([x509.NameAttribute(COMMON, "Lab, Press; +1")]), (), ["x509.subject: CN=Lab\\, Press\\; \\+1"]),
        (x509.Name([x509.NameAttribute(COMMON, " Lab,  ")]), (), None),
        (x509.Name([x509.NameAttribute(x509.ObjectIdentifier("1.2.3.4"), "x")]), (), None),
    ],
)
def test_only_identities_that_can_stand_in_a_policy_are_proposed(sim, certified, name, sans, wanted):
    leaf = named(certified, name, sans)
    evidence = certified.graft((leaf, {"chain": [leaf.der]}))
    document = certified.document(entry={"trustedIdentities": ["x509.subject: CN=Somebody"]})
    explanation = explain(sim, evidence, document)
    remedies = found(explanation, "authenticity").remedies
    proposed = [remedy for remedy in remedies if remedy.edits]
    if wanted is not None:
        assert [edit["value"] for remedy in proposed for edit in remedy.edits] == wanted
    for remedy in proposed:
        changed = jsonpatch.JsonPatch([dict(edit) for edit in remedy.edits]).apply(document)
        assert sim.verify(evidence, parse_policy(json.dumps(changed).encode())).ok and remedy.alone is True
    cannot = [remedy for remedy in remedies if "no entry of trustedIdentities means" in remedy.text]
    assert bool(cannot) is not bool(proposed)


def test_a_certificate_of_many_names_does_not_flood(sim, certified):
    names = tuple(x509.DNSName(f"n{index}.example") for index in range(100))
    leaf = named(certified, x509.Name([x509.NameAttribute(COMMON, "Lab")]), names)
    evidence = certified.graft((leaf, {"chain": [leaf.der]}))
    document = certified.document(entry={"trustedIdentities": ["x509.subject: CN=Somebody"]})
    remedies = found(explain(sim, evidence, document), "authenticity").remedies
    assert 3 < len(remedies) <= MAX_REMEDIES


# --- scope, and what a policy cannot hold


@pytest.mark.parametrize("name", ["a[1].img", "a*.img", "?", "!.img", "-a b.img", "ä.img"])
def test_a_scope_that_is_proposed_means_this_image_alone(sim, name):
    document = entry(sim.policy_document(), imageScopes=["name:other"])
    remedy = found(explain(sim, sim.graft(), document, image_name=name), "scope").remedies[0]
    changed = parse_policy(json.dumps(apply_edits(document, remedy.edits)).encode())
    assert remedy.alone is True and sim.verify(sim.graft(), changed, image_name=name).ok
    for other in ("a1.img", "ax.img", "x", "-axb.img", f"{name}x"):
        assert not sim.verify(sim.graft(), changed, image_name=other).ok


@pytest.mark.parametrize("name", ["a\x01.img", "\udcff.img", "n" * 256])
def test_an_image_whose_name_no_scope_can_hold_goes_by_its_content(sim, name):
    document = entry(sim.policy_document(), imageScopes=["name:other"])
    remedy = found(explain(sim, sim.graft(), document, image_name=name), "scope").remedies[0]
    assert remedy.edits[0]["value"] == "tree:sha256:" + "22" * 32 and remedy.alone is True
    portable = sim.graft(binding="any")
    (remedy,) = found(explain(sim, portable, document, image_name=name), "scope").remedies
    assert remedy.edits == () and remedy.text == "write a trust policy for this image and its extensions"


def test_tied_policies_are_told_apart_by_an_edit(sim):
    document = sim.policy_document()
    document["trustPolicies"].append(copy.deepcopy(document["trustPolicies"][0]) | {"name": "twin"})
    explanation = explain(sim, sim.graft(), document)
    remedies = found(explanation, "scope").remedies
    assert [remedy.alone for remedy in remedies] == [True, True, None]
    for remedy, name in zip(remedies, ("default", "twin"), strict=False):
        changed = parse_policy(json.dumps(apply_edits(document, remedy.edits)).encode())
        assert sim.verify(sim.graft(), changed).policy == name


def test_grants_for_two_extensions_where_there_are_none(sim):
    document = sim.policy_document()
    del document["trustPolicies"][0]["grants"]
    two = sim.graft(sim.manifest(), sim.manifest(GUARD, capabilities=["now"]))
    (remedy,) = found(explain(sim, two, document), "capabilities").remedies
    assert remedy.alone is True
    assert sim.verify(two, parse_policy(json.dumps(apply_edits(document, remedy.edits)).encode())).ok


def test_an_edit_that_the_policy_cannot_take_is_said_to_be_none(sim):
    document = sim.policy_document(expires=sim.now) | {"policyVersion": (1 << 32) - 1}
    _, remedy = found(explain(sim, sim.graft(), document), "policy").remedies
    assert remedy.edits == () and "the policy would be invalid (policyVersion: " in remedy.text
    document = sim.policy_document("vendor", "second") | {"auditors": ["key:vendor"]}
    document["trustPolicies"][0]["signatures"] = {"anyOf": {"minimumMatches": 1, "of": ["key:second"]}}
    remedies = found(explain(sim, sim.graft(), document), "authenticity").remedies
    (count,) = [remedy for remedy in remedies if remedy.text.startswith("let the signature by")]
    assert count.edits == () and "also signs images" in count.text


def test_many_policies_are_bounded(sim):
    document = sim.policy_document()
    first = document["trustPolicies"][0] | {"imageScopes": ["name:other"]}
    document["trustPolicies"] = [first | {"name": f"p{index}"} for index in range(40)]
    remedies = found(explain(sim, sim.graft(), document), "scope").remedies
    assert len(remedies) == MAX_REMEDIES + 1 and remedies[-1].text == "or one of 9 more of this kind"


# --- who signed


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        ({"allOf": ["key:vendor", "key:second"]}, "by {second} to"),
        ({"anyOf": {"minimumMatches": 2, "of": ["key:vendor", "key:second", "key:third"]}}, "by 1 of {both} to"),
        ({"anyOf": {"minimumMatches": 3, "of": ["key:vendor", "key:second", "key:third"]}}, "by {both} to"),
        (
            {"allOf": ["key:second"], "anyOf": {"minimumMatches": 2, "of": ["key:vendor", "key:third"]}},
            "by {second}, and by {third} to",
        ),
    ],
)
def test_whose_signatures_are_missing(sim, rule, part):
    document = entry(sim.policy_document("vendor", "second", "third"), signatures=rule)
    said = texts(explain(sim, sim.graft(), document), "authenticity")[0]
    keyids = {name: sim.keys[name].keyid for name in ("second", "third")}
    assert f"add signatures {part.format(**keyids, both=', '.join(sorted(keyids.values())))}" in said


def test_a_revoked_key_is_not_asked_to_sign(sim):
    document = entry(sim.policy_document("vendor", "second"), signatures={"allOf": ["key:vendor", "key:second"]})
    document["revocations"]["keys"] = ["key:second"]
    said = texts(explain(sim, sim.graft(), document), "authenticity")[0]
    assert f"{sim.keys['second'].keyid} (revoked: the rule needs another)" in said
    document["revocations"]["keys"] = [sim.keys["stranger"].keyid]
    (said,) = texts(explain(sim, sim.graft(signers=["stranger"]), document), "authenticity")
    assert said.startswith("let somebody else sign") and "get that public key" not in said


# --- signed policies


def test_edits_of_a_signed_policy_come_with_a_note(sim):
    document = entry(sim.policy_document(), grants={}) | {"policyVersion": 7}
    data, admin = json.dumps(document).encode(), sim.keys["second"].keyid
    options = {"image_name": "disk.qcow2", "now": sim.now}
    explanation = explain_evidence(sim.graft(), parse_policy(data, signed_by=(admin,)), **options)
    (note,) = explanation.to_dict()["notes"]
    assert admin in note and "raise its policyVersion above 7" in note and "vmgraft policy sign" in note
    assert explain_evidence(sim.graft(), parse_policy(data), **options).notes == ()
    sound = json.dumps(sim.policy_document()).encode()
    assert explain_evidence(sim.graft(), parse_policy(sound, signed_by=(admin,)), **options).notes == ()
