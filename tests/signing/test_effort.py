"""Envelopes that are made to be costly: what their certificates may cost in all, whatever the number of stores.

And what a costly signature takes from the others: nothing.
"""

from __future__ import annotations

import dataclasses

import pytest
import signing_ca as ca
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from openssl_tsa import Tsa, tsa_leaf

from vmgraft.errors import UntrustedSignerError
from vmgraft.signing import paths
from vmgraft.signing.dsse import MAX_SIGNATURES, PAYLOAD_TYPE, Envelope, Signature, pae
from vmgraft.signing.effort import MAX_STEPS, SPENT, Budget, Effort
from vmgraft.signing.judge import judge_signatures
from vmgraft.signing.keys import public_from_key
from vmgraft.signing.material import Material, pack_material
from vmgraft.signing.policy import parse_policy
from vmgraft.signing.policytools import format_policy
from vmgraft.signing.standing import take_stand
from vmgraft.signing.timestamps import TimestampAuthority, examine_timestamp, make_request
from vmgraft.signing.truststores import TrustStore

MESSAGE = pae(PAYLOAD_TYPE, b"{}")


@pytest.fixture
def calls(monkeypatch):
    """Every path validation that is really made, and every candidate on a path that is really looked at."""
    made = {"validations": 0, "candidates": 0}
    builder, step = paths.verification.PolicyBuilder, Effort.step

    def build():
        made["validations"] += 1
        return builder()

    def stepped(self, cost=1):
        allowed = step(self, cost)
        made["candidates"] += allowed * cost
        return allowed

    monkeypatch.setattr(paths.verification, "PolicyBuilder", build)
    monkeypatch.setattr(Effort, "step", stepped)
    return made


def signed(entity, chain, timestamps=()):
    sig = entity.key.sign(MESSAGE, ec.ECDSA(hashes.SHA256()))
    return Signature("", sig, pack_material(Material((entity.der, *chain), tuple(timestamps))))


def stores(count, *roots):
    return [TrustStore(f"s{number}", "ca", tuple(root.der for root in roots)) for number in range(count)]


def maze(middle, count):
    return [ca.issue("Mid", middle, ca=True, key=middle.key, days=(-100 + i, 1000)).der for i in range(count)]


@pytest.mark.parametrize("count", [1, 8, 32])
def test_a_maze_beside_each_signature(calls, count):
    middle = ca.issue("Mid", ca=True, days=(-100, 1000))
    between = maze(middle, 7)
    leaves = [ca.issue(f"Leaf{n}", middle, days=(-50, 500)) for n in range(MAX_SIGNATURES)]
    envelope = Envelope(b"{}", tuple(signed(leaf, between) for leaf in leaves))
    trusted = stores(count, ca.issue("Mid", ca=True))  # of the same name, so that there may be a path
    found = judge_signatures(envelope, [], trusted, ca.NOW)
    assert not found.certified and len(found.unknown) == MAX_SIGNATURES
    assert all("Exceeded maximum" in text for text in found.unknown)
    assert calls["validations"] == MAX_SIGNATURES and calls["candidates"] == found.budget.steps <= MAX_STEPS


def test_what_has_nothing_to_do_with_a_store_costs_nothing(calls):
    middle = ca.issue("Mid", ca=True, days=(-100, 1000))
    leaf = ca.issue("Leaf", middle, days=(-50, 500))
    envelope = Envelope(b"{}", (signed(leaf, maze(middle, 7)),))
    found = judge_signatures(envelope, [], stores(32, ca.issue("Root", ca=True)), ca.NOW)
    assert "no root of it has the name of an issuer" in found.unknown[0] and found.budget.steps == 0
    assert calls == {"validations": 0, "candidates": 0}


@pytest.mark.parametrize("place", [0, 7, MAX_SIGNATURES - 1])
def test_mazes_take_nothing_from_a_good_chain(calls, place):
    """Wherever the good one stands among them, and though it has two intermediates under thirty-two stores."""
    middle, root = ca.issue("Mid", ca=True, days=(-100, 1000)), ca.issue("Root", ca=True)
    inter = ca.issue("Inter", root, ca=True)
    below = ca.issue("Below", inter, ca=True)
    good = ca.issue("Leaf", below)
    bad = [ca.issue(f"Leaf{n}", middle, days=(-50, 500)) for n in range(MAX_SIGNATURES - 1)]
    signatures = [signed(leaf, maze(middle, 7)) for leaf in bad]
    signatures.insert(place, signed(good, [below.der, inter.der]))
    trusted = stores(32, root, ca.issue("Mid", ca=True))
    found = judge_signatures(Envelope(b"{}", tuple(signatures)), [], trusted, ca.NOW)
    assert [(item.index, len(item.paths)) for item in found.certified] == [(place, 32)]
    assert not found.notes and calls["candidates"] == found.budget.steps <= MAX_STEPS


def test_a_maze_behind_the_same_certificate(calls):
    """The signature copied, its chain made costly: what is said of the copy is not said of the original."""
    root, middle = ca.issue("Root", ca=True), ca.issue("Mid", ca=True, days=(-100, 1000))
    leaf = ca.issue("Leaf", middle, days=(-50, 500))
    cross = ca.issue("Mid", root, ca=True, key=middle.key, days=(-100, 1000))
    plain = signed(leaf, [cross.der])
    copy = dataclasses.replace(plain, extension=signed(leaf, maze(middle, 7)).extension)
    found = judge_signatures(Envelope(b"{}", (copy, plain)), [], stores(2, ca.issue("Mid", ca=True), root), ca.NOW)
    assert [(item.index, len(item.paths)) for item in found.certified] == [(1, 2)]
    assert len(found.unknown) == 1 and "Exceeded maximum" in found.unknown[0]


def test_an_answer_that_was_too_costly_is_asked_again():
    budget = Budget(2)

    def answer(effort):
        if not all(effort.step() for _ in range(wanted)):
            raise UntrustedSignerError(SPENT)
        return "good"

    wanted = MAX_STEPS
    with pytest.raises(UntrustedSignerError, match=SPENT):
        budget.once(0, "question", answer)
    wanted = 10
    with pytest.raises(UntrustedSignerError, match=SPENT):
        budget.once(0, "question", answer)
    assert budget.once(1, "question", answer) == budget.once(1, "question", answer) == "good"
    assert budget.steps == MAX_STEPS // 2 + 10
    for index in (-1, 2):
        with pytest.raises(ValueError, match="no such signature"):
            budget.share(index)


def test_mazes_that_are_just_not_too_costly(calls):
    """Each chain stays within the library's limit; the sum over signatures, stores and moments does not."""
    root = ca.issue("Mid", ca=True, days=(-2000, 1))  # of the same name, so that each store seems to have a path
    middle = ca.issue("Mid", ca=True, days=(-100, 1000))
    between = maze(middle, 1)
    leaves = [ca.issue(f"Leaf{n}", middle, days=(-50, 500)) for n in range(MAX_SIGNATURES)]
    envelope = Envelope(b"{}", tuple(signed(leaf, between) for leaf in leaves))
    found = judge_signatures(envelope, [], stores(32, root), ca.NOW)
    assert not found.certified and len(found.unknown) == MAX_SIGNATURES and SPENT in found.unknown[-1]
    assert 1 < calls["validations"] <= MAX_STEPS and calls["candidates"] == found.budget.steps == MAX_STEPS


def test_the_costliest_keys_are_not_used():
    """One check with an RSA key of 16,384 bits takes as long as dozens with others."""
    huge = rsa.RSAPublicNumbers(65537, (1 << 16383) + 1).public_key()
    root, leaf = ca.issue("Root", ca=True), ca.issue("Leaf")
    builder = x509.CertificateBuilder().subject_name(leaf.cert.issuer).issuer_name(root.cert.subject).public_key(huge)
    builder = builder.serial_number(7).not_valid_before(root.cert.not_valid_before_utc)
    builder = builder.not_valid_after(root.cert.not_valid_after_utc)
    for extension in root.cert.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    middle = builder.sign(root.key, hashes.SHA256())
    effort = Effort()
    found = paths.validate([leaf.cert, middle], [root.cert], ca.NOW, paths.CODE_SIGNING, effort)
    assert isinstance(found, str) and "RSA key of more than 8192 bits" in found and effort.steps == 2


def test_the_largest_sensible_envelope_is_judged_whole(calls):
    """Sixteen signatures, two intermediates each, under thirty-two stores with the root and one that was renewed."""
    root, renewed = ca.issue("Root", ca=True), ca.issue("Root", ca=True)
    inter = ca.issue("Inter", root, ca=True)
    below = ca.issue("Below", inter, ca=True)
    leaves = [ca.issue(f"Leaf{n}", below) for n in range(MAX_SIGNATURES)]
    envelope = Envelope(b"{}", tuple(signed(leaf, [below.der, inter.der]) for leaf in leaves))
    found = judge_signatures(envelope, [], stores(32, root, renewed), ca.NOW)
    assert [len(item.paths) for item in found.certified] == [32] * MAX_SIGNATURES and not found.notes
    assert calls["validations"] == 32 * MAX_SIGNATURES and found.budget.steps <= MAX_STEPS


def test_it_is_said_when_not_every_store_was_asked(calls):
    """A good chain that leads to each of thirty-two stores, at more steps than its share has."""
    root = ca.issue("Root", ca=True)
    above = root
    between = []
    for number in range(4):
        above = ca.issue(f"Inter{number}", above, ca=True)
        between.append(above.der)
    leaf, known = ca.issue("Leaf", above), ca.issue("Known")
    plain = [signed(known, [])] * (MAX_SIGNATURES - 1)
    trusted = stores(32, root)
    found = judge_signatures(Envelope(b"{}", (signed(leaf, between), *plain)), [], trusted, ca.NOW)
    (item,) = found.certified
    assert 1 <= len(item.paths) < 32 and calls["candidates"] <= MAX_STEPS
    text = f"signature 0: not every trust store was asked about its certificate: {SPENT}"
    assert found.notes == (text,)
    alone = judge_signatures(Envelope(b"{}", (signed(leaf, between),)), [], trusted, ca.NOW)
    assert len(alone.certified[0].paths) == 32 and not alone.notes


def test_the_same_chain_is_judged_once(calls):
    root = ca.issue("Root", ca=True)
    leaf = ca.issue("Leaf", root)
    envelope = Envelope(b"{}", tuple(signed(leaf, []) for _ in range(MAX_SIGNATURES)))
    assert len(judge_signatures(envelope, [], stores(2, root), ca.NOW).certified) == MAX_SIGNATURES
    assert calls["validations"] == 2


def test_a_known_key_counts_beside_a_maze(calls):
    middle = ca.issue("Mid", ca=True, days=(-100, 1000))
    leaf, known = ca.issue("Leaf", middle, days=(-50, 500)), ca.issue("Known")
    envelope = Envelope(b"{}", (signed(leaf, maze(middle, 7)), signed(known, [])))
    key = public_from_key(known.key.public_key())
    found = judge_signatures(envelope, [key], stores(4, ca.issue("Mid", ca=True)), ca.NOW)
    assert found.believed == {key} and len(found.unknown) == 1 and "Exceeded maximum" in found.unknown[0]


def test_mazes_in_timestamps(calls, sim, tmp_path):
    """Copies of a genuine chain that has expired, with tokens in which the authority's certificate is in a maze."""
    root, clock = ca.issue("Root", ca=True), ca.issue("Mid", ca=True)
    leaf = ca.issue("Leaf", root, days=(-100, -5))
    middle = ca.issue("Mid", ca=True, days=(-4000, 4000))
    hidden = [ca.issue("Mid", middle, ca=True, key=middle.key, days=(-4000 + i, 4000)) for i in range(7)]
    (tmp_path / "serial").write_text("01")
    tsa = Tsa(tmp_path, tsa_leaf(middle, days=(-4000, 4000)), tuple(hidden))
    plain = [signed(leaf, []) for _ in range(4)]
    stamped = [
        dataclasses.replace(
            item, extension=pack_material(Material((leaf.der,), tuple(tsa.reply(make_request(item.sig)) for _ in "ab")))
        )
        for item in plain
    ]
    document = sim.policy_document("vendor")
    document["trustStores"] = [
        {"name": "acme", "type": "ca", "certificates": root.pem.decode()},
        *({"name": f"t{n}", "type": "tsa", "certificates": clock.pem.decode()} for n in range(8)),
    ]
    document["trustPolicies"][0] |= {
        "trustStores": ["ca:acme", *(f"tsa:t{n}" for n in range(8))], "trustedIdentities": ["*"],
        "signatures": {"allOf": ["ca:acme"]},
    }  # fmt: skip
    policy = parse_policy(format_policy(document), file="policy.json")
    found = judge_signatures(Envelope(b"{}", tuple(stamped)), [], policy.authorities, ca.NOW)
    before = calls["validations"]
    standing = take_stand(found, policy, policy.trust_policies[0], ca.NOW)
    assert calls["validations"] == before + len(stamped) and found.budget.steps <= MAX_STEPS
    assert standing.signed == set(standing.expired)
    assert sum("does not count" in note for note in standing.notes) == 8
    genuine = [TimestampAuthority("genuine", (middle.der,))]
    token = tsa.reply(make_request(plain[0].sig))
    with pytest.raises(UntrustedSignerError, match=SPENT):
        examine_timestamp(token, plain[0].sig, genuine, found.budget.share(0))
