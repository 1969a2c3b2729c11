"""What an explanation may cost: that of one verification, whatever the number of edits that are tried.

And how edits are ranked that let another trust policy decide.
"""

from __future__ import annotations

import copy
import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest
import signing_ca as ca
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from test_certified import Broken, Remembered, World
from test_effort import calls, maze
from test_explain import entry, explain, found
from verdict_stamps import Stamps

from vmgraft.cli import policyview
from vmgraft.errors import FileError
from vmgraft.signing import explain as explaining
from vmgraft.signing.contract import Status
from vmgraft.signing.dsse import Envelope, Signature, parse_envelope, serialise
from vmgraft.signing.effort import MAX_STEPS
from vmgraft.signing.keys import PublicKey
from vmgraft.signing.material import Material, pack_material
from vmgraft.signing.patches import UNTRIED, Remedy, add, tried
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policytools import format_policy
from vmgraft.signing.verify import judge_again, judge_evidence

__all__ = ["calls"]


@pytest.fixture(scope="module")
def world(sim):
    return World(sim)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    return Stamps(tmp_path_factory.mktemp("stamps"))


def apart(document, count):
    """Many trust policies, none of which speaks about the image: there is an edit for each."""
    first = document["trustPolicies"][0] | {"imageScopes": ["name:other"]}
    document["trustPolicies"] = [first | {"name": f"p{number}"} for number in range(count)]
    return document


# --- once


def test_what_the_edits_share_is_done_once(sim, calls, monkeypatch):
    """Mazes beside fifteen signatures, thirty-two trust policies: payloads, signatures and chains looked at once."""
    evidence = sim.graft()
    envelope = parse_envelope(evidence.stored[0])
    middle = ca.issue("Mid", ca=True, days=(-100, 1000))
    between, extra = maze(middle, 7), []
    for number in range(15):
        leaf = ca.issue(f"L{number}", middle, days=(-50, 500))
        sig = leaf.key.sign(envelope.pae, ec.ECDSA(hashes.SHA256()))
        extra.append(Signature("", sig, pack_material(Material((leaf.der, *between)))))
    evidence.stored = [serialise(Envelope(envelope.payload, (*envelope.signatures, *extra)))]
    read, checked, payload, verify = [], [], type(evidence).payload, PublicKey.verify
    monkeypatch.setattr(type(evidence), "payload", lambda self, sha256: read.append(sha256) or payload(self, sha256))
    monkeypatch.setattr(
        PublicKey, "verify", lambda self, message, sig: checked.append(sig) or verify(self, message, sig)
    )
    document = apart(sim.policy_document(), 32)
    document["trustStores"] = [{"name": "a", "type": "ca", "certificates": ca.issue("Mid", ca=True).pem.decode()}]
    explanation = explain(sim, evidence, document)
    remedies = found(explanation, "scope").remedies
    assert len(remedies) == 33 and [remedy.alone for remedy in remedies[:32]] == [True] * 32
    assert len(read) == len(set(read)) == 2
    assert len(checked) == 1 + 2 * 15  # by the known key, and by each leaf
    assert calls["candidates"] <= MAX_STEPS and not explanation.notes


def test_content_that_cannot_be_read_is_tried_once(sim):
    """Some trust policy names images by content, and the statement does not say it; every edit would ask for it."""
    evidence = sim.graft(binding="any")
    asked = []

    def content(flat):
        asked.append(flat)
        raise FileError("it cannot be read", file="disk.img")

    evidence.content = content
    document = sim.policy_document(expires=sim.now)
    document["trustPolicies"].append(document["trustPolicies"][0] | {
        "name": "exact", "imageScopes": ["tree:sha256:" + "44" * 32],
    })  # fmt: skip
    explanation = explain(sim, evidence, document)
    assert found(explanation, "policy").remedies[1].alone is True and len(asked) == len(set(asked)) <= 2
    assert found(explanation, "scope").check.detail == "disk.img: it cannot be read"


@pytest.mark.parametrize("answer", [Remembered(clock=9), Broken()])
def test_the_memory_is_asked_once(sim, answer):
    asked = []

    class Counting:
        def highest(self, policy, extension):
            asked.append((policy, extension))
            return answer.highest(policy, extension)

    document = entry(sim.policy_document(expires=sim.now), grants={}, requireExtensions=["com.acme.guard"])
    explanation = explain(sim, sim.graft(), document, memory=Counting())
    assert found(explanation, "rollback").remedies and len(asked) == len(set(asked)) == 1


def test_only_what_is_the_same_is_reused(sim):
    """Other keys or stores could make other signatures count: those are never judged by what was found before."""
    policy = sim.policy()
    judgement = judge_evidence(sim.graft(), policy, image_name="disk.qcow2", now=sim.now)
    document = sim.policy_document("vendor", "second")
    with pytest.raises(ValueError, match="other signatures"):
        judge_again(judgement, parse_policy(format_policy(document)))
    document = sim.policy_document()
    document["trustStores"] = [{"name": "a", "type": "ca", "certificates": ca.issue("R", ca=True).pem.decode()}]
    with pytest.raises(ValueError, match="other signatures"):
        judge_again(judgement, parse_policy(format_policy(document)))
    again = judge_again(judgement, policy)
    assert again.run.report(()) == judgement.run.report(()) and again.run.checks is not judgement.run.checks
    elsewhere = judge_again(judgement, sim.policy(entry={"imageScopes": ["name:other"]}))
    assert elsewhere.run.checks["scope"].status is Status.FAIL and elsewhere.run.checks["content"].status is Status.PASS
    assert not elsewhere.run.checks.keys() & {"authenticity", "rollback", "binding", "capabilities", "required"}


# --- when it is spent


def expired(world, stamps):
    """A graft signed by a leaf that has expired, timestamped in time by an authority that the policy could name."""
    leaf = ca.issue("Release", world.middle, days=(-100, -5))
    evidence = world.graft((leaf, {}))
    envelope = parse_envelope(evidence.stored[0])
    token = stamps(envelope.signatures[0].sig, ca.NOW - timedelta(days=7), "tsa")
    evidence = world.graft((leaf, {"chain": [leaf.der, world.middle.der]}))
    signature = Signature(
        "", envelope.signatures[0].sig, pack_material(Material((leaf.der, world.middle.der), (token,)))
    )
    evidence.stored = [serialise(Envelope(envelope.payload, (signature,)))]
    root = x509.load_der_x509_certificate(stamps.root("tsa")).public_bytes(Encoding.PEM)
    document = world.document()
    document["trustStores"].append({"name": "clock", "type": "tsa", "certificates": root.decode()})
    return evidence, document


def test_an_edit_is_left_untried_when_the_share_is_spent(world, stamps, sim):
    evidence, document = expired(world, stamps)
    judgement = judge_evidence(evidence, parse_policy(format_policy(document)), image_name="disk.qcow2", now=sim.now)
    check = judgement.run.checks["expiry"]
    remedy = Remedy("believe", (add("/trustPolicies/0/trustStores/-", "tsa:clock"),))
    assert tried(remedy, check, judgement).alone is True
    judgement = judge_evidence(evidence, parse_policy(format_policy(document)), image_name="disk.qcow2", now=sim.now)
    judgement.run.signers.budget.share(0).spent = True
    left = tried(remedy, check, judgement)
    assert left.alone is None and left.edits == remedy.edits and left.text == f"believe; not tried: {UNTRIED}"
    assert tried(Remedy("believe", remedy.edits, sure=True), check, judgement) is None
    unaffected = Remedy("log", (add("/trustPolicies/0/signatureVerification/override", {"expiry": "log"}),))
    assert tried(unaffected, check, judgement).alone is True


def test_an_explanation_says_that_not_every_edit_was_tried(world, stamps, sim, monkeypatch):
    evidence, document = expired(world, stamps)
    assert explaining.CUT not in explain(sim, evidence, document).notes
    judge = explaining.judge_evidence

    def spent(*args, **options):
        judgement = judge(*args, **options)
        judgement.run.signers.budget.share(0).spent = True
        return judgement

    monkeypatch.setattr(explaining, "judge_evidence", spent)
    explanation = explain(sim, evidence, document)
    assert explanation.notes == (explaining.CUT,) and explanation.to_dict()["notes"] == [explaining.CUT]


def test_what_was_not_tried_stands_apart(capsys, sim):
    explanation = explain(sim, sim.graft(), entry(sim.policy_document(), grants={}))
    check = found(explanation, "capabilities")
    (remedy,) = check.remedies
    check = dataclasses.replace(check, remedies=(remedy, Remedy("perhaps", remedy.edits)))
    policyview.show_explanation(dataclasses.replace(explanation, checks=(check,)), Path("disk.img"))
    before, after = capsys.readouterr().out.split("capabilities may pass by any of:")
    assert "capabilities would pass by any of:" in before and "perhaps" not in before and "perhaps" in after


# --- which trust policy decides


def two(sim, level, **near):
    """The image is for ``default``, which is strict; ``other`` speaks about other images."""
    document = sim.policy_document()
    first = document["trustPolicies"][0]
    first |= {"imageScopes": ["name:disk*"], "extensionScopes": ["org.other.*"]} | near
    other = copy.deepcopy(first) | {
        "name": "other", "imageScopes": ["name:zzz"], "extensionScopes": ["*"], "signatureVerification": level,
    }  # fmt: skip
    document["trustPolicies"] = [other, first]
    return document


def test_a_move_to_a_weaker_trust_policy_comes_last_and_says_so(sim):
    document = two(sim, {"level": "audit"})
    first, write, last = found(explain(sim, sim.graft(), document), "scope").remedies
    assert first.text == "let the trust policy default speak about this image and its extensions (level strict)"
    assert first.edits[0]["path"] == "/trustPolicies/1/extensionScopes/-" and first.alone is True
    assert write.text == "write a trust policy for this image and its extensions" and not write.edits
    assert last.text == (
        "let the trust policy other speak about this image and its extensions (level audit, in place of default, level "
        "strict); weaker: it only logs authenticity, expiry, revocation, rollback, capabilities, required; a name: "
        "scope fits every image of that file name"
    )
    assert last.edits == (add("/trustPolicies/0/imageScopes/-", "name:disk.qcow2"),)


def test_an_override_is_a_weaker_level_too(sim):
    document = two(sim, {"level": "strict", "override": {"rollback": "log"}})
    *_, write, last = found(explain(sim, sim.graft(), document), "scope").remedies
    assert not write.edits and "(level strict, in place of default, level strict); weaker: it only logs rollback" in (
        last.text
    )


def test_a_move_that_weakens_nothing_comes_second(sim):
    document = two(sim, {"level": "strict"}, signatureVerification={"level": "permissive"})
    first, second, write = found(explain(sim, sim.graft(), document), "scope").remedies
    assert first.edits[0]["path"].startswith("/trustPolicies/1/") and "in place of" not in first.text
    assert "(level strict, in place of default, level permissive)" in second.text and "weaker" not in second.text
    assert not write.edits


def test_where_nobody_speaks_about_the_image_nothing_is_taken(sim):
    document = entry(sim.policy_document(), imageScopes=["name:other"], signatureVerification={"level": "audit"})
    first, write = found(explain(sim, sim.graft(), document), "scope").remedies
    assert "(level audit); a name: scope fits every image of that file name" in first.text and not write.edits


def test_tied_policies_of_different_levels(sim):
    document = sim.policy_document()
    twin = copy.deepcopy(document["trustPolicies"][0]) | {"name": "twin", "signatureVerification": {"level": "audit"}}
    document["trustPolicies"] = [twin, *document["trustPolicies"]]
    strict, out, audit = found(explain(sim, sim.graft(), document), "scope").remedies
    assert strict.text.startswith("let default decide here, by a closer image scope (level strict, in place of twin")
    assert not out.edits and "take this image out" in out.text
    assert audit.text.startswith("let twin decide") and "; weaker: it only logs authenticity" in audit.text


def test_a_scope_by_content_is_not_called_one_by_name(sim):
    document = entry(sim.policy_document(), imageScopes=["tree:sha256:" + "44" * 32, "name:zzz"])
    remedy = found(explain(sim, sim.graft(), document, image_name="n" * 256), "scope").remedies[0]
    assert remedy.edits[0]["value"].startswith("tree:sha256:") and "name: scope" not in remedy.text
