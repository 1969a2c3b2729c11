"""Envelopes that are made to be costly: what their certificates may cost in all, whatever the number of stores."""

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
from vmgraft.signing.effort import MAX_STEPS, SPENT, Effort
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

    def stepped(self):
        allowed = step(self)
        made["candidates"] += allowed
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
    trusted = stores(count, ca.issue("Root", ca=True))
    found = judge_signatures(envelope, [], trusted, ca.NOW)
    assert not found.certified and len(found.unknown) == MAX_SIGNATURES and found.effort.spent
    assert "Exceeded maximum" in found.unknown[0] and SPENT in found.unknown[-1]
    assert calls["validations"] == 1 and calls["candidates"] <= MAX_STEPS


def test_mazes_that_are_just_not_too_costly(calls):
    """Each chain stays within the library's limit; the sum over signatures, stores and moments does not."""
    root = ca.issue("Mid", ca=True, days=(-2000, 1))  # of the same name, so that each store seems to have a path
    middle = ca.issue("Mid", ca=True, days=(-100, 1000))
    between = maze(middle, 1)
    leaves = [ca.issue(f"Leaf{n}", middle, days=(-50, 500)) for n in range(MAX_SIGNATURES)]
    envelope = Envelope(b"{}", tuple(signed(leaf, between) for leaf in leaves))
    found = judge_signatures(envelope, [], stores(32, root), ca.NOW)
    assert not found.certified and len(found.unknown) == MAX_SIGNATURES and found.effort.spent
    assert 1 < calls["validations"] <= MAX_STEPS and calls["candidates"] == MAX_STEPS


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
    root, other = ca.issue("Root", ca=True), ca.issue("Other", ca=True)
    inter = ca.issue("Inter", root, ca=True)
    leaves = [ca.issue(f"Leaf{n}", inter) for n in range(MAX_SIGNATURES)]
    envelope = Envelope(b"{}", tuple(signed(leaf, [inter.der]) for leaf in leaves))
    found = judge_signatures(envelope, [], [*stores(31, other), TrustStore("acme", "ca", (root.der,))], ca.NOW)
    assert len(found.certified) == MAX_SIGNATURES and not found.effort.spent
    assert calls["validations"] == 32 * MAX_SIGNATURES


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
    found = judge_signatures(envelope, [key], stores(4, ca.issue("Root", ca=True)), ca.NOW)
    assert found.believed == {key} and any(SPENT in note for note in found.notes)


def test_mazes_in_timestamps(calls, sim, tmp_path):
    """Copies of a genuine chain that has expired, with tokens in which the authority's certificate is in a maze."""
    root, clock = ca.issue("Root", ca=True), ca.issue("Clock", ca=True)
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
    assert calls["validations"] == before + 1 and found.effort.spent
    assert standing.signed == set(standing.expired)
    assert sum("does not count" in note for note in standing.notes) == 8
    genuine = [TimestampAuthority("genuine", (middle.der,))]
    token = tsa.reply(make_request(plain[0].sig))
    with pytest.raises(UntrustedSignerError, match=SPENT):
        examine_timestamp(token, plain[0].sig, genuine, found.effort)
